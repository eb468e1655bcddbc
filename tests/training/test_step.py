"""One step's loss and gradients: packed as alone (float64), beside transformers, and with parts frozen."""

import pytest
import torch

from qwen2vl.training.packing import collate
from qwen2vl.training.step import TrainingStep
from tests.model import oracle
from tests.training.samples import make_example, tiny_model

EXAMPLES = [make_example(0, "image"), make_example(1), make_example(2, "video"), make_example(3, "images", 14)]


def _gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_gradients_of_a_pack_are_the_sum_of_its_samples(tie):
    model = tiny_model(tie, dtype=torch.float64)
    step = TrainingStep(model, chunk_rows=5)
    packed = step(collate(EXAMPLES, model.config))
    packed.backward()
    got = _gradients(model)
    model.zero_grad()
    losses = [step(collate([e], model.config)) for e in EXAMPLES]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(packed, sum(losses), rtol=1e-12, atol=0)
    expected = _gradients(model)
    assert got.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name in got:
        # Rotary arithmetic is float32 in either run; sums over rows differ in their order only.
        torch.testing.assert_close(got[name], expected[name], rtol=1e-9, atol=1e-11 * expected[name].abs().max().item())


def test_losses_by_sample_are_those_of_the_samples_alone():
    model = tiny_model()
    step = TrainingStep(model)
    got = step(collate(EXAMPLES, model.config), by_sample=True)
    expected = torch.stack([step(collate([e], model.config)).detach() for e in EXAMPLES])
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_loss_and_gradients_equal_those_of_transformers(tie, tmp_path):
    """Its padded batch with its own labels argument, weights saved by us and loaded by it."""
    model = tiny_model(tie)
    model.save_pretrained(tmp_path)
    batch = collate(EXAMPLES, model.config)
    loss = TrainingStep(model)(batch, 1 / batch.supervised)
    loss.backward()

    theirs = oracle.load(tmp_path, attention="eager")
    length = max(e.tokens for e in EXAMPLES)
    ids, labels = torch.full((4, length), 62), torch.full((4, length), -100)
    mask = torch.zeros(4, length, dtype=torch.int64)
    for row, e in enumerate(EXAMPLES):
        ids[row, : e.tokens], labels[row, : e.tokens], mask[row, : e.tokens] = e.input_ids, e.labels, 1
    inputs = {"input_ids": ids, "attention_mask": mask} | {
        name: getattr(batch, name)
        for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    }
    expected = theirs(**oracle.oracle_inputs(model.config, inputs), labels=labels).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    wanted = {}
    for name, p in theirs.named_parameters():
        ours = name.removeprefix("model.").replace("language_model.", "model.")
        wanted[ours] = p.grad
    got = _gradients(model)
    assert got.keys() == wanted.keys()
    for name in got:
        torch.testing.assert_close(
            got[name], wanted[name], rtol=1e-3, atol=2e-5 * wanted[name].abs().max().item(), msg=lambda m, n=name: n + m
        )


def test_a_frozen_tower_keeps_nothing_for_a_backward():
    """Tensors saved while the tower runs: none when frozen, many otherwise (the check can fail)."""
    model = tiny_model()
    batch = collate(EXAMPLES, model.config)
    counts = []
    for frozen in (False, True):
        model.visual.requires_grad_(not frozen)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.shape) or t, lambda t: t):
            features = TrainingStep(model)._features(batch)
        assert all(rows.requires_grad != frozen for rows in features)
        counts.append(len(saved))
    assert counts[0] > 20 and counts[1] == 0
    TrainingStep(model)(batch).backward()
    assert all(p.grad is None for p in model.visual.parameters())
    assert all(p.grad is not None for p in model.model.parameters())


def test_a_frozen_decoder_passes_gradients_to_the_tower():
    model = tiny_model(tie=False)
    batch = collate(EXAMPLES, model.config)
    TrainingStep(model)(batch).backward()
    expected = _gradients(model)
    model.zero_grad()
    model.model.requires_grad_(False), model.lm_head.requires_grad_(False)
    TrainingStep(model)(batch).backward()
    got = _gradients(model)
    assert got and all(name.startswith("visual.") for name in got)
    for name in got:
        torch.testing.assert_close(got[name], expected[name])


def test_a_pack_of_text_gives_the_tower_gradients_of_exactly_zero():
    model = tiny_model()
    TrainingStep(model)(collate([make_example(1)], model.config)).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.visual.parameters())
