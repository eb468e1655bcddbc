"""The plan of memory and time against models built from the same configs, and a tiny run's own tensors."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import plan
from benchmarks.__main__ import app
from qwen2vl import Qwen2VL
from qwen2vl.config import Qwen2VLConfig
from qwen2vl.training.config import OptimizerConfig
from qwen2vl.training.example import Example
from qwen2vl.training.flops import Work, block_parameters, layer_parameters, parameters, training_flops, work_of
from qwen2vl.training.optim import Optimizer
from qwen2vl.training.packing import collate
from qwen2vl.training.parallel import wrap_blocks
from qwen2vl.training.stages import PARTS, STAGES, freeze, part_of
from qwen2vl.training.step import TrainingStep
from tests.training.samples import IMAGE, make_example, tiny_config, tiny_model

#: Unique parameters of the released sizes, and of their towers with the merger.
RELEASED = {
    "2b": (2_208_985_600, 665_271_296),
    "7b": (8_291_375_616, 675_759_104),
    "72b": (73_405_560_320, 699_356_672),
}


@pytest.mark.parametrize("model", plan.MODELS)
def test_parameters_are_those_of_the_model(model):
    config = Qwen2VLConfig.preset(model)
    built = Qwen2VL.from_config(config, device="meta")
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in built.named_parameters():
        counts[part_of(name)] += parameter.numel()
    assert parameters(config) == counts
    whole, visual = RELEASED[model]
    assert (sum(counts.values()), counts["tower"] + counts["merger"]) == (whole, visual)
    assert layer_parameters(config) == sum(p.numel() for p in built.model.layers[-1].parameters())
    assert block_parameters(config) == sum(p.numel() for p in built.visual.blocks[-1].parameters())
    for stage in STAGES:
        freeze(built, stage)
        learns = sum(p.numel() for p in built.parameters() if p.requires_grad)
        assert plan.trained_parameters(config, stage) == learns


@pytest.mark.parametrize("stage", STAGES)
def test_flops_are_those_of_a_pack_of_the_mix(stage):
    """A sample of the assumed mix: an image of 8 tokens, then 24 of text, all of them taught."""
    config = tiny_config()
    text = torch.arange(24)
    example = Example(
        input_ids=torch.cat((torch.full((8,), IMAGE), text)),
        labels=torch.cat((torch.full((8,), -100), text)),
        pixel_values=torch.zeros(32, 588, dtype=torch.uint8),
        image_grid_thw=torch.tensor([[1, 4, 8]]),
    )
    pack = collate([example] * 3, config)
    recipe = plan.Recipe(vision_share=0.25, image_tokens=8, sample_tokens=32)
    counted = training_flops(config, work_of(pack), set(STAGES[stage]))
    assert plan.flops_per_token(config, stage, recipe) * pack.tokens == pytest.approx(counted, rel=1e-12)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_state_is_what_a_run_holds(stage, tie):
    """Weights, gradients before and after they are taken over, masters and moments, byte by byte."""
    model = tiny_model(tie, dtype=torch.bfloat16)
    freeze(model, stage)
    optimizer = Optimizer(model.named_parameters(), OptimizerConfig(), master_weights=True)
    TrainingStep(model)(collate([make_example(0, "image"), make_example(1)], model.config)).backward()
    weights = sum(p.nbytes for p in model.parameters())
    gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    optimizer.collect()
    gradients += sum(entry.master.grad.nbytes for entry in optimizer.entries)
    state = sum(tensor.nbytes for name, tensor in optimizer.state().items() if not name.endswith(".step"))
    assert plan.state_bytes(model.config, stage) == (weights, gradients, state)
    on_four = plan.memory(model.config, stage, 4, plan.Recipe(max_tokens=64))
    assert on_four.state == (weights + gradients + state) / 4


@pytest.mark.parametrize("stage", STAGES)
def test_kept_activations_are_the_blocks_inputs(stage):
    """What of the blocks' inputs still lives between a checkpointed forward and its backward."""
    model = tiny_model(layers=3)
    freeze(model, stage)
    inputs: list[weakref.ref] = []

    def watch(block, arguments):
        inputs.extend(weakref.ref(x) for x in arguments if isinstance(x, torch.Tensor))

    wrap_blocks(model, checkpoint_activations=True, compiled=False)
    for block in [*model.visual.blocks, *model.model.layers]:
        block.register_forward_pre_hook(watch)
    pack = collate([make_example(0, "image"), make_example(1, "image"), make_example(2)], model.config)
    loss = TrainingStep(model)(pack)
    gc.collect()
    alive = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for ref in inputs if (x := ref()) is not None}
    patches = pack.pixel_values.shape[0]
    assert plan.kept_activations(model.config, stage, pack.tokens, patches, itemsize=4) == sum(alive.values())
    loss.backward()


def test_the_peak_takes_the_worst_moment():
    config, recipe = Qwen2VLConfig.preset("7b"), plan.Recipe()
    for stage in STAGES:
        few, many = (plan.memory(config, stage, n, recipe) for n in (8, 64))
        assert few.state == pytest.approx(8 * many.state)
        assert few.peak - few.state == pytest.approx(many.peak - many.state), "what is not sharded"
        for m in (few, many):
            others = (m.activations, m.loss, m.gathered)
            assert m.state + max(others) < m.peak <= m.state + sum(others)
    longer = plan.memory(config, "multimodal", 8, replace(recipe, max_tokens=2 * recipe.max_tokens))
    assert longer.peak > plan.memory(config, "multimodal", 8, recipe).peak


def test_what_fits_leaves_the_reserve():
    m = plan.Memory(0, 0, 0, 0, 0, 0, peak=74e9)
    assert plan.fits(m, 80, plan.Recipe(reserve=6))
    assert not plan.fits(m, 80, plan.Recipe(reserve=6.1))


def test_time_by_hand():
    """A thousand tokens a GPU at half of one TFLOP/s."""
    config, recipe = tiny_config(), plan.Recipe(mfu=0.5, peak_tflops=1.0)
    expected = 1000 * plan.flops_per_token(config, "vision", recipe) / 0.5e12
    assert plan.seconds(config, "vision", 8, 8000, recipe) == pytest.approx(expected)
    assert plan.tokens_of("vision", recipe) == 600e9 and plan.tokens_of("multimodal", recipe) == 800e9
    assert plan.tokens_of("instruct", recipe) is None


def _cells(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]


def test_the_command():
    done = CliRunner().invoke(app, ["plan", "--mfu", "0.2", "--instruct-tokens", "1e10", "--memory", "24"])
    assert done.exit_code == 0, done.output
    assert "No MFU of this code was measured on a GPU" in " ".join(done.output.split())
    recipe = plan.Recipe(mfu=0.2, instruct_tokens=1e10, memories=(24.0,))
    assert done.output == plan.report(recipe)
    rows = _cells(done.output)
    memory = {tuple(row[:3]): row for row in rows if len(row) == 11}
    assert len(memory) == 1 + 3 * 3 * 3
    assert memory["7B", "multimodal", "8"][-1] == "no" and memory["2B", "instruct", "8"][-1] == "yes"
    time = {tuple(row[:2]): row for row in rows if len(row) == 9}
    days = plan.seconds(Qwen2VLConfig.preset("7b"), "instruct", 64, 1e10, recipe) / 86400
    assert float(time["7B", "instruct"][7]) == pytest.approx(days, abs=0.05)
    assert [row[6:] for key, row in time.items() if key[1] == "instruct"] != [["–"] * 3] * 3


def test_without_a_token_count_there_are_no_days():
    rows = [row for row in _cells(plan.report(plan.Recipe())) if len(row) == 9 and row[1] == "instruct"]
    assert len(rows) == 3 and all(row[3] == "–" and row[6:] == ["–"] * 3 for row in rows)


def test_adapters_save_the_weights_gradients_and_nothing_else():
    """Against a decoder alone: forward, and in the backward what comes in, two thirds of training all of it; attention,
    which has no weights, costs what it did."""
    config = Qwen2VLConfig.preset("2b")
    text = Work(tokens=1000.0, pairs=0.0, supervised=500.0, patches=0.0, patch_pairs=0.0)
    full, adapted = (training_flops(config, text, {"llm"}, adapters=on) for on in (False, True))
    assert adapted == pytest.approx(2 / 3 * full)
    pairs = Work(tokens=0.0, pairs=1e6, supervised=0.0, patches=0.0, patch_pairs=0.0)
    full, adapted = (training_flops(config, pairs, {"llm"}, adapters=on) for on in (False, True))
    assert adapted == full > 0
