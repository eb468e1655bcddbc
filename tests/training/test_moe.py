"""Training of experts: the load-balancing loss of a step, whom it reaches, and runs that write what can be loaded."""

import pytest
import torch

from qwen2vl import Qwen2VL
from qwen2vl.moe import load_balancing_loss, router_probabilities
from qwen2vl.training import parallel
from qwen2vl.training.config import ParallelConfig
from qwen2vl.training.errors import TrainingConfigError
from qwen2vl.training.packing import collate
from qwen2vl.training.stages import freeze
from qwen2vl.training.step import TrainingStep
from tests.training import runs
from tests.training.samples import make_example, tiny_model, tiny_moe_config

EXAMPLES = [make_example(0, "image"), make_example(1)]


def _step(**changes):
    model = tiny_model(config=tiny_moe_config(**changes), dtype=torch.float64)
    return TrainingStep(model), collate(EXAMPLES, model.config)


def test_a_step_adds_its_share_of_the_load_balancing_loss():
    step, batch = _step()
    plain, _ = _step(router_aux_loss_coef=0.0)
    seen = []
    model = step.model
    features = step._features(batch)
    model.hidden_states(batch.input_ids, batch.positions, batch.cu_seqlens, features, seen)
    aux = load_balancing_loss(seen, 2)
    assert [one.shape for one in seen] == [(batch.tokens, 5)] * 2 and aux > 2
    torch.testing.assert_close(step(batch, 0.1, 0.25), plain(batch, 0.1) + 0.25 * 0.5 * aux, rtol=1e-12, atol=0)
    torch.testing.assert_close(step(batch, by_sample=True), plain(batch, by_sample=True), rtol=1e-12, atol=0)


def test_every_expert_that_was_met_learns_and_no_other():
    step, batch = _step(num_experts=40)
    step(batch, 1 / batch.supervised).backward()
    assert all(p.grad is not None for name, p in step.model.named_parameters() if name.startswith("model."))
    seen = []
    features = step._features(batch)
    step.model.hidden_states(batch.input_ids, batch.positions, batch.cu_seqlens, features, seen)
    met = set(router_probabilities(seen[0]).topk(2, -1).indices.flatten().tolist())
    assert 2 < len(met) < 40
    experts = step.model.model.layers[0].mlp.experts
    for weight in (experts.gate_up_proj, experts.down_proj):
        assert {e for e in range(40) if weight.grad[e].any()} == met


def test_routers_that_do_not_learn_are_not_balanced():
    """The tower, which learns in the first stage, is not to steer them."""
    step, batch = _step()
    plain, _ = _step(router_aux_loss_coef=0.0)
    freeze(step.model, "vision")
    assert torch.equal(step(batch), plain(batch))


def test_rows_that_fill_a_product_up_are_no_tokens(monkeypatch):
    """A CPU's 16-bit products want a multiple of 8 rows; what is appended has a router's choice, and no say."""
    step, batch = _step()
    want = step(batch)
    monkeypatch.setattr("qwen2vl.text.idle_rows", lambda x: -x.shape[0] % 8 or 8)
    torch.testing.assert_close(step(batch), want, rtol=1e-9, atol=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs.checkpoint(tmp_path_factory.mktemp("start"), config=tiny_moe_config())


def test_checkpointed_and_compiled_layers_change_nothing(folder, tmp_path, monkeypatch):
    """Compiled whole: once for each kind of layer, whatever the experts that packs meet."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    plain = runs.make(folder, tmp_path / "plain")
    kept = runs.make(folder, tmp_path / "kept", run={"checkpoint_activations": True})
    fast = runs.make(folder, tmp_path / "fast")
    monkeypatch.setattr(parallel, "blocks", lambda model: model.model.layers)
    parallel.wrap_blocks(fast.model, checkpoint_activations=False, compiled=True, backend=backend)
    for _ in range(2):
        first = [trainer.train_step() for trainer in (plain, kept, fast)]
        assert first[0].loss == first[1].loss and abs(first[0].loss - first[2].loss) < 1e-5
    assert len(compiled) == 3
    kept_weights, fast_weights = runs.weights(kept), runs.weights(fast)
    for name, value in runs.weights(plain).items():
        assert torch.equal(value, kept_weights[name]), name
        torch.testing.assert_close(value, fast_weights[name], rtol=1e-3, atol=1e-5)


def test_a_run_is_exported_and_resumed(folder, tmp_path):
    trainer = runs.make(folder, tmp_path, run={"steps": 1})
    trainer.run()
    exported = dict(Qwen2VL.from_pretrained(tmp_path / "model", device="cpu").named_parameters())
    resumed = runs.weights(runs.make(folder, tmp_path, resume=True, run={"steps": 1}))
    for name, value in runs.weights(trainer).items():
        assert torch.equal(exported[name], value) and torch.equal(resumed[name], value), name


def test_ranks_that_split_a_layer_have_as_many_experts_each(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(TrainingConfigError, match=r"parallel\.tensor: 2 does not divide num_experts, 5"):
        parallel.start(ParallelConfig(tensor=2), tiny_moe_config())
    with pytest.raises(TrainingConfigError, match="2 does not divide shared_expert_intermediate_size, 41"):
        config = tiny_moe_config(num_experts=6, shared_expert_intermediate_size=41)
        parallel.start(ParallelConfig(tensor=2), config)
