"""The loop in one process: resume after a kill, frozen parts, the non-finite sample, logs, export, adapters."""

import csv
import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch

from qwen2vl import Qwen2VL
from qwen2vl.training import checkpoint
from qwen2vl.training.errors import NonFiniteLossError, TrainingConfigError
from qwen2vl.training.logs import draw_loss
from qwen2vl.training.optim import lr_factor
from qwen2vl.training.packing import Batch
from qwen2vl.training.parallel import refuse_sharded
from qwen2vl.training.stages import STAGES, part_of
from qwen2vl.training.storage import TensorReader
from tests.training import runs
from tests.training.samples import InMemory, mixed, tiny_model, tiny_moe_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.checkpoint(tmp_path_factory.mktemp("checkpoint"))


def _same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class _Drawing(InMemory):
    """Hides some labels at random, as augmentation would."""

    def __iter__(self):
        for example in super().__iter__():
            keep = torch.rand(example.tokens) < 0.8
            yield replace(example, labels=torch.where(keep, example.labels, -100))


def _drawing(rank=0, world=1):
    return _Drawing(mixed().examples, rank, world)


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "adamw"), ("bfloat16", "adamw"), ("bfloat16", "muon")])
def test_killed_at_any_step_and_resumed_it_is_bitwise_the_same(folder, tmp_path, dtype, kind):
    """Losses, norms and weights; with float32 masters of bfloat16 weights too."""
    records = []
    tables = {"model": {"dtype": dtype}, "optimizer": {"kind": kind}}
    whole = runs.make(folder, tmp_path / "whole", on_step=records.append, **tables)
    whole.run()
    assert len(records) == 4
    for killed in (1, 2, 3):
        output = tmp_path / f"killed-{killed}"
        first = runs.make(folder, output, **tables)
        for _ in range(killed):
            first.train_step()
        first._save()
        first.train_step()  # lost: the kill comes before it is saved
        again = []
        resumed = runs.make(folder, output, resume=True, on_step=again.append, **tables)
        assert resumed.step == killed
        resumed.run()
        assert [(r.step, r.loss, r.grad_norm, r.lr_llm, r.tokens) for r in again] == [
            (r.step, r.loss, r.grad_norm, r.lr_llm, r.tokens) for r in records[killed:]
        ]
        _same(runs.weights(resumed), runs.weights(whole))


def test_resume_restores_the_random_generators(folder, tmp_path):
    """Without dropout only data draws, so two runs that go on from one state draw the same."""
    trainer = runs.make(folder, tmp_path, dataset=_drawing, run={"lookahead": 1})
    trainer.train_step()
    trainer._save()
    expected = torch.rand(3)
    torch.manual_seed(99)
    runs.make(folder, tmp_path, dataset=_drawing, run={"lookahead": 1}, resume=True)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("stage", list(STAGES))
def test_what_is_frozen_stays_bitwise_and_what_is_not_moves(folder, tmp_path, stage):
    trainer = runs.make(folder, tmp_path, stage, optimizer={"warmup_steps": 0})
    before = runs.weights(trainer)
    learns = {name for name in before if part_of(name) in STAGES[stage]}
    assert {name for name, p in trainer.model.named_parameters() if p.requires_grad} == learns
    for _ in range(2):
        trainer.train_step()
    for name, now in runs.weights(trainer).items():
        assert torch.equal(now, before[name]) != (name in learns), name
    assert {e.name for e in trainer.optimizer.entries} == learns, "no optimiser state for what is frozen"


def test_accumulated_packs_are_the_mean_over_all_their_tokens(folder, tmp_path):
    """Two packs of different numbers of supervised tokens: gradients of one pack of both, not the mean of two means."""
    trainer = runs.make(folder, tmp_path, optimizer={"clip": 1e9})
    packs = [next(trainer.packer) for _ in range(2)]
    assert packs[0].supervised != packs[1].supervised
    trainer.packer = iter(packs)
    trainer.optimizer.step = lambda factor: torch.zeros(())
    record = trainer.train_step()
    got = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    total = sum(trainer.step_module(pack) for pack in packs) / sum(pack.supervised for pack in packs)
    total.backward()
    assert math.isclose(record.loss, total.item(), rel_tol=1e-6)
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-4, atol=1e-6 * p.grad.abs().max().item())


def test_checkpointed_activations_and_compiled_blocks_change_nothing(folder, tmp_path, monkeypatch):
    """Packs of any number of samples, of any lengths: each tower's block is compiled once with a residual and once
    without."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr("qwen2vl.training.trainer.wrap_blocks", lambda model, **on: _wrap(model, backend=backend, **on))
    from qwen2vl.training.parallel import wrap_blocks as _wrap

    torch._dynamo.reset()
    plain = runs.make(folder, tmp_path / "a")
    kept = runs.make(folder, tmp_path / "b", run={"checkpoint_activations": True})
    fast = runs.make(folder, tmp_path / "c", run={"compile": True})
    for trainer in (plain, kept, fast):
        trainer.records = [trainer.train_step() for _ in range(4)]
    assert [r.loss for r in kept.records] == [r.loss for r in plain.records]
    _same(runs.weights(kept), runs.weights(plain))
    for a, b in zip(fast.records, plain.records, strict=True):
        assert math.isclose(a.loss, b.loss, rel_tol=1e-5)
    for trainer in (kept, fast):
        for _ in range(10):
            trainer.train_step()
    torch.testing.assert_close(runs.weights(fast), runs.weights(kept), rtol=1e-2, atol=1e-3)
    assert len(compiled) == 4, f"28 packs: compiled {len(compiled)} times"


def test_checkpointed_activations_keep_less(folder, tmp_path):
    sizes = []
    for on in (False, True):
        trainer = runs.make(folder, tmp_path / str(on), run={"checkpoint_activations": on})
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, k=kept: k.append(t.nbytes) or t, lambda t: t):
            trainer.step_module(next(trainer.packer))
        sizes.append(sum(kept))
    assert sizes[1] < 0.5 * sizes[0], sizes


def test_a_non_finite_loss_stops_and_names_the_sample(folder, tmp_path):
    trainer = runs.make(folder, tmp_path, dataset=runs.poisoned, run={"accumulation": 4})
    before = runs.weights(trainer)
    with pytest.raises(NonFiniteLossError, match=r"^step 1: .* in 1 of \d+ samples: memory:5 \(nan\)\. No weight"):
        trainer.train_step()
    _same(runs.weights(trainer), before)


def test_a_gradient_that_is_not_finite_under_a_finite_loss_stops_before_the_weights(folder, tmp_path):
    trainer = runs.make(folder, tmp_path, optimizer={"warmup_steps": 0})
    trainer.train_step()
    before = runs.weights(trainer)
    moments = {name: tensor.clone() for name, tensor in trainer.optimizer.state().items()}
    name, parameter = next(iter(trainer.model.named_parameters()))
    parameter.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), float("inf")))
    with pytest.raises(
        NonFiniteLossError, match=rf"^step 2: the loss is \d.* in 1 parameters \({name}\), from .*memory:"
    ):
        trainer.train_step()
    _same(runs.weights(trainer), before)
    _same(trainer.optimizer.state(), moments)
    assert trainer.step == 1


def test_weights_that_are_not_finite_are_told_from_samples(folder, tmp_path):
    trainer = runs.make(folder, tmp_path)
    trainer.model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(NonFiniteLossError, match="the weights are likely not finite"):
        trainer.train_step()


def test_logs_and_export(folder, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("tensorboard")
    (tmp_path / "checkpoint").mkdir()
    tables = {"run": {"plot": True, "tensorboard": True, "peak_tflops": 0.5, "keep": 2}}
    first = runs.make(folder, tmp_path / "out", **tables)
    first.config = replace(first.config, run=replace(first.config.run, steps=3))
    first.run()
    runs.make(folder, tmp_path / "out", resume=True, **tables).run()
    with (tmp_path / "out" / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    for row in rows:
        assert float(row["tokens_per_s"]) > 0 and 0 < float(row["mfu"]) < 1 and int(row["supervised"]) > 0
        assert float(row["lr_tower"]) == pytest.approx(0.5 * float(row["lr_llm"]))
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "out" / "tensorboard").iterdir())
    assert checkpoint.steps_saved(tmp_path / "out") == [3, 4], "keep = 2"
    assert not list((tmp_path / "out" / "checkpoints").glob(".*partial"))
    exported = Qwen2VL.from_pretrained(tmp_path / "out" / "model", device="cpu")
    final = runs.make(folder, tmp_path / "out", resume=True, **tables)
    _same(dict(exported.named_parameters()), runs.weights(final))


@pytest.mark.parametrize(("steps", "window"), [(1, 0), (3, 0), (8, 2), (30, 7), (400, 10), (1000, 20)])
def test_the_plot_shows_a_mean_that_a_short_run_has_too(tmp_path, monkeypatch, steps, window):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *args, **options: drawn.append(self))
    losses = [5.0 / (1 + n % 7) for n in range(steps)]
    (tmp_path / "log.csv").write_text("step,loss\n" + "".join(f"{n + 1},{loss}\n" for n, loss in enumerate(losses)))
    draw_loss(tmp_path)
    by_step, *mean = drawn[0].axes[0].lines
    assert by_step.get_ydata().tolist() == losses
    if not window:
        assert not mean and by_step.get_alpha() is None and by_step.get_marker() == ".", "one line, and not a pale one"
        return
    assert mean[0].get_label() == f"mean of {window} steps"
    assert mean[0].get_ydata()[-1] == pytest.approx(sum(losses[-window:]) / window)


def test_rates_are_those_of_the_schedule(folder, tmp_path):
    """Warm-up and floor included, as the log says them and as the optimiser takes them."""
    tables = {"optimizer": {"lr": 0.5, "lr_tower": 0.25, "warmup_steps": 2, "min_lr_ratio": 0.2}, "run": {"steps": 6}}
    trainer = runs.make(folder, tmp_path, **tables)
    for step in range(6):
        record = trainer.train_step()
        factor = lr_factor(step, steps=6, warmup=2, minimum=0.2)
        assert (record.lr_llm, record.lr_merger, record.lr_tower) == (0.5 * factor, 0.5 * factor, 0.25 * factor)
        taken = {group["part"]: group["lr"] for one in trainer.optimizer.optimizers for group in one.param_groups}
        assert taken == {"llm": record.lr_llm, "merger": record.lr_merger, "tower": record.lr_tower}


def test_a_log_is_cut_where_a_run_resumes(folder, tmp_path):
    """Steps after the checkpoint, and a line that a kill cut short, are taken again."""
    first = runs.make(folder, tmp_path, run={"save_every": 2, "steps": 3})
    first.run()
    assert checkpoint.steps_saved(tmp_path) == [2, 3]
    import shutil

    shutil.rmtree(checkpoint.folder_of(tmp_path, 3))
    with (tmp_path / "log.csv").open("a") as file:
        file.write("4,1.23")
    runs.make(folder, tmp_path, run={"save_every": 2, "steps": 4}, resume=True).run()
    with (tmp_path / "log.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2", "3", "4"]


def test_what_is_refused_before_anything_runs(folder, tmp_path):
    runs.make(folder, tmp_path / "out", run={"steps": 1}, optimizer={"warmup_steps": 0}).run()
    with pytest.raises(TrainingConfigError, match=r"run.output: .*out holds a run of 1 steps; resume it or move it"):
        runs.make(folder, tmp_path / "out")
    with pytest.raises(TrainingConfigError, match=r"resume: .* has stage 'multimodal', this run has 'instruct'"):
        runs.make(folder, tmp_path / "out", "instruct", resume=True)
    with pytest.raises(TrainingConfigError, match="stage: must be one of vision, multimodal, instruct, got 'pretrain'"):
        runs.make(folder, tmp_path / "new", "pretrain")
    for tables, message in (
        ({"model": {"dtype": "bfloat16"}}, "has dtype 'float32', this run has 'bfloat16'"),
        ({"model": {"master_weights": False}}, "has master_weights True, this run has False"),
        ({"lora": {"rank": 2}}, r"has lora None, this run has \[2, "),
        ({"optimizer": {"kind": "muon"}}, "has optimizer 'adamw', this run has 'muon'"),
    ):
        with pytest.raises(TrainingConfigError, match=f"resume: .* {message}"):
            runs.make(folder, tmp_path / "out", resume=True, **tables)
    for path in checkpoint.folder_of(tmp_path / "out", 1).glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TrainingConfigError, match=r"resume: .*step-00000001 is damaged or of another model: "):
        runs.make(folder, tmp_path / "out", resume=True)
    with pytest.raises(TrainingConfigError, match="lora: adapters of the decoder do not go with stage vision"):
        runs.make(folder, tmp_path / "new", "vision", lora={})
    for mode, message in (
        ({"mode": "fsdp"}, "parallel.mode: 'fsdp' needs processes: start with torchrun"),
        ({"tensor": 2}, "parallel.mode: 'none' is one process, there are 1 and tensor 2"),
    ):
        with pytest.raises(TrainingConfigError, match=message):
            runs.make(folder, tmp_path / "new", parallel=mode)
    with pytest.raises(TrainingConfigError, match=r"loss: 'liger' runs on CUDA"):
        runs.make(folder, tmp_path / "new", run={"loss": "liger"})


def test_adapters_train_alone_and_merge_into_the_export(folder, tmp_path):
    pytest.importorskip("peft")
    tables = {"lora": {"rank": 2, "alpha": 8.0}, "run": {"steps": 2}, "optimizer": {"lr": 0.1}}
    trainer = runs.make(folder, tmp_path, "instruct", **tables)
    before = runs.weights(trainer)
    learns = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    adapter = trainer.model.model.layers[0].mlp.up_proj
    assert adapter.scaling == {"default": 8.0 / 2}
    assert len(learns) == 2 * 2 * 7 and all("model.layers." in n and ".lora_" in n for n in learns), "no tower"
    trainer.run()
    for name, now in runs.weights(trainer).items():
        assert torch.equal(now, before[name]) != (name in learns), name
    exported = Qwen2VL.from_pretrained(tmp_path / "model", device="cpu").train()
    batch: Batch = next(trainer.packer)
    from qwen2vl.training.step import TrainingStep

    with torch.no_grad():
        merged, adapted = TrainingStep(exported)(batch), trainer.step_module(batch)
        plain = TrainingStep(tiny_model())(batch)
    torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=0)
    assert not torch.isclose(plain, adapted, rtol=1e-3)
    beside = Qwen2VL.from_pretrained(folder, device="cpu", adapter=tmp_path / "adapter").train()
    with torch.no_grad():
        assert torch.equal(TrainingStep(beside)(batch), adapted), "what was trained, not what was merged"
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (2, 8, str(folder))
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    resumed = runs.make(folder, tmp_path, "instruct", resume=True, **tables)
    _same(runs.weights(resumed), runs.weights(trainer))
    saved = TensorReader(checkpoint.folder_of(tmp_path, 2)).read_metadata().state_dict_metadata
    assert {name.removeprefix("model.") for name in saved if name.startswith("model.")} == learns, "nothing frozen"


def test_adapters_of_the_tower_when_asked_and_a_target_that_is_none(folder, tmp_path):
    pytest.importorskip("peft")
    trainer = runs.make(folder, tmp_path, "instruct", lora={"tower": True, "dropout": 0.25})
    dropouts = [m for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts and all(m.p == 0.25 and m.training for m in dropouts)
    learns = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert sum(name.startswith("visual.blocks.") for name in learns) == 2 * 2 * 4
    trainer.train_step()
    with pytest.raises(TrainingConfigError, match=r"lora\.targets: 'qkv' names no linear layer; there are down_proj, "):
        runs.make(folder, tmp_path / "b", "instruct", lora={"targets": ["qkv"]})


def test_adapters_of_experts_when_asked(folder, tmp_path):
    pytest.importorskip("peft", minversion="0.19.1")
    model = tiny_model(config=tiny_moe_config())
    model.save_pretrained(tmp_path / "base")
    tables = {"lora": {"rank": 2, "experts": True, "targets": ["q_proj"]}, "optimizer": {"lr": 0.1}}
    trainer = runs.make(tmp_path / "base", tmp_path / "out", "instruct", run={"steps": 2}, **tables)
    learns = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert len(learns) == 2 * (3 + 2 * 2) and sum(".experts." in name for name in learns) == 2 * 2 * 2
    trainer.run()
    beside = Qwen2VL.from_pretrained(tmp_path / "base", device="cpu", adapter=tmp_path / "out" / "adapter")
    exported = Qwen2VL.from_pretrained(tmp_path / "out" / "model", device="cpu")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(exported(ids), beside(ids), rtol=1e-4, atol=1e-4)
        assert not torch.isclose(exported(ids), model(ids), rtol=1e-2).all()
    with pytest.raises(TrainingConfigError, match=r"lora\.experts: the model has no routed experts"):
        runs.make(folder, tmp_path / "b", "instruct", lora={"experts": True})
    with pytest.raises(TrainingConfigError, match=r"lora\.dropout: must be 0 with lora\.experts"):
        runs.make(folder, tmp_path / "b", "instruct", lora={"experts": True, "dropout": 0.1})
    with pytest.raises(
        TrainingConfigError, match=r"lora\.experts: goes with parallel\.mode 'none' and 'ddp', got 'fsdp'"
    ):
        refuse_sharded(trainer.model, "fsdp")


def test_ctrl_c_in_the_middle_of_a_save_is_told_and_counts_when_it_is_over(folder, tmp_path, monkeypatch, caplog):
    trainer = runs.make(folder, tmp_path, run={"steps": 2})
    (tmp_path / "checkpoints" / ".step-00000099.partial").mkdir(parents=True)  # left by a kill
    save = torch.save

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        save(*args)

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    told = [record.getMessage() for record in caplog.records if record.name == "qwen2vl.interrupts"]
    assert told == ["interrupted: the checkpoint that is being written is finished first"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    monkeypatch.setattr(torch, "save", save)
    assert runs.make(folder, tmp_path, resume=True, run={"steps": 2}).step == 1
