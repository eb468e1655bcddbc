"""Ranks that hold one model together: what one process answers, each from its part of the files, and no rank left
waiting. All ranks run once, see tests/model/ranks.py."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from benchmarks.random_checkpoint import small_config, write_random_checkpoint
from qwen2vl import MoEConfig, Processor, Qwen2VL, Qwen2VLConfig, Qwen2VLError, TensorParallel
from qwen2vl.cli import app
from qwen2vl.parallel import bytes_per_rank, slices
from qwen2vl.quantising import quantise
from tests.conftest import assert_two_times
from tests.model import rank_memory
from tests.model import ranks as worker
from tests.model.test_quantised import FORMATS
from tests.model.test_quantised import quantise as quantise_as_written

ROOT = Path(__file__).parents[2]
OF = {2: "untied", 4: "tied"}
QUANTISED = ("awq", "gptq-int4", "fp8")
#: Forms of which ranks hold blocks of their own: in the order of activations, and in groups that they share.
SHARED = {"act-order": "gptq act-order", "cut-groups": "gptq int8", "cut-blocks": "fp8 fine-grained"}
OF_EXPERTS = ("experts", "experts-int4")
#: One layer with experts, one without.
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 96, "norm_topk_prob": False,
           "shared_expert_intermediate_size": 128, "mlp_only_layers": (1,)}  # fmt: skip
GENERATE = ["generate", "-m", "untied", "-i", "seen.png", "-p", "-", "-n", "12", "--device", "cpu"]
CHAT = ["chat", "-m", "untied", "-n", "8", "--temperature", "1", "--seed", "3", "--device", "cpu"]
COMMANDS = {
    "generate": GENERATE,
    "chat": CHAT,
    "missing": [*GENERATE, "-i", "nowhere.png"],
    "alone": GENERATE,
}
STDIN = "/image seen.png\nWhat is this?\nAnd else?\n/reset\nAnd this?\nMore?\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for name in OF.values():
        config = small_config(tie_word_embeddings=name == "tied")
        write_random_checkpoint(folder / name, config, dtype=torch.float32, std=0.08)
        path = folder / name / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [999]}))
    config = small_config(tie_word_embeddings=False)
    config = replace(config, text=replace(config.text, moe=MoEConfig(**EXPERTS)))
    write_random_checkpoint(folder / "experts", config, dtype=torch.float32, std=0.08)
    quantise(Qwen2VL.from_pretrained(folder / "experts", device="cpu"), "gptq-int4", 32).save_pretrained(
        folder / "experts-int4"
    )
    for form in QUANTISED:
        quantise(Qwen2VL.from_pretrained(folder / "untied", device="cpu"), form, 64).save_pretrained(folder / form)
    for form, name in SHARED.items():
        quantise_as_written(folder / "untied", folder / "made" / form, FORMATS[name])
        (folder / "made" / form / "quantised").rename(folder / form)
    return folder


@pytest.fixture(scope="module")
def inputs(folder):
    picture = np.random.default_rng(0).integers(0, 256, (84, 112, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "seen.png")
    return dict(Processor.from_pretrained(folder / "untied")(worker.messages(torch.from_numpy(picture))))


@pytest.fixture(scope="module")
def found(folder, inputs):
    """What every rank found, by (ranks, rank), and exit codes by what was run."""
    given = {"inputs": inputs, "of": OF, "quantised": (*QUANTISED, *SHARED), "experts": OF_EXPERTS}
    torch.save(given, folder / "given.pt")
    (folder / "commands.json").write_text(json.dumps(COMMANDS))
    (folder / "stdin").write_text(STDIN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.model.ranks", str(folder)]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=300)
    codes = json.loads((folder / "codes.json").read_text())
    assert codes["2"] == [0] * 2 and codes["4"] == [0] * 4
    return codes | {(n, rank): torch.load(folder / f"found-{n}-{rank}.pt") for n in OF for rank in range(n)}


@pytest.mark.parametrize("ranks", OF)
def test_answers_of_one_process(folder, inputs, found, ranks):
    model = Qwen2VL.from_pretrained(folder / OF[ranks], device="cpu")
    torch.manual_seed(5)
    one = worker.answers(model, inputs, Processor.from_pretrained(folder / "untied"))
    for rank in range(ranks):
        got = found[ranks, rank]
        for name in ("logits", "step"):
            torch.testing.assert_close(got[name], one[name], rtol=1e-4, atol=1e-4)
            assert torch.equal(got[name], found[ranks, 0][name])
        for name in ("greedy", "stopped", "turns", "drawn"):
            assert got[name] == one[name], name
        assert got["logprobs"] == pytest.approx(one["logprobs"], rel=1e-4, abs=1e-4)
        assert got["heads"] == max(1, one["heads"] // ranks)
    assert one["turns"][1] == [0] and one["turns"][3] == [inputs["input_ids"].shape[1]]
    assert len(set(map(tuple, one["drawn"]))) == 3 and len(set(one["greedy"][0])) > 5


@pytest.mark.parametrize("ranks", OF)
def test_sums_of_16_bits(folder, inputs, found, ranks):
    model = Qwen2VL.from_pretrained(folder / OF[ranks], device="cpu")
    with torch.no_grad():
        exact, one = model(**inputs), model.bfloat16()(**inputs)
    for rank in range(ranks):
        assert found[ranks, rank]["bfloat16"].dtype == torch.bfloat16
        assert_two_times(found[ranks, rank]["bfloat16"], one, exact, floor=0)


@pytest.mark.parametrize("form", [*QUANTISED, *SHARED])
def test_quantised_weights_are_split(folder, inputs, found, form):
    with torch.no_grad():
        one = Qwen2VL.from_pretrained(folder / form, device="cpu")(**inputs)
    for rank in range(2):
        torch.testing.assert_close(found[2, rank][form], one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", OF)
def test_ranks_read_what_they_hold(folder, found, ranks):
    whole = Qwen2VL.from_pretrained(folder / OF[ranks], device="cpu")
    held = bytes_per_rank(whole, ranks)
    for rank in range(ranks):
        assert found[ranks, rank]["bytes"] == found[ranks, rank]["held"] == held[rank]
    split = sum(p.nbytes for name, p in whole.named_parameters() if name in slices(whole.config.text, 0, ranks))
    assert sum(held) - ranks * (sum(p.nbytes for p in whole.parameters()) - split) < 1.3 * split


@pytest.mark.parametrize("ranks", OF)
@pytest.mark.parametrize("form", OF_EXPERTS)
def test_experts_are_split(folder, inputs, found, form, ranks):
    """Whole experts to each rank, which reads no others, and a shared one by columns."""
    whole = Qwen2VL.from_pretrained(folder / form, device="cpu")
    one, held = worker.few_answers(whole, inputs), bytes_per_rank(whole, ranks)
    # Beside what is held: zero points that are all the same, and the columns' groups, in order.
    stored = load_file(folder / form / "model.safetensors")
    spare = {name: t.nbytes for name, t in stored.items() if name.endswith((".qzeros", ".g_idx"))}
    for rank in range(ranks):
        got = found[ranks, rank]["experts"][form]
        torch.testing.assert_close(got["logits"], one["logits"], rtol=1e-4, atol=1e-4)
        assert torch.equal(got["logits"], found[ranks, 0]["experts"][form]["logits"])
        assert got["greedy"] == one["greedy"] and len(set(one["greedy"][0])) > 4
        assert got["held"] == held[rank]
        routed = sum(n for name, n in spare.items() if ".experts." in name)
        assert 0 <= got["bytes"] - held[rank] - routed // ranks <= sum(spare.values()) - routed
    routed = sum(p.nbytes for p in whole.model.layers[0].mlp.experts.parameters())
    assert held[0] < sum(p.nbytes for p in whole.parameters()) - routed * (ranks - 1) // ranks


def test_what_is_refused(folder, found):
    assert worker.fuses(Qwen2VL.from_pretrained(folder / "untied", device="cpu"))
    for rank in range(2):
        got = found[2, rank]
        assert "different prompts" in got["differing"]
        assert "each rank holds a part" in got["saved"]
        assert "wants a whole model" in got["adapter"]
        assert got["graphs"].startswith("graphs: ")
        assert got["cache"].startswith("append_kv: ")
        assert "has no gradients" in got["gradients"]
        assert "nowhere" in got["unread"] and got["unread"].startswith("rank 0: ") == (rank == 1)
        assert not got["fused"]


def test_one_rank_leads_and_the_other_follows(found):
    assert found[2, 1]["followed"] == 2
    assert found[2, 0]["stopped"] == found[2, 1]["stopped"] != [""]


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_the_command_answers_as_one_process(folder, found, monkeypatch, name):
    monkeypatch.chdir(folder)
    one = CliRunner().invoke(app, COMMANDS[name], input=STDIN)
    assert found[name] == [0, 0] and one.exit_code == 0
    assert (folder / f"{name}-0.out").read_text() == one.stdout != ""
    assert (folder / f"{name}-0.err").read_text() == one.stderr
    assert (folder / f"{name}-1.out").read_text() == (folder / f"{name}-1.err").read_text() == ""


def test_a_job_of_others_is_not_waited_for(folder, monkeypatch):
    """RANK and WORLD_SIZE without torchrun: one process, which reads its standard input whatever its rank."""
    monkeypatch.chdir(folder)
    wanted = CliRunner().invoke(app, GENERATE, input=STDIN)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    got = CliRunner().invoke(app, GENERATE, input=STDIN)
    assert (got.exit_code, got.stdout) == (0, wanted.stdout)


def test_an_error_ends_all(folder, found):
    """That of the first rank is told once; one that fails alone says so, and nobody waits for it."""
    assert found["missing"] == [1, 0]
    told = (folder / "missing-0.err").read_text()
    assert told.startswith("error: ") and told.count("\n") == 1 and "nowhere.png" in told
    assert (folder / "missing-1.err").read_text() == ""
    assert found["alone"] == [1, 1]
    assert (folder / "alone-1.err").read_text().startswith("error: rank 1: out of memory")
    assert (folder / "alone-0.err").read_text().startswith("error: another process stopped")


@pytest.mark.parametrize(
    ("preset", "ranks", "reason"),
    [
        ("2b", 3, "3 ranks do not divide num_key_value_heads, 2"),
        ("2b", 8, "8 ranks do not divide num_attention_heads, 12"),
        ("7b", 28, "28 ranks do not divide intermediate_size, 18944"),
    ],
)
def test_uneven_heads_are_refused(preset, ranks, reason):
    with pytest.raises(Qwen2VLError, match=reason):
        slices(Qwen2VLConfig.preset(preset).text, 0, ranks)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_experts": 6}, "4 ranks do not divide num_experts, 6"),
        ({"shared_expert_intermediate_size": 66}, "4 ranks do not divide shared_expert_intermediate_size, 66"),
    ],
)
def test_uneven_experts_are_refused(changes, reason):
    with pytest.raises(Qwen2VLError, match=reason):
        slices(replace(small_config().text, moe=MoEConfig(**{**EXPERTS, **changes})), 0, 4)


def test_the_width_of_dense_layers_counts_where_there_are_some():
    text = replace(small_config().text, intermediate_size=18, moe=MoEConfig(**EXPERTS))
    with pytest.raises(Qwen2VLError, match="4 ranks do not divide intermediate_size, 18"):
        slices(text, 0, 4)
    sparse = slices(replace(text, moe=MoEConfig(**{**EXPERTS, "mlp_only_layers": ()})), 3, 4)
    assert sparse["model.layers.1.mlp.experts.down_proj"] == (0, 6, 8, 8)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_frames_are_spread(folder, monkeypatch, ranks):
    """Images and a video, cut between any two frame pairs: each rank's tokens, joined, are those of the tower, whether
    some have nothing to encode or one has to do it in several goes."""
    tower = Qwen2VL.from_pretrained(folder / "tied", device="cpu").visual
    images, video = torch.tensor([[1, 4, 6], [1, 8, 4]]), torch.tensor([[3, 4, 4]])
    random = torch.Generator().manual_seed(0)
    rows = [torch.randint(0, 256, size, generator=random, dtype=torch.uint8) for size in ((56, 588), (48, 1176))]
    wanted = tower(rows, [images, video])
    found: list[list[torch.Tensor]] = []
    monkeypatch.setattr(TensorParallel, "gather", lambda self, x, counts, dim: found[-1].append(x) or x)
    for rank in range(ranks):
        one = TensorParallel.__new__(TensorParallel)
        one.rank, one.ranks, one.device = rank, ranks, torch.device("cpu")
        found.append([])
        tower(rows, [images, video], max_patches=60, encode=one.spread(tower))
    assert len(found[0]) == 2 and (ranks < 8 or any(not len(part) for of_rank in found for part in of_rank))
    got = torch.cat([torch.cat(parts) for parts in zip(*found, strict=True)])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_processes_are_asked_for():
    with pytest.raises(Qwen2VLError, match=r"TensorParallel\.start"):
        TensorParallel()
    with pytest.raises(Qwen2VLError, match="start with torchrun"):
        TensorParallel.start()


def test_memory_of_the_72b():
    """Two cards of 80 GB hold it and 8,192 tokens; each key-value head is in one rank's cache."""
    model = Qwen2VL.from_config("72b", device="meta")
    weights = [bytes_per_rank(model, ranks)[0] / 1e9 for ranks in (1, 2, 4, 8)]
    assert weights == pytest.approx([146.8, 74.1, 37.7, 19.5], abs=0.1)
    for ranks in (2, 4, 8):
        cache = bytes_per_rank(model, ranks, tokens=8192)[-1] - bytes_per_rank(model, ranks)[-1]
        assert cache == 2 * 80 * 8 // ranks * 128 * 8192 * 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("form", ["bf16", "gptq-int4"])
def test_one_rank_alone_holds_what_is_calculated(tmp_path, form):
    """By the measurement of docs/model.md, of a small model."""
    rank_memory.write(tmp_path / "all", small_config(tie_word_embeddings=False), form, 64)
    rank_memory.fewer(tmp_path / "all", tmp_path / "half", 1)
    for name in ("all", "half"):
        held = bytes_per_rank(Qwen2VL.from_pretrained(tmp_path / name, device="cpu"), 2)
        assert rank_memory.measure(tmp_path / name, 1, 2)["parameters"] == held[1]
