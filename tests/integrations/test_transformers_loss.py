"""The feature ``loss``: the training loss of transformers' models without logits, and all that keeps stock's code.

Runs with whichever transformers is installed, 4.57 or 5. What stock does is the oracle throughout.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qwen2vl_kernels.integrations import transformers as adapter
from qwen2vl_kernels.integrations.transformers_loss import causal_lm

from ..conftest import assert_two_times
from .tiny_models import FAMILIES, VERSION_5, model, prompt

#: float32: two orders of the same sums differ by less.
ROUNDING = 1e-5


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.delenv("QWEN2VL_KERNELS_DISABLE", raising=False)
    adapter.restore()
    with warnings.catch_warnings():
        warnings.simplefilter("error", adapter.PatchWarning)
        warnings.filterwarnings("ignore", ".* was never tested", adapter.PatchWarning)
        yield
        adapter.restore()


def _batch(family: str) -> dict[str, Any]:
    inputs = prompt(family)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, 3] = -100
    return {**inputs, "labels": labels}


def _text(**more: Any) -> dict[str, Any]:
    ids = torch.arange(12, 40).view(2, 14)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone(), **more}
    return made | ({"mm_token_type_ids": torch.zeros_like(ids).int()} if VERSION_5 else {})


def _step(net: Any, batch: dict[str, Any], **options: Any) -> tuple[Any, list[torch.Tensor]]:
    """The output and the gradients of everything that learns."""
    for module in net.modules():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None
    net.zero_grad()
    output = net(**batch, **options)
    output.loss.backward()
    return output, [p.grad.clone() for p in net.parameters() if p.grad is not None]


def _both(net: Any, batch: dict[str, Any], **options: Any) -> tuple[Any, Any]:
    """Stock's output and ours, with equal losses and gradients."""
    want, gradients = _step(net, batch, **options)
    adapter.apply(features=["loss"])
    got, ours = _step(net, batch, **options)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-6, atol=0)
    largest = max(float(g.norm()) for g in gradients)
    for one, two in zip(ours, gradients, strict=True):
        assert (one - two).norm() <= ROUNDING * max(float(two.norm()), 1e-3 * largest)
    return want, got


# ------------------------------------------------------------------------------------------ equal to stock


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family):
    """And everything else of the output, of the same class, but for the logits."""
    want, got = _both(model(family).train(), _batch(family))
    assert got.logits is None and type(got) is type(want) and got.keys() == want.keys() - {"logits"}


@pytest.mark.parametrize(
    "options", [{"num_items_in_batch": torch.tensor(17)}, {"num_items_in_batch": 9}, {"ignore_index": 20}], ids=str
)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_goes_to_the_loss_function(family, options):
    """Whatever this version of transformers hands on, of which 4.57 hands nothing on in Qwen3-VL."""
    _, got = _both(model(family).train(), _text(), **options)
    assert got.logits is None


def test_labels_that_are_shifted_already():
    """And the packed rows of a collator, whose boundaries are their labels' alone."""
    batch = _text()
    labels = batch["labels"]
    labels[0, 5:9] = -100
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    net = model("Qwen2VL").train()
    _, got = _both(net, batch)
    given = _step(net, batch, shift_labels=shifted)[0]
    assert torch.equal(given.loss, got.loss) and given.logits is None


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_by_the_two_times_rule(family):
    exact, gradients = _step(model(family).train(), _text())
    net = model(family, torch.bfloat16).train()
    stock, theirs = _step(net, _text())
    adapter.apply(features=["loss"])
    got, ours = _step(net, _text())
    assert got.loss.dtype == torch.float32 and got.logits is None
    assert_two_times(got.loss.detach(), stock.loss.detach(), exact.loss.detach(), 1e-3)
    for one, two, right in zip(ours, theirs, gradients, strict=True):
        if right.norm() > 1e-3:
            assert_two_times(one, two, right, 1e-2)


def test_autocast():
    net, batch = model("Qwen2VL").train(), _text()
    with torch.autocast("cpu", torch.bfloat16):
        stock, theirs = _step(net, batch)
        adapter.apply(features=["loss"])
        got, ours = _step(net, batch)
    assert got.logits is None and all(g.dtype == torch.float32 for g in ours)
    torch.testing.assert_close(got.loss, stock.loss, rtol=1e-5, atol=0)
    for one, two in zip(ours, theirs, strict=True):
        assert (one - two).norm() <= 2e-2 * two.norm() + 1e-6


def test_a_frozen_head_and_a_tied_one():
    net = model("Qwen2VL").train()
    net.lm_head.requires_grad_(False)
    _, got = _both(net, _text())
    assert got.logits is None and net.lm_head.weight.grad is None
    adapter.restore()
    net = model("Qwen2VL").train()
    net.lm_head.weight = net.model.language_model.embed_tokens.weight
    assert _both(net, _text())[1].logits is None


@pytest.mark.parametrize("family", FAMILIES)
def test_with_all_other_features(family):
    net, batch = model(family).train(), _batch(family)
    want, gradients = _step(net, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", adapter.PatchWarning)  # of a version that takes some of them only
        adapter.apply(features=adapter.FEATURES)
    got, ours = _step(net, batch)
    torch.testing.assert_close(got.loss, want.loss, rtol=ROUNDING, atol=0)
    largest = max(float(g.norm()) for g in gradients)
    for one, two in zip(ours, gradients, strict=True):
        assert (one - two).norm() <= ROUNDING * max(float(two.norm()), 1e-3 * largest)
    assert got.logits is None


def test_on_one_model():
    one, other = model("Qwen2VL").train(), model("Qwen2VL").train()
    adapter.apply(one, features=["loss"])
    assert _step(one, _text())[0].logits is None and _step(other, _text())[0].logits is not None


def test_checkpointed_and_compiled():
    net = model("Qwen2VL").train()
    net.gradient_checkpointing_enable({"use_reentrant": False})
    assert _both(net, _text(use_cache=False))[1].logits is None
    net = model("Qwen2VL").train()
    want = _step(net, _text(use_cache=False))[0].loss
    torch._dynamo.reset()
    net.compile(backend="aot_eager")
    torch.testing.assert_close(_step(net, _text(use_cache=False))[0].loss, want)


def test_the_stand_in_is_traced():
    """The head, the loss and what lies between them are one graph."""
    net = model("Qwen2VL").train()
    adapter.apply(net, features=["loss"])
    outputs = net.model(**{k: v for k, v in _text(use_cache=False).items() if k != "labels"})
    net.model.forward = lambda **_: outputs
    torch._dynamo.reset()
    run = torch.compile(lambda labels: net(labels=labels).loss, backend="aot_eager", fullgraph=True)
    labels = _text()["labels"]
    torch.testing.assert_close(run(labels), net(labels=labels).loss)


# -------------------------------------------------------------------------------- where stock's code runs


def _keeps_logits(net: Any, batch: dict[str, Any] | None = None, **options: Any) -> Any:
    _, got = _both(net, batch or _text(), **options)
    assert got.logits is not None
    return got


def test_evaluation_and_no_labels():
    net = model("Qwen2VL")
    _keeps_logits(net)
    net.train()
    batch = _text()
    del batch["labels"]
    output = net(**batch)
    assert output.loss is None and output.logits is not None


def test_by_name_only():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", adapter.PatchWarning)
        adapter.apply()
    assert not [row for row in adapter.status() if row.feature.endswith(" loss") and row.state == "applied"]
    assert _step(model("Qwen2VL").train(), _text())[0].logits is not None
    assert set(adapter.FEATURES) - set(adapter.DEFAULT) == {"loss"}


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states(family):
    """Whether they are asked for in the call or in the configuration."""
    net = model(family).train()
    assert len(_keeps_logits(net, output_hidden_states=True).hidden_states) == 3
    net.config.output_hidden_states = True
    assert _step(net, _text())[0].logits is not None
    assert _step(net, _text(), output_hidden_states=False)[0].logits is None


def test_tuples():
    net, batch = model("Qwen2VL").train(), _text()
    adapter.apply(features=["loss"])
    loss, logits = net(**batch, return_dict=False)[:2]
    assert loss.ndim == 0 and logits.shape == (2, 14, 100)


@pytest.mark.skipif(not VERSION_5, reason="4.57's Qwen2-VL has no logits_to_keep")
@pytest.mark.parametrize("kept", [5, torch.arange(9, 14)], ids=["number", "places"])
def test_logits_to_keep(kept):
    net = model("Qwen2VL").train()
    batch = _text(logits_to_keep=kept)
    batch["labels"] = batch["labels"][:, -5:]
    assert _keeps_logits(net, batch).logits.shape == (2, 5, 100)


def test_a_loss_function_of_the_users():
    net, seen = model("Qwen2VL").train(), []

    def loss(logits, labels, vocab_size, **_):
        seen.append(logits.shape)
        return logits.square().mean()

    net.loss_function = loss
    _keeps_logits(net)
    assert seen == [(2, 14, 100)] * 2


class _Added(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def _own_class(net: Any) -> None:
    net.lm_head.__class__ = _Added


def _parametrized(net: Any) -> None:
    nn.utils.parametrizations.weight_norm(net.lm_head)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.lm_head.register_forward_hook(lambda module, args, output: 2 * output),
        lambda net: net.lm_head.register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        lambda net: net.lm_head.register_full_backward_hook(lambda module, grad, output: (2 * grad[0],)),
        lambda net: net.lm_head.register_full_backward_pre_hook(lambda module, grad: (2 * grad[0],)),
        _own_class,
        _parametrized,
    ],
    ids=["hook", "pre-hook", "backward hook", "backward pre-hook", "class", "parametrized"],
)
def test_a_head_that_is_more_than_its_weight(change):
    net = model("Qwen2VL").train()
    change(net)
    _keeps_logits(net)


@pytest.mark.parametrize("target", ["q_proj", "lm_head", "saved"])
def test_peft(target):
    """LoRA of other layers leaves the head as it is, which then has no gradient; of the head itself it is stock's."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    saved = {"modules_to_save": ["lm_head"]} if target == "saved" else {}
    layer = "q_proj" if target == "saved" else target
    config = peft.LoraConfig(r=2, target_modules=[layer], init_lora_weights=False, **saved)
    net = peft.get_peft_model(model("Qwen2VL"), config).train()
    _, got = _both(net, _text())
    assert (got.logits is None) == (target == "q_proj")


def test_a_forward_of_the_users():
    """It may do anything with the logits."""
    net = model("Qwen2VL").train()

    class Own(type(net)):
        def forward(self, input_ids, labels, **kwargs):
            logits = self.lm_head(self.model(input_ids, **kwargs).last_hidden_state)
            return SimpleNamespace(loss=logits.square().mean(), logits=logits)

    net.__class__ = Own
    with pytest.warns(adapter.PatchWarning, match="leaves alone what runs other code: Own.forward"):
        adapter.apply(net, features=["loss"])
    assert _step(net, _text())[0].logits.shape == (2, 14, 100)


def test_another_versions_arithmetic_on_logits_is_not_overlooked():
    """A forward that does something with the logits before the loss would do it with hidden states."""
    net = model("Qwen2VL").train()

    def capped(self, input_ids=None, labels=None, **kwargs):
        hidden = self.model(input_ids, **kwargs).last_hidden_state
        logits = 30 * torch.tanh(self.lm_head(hidden) / 30)
        return self.loss_function(logits=logits, labels=labels, vocab_size=100)

    capped.__module__ = "transformers.models.qwen2_vl.modeling_qwen2_vl"
    with pytest.raises(RuntimeError, match="computes with the logits before its loss function sees them"):
        causal_lm(capped)(net, **_text())


@pytest.mark.parametrize("alone", [False, True], ids=["in the model", "by itself"])
def test_a_sharded_head(alone):
    """FSDP2 gathers the root's parameters for its forward; a head that is sharded by itself gathers in its own."""
    from torch._C._distributed_c10d import HashStore
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    net = model("Qwen2VL").train()
    want, gradients = _step(net, _text())
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=HashStore())
    try:
        mesh = init_device_mesh("cpu", (1,))
        if alone:
            fully_shard(net.lm_head, mesh=mesh)
        fully_shard(net, mesh=mesh)
        adapter.apply(features=["loss"])
        got, ours = _step(net, _text())
        assert (got.logits is None) == (not alone)
        torch.testing.assert_close(got.loss, want.loss)
        for one, two in zip(ours, gradients, strict=True):
            assert isinstance(one, DTensor)
            torch.testing.assert_close(one.full_tensor(), two, rtol=1e-4, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


# -------------------------------------------------------------------------------------------- the Trainer


def test_trainer(tmp_path):
    """Accumulation, whose losses are divided by the items of a step, and evaluation, whose metrics read logits."""
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from transformers import Trainer, TrainingArguments

    rows = [{name: value[n % 2, : 8 + n % 3 * 3] for name, value in _text().items()} for n in range(8)]

    def collate(examples):
        width = max(len(e["input_ids"]) for e in examples)
        fill = {"input_ids": 0, "attention_mask": 0, "labels": -100, "mm_token_type_ids": 0}
        return {
            name: torch.stack(
                [nn.functional.pad(e[name], (0, width - len(e[name])), value=fill[name]) for e in examples]
            )
            for name in examples[0]
        }

    def run() -> tuple[list[float], dict[str, float]]:
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2, use_cpu=True,
            learning_rate=1e-3, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True,
            remove_unused_columns=False, adam_epsilon=1e-2,
        )  # fmt: skip
        trainer = Trainer(
            model("Qwen2VL"), arguments, data_collator=collate, train_dataset=rows, eval_dataset=rows[:2],
            compute_metrics=lambda p: {"mean": float(p.predictions[0].mean())},
        )  # fmt: skip
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        return losses, {k: v for k, v in trainer.evaluate().items() if k in ("eval_loss", "eval_mean")}

    want = run()
    adapter.apply(features=["loss"])
    losses, metrics = run()
    assert len(losses) == 2 and losses == pytest.approx(want[0], rel=1e-4)
    assert metrics == pytest.approx(want[1], rel=1e-3, abs=1e-5) and len(metrics) == 2
