"""``qwen2vl train`` from outside: from files on disk to a model that answers; kills, ranks, and how it fails."""

import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from benchmarks.random_checkpoint import write_random_checkpoint
from examples.demo.media import write_video
from qwen2vl import Processor, Qwen2VL
from qwen2vl.cli import app
from qwen2vl.cli.train import Stage
from qwen2vl.training.config import TrainingConfig
from qwen2vl.training.data import build_dataset
from qwen2vl.training.errors import TrainingConfigError
from qwen2vl.training.stages import STAGES
from qwen2vl.training.trainer import read_dataset
from tests.model import oracle
from tests.training.data_files import png, write_jsonl, write_tar

ROOT = Path(__file__).parents[2]
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220)}
ENTRIES = [
    {"path": "data/pictures.jsonl", "format": "conversations", "weight": 5, "max_pixels": 12544},
    {"path": "data/clips.jsonl", "format": "sharegpt", "video_max_pixels": 3136},
    {"path": "data/shard-*.tar", "format": "webdataset"},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small checkpoint and a set of samples in each of the three formats."""
    folder = tmp_path_factory.mktemp("train")
    write_random_checkpoint(folder / "model", std=0.05, dtype=torch.float32)
    data = folder / "data"
    data.mkdir()
    pictures = []
    for n, (name, colour) in enumerate(COLOURS.items()):
        image = Image.new("RGB", (56 + 28 * n, 84), "white")
        ImageDraw.Draw(image).rectangle((10, 20, 40, 60), fill=colour)
        image.save(data / f"{name}.png")
        turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": name}]
        pictures.append({"image": f"{name}.png", "conversations": turns})
    pictures.append({"conversations": [
        {"from": "human", "value": "Say what the assistant says."}, {"from": "gpt", "value": "hello"},
        {"from": "human", "value": "And once more?"}, {"from": "gpt", "value": "hello again"},
    ]})  # fmt: skip
    both = [{"from": "human", "value": "<image><image>\nSame?"}, {"from": "gpt", "value": "no"}]
    pictures.append({"image": ["red.png", "blue.png"], "conversations": both})
    write_jsonl(data / "pictures.jsonl", pictures)
    write_video(data / "clip.mp4", width=56, height=56, seconds=2, fps=4)
    clip = [{"role": "user", "content": "<video>What moves?"}, {"role": "assistant", "content": "a balloon"}]
    write_jsonl(data / "clips.jsonl", [{"messages": clip, "videos": ["clip.mp4"]}])
    write_tar(data / "shard-0.tar", [("one.png", png(56, 56, 90)), ("one.txt", "a grey square")])
    return folder


def configure(place, output, entries=ENTRIES, **tables) -> Path:
    """A TOML file in ``place``, whose relative paths begin there, for a run into ``output``."""
    found: dict[str, dict] = {
        "run": {"output": str(output), "steps": 4, "max_tokens": 1000, "lookahead": 7, "checkpoint_activations": False},
        "model": {"checkpoint": "model", "dtype": "float32"},
        "optimizer": {"lr": 3e-3, "warmup_steps": 1, "weight_decay": 0.0},
    }
    for name, table in tables.items():
        found[name] = {**found.get(name, {}), **table}
    lines = []
    for name, table in [*found.items(), *(("[data]", entry) for entry in entries)]:
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items() if value is not None)]
    path = place / f"{Path(output).name}.toml"
    path.write_text("\n".join(lines))
    return path


def run(*args):
    return CliRunner().invoke(app, ["train", *map(str, args)])


def log(output) -> list[dict[str, str]]:
    with (output / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_stages_offered_are_the_stages():
    assert [stage.value for stage in Stage] == list(STAGES)


def test_first_loss_is_that_of_transformers_on_the_same_files(place, tmp_path):
    """Files, readers, one pack, one step; beside each sample alone through transformers, all tokens weighed alike."""
    result = run("--stage", "multimodal", "--config", configure(place, tmp_path / "one", run={"steps": 1}))
    assert result.exit_code == 0, result.output
    entries = [{**entry, "path": str(place / entry["path"])} for entry in ENTRIES]
    data = build_dataset(entries, Processor.from_pretrained(place / "model"), max_tokens=1000)
    examples = list(itertools.islice(data, 7))  # as many as the run looks ahead, all of which fit
    kinds = [(e.image_grid_thw is not None, e.video_grid_thw is not None) for e in examples]
    assert set(kinds) == {(False, False), (True, False), (False, True)}
    config = Qwen2VL.from_pretrained(place / "model").config
    theirs = oracle.load(place / "model")
    total = count = 0
    for example in examples:
        inputs = {"input_ids": example.input_ids[None], "attention_mask": torch.ones(1, example.tokens).long()}
        for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
            if getattr(example, name) is not None:
                inputs[name] = getattr(example, name)
        with torch.no_grad():
            logits = theirs(**oracle.oracle_inputs(config, inputs)).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, example.labels[1:], reduction="sum").item()
        count += int((example.labels[1:] != -100).sum())
    (row,) = log(tmp_path / "one")
    assert int(row["tokens"]) == sum(e.tokens for e in examples)
    assert (int(row["supervised"]), int(row["samples"])) == (count, 7)
    assert float(row["loss"]) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_stage_learns_and_leaves_a_model_that_answers(place, tmp_path, stage):
    output = tmp_path / stage
    tables = {"run": {"steps": 12, "peak_tflops": 0.1}, "optimizer": {"lr": 3e-3}}
    result = run("--stage", stage, "--config", configure(place, output, **tables))
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{output / 'model'}\n"
    assert f"{stage}: " in result.stderr and f"({', '.join(STAGES[stage])})" in result.stderr
    assert "step 12/12  loss" in result.stderr and "tokens/s  MFU " in result.stderr
    assert "samples used, none skipped" in result.stderr
    rows = log(output)
    assert [int(row["step"]) for row in rows] == list(range(1, 13))
    first, last = (sum(float(row["loss"]) for row in part) / 3 for part in (rows[:3], rows[-3:]))
    assert last < 0.93 * first, (first, last)
    arguments = ["--model", output / "model", "--image", place / "data" / "red.png", "--prompt", "Which colour?"]
    answer = CliRunner().invoke(app, ["generate", *map(str, arguments), "-n", "4"])
    assert answer.exit_code == 0, answer.output


def start(*args, ranks=0):
    """The command in processes of its own; with ``ranks``, under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    return subprocess.Popen(
        [sys.executable, *torchrun, "-m", "qwen2vl", "train", *map(str, args)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_and_resumed_the_log_is_that_of_a_run_that_was_not(place, tmp_path):
    """SIGKILL wherever the run happens to be; data readers, packing, weights and optimiser go on exactly there."""
    tables = {"run": {"steps": 8, "save_every": 1, "max_tokens": 300}}
    config = configure(place, tmp_path / "killed", **tables)
    process = start("--stage", "multimodal", "--config", config)
    path = tmp_path / "killed" / "log.csv"
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    refused = run("--stage", "multimodal", "--config", config)
    assert refused.exit_code == 1 and "resume it or move it" in refused.stderr
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in that process: sums in the same order
    try:
        resumed = run("--stage", "multimodal", "--config", config, "--resume")
        assert resumed.exit_code == 0, resumed.output
        assert "steps 1 to 8" not in resumed.stderr and "to 8" in resumed.stderr
        assert run("--stage", "multimodal", "--config", configure(place, tmp_path / "whole", **tables)).exit_code == 0
    finally:
        torch.set_num_threads(threads)
    exact = ("step", "loss", "grad_norm", "lr_llm", "tokens", "supervised", "samples")
    rows, expected = ([[row[key] for key in exact] for row in log(tmp_path / name)] for name in ("killed", "whole"))
    assert len(expected) == 8 and rows == expected


def test_ranks_of_torchrun_speak_with_one_voice(place, tmp_path, monkeypatch):
    config = configure(place, tmp_path / "two", run={"steps": 2})
    stdout, stderr = (process := start("--stage", "instruct", "--config", config, ranks=2)).communicate()
    assert process.returncode == 0, stderr
    # PyTorch 2.10 has gloo report there, from both ranks at once, so that their lines may be cut.
    ours = [line for line in stdout.splitlines() if "[Gloo]" not in line and "peer ranks" not in line]
    assert ours == [str(tmp_path / "two" / "model")]
    assert "on 2 x cpu (fsdp), steps 1 to 2" in stderr and stderr.count("step 2/2") == 1
    assert "data of rank 0: " in stderr and "data of rank 1: " in stderr
    assert len(log(tmp_path / "two")) == 2
    for rank, said in (("0", 1), ("1", 0)):  # both find the finished run and refuse, before they would meet
        monkeypatch.setenv("RANK", rank)
        again = run("--stage", "instruct", "--config", config)
        assert again.exit_code == 1 and again.stderr.count("error: run.output") == said, again.stderr


def test_a_rank_ends_whatever_its_threads_hold():
    """A thread of gloo that still drops a tensor when the interpreter is taken down aborts the process; no run may wait
    for such a thread either, nor lose what was written, nor its exit status."""
    program = """
import atexit, sys, threading
from qwen2vl.cli import main
threading.Thread(target=threading.Event().wait).start()
atexit.register(print, "closed")
sys.argv = ["qwen2vl", *sys.argv[1:]]
main()
"""
    for arguments, status, said in ((["--version"], 0, "qwen2vl "), (["train", "--stage", "instruct"], 2, "")):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": "0"}
        command = [sys.executable, "-c", program, *arguments]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert ended.returncode == status, ended.stderr
        assert ended.stdout.startswith(said) and ended.stdout.endswith("closed\n")


def test_bad_samples_are_counted_with_their_places(place, tmp_path):
    lines = [*(place / "data" / "pictures.jsonl").read_text().splitlines()[3:4], "{broken", '{"conversations": []}']
    bad = write_jsonl(place / "data" / "bad.jsonl", lines)
    entries = [{"path": "data/bad.jsonl", "format": "conversations", "shuffle": False}]
    result = run("--stage", "instruct", "--config", configure(place, tmp_path / "bad", entries, run={"steps": 1}))
    assert result.exit_code == 0, result.output
    assert "skipped as malformed" in result.stderr
    assert f"{bad}:2: " in result.stderr and f"{bad}:3: " in result.stderr
    config = configure(place, tmp_path / "strict", entries, run={"steps": 1, "max_bad": 0})
    result = run("--stage", "instruct", "--config", config)
    assert result.exit_code == 1 and f"error: {bad}:2: " in result.stderr and "Traceback" not in result.output


def test_limits_are_a_table_of_the_run(place, tmp_path):
    entries = [{"path": "data/pictures.jsonl", "format": "conversations", "shuffle": False}]
    tables = {"run": {"steps": 1, "max_bad": 0}, "limits": {"max_item_tokens": 5}}
    result = run("--stage", "instruct", "--config", configure(place, tmp_path / "low", entries, **tables))
    assert result.exit_code == 1 and "max_item_tokens = 5; " in result.stderr
    assert "raise limits.max_item_tokens" in result.stderr and "--limit" not in result.stderr
    for wrong, message in (({"max_pixels": 1}, "'max_pixels' is no limit; there are max_source_pixels, "),
                           ({"max_characters": 0}, "max_characters must be a positive integer, got 0")):  # fmt: skip
        with pytest.raises(TrainingConfigError, match=f"limits: {message}"):
            TrainingConfig.from_toml(configure(place, tmp_path / "x", limits=wrong))


def test_ranks_read_shares_of_their_own(place, tmp_path):
    config = TrainingConfig.from_toml(configure(place, tmp_path / "x"))
    sets = [read_dataset(config, rank, 2) for rank in range(2)]
    sources = [{e.source for e in itertools.islice(one, 2)} for one in sets]  # five samples, dealt once
    assert all(sources) and not sources[0] & sources[1]


def test_a_run_is_the_same_from_another_folder(place, tmp_path, monkeypatch):
    """Started and resumed with the file's name spelled in two ways; media_root is the file's neighbour as well."""
    moved = {**ENTRIES[0], "path": "other/pictures.jsonl", "media_root": "data"}
    (place / "other").mkdir(exist_ok=True)
    (place / "other" / "pictures.jsonl").write_bytes((place / "data" / "pictures.jsonl").read_bytes())
    config = configure(place, tmp_path / "moved", [moved], run={"steps": 1})
    monkeypatch.chdir(place)
    assert run("--stage", "vision", "--config", config.name).exit_code == 0
    config = configure(place, tmp_path / "moved", [moved], run={"steps": 2})
    monkeypatch.chdir(tmp_path)
    result = run("--stage", "vision", "--config", os.path.relpath(config, tmp_path), "--resume")
    assert result.exit_code == 0 and "steps 2 to 2" in result.stderr, result.output
    result = run("--stage", "vision", "--config", config, "--resume")
    assert result.exit_code == 0 and "no step left: step 2 is saved, and run.steps is 2" in result.stderr, result.output
    assert "3 to 2" not in result.stderr


def test_a_run_goes_on_where_its_folder_was_moved_to(place, tmp_path):
    """With its data, which lie in two folders, and a bad line among them; as a run that was not moved goes on."""
    home = tmp_path / "home"
    shutil.copytree(place, home)
    (home / "more").mkdir()
    lines = (home / "data" / "pictures.jsonl").read_text().splitlines()
    write_jsonl(home / "more" / "pictures.jsonl", ["{broken", lines[3]])
    entries = [*ENTRIES, {"path": "more/pictures.jsonl", "format": "conversations"}]
    sizes = {"max_tokens": 300, "save_every": 1}
    config = configure(home, home / "out", entries, run={"output": "out", "steps": 2, **sizes})
    assert run("--stage", "vision", "--config", config).exit_code == 0
    shutil.copytree(home, tmp_path / "elsewhere" / "else")
    found = []
    for folder in (home, tmp_path / "elsewhere" / "else"):
        configure(folder, folder / "out", entries, run={"output": "out", "steps": 6, **sizes})
        result = run("--stage", "vision", "--config", folder / "out.toml", "--resume")
        assert result.exit_code == 0 and "steps 3 to 6" in result.stderr, result.output
        assert f"1 skipped as malformed\n  {folder}/more/pictures.jsonl:1: " in result.stderr
        found.append([(row["loss"], row["samples"], row["epoch"]) for row in log(folder / "out")])
    assert found[0] == found[1] and len(found[0]) == 6
    (home / "more").rename(home / "fewer")
    entries[-1]["path"] = "fewer/pictures.jsonl"
    config = configure(home, home / "out", entries, run={"output": "out", "steps": 8, **sizes})
    result = run("--stage", "vision", "--config", config, "--resume")
    assert result.exit_code == 1 and "state.entries: is" in result.stderr, "other files are other data"


def test_a_run_of_so_many_passes_and_samples_that_repeat_in_a_step(place, tmp_path, caplog):
    """`epochs` in the place of `steps`; cut and resumed it is the same; the log says where in the data a step is."""
    entry = {"path": "data/pictures.jsonl", "format": "conversations", "max_pixels": 12544}
    whole = {"steps": None, "epochs": 3, "max_tokens": 150, "lookahead": 2, "save_every": 1}
    config = configure(place, tmp_path / "passes", [entry], run=whole)
    result = run("--stage", "instruct", "--config", config)
    assert result.exit_code == 0 and "steps 1 to epoch 3" in result.stderr, result.output
    rows = log(tmp_path / "passes")
    passed = [float(row["epoch"]) for row in rows]
    assert passed == sorted(passed) and passed[-2] < 3 <= passed[-1] < 3.5
    assert f"step {len(rows)}  loss" in result.stderr and f"epoch {passed[-1]:.2f}" in result.stderr
    samples = [int(row["samples"]) for row in rows]
    assert passed[-1] * 5 <= sum(samples) <= passed[-1] * 5 + 2, "five records; two wait at most"
    rates = [float(row["lr_llm"]) for row in rows]
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.1 * rates[0]
    for path in sorted((tmp_path / "passes" / "checkpoints").iterdir())[-2:]:
        shutil.rmtree(path)
    result = run("--stage", "instruct", "--config", config, "--resume")
    assert result.exit_code == 0, result.output
    again = log(tmp_path / "passes")
    assert [(row["step"], row["epoch"], row["lr_llm"]) for row in again] == [
        (row["step"], row["epoch"], row["lr_llm"]) for row in rows
    ]
    result = run("--stage", "instruct", "--config", config, "--resume")
    assert "no step left" in result.stderr and "run.epochs is epoch 3" in result.stderr

    caplog.clear()
    assert run("--stage", "instruct", "--config", configure(place, tmp_path / "few", [entry])).exit_code == 0
    (told,) = [record.getMessage() for record in caplog.records if record.name == "qwen2vl.training"]
    first = log(tmp_path / "few")[0]
    assert int(first["repeated"]) == int(first["samples"]) - 5 > 0, "of five records"
    assert told.startswith(f"step 1: {first['repeated']} of its {first['samples']} samples were in it before")
    for given, message in (
        ({"epochs": 2}, "run.steps: give either it or run.epochs"),
        ({"steps": None}, "run.steps: give either it or run.epochs"),
        ({"steps": None, "epochs": 0}, "run.epochs: must be positive, got 0"),
    ):
        result = run("--stage", "instruct", "--config", configure(place, tmp_path / "never", [entry], run=given))
        assert result.exit_code == 1 and message in result.stderr
    endless = [{"path": "count", "format": "generated"}]
    config = configure(place, tmp_path / "never", endless, run={"steps": None, "epochs": 1})
    result = run("--stage", "instruct", "--config", config)
    assert result.exit_code == 1 and "run.epochs: the data have no end" in result.stderr


def test_the_model_is_exported_with_the_processor_that_it_was_trained_with(place, tmp_path):
    """Limits that stand in processor_config.json, as transformers 5 saves them, included."""
    source = tmp_path / "source"
    shutil.copytree(place / "model", source)
    settings = json.loads((source / "preprocessor_config.json").read_text())
    (source / "preprocessor_config.json").unlink()
    settings["size"] = {"shortest_edge": 3136, "longest_edge": 50000}
    settings.pop("max_pixels", None), settings.pop("min_pixels", None)
    (source / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    config = configure(place, tmp_path / "out", model={"checkpoint": str(source)}, run={"steps": 1})
    assert run("--stage", "instruct", "--config", config).exit_code == 0
    before, after = (Processor.from_pretrained(folder) for folder in (source, tmp_path / "out" / "model"))
    assert (before.min_pixels, before.max_pixels) == (3136, 50000)
    assert (after.min_pixels, after.max_pixels) == (3136, 50000)
    assert after.tokenizer.encode_plain("a cat") == before.tokenizer.encode_plain("a cat")


def test_refusals(place, tmp_path):
    """One line that names the key or the file, before anything is written."""
    for tables, entries, message in (
        ({"run": {"setps": 3}}, ENTRIES, "run.setps: unknown key"),
        ({"run": {"steps": 0}}, ENTRIES, "run.steps: must be positive, got 0"),
        ({"run": {"max_bad": -1}}, ENTRIES, "run.max_bad: must be zero or positive, got -1"),
        ({"model": {"checkpoint": "nowhere/at/all"}}, ENTRIES, "nowhere/at/all: no such folder"),
        ({"model": {"checkpoint": None, "config": str(place / "model")}}, ENTRIES, "model.processor: is missing"),
        ({"parallel": {"mode": "fsdp"}}, ENTRIES, "parallel.mode: 'fsdp' needs processes: start with torchrun"),
        ({}, [], "data: no entry; a run needs at least one"),
        ({}, [{"path": "data/none.jsonl", "format": "conversations"}], f"{place / 'data' / 'none.jsonl'}: no such"),
        ({}, [{"path": "data/clips.jsonl"}], "data[0].format: is missing"),
    ):
        result = run("--stage", "vision", "--config", configure(place, tmp_path / "never", entries, **tables))
        assert result.exit_code == 1 and "Traceback" not in result.output, result.output
        assert message in result.stderr and not result.stdout
        assert not (tmp_path / "never").exists()
    result = run("--stage", "vision", "--config", place / "absent.toml")
    assert result.exit_code == 1 and "absent.toml: cannot be read: " in result.stderr
    assert run("--stage", "fourth", "--config", place / "absent.toml").exit_code == 2
