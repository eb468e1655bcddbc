"""Quantising a checkpoint: what is written, how near it is, and what the small model loses by it."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from benchmarks.random_checkpoint import small_config, write_random_checkpoint
from qwen2vl import CheckpointError, Processor, Qwen2VL, assets
from qwen2vl.cli import app
from qwen2vl.quantising import nearest, quantise, stated
from qwen2vl.quantization import Quantization, quantised, to_stored
from qwen2vl.samples import generate as make_sample
from qwen2vl.samples.source import read_sample
from tests.model.checkpoint_files import logits

FORMS = ["awq", "gptq-int4", "gptq-int8", "fp8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_random_checkpoint(tmp_path_factory.mktemp("plain"), small_config(), std=0.08)


def integers(words, bits):
    """The integers in the words of a row, lowest bits first."""
    words = words.numpy().view(np.uint32)
    return np.stack([words >> bits * i & 2**bits - 1 for i in range(32 // bits)], 2).reshape(len(words), -1).astype(int)


def values_of(stored, how):
    """By the formats' definitions, from what a file would hold."""
    if how["quant_method"] == "compressed-tensors":
        return stored["weight"].double().numpy() * stored["weight_scale"].double().numpy()
    bits, scales = how["bits"], stored["scales"].double().numpy()
    if how["quant_method"] == "awq":
        back = [0, 4, 1, 5, 2, 6, 3, 7]
        q, zeros = (integers(stored[name], 4) for name in ("qweight", "qzeros"))
        q, zeros = (x.reshape(len(x), -1, 8)[:, :, back].reshape(len(x), -1) for x in (q, zeros))
        g_idx = np.arange(len(q)) // (len(q) // len(scales))
    else:
        q, zeros = integers(stored["qweight"].T.contiguous(), bits).T, integers(stored["qzeros"], bits) + 1
        g_idx = stored["g_idx"].numpy()
    return ((q - zeros[g_idx]) * scales[g_idx]).T


@pytest.mark.parametrize("form", FORMS)
def test_values_are_nearer_than_those_of_the_whole_range(form):
    """What the largest and the smallest weight of each group alone would give, by the usual formulas."""
    layer = nn.Linear(256, 40)
    nn.init.normal_(layer.weight)
    with torch.no_grad():
        layer.weight[3] = 0
        layer.weight[5, 64:128] = layer.weight[5, 64:128].abs() + 1  # a group without a negative weight
    how = Quantization.from_dict(stated(form, 64))
    values = values_of(dict(to_stored(nearest(layer, how))), stated(form, 64))
    weight = layer.weight.detach().double().numpy()
    if form == "fp8":
        error, largest = np.abs(values - weight), np.abs(weight).max(1, keepdims=True)
        assert (error <= np.maximum(np.abs(weight) / 16, largest / 448 / 512) * 1.0001).all()
        return
    groups, top = weight.reshape(40, 4, 64), 2**how.bits - 1
    low, high = np.minimum(groups.min(2), 0), np.maximum(groups.max(2), 0)
    if form != "awq":
        high = np.maximum(high, -low)
        low = -high
    scale = np.maximum((high - low) / top, 6.2e-5).astype(np.float16).astype(float)[..., None]
    zero = np.rint(-low[..., None] / scale) if form == "awq" else top // 2 + 1
    usual = (np.clip(np.rint(groups / scale) + zero, 0, top) - zero) * scale
    ours, theirs = (((x.reshape(40, 4, 64) - groups) ** 2).sum(2) for x in (values, usual))
    assert (ours <= theirs * 1.001 + 1e-12).all() and (values[3] == 0).all()
    if how.bits == 4:
        assert ours.sum() < 0.97 * theirs.sum()


@pytest.mark.parametrize("form", FORMS)
def test_the_command_writes_what_is_loaded(folder, tmp_path, form):
    out = tmp_path / "out"
    command = ["convert", "--model", str(folder), "--to", form, "--group-size", "64", "--output", str(out)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and done.stdout == f"{out}\n", done.output
    model = quantise(Qwen2VL.from_pretrained(folder, device="cpu"), form, 64)
    with torch.no_grad():
        assert torch.equal(logits(out), model(torch.arange(10, 40)[None]))
    assert len(quantised(model)) == 14
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    for name, tensor in before.items():
        if "proj" not in name or "visual" in name or name.endswith("bias"):
            assert torch.equal(after[name], tensor), name
    assert json.loads((out / "config.json").read_text())["quantization_config"] == stated(form, 64)
    assert Processor.from_pretrained(out).max_pixels == Processor.from_pretrained(folder).max_pixels
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2 and "out is there and not" in " ".join(again.stderr.replace("│", " ").split())


def test_refusals(folder, tmp_path):
    model = Qwen2VL.from_pretrained(folder, device="cpu")
    for form, group, words in (
        ("int3", 64, "form must be one of awq, gptq-int4, gptq-int8, fp8, got 'int3'"),
        ("awq", 48, "group_size must be -1 or a multiple of 32, got 48"),
        ("gptq-int4", 96, "q_proj: cannot be gptq int4, groups of 96: 256 columns are no multiple of groups of 96"),
    ):
        with pytest.raises(CheckpointError, match=words):
            quantise(model, form, group)
    assert not quantised(model) and model.config.quantization is None
    quantise(model, "gptq-int8", -1)
    with pytest.raises(CheckpointError, match="quantise: wants a model in 16 or 32 bits"):
        quantise(model, "awq", 64)


def test_the_small_model_loses_little():
    """The loss of its answers to held-out samples, within one per cent of that of its own weights."""
    processor = Processor.from_pretrained(assets.folder())
    skills = ("read", "colour_shape", "count", "compare", "point")
    batch = [
        processor.supervised(read_sample(make_sample(skill, 0, split="held-out", index=index)))
        for skill in skills
        for index in range(20)
    ]

    def loss(model):
        total = count = 0
        for inputs in batch:
            labels = inputs["labels"][0, 1:]
            with torch.no_grad():
                found = model(**{name: x for name, x in inputs.items() if name != "labels"})[0, :-1].float()
            total += F.cross_entropy(found, labels, ignore_index=-100, reduction="sum").item()
            count += int((labels != -100).sum())
        return total / count

    base = loss(Qwen2VL.from_pretrained(assets.folder(), device="cpu"))
    for form in FORMS:
        quantised_loss = loss(quantise(Qwen2VL.from_pretrained(assets.folder(), device="cpu"), form, 32))
        assert quantised_loss < 1.01 * base, (form, quantised_loss, base)
