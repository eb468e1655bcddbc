"""The small model: its shape and plan, the command that trains it, and the file that is shipped."""

import hashlib
import json
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from typer.testing import CliRunner

from examples.small.plan import PHASES, SEED, configuration
from examples.small.results import GOALS, Goal, behind, error_rate, facts_of, mean, table
from examples.small.shape import write_beginning
from qwen2vl import assets
from qwen2vl.config import Qwen2VLConfig
from qwen2vl.model import Qwen2VL
from qwen2vl.prompt.processor import Processor
from qwen2vl.prompt.tokenizer import CONTROL_TOKENS
from qwen2vl.samples.skills import DATA_VERSION
from qwen2vl.training.config import TrainingConfig
from qwen2vl.training.stages import STAGES


@pytest.fixture(scope="module")
def beginning(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beginning")
    write_beginning(folder, seed=SEED)
    return folder


def test_equal_seeds_write_equal_bytes(beginning, tmp_path):
    write_beginning(tmp_path / "again", seed=SEED)
    write_beginning(tmp_path / "other", seed=SEED + 1)
    sums = [
        {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        for folder in (beginning, tmp_path / "again", tmp_path / "other")
    ]
    assert sums[0] == sums[1]
    assert {name for name in sums[0] if sums[0][name] != sums[2][name]} == {"model.safetensors"}


def test_the_shape_is_qwen2_vls_own(beginning):
    config = Qwen2VLConfig.from_pretrained(beginning)
    assert config.vision.head_dim == 80 and config.vision.spatial_merge_size == 2
    assert config.text.num_key_value_heads < config.text.num_attention_heads
    assert len(config.text.mrope_section) == 3 and min(config.text.mrope_section) > 0
    tokenizer = Processor.from_pretrained(beginning).tokenizer
    for token in CONTROL_TOKENS:
        assert tokenizer.decode([tokenizer.id(token)], skip_special_tokens=False) == token


@pytest.mark.parametrize("processes", [1, 2])
def test_every_phase_is_a_run_that_the_trainer_takes(tmp_path, processes):
    seeds = set()
    for number, phase in enumerate(PHASES, 1):
        (tmp_path / "run.toml").write_text(
            configuration(phase, number=number, checkpoint="../x", budget=0.5, processes=processes)
        )
        config = TrainingConfig.from_toml(tmp_path / "run.toml")
        assert phase.stage in STAGES and config.run.steps == phase.steps // 2
        assert config.run.max_tokens * processes == phase.tokens
        assert (config.parallel.mode == "ddp") == (processes > 1)
        assert {entry["path"] for entry in config.data} == set(phase.mix)
        seeds.add(config.run.seed)
    assert len(seeds) == len(PHASES)
    assert [phase.stage for phase in PHASES][1:] == ["vision", "multimodal", "multimodal", "multimodal", "instruct"]


def test_the_command_trains_resumes_and_ships(tmp_path, monkeypatch):
    """Two phases of one step each, the second one begun again after its first one is there."""
    command = import_module("examples.small.__main__")
    results = import_module("examples.small.results")
    phases = [replace(PHASES[n], steps=1, tokens=512, mix={"read": ("0", 1.0), "count": ("0", 1.0)}) for n in (0, -1)]
    monkeypatch.setattr(command, "PHASES", phases[:1])
    monkeypatch.setattr(results, "SKILLS", {"read": None})
    monkeypatch.setattr(results, "LEVELS", (0,))
    monkeypatch.setattr(results, "GOALS", (Goal("reading", error_rate("read", (0,)), 0.05, least=False),))
    app = command.typer.Typer()
    app.command()(command.small)

    def run(*options):
        return CliRunner().invoke(app, ["--output", str(tmp_path), "--processes", "1", "--count", "2", *options])

    first = run()
    assert first.exit_code == 0, first.output
    written = (tmp_path / phases[0].name / "model" / "model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(command, "PHASES", phases)
    assert run().exit_code == 0
    assert (tmp_path / phases[0].name / "model" / "model.safetensors").stat().st_mtime_ns == written
    told = facts_of(tmp_path / "model")
    assert [phase["name"] for phase in told["phases"]] == [phase.name for phase in phases]
    assert told["seed"] == SEED and told["data_version"] == DATA_VERSION
    assert told["results"]["by_skill"]["read"]["samples"] == 2
    model = Qwen2VL.from_pretrained(tmp_path / "model", device="cpu")
    trained = Qwen2VL.from_pretrained(tmp_path / phases[1].name / "model", device="cpu")
    assert model.dtype == torch.bfloat16
    for (name, ours), theirs in zip(model.named_parameters(), trained.parameters(), strict=True):
        assert torch.equal(ours, theirs.bfloat16()), name
    (tmp_path / phases[1].name / "done").unlink()
    other = run("--budget", "3")
    assert other.exit_code == 1 and "run.toml: is of another plan" in other.output


def test_goals_are_means_over_difficulties_and_edits_by_characters():
    rows = {
        "read 0": {"accuracy": 1.0, "edits": 0.0, "characters": 1.0, "samples": 10},
        "read 1": {"accuracy": 0.9, "edits": 0.2, "characters": 3.0, "samples": 30},
    }
    languages = {"en": {"accuracy": 0.75}, "zh": {"accuracy": 0.5}}
    results = {"by_difficulty": rows, "by_language": languages}
    goal = Goal("reading", error_rate("read", (0, 1)), 0.08, least=False)
    assert goal.value(results) == pytest.approx(0.06) and goal.reached(results)
    assert not replace(goal, least=True).reached(results)
    assert mean("read", (0, 1))(results) == pytest.approx(0.925) and behind("zh", "en")(results) == 0.25


# -------------------------------------------------------------------------------------------- the file that is shipped


def test_the_shipped_file_says_what_made_it():
    told = facts_of(assets.FOLDER)
    assert told["phases"] == json.loads(json.dumps([asdict(phase) for phase in PHASES]))
    assert (told["seed"], told["data_version"]) == (SEED, 1)  # its figures are of the samples as they were then
    assert (told["budget"], told["count"], len(told["typefaces"]) > 1) == (1, 200, True)
    assert set(told["goals"]) == {goal.name for goal in GOALS}
    for goal in GOALS:
        assert told["goals"][goal.name]["value"] == pytest.approx(goal.value(told["results"]))
    assert min(row["samples"] for row in told["results"]["by_skill"].values()) >= 1000


def test_the_docs_say_what_the_shipped_file_does():
    page = (Path(__file__).parents[2] / "docs" / "model.md").read_text(encoding="utf-8")
    assert table(facts_of(assets.FOLDER)) in page


def test_the_shipped_file_is_small_and_of_bfloat16(beginning):
    path = assets.FOLDER / "model.safetensors"
    assert path.stat().st_size <= 16e6
    with safe_open(path, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
    assert (assets.FOLDER / "tokenizer.json").read_bytes() == (beginning / "tokenizer.json").read_bytes()


def test_transformers_reads_the_shipped_file_as_we_do():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = Qwen2VL.from_pretrained(assets.FOLDER, device="cpu", dtype="float32")
    other = transformers.Qwen2VLForConditionalGeneration.from_pretrained(assets.FOLDER, dtype=torch.float32).eval()
    ids = torch.tensor([Processor.from_pretrained(assets.FOLDER).tokenizer.encode_plain("Read the text: 读出文字。")])
    with torch.inference_mode():
        ours, theirs = model(input_ids=ids)[0], other(input_ids=ids).logits[0]
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
