"""The case of decoding: who takes part, that all choose the same tokens, and what a token must read."""

import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.case import Context, Skip
from benchmarks.cases import _choice, decode
from benchmarks.cases._qwen2vl import decode_bytes
from benchmarks.random_checkpoint import small_config
from benchmarks.run import run_case
from qwen2vl import Qwen2VL
from qwen2vl.speed import step_bytes


def test_all_decode_the_same(tmp_path):
    """Every contender that a CPU has but for the compiled one, which takes half a minute to make; by its gate."""
    with Context(quick=True, checkpoint_dir=tmp_path, without=(decode.COMPILED,)) as context:
        result = run_case(decode.CASE, context)
    whole = {f"float32 tokens, {who}" for who in ("ours", decode.DYNAMIC, decode.STATIC)}
    assert whole <= {check["name"] for check in result["gate"]} and not result["red"]
    rows = {(row["workload"], row["provider"]): row for row in result["rows"]}
    for who in ("ours", decode.DYNAMIC, decode.STATIC):
        for batch in (1, 8):
            assert rows[f"small, {batch} rows: first token after 24", who]["median"] > 0
            row = rows[f"small, {batch} rows: a token after 24", who]
            assert row["unit_of_work"] == "token" and 0 < row["units_per_s"] < 1e6 and row["of_ceiling"] > 0
    for batch in (1, 8):
        for form in decode.FORMS:
            row = rows[f"small, {batch} rows: a token after 24, quantised", f"ours, {form}"]
            assert 0 < row["units_per_s"] < 1e6 and row["ratios"].keys() == {decode.BF16, decode.DYNAMIC}
        for name in _choice.SETTINGS:
            row = rows[f"choice of {small_config().text.vocab_size} ids, {name}: {batch} rows", "eager"]
            assert row["median"] > 0 and row["ratios"].keys() == {_choice.TRANSFORMERS}
    skipped = {skip["provider"]: skip["reason"] for skip in result["skipped"]}
    assert skipped == {decode.COMPILED: "left out by --without", decode.VLLM: "the engine is measured on a GPU alone"}


def test_a_step_reads_the_weights_once_for_all_rows():
    """As the model counts it, but for norms and biases."""
    config = small_config()
    model = Qwen2VL.from_config(config, device="meta", dtype=torch.bfloat16)
    small = sum(p.nbytes for p in model.model.parameters() if p.ndim == 1)
    assert decode_bytes(config.text, 8 * 100, 2) == step_bytes(model, 100, 8) - small


def test_what_takes_too_long_takes_no_part():
    with pytest.raises(Skip, match="compiling takes longer than 1 s"), decode.limited(1, "compiling"):
        time.sleep(20)
    with decode.limited(1, "compiling"):
        pass
    assert signal.alarm(0) == 0


def test_an_engine_that_keeps_prompts(monkeypatch):
    """vLLM's interface, as far as it is called: it is asked for the first token anew, and for steps behind it."""
    asked = []

    class Engine:
        def reset_prefix_cache(self):
            asked.append("reset")

        def generate(self, prompts, params, use_tqdm):
            asked.append(params.max_tokens)
            answers = ([len(prompt["prompt_token_ids"])] * params.max_tokens for prompt in prompts)
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids)]) for ids in answers]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    contender = decode.VllmDecodes(Engine(), decode.prompts(2, 5, torch.device("cpu")), 3)
    assert contender.fill().tolist() == [[5], [5]]
    contender.rewind()
    assert contender.decode().tolist() == [[5] * 3] * 2 and asked == ["reset", 1, 3]
