"""sample_tokens_'s formula against another writing of it in float64, transformers' warpers, and at its edges."""

from __future__ import annotations

import math

import pytest
import torch

from qwen2vl_kernels import sample_tokens_
from qwen2vl_kernels.core.backends import unavailable
from tests.conftest import DEVICE
from tests.kernels import sampling_oracle as oracle

BANNED = [3, 40]
BACKENDS = [
    "eager",
    pytest.param("triton", marks=pytest.mark.skipif(unavailable("triton", DEVICE) is not None, reason="no Triton")),
]


@pytest.mark.parametrize("setting", oracle.SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_id_falls_by_its_share(setting, dtype):
    """At both ends of what each id has, of rows in one place and with equals among them; and it is marked as seen."""
    penalised = "repetition_penalty" in setting
    for row in oracle.rows(48).to(dtype):
        marks = torch.rand(48) < 0.3
        chances = oracle.kept(row.tolist(), marks.tolist() if penalised else None, BANNED, **setting)
        numbers, ids = oracle.draws(chances)
        seen = marks.expand(len(ids), -1).clone() if penalised else None
        given = (torch.tensor(numbers, dtype=torch.float64), seen, torch.tensor(BANNED))
        got = sample_tokens_(row.expand(len(ids), -1), *given, **setting)
        assert got.tolist() == ids
        if penalised:
            expected = [marks.clone().index_fill(0, torch.tensor(i), True) for i in ids]
            assert torch.equal(seen, torch.stack(expected))


def test_sets_are_those_of_transformers():
    """Of its penalty, its temperature, its top_k and its top_p, one after another, where no two scores are equal."""
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits, prompt = torch.randn(1, 64) * 3, torch.tensor([[5, 9, 33]])
    seen = torch.zeros(1, 64, dtype=torch.bool).index_fill(1, prompt[0], True)
    for temperature, top_k, top_p in ((0.7, 12, 0.9), (2.0, 30, 0.7), (1.3, 64, 0.95), (0.01, 1, 0.001)):
        scores = processors.RepetitionPenaltyLogitsProcessor(1.3)(prompt, logits.clone())
        scores = processors.TemperatureLogitsWarper(temperature)(prompt, scores)
        scores = processors.TopPLogitsWarper(top_p)(prompt, processors.TopKLogitsWarper(top_k)(prompt, scores))
        chances = {i: p for i, p in enumerate(scores.double().softmax(-1)[0].tolist()) if p > 0}
        numbers, ids = oracle.draws(chances)
        given = (torch.tensor(numbers, dtype=torch.float64), seen.expand(len(ids), -1).clone())
        shaped = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": 1.3}
        assert sample_tokens_(logits.expand(len(ids), -1), *given, **shaped).tolist() == ids
        assert sample_tokens_(logits, None, seen.clone(), repetition_penalty=1.3).item() == scores.argmax()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_choice(backend):
    """Nothing finite, or no number: id 0 is drawn. The likeliest is where PyTorch finds it."""
    rows = torch.zeros(4, 9, device=DEVICE)
    rows[0] = -math.inf
    rows[1, 4], rows[2, 5], rows[3, 6] = math.nan, math.inf, 1e38
    for setting in ({}, {"top_k": 3}, {"top_p": 0.5}):
        numbers = torch.full((4,), 0.9, dtype=torch.float64, device=DEVICE)
        assert sample_tokens_(rows, numbers, temperature=0.5, **setting, backend=backend).tolist() == [0, 0, 0, 6]
    assert sample_tokens_(rows, backend=backend).tolist() == rows.argmax(-1).tolist() == [0, 4, 5, 6]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_has_no_chance_is_not_drawn(backend):
    """At the ends of the numbers that are drawn, where sums are as large as they come."""
    logits = torch.zeros(4, 70, device=DEVICE)
    logits[:2, :5] = logits[2:, -5:] = -math.inf
    numbers = torch.tensor([0.0, 1 - 2**-53] * 2, dtype=torch.float64, device=DEVICE)
    assert sample_tokens_(logits, numbers, backend=backend).tolist() == [5, 69, 0, 64]


def test_refusals():
    logits, numbers = torch.zeros(2, 5), torch.zeros(2, dtype=torch.float64)
    seen = torch.zeros(2, 5, dtype=torch.bool)
    for given, named, error, message in (
        ((logits.double(),), {}, TypeError, "logits must have one of the dtypes float32, bfloat16, float16, got"),
        ((logits[:, :0],), {}, ValueError, "logits must have 1 to 524288 columns, got 0"),
        ((logits, numbers.float()), {}, TypeError, "uniforms must have one of the dtypes float64"),
        ((logits, numbers[:1]), {}, ValueError, r"uniforms must have shape \(B\) with B=2"),
        ((logits, numbers, seen[:, :4]), {}, ValueError, r"seen must have shape \(B, V\) with B=2, V=5"),
        ((logits, numbers, seen.byte()), {}, TypeError, "seen must have one of the dtypes bool"),
        ((logits, numbers, seen[:1].expand(2, 5)), {}, ValueError, "seen is overwritten"),
        ((logits, numbers, None, torch.tensor([1.0])), {}, TypeError, "banned must have one of the dtypes int64"),
        ((logits,), {"temperature": 0}, ValueError, "temperature must be > 0 .*, got 0"),
        ((logits,), {"temperature": math.nan}, ValueError, "temperature must be > 0"),
        ((logits,), {"temperature": "1"}, TypeError, "temperature must be a number, got str"),
        ((logits,), {"top_k": -1}, ValueError, "top_k must be >= 0, got -1"),
        ((logits,), {"top_k": 1.5}, TypeError, "top_k must be an int, got float"),
        ((logits,), {"top_p": 1.5}, ValueError, r"top_p must be in \[0, 1\], got 1.5"),
        ((logits,), {"repetition_penalty": 1.5}, ValueError, "repetition_penalty 1.5 must come with seen"),
        ((logits, None, seen), {"repetition_penalty": math.inf}, ValueError, "repetition_penalty must be > 0, got inf"),
        ((logits.clone().requires_grad_(),), {}, ValueError, "logits must not require grad"),
    ):
        with pytest.raises(error, match=f"^sample_tokens_: {message}"):
            sample_tokens_(*given, **named)
