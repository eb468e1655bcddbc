"""The kernels of sample_tokens_, against the formula's other writing: chunks, lists and bins of every kind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.aot.sampling import choose
from qwen2vl_kernels import sample_tokens_
from qwen2vl_kernels.core import launching
from qwen2vl_kernels.core.launching import Target, record
from qwen2vl_kernels.triton import sampling
from tests.conftest import DEVICE
from tests.kernels import sampling_oracle as oracle
from tests.kernels.poison import poisoned  # noqa: F401

needs_triton = pytest.mark.skipif(launching.reason(DEVICE) is not None, reason=str(launching.reason(DEVICE)))
ROOT = Path(__file__).resolve().parents[3]
BANNED = [3, 130]
COLUMNS = 150


@pytest.fixture
def few(monkeypatch):
    """So that a short row has two chunks and a list is read in several pieces."""
    monkeypatch.setattr(sampling, "CHUNK", 128)
    monkeypatch.setattr(sampling, "LISTED", 32)


def _strided(x):
    """Rows with numbers between them that would be chosen before any other."""
    wide = torch.full((x.shape[0], x.shape[1] + 5), float("inf"), dtype=x.dtype)
    wide[:, 2:-3] = x
    return wide.to(DEVICE)[:, 2:-3]


@needs_triton
@pytest.mark.parametrize(("shown", "setting"), list(enumerate(oracle.SETTINGS)), ids=str)
def test_every_id_falls_by_its_share(shown, setting, few, poisoned):  # noqa: F811
    """Draws of four kinds of rows; each setting shows others."""
    penalised = "repetition_penalty" in setting
    marks = torch.rand(COLUMNS) < 0.3
    rows, numbers, ids = [], [], []
    for row in oracle.rows(COLUMNS).bfloat16():
        chances = oracle.kept(row.tolist(), marks.tolist() if penalised else None, BANNED, **setting)
        several = list(zip(*oracle.draws(chances), strict=True))
        some = [several[(n * len(several) // 5 + shown) % len(several)] for n in (range(2) if not rows else (shown,))]
        rows += [row] * len(some)
        numbers += [number for number, _ in some]
        ids += [i for _, i in some]
    seen = marks.expand(len(rows), -1).clone().to(DEVICE) if penalised else None
    table = torch.tensor(numbers, dtype=torch.float64, device=DEVICE).unsqueeze(1).expand(-1, 3).contiguous()
    given = (table[:, 1], seen, torch.tensor(BANNED, device=DEVICE))
    got = sample_tokens_(_strided(torch.stack(rows)), *given, **setting, backend="triton")
    assert got.tolist() == ids
    if penalised:
        expected = [marks.clone().index_fill(0, torch.tensor(i), True) for i in ids]
        assert torch.equal(seen.cpu(), torch.stack(expected))


@needs_triton
def test_the_likeliest(few, poisoned):  # noqa: F811
    for dtype in (torch.float32, torch.float16):
        logits, seen = oracle.rows(COLUMNS).to(DEVICE, dtype), torch.rand(4, COLUMNS, device=DEVICE) < 0.3
        banned = torch.tensor(BANNED, device=DEVICE)
        for marks, penalty in ((None, 1.0), (seen, 1.4)):
            given = {"banned": banned, "repetition_penalty": penalty}
            chosen = []
            for backend in ("eager", "triton"):
                copied = None if marks is None else marks.clone()
                chosen.append(sample_tokens_(logits, None, copied, **given, backend=backend))
            assert torch.equal(*chosen)


@needs_triton
@pytest.mark.parametrize("setting", [{"top_k": 30, "top_p": 0.8}, {"top_p": 0.95}], ids=str)
def test_chunks_pieces_and_other_rows_change_nothing(setting, monkeypatch):
    logits, numbers = torch.randn(2, 300, device=DEVICE) * 2, torch.rand(2, dtype=torch.float64, device=DEVICE)
    found = []
    for chunk, listed, rows in ((1024, 512, slice(0, 2)), (128, 16, slice(0, 2)), (256, 64, slice(1, 2))):
        monkeypatch.setattr(sampling, "CHUNK", chunk)
        monkeypatch.setattr(sampling, "LISTED", listed)
        found.append(sample_tokens_(logits[rows], numbers[rows], **setting, backend="triton").tolist())
    assert found[0] == found[1] and found[2] == found[0][1:2]
    assert found[0] == sample_tokens_(logits, numbers, **setting, backend="eager").tolist()


@pytest.mark.skipif(not launching.INTERPRETED, reason="a GPU has its own order of programs")
def test_the_order_of_programs_changes_nothing(few, monkeypatch):
    """The last chunk comes first, so that lists are another way round and another program ends the choice."""
    from triton.runtime.interpreter import interpreter_builder as builder

    logits, numbers = (torch.randn(2, 300) * 2).round(decimals=1), torch.rand(2, dtype=torch.float64)
    given = {"temperature": 3.0, "top_k": 200, "top_p": 0.7, "backend": "triton"}
    forward, place = sample_tokens_(logits, numbers, **given), builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: place(builder.grid_dim[0] - 1 - x, y, z))
    assert torch.equal(sample_tokens_(logits, numbers, **given), forward)


@needs_triton
@pytest.mark.parametrize("top_k", [2, 3])
def test_the_highest_lie_in_chunks_of_their_own(top_k, few):
    """Each chunk's maximum is one of the highest, so that no other bound on these is as tight."""
    logits = torch.zeros(top_k, 384, device=DEVICE)
    logits[:, [50, 130, 300]] = torch.tensor([9.0, 10.0, 8.0], device=DEVICE)
    numbers = (torch.arange(top_k, device=DEVICE, dtype=torch.float64) + 0.5) / top_k
    got = sample_tokens_(logits, numbers, temperature=1e9, top_k=top_k, backend="triton")
    assert got.tolist() == [50, 130, 300][:top_k]


@needs_triton
def test_chunks_as_they_are_launched():
    """The last one cut short."""
    logits = torch.randn(1, 9_216 + 60, device=DEVICE).bfloat16() * 3
    numbers = torch.tensor([0.4], dtype=torch.float64, device=DEVICE)
    given = {"top_k": 50, "top_p": 0.9, "temperature": 0.8}
    chosen = [sample_tokens_(logits, numbers, **given, backend=backend) for backend in ("eager", "triton")]
    assert torch.equal(*chosen)


def test_two_launches_whatever_is_asked_for(monkeypatch):
    """The second may start while the first ends, from Hopper on."""
    monkeypatch.setattr(launching, "INTERPRETED", False)
    for capability, dependent in ((80, False), (90, True)):
        for given in ((0, 1.0), (1, 0.001), (50, 0.9), (0, 0.9), (50, 1.0)):
            for rows, penalised, drawn in ((1, True, True), (64, False, True), (3, True, False)):
                with record(Target("cuda", capability)) as launches:
                    choose(rows, 151_936, torch.bfloat16, *given, penalised, drawn)
                assert [one.kernel.__name__ for one in launches] == ["_maxima_kernel", "_choice_kernel"]
                assert [one.grid for one in launches] == [(rows * 149,)] * 2
                assert [one.options.get("launch_pdl", False) for one in launches] == [dependent] * 2


_CODE = """
import json, re, tempfile, torch
from pathlib import Path
from benchmarks.aot import compiler
from benchmarks.aot.sampling import choose
from qwen2vl_kernels.core.launching import Target, record

found = []
with record(Target("cuda", 90)) as launches:
    choose(1, 151_936, torch.bfloat16, 1, 0.001)
for one in launches:
    source, _ = compiler._source(one)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiler._compile(source, one, "cuda", 90, 32).asm["cubin"])
        text = compiler.disassembled(cubin)
    found.append(re.findall(r"\\b(ACQBULK|PREEXIT|LDG\\.E\\.128|LDG|STG|EXIT|ATOMG|REDG?|CCTL\\.IVALL)\\b", text))
print(json.dumps(found))
"""


def test_the_machine_code_waits_before_it_reads():
    """Once, before anything is read or written; logits come 16 bytes at a time; what others counted is read behind the
    count alone."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", _CODE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == 2
    for names in found:
        assert names.count("ACQBULK") == 1 and names[:2] == ["ACQBULK", "PREEXIT"], names
        assert "LDG.E.128" in names
    assert "CCTL.IVALL" in found[1] and "ATOMG" in found[1][: found[1].index("CCTL.IVALL")]
