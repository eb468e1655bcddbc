"""Steps of decoding where the host goes on while the device works: nothing is read there, whatever runs next."""

import gc
import weakref
from bisect import bisect_right
from collections import Counter
from copy import deepcopy
from functools import cache as once
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from qwen2vl import Conversation, GenerationConfig, Qwen2VL, Qwen2VLError, decoding, generate, stream
from qwen2vl import graphs as graphs_of_models
from qwen2vl.cache import KVCache
from qwen2vl.choosing import Chooser
from qwen2vl_kernels import use_backend
from qwen2vl_kernels.core import launching
from qwen2vl_kernels.core.backends import unavailable
from qwen2vl_kernels.ops.sample_tokens import sample_tokens_ref

from .graph_stand_in import VIEWS, FromOutside, OnDevice, Recorder, capture_into, storage_of

ENDLESS = (10**6,)
STATE = ("k", "v", "seqlens", "growth", "next_position")
SETTINGS = {
    "greedy": {},
    "penalised": {"repetition_penalty": 1.4},
    "warm": {"temperature": 1.4},
    "top_k": {"top_k": 9},
    "top_p": {"top_p": 0.8},
    "all": {"temperature": 1.5, "top_k": 60, "top_p": 0.9, "repetition_penalty": 1.2, "logprobs": 2},
    "several": {"temperature": 1.5, "num_return_sequences": 3},
}


@pytest.fixture(autouse=True)
def asked_for(monkeypatch):
    monkeypatch.setenv("QWEN2VL_GRAPHS", "1")


# ---- what a step launches ----


@once
def _absent():
    """The 2B on a CUDA device that is not there."""
    model = Qwen2VL.from_config("2b", device="meta")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model.init_weights(torch.device("cuda"))
    return model, mode


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).any()),
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: torch.arange(3),
        lambda x: x + torch.arange(3),
        lambda x: x + torch.tensor([1, 2, 3]),
    ],
    ids=["item", "tolist", "bool", "nonzero", "cpu", "arange", "operand", "tensor"],
)
def test_what_a_step_may_not_do_is_seen(forbidden):
    with FakeTensorMode():
        x = torch.ones(3, device="cuda")
        with pytest.raises((AssertionError, RuntimeError)), OnDevice():
            forbidden(x)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_and_a_choice_stay_on_the_device(rows, setting):
    """A step of the 2B is 343 operators whatever the batch, a greedy choice 2, any other one of two launches."""
    model, fake = _absent()
    with torch.inference_mode(), fake:
        cache = KVCache(model.config.text, rows, 4096, device=model.device, dtype=model.dtype)
        state = [(getattr(cache, name), getattr(cache, name).untyped_storage()._cdata) for name in STATE]
        ids = torch.zeros(rows, 1, dtype=torch.int64, device="cuda")
        options = SETTINGS[setting] | {"num_return_sequences": 1}
        choose = Chooser(model, {"input_ids": ids}, GenerationConfig(seed=3, **options))
        with OnDevice() as step:
            logits = model.step(ids, cache).squeeze(1)
        with OnDevice() as choice:
            choose(logits, [[]] * rows, [False] * rows)
        for name, (tensor, storage) in zip(STATE, state, strict=True):
            assert getattr(cache, name) is tensor and tensor.untyped_storage()._cdata == storage
    layers = model.config.text.num_hidden_layers
    assert step.launched == {
        "linear": 7 * layers + 1,
        "norm_forward": 2 * layers + 1,
        "append_kv": layers,
        "kvcache_attention_decode": layers,
        "swiglu_forward_": layers,
        "embedding": 1,
        "add": 2,  # lengths with the new token, and slots
        "add_": 2,  # lengths and positions, in place
    }
    assert step.launched.total() == 343
    if setting == "greedy":
        assert choice.launched.total() == 2, choice.launched
    elif "logprobs" not in SETTINGS[setting]:
        assert choice.launched == {"sample_tokens_": 1}


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_formula_of_a_choice_stays_on_the_device(rows, setting):
    """By PyTorch's operators, as long as no GPU has run the kernels; at most one of them sorts."""
    config = GenerationConfig(**SETTINGS[setting])
    with torch.inference_mode(), FakeTensorMode():
        given = {"device": "cuda:0"}
        logits, uniforms = (
            torch.zeros(rows, 99, **given),
            torch.zeros(rows, 3, dtype=torch.float64, **given).select(1, 1),
        )
        seen, banned = torch.zeros(rows, 99, dtype=torch.bool, **given), torch.zeros(3, dtype=torch.int64, **given)
        shape = (config.temperature or 1.0, config.top_k or 0, 1.0 if config.top_p is None else config.top_p)
        with OnDevice() as choice:
            sample_tokens_ref(logits, uniforms if config.samples else None, seen, banned, *shape, 1.2)
    assert choice.launched["sort"] + choice.launched["topk"] <= 1 and choice.launched.total() <= 28


#: Where a step's own kernels come first.
FUSED = dict.fromkeys(("rms_norm_linear", "rms_norm_swiglu", "linear_add", "decode_attention"), "triton")


@pytest.mark.parametrize("rows", [1, 8, 9])
def test_a_step_of_few_rows_is_five_launches_a_layer(rows, monkeypatch):
    """With a greedy choice 147 in all for the 2B; more rows take PyTorch's matrix products."""
    monkeypatch.setattr(launching, "reason", lambda device: None)
    model, fake = _absent()
    with torch.inference_mode(), fake, use_backend(**FUSED):
        cache = KVCache(model.config.text, rows, 4096, device=model.device, dtype=model.dtype)
        ids = torch.zeros(rows, 1, dtype=torch.int64, device="cuda")
        choose = Chooser(model, {"input_ids": ids}, GenerationConfig())
        with OnDevice() as step:
            choose(model.step(ids, cache).squeeze(1), [[]] * rows, [False] * rows)
    layers, choice = model.config.text.num_hidden_layers, step.launched.total()
    if rows > 8:
        assert step.launched["decode_attention_"] == layers and step.launched["linear"] == 7 * layers + 1
        assert not step.launched["append_kv"] and not step.launched["rms_norm_linear"]
        return
    got = {name: step.launched.pop(name) for name in ("rms_norm_linear", "rms_norm_swiglu", "linear_add_")}
    assert got == {"rms_norm_linear": layers + 1, "rms_norm_swiglu": layers, "linear_add_": 2 * layers}
    assert step.launched.pop("decode_attention_") == layers
    assert step.launched.total() == 6, step.launched  # embedding, lengths, two to count the token, the choice
    assert choice == 147


@pytest.fixture
def halved(model):
    return deepcopy(model).bfloat16()


_triton = pytest.mark.skipif(unavailable("triton", "cpu") is not None, reason=f"{unavailable('triton', 'cpu')}")
_OFF = dict.fromkeys(FUSED, "eager")


@pytest.mark.parametrize("ahead", [False, True], ids=["host", "device"])
@pytest.mark.parametrize(
    "fused",
    [
        pytest.param(FUSED, marks=_triton, id="triton"),
        pytest.param({**_OFF, "decode_attention": "triton"}, marks=_triton, id="triton attention"),
        pytest.param({}, id="native"),
        pytest.param({**_OFF, "decode_attention": "native"}, id="native attention"),
    ],
)
def test_a_step_by_its_own_kernels_is_the_usual_one(halved, inputs, monkeypatch, fused, ahead):
    """Three rows, one of them held, over a cache whose other slots are no numbers; what is stored is equal."""
    monkeypatch.setattr(KVCache, "asynchronous", staticmethod(lambda device: ahead))
    caches = []
    with torch.inference_mode():
        for backends in (_OFF, fused):
            cache = KVCache(halved.config.text, 3, 60, device=halved.device, dtype=halved.dtype)
            cache.k.fill_(float("nan"))
            cache.v.fill_(float("nan"))
            halved(**inputs, cache=cache, last_only=True)
            cache.hold([1])
            with use_backend(**backends):
                logits = halved.step(torch.tensor([[7], [8], [9]]), cache)
            caches.append((cache, logits.float()))
    (usual, expected), (own, got) = caches
    assert own.lengths == usual.lengths and own.seqlens.tolist() == own.lengths and own.arrived.count_nonzero() == 0
    for some, others in ((own.k, usual.k), (own.v, usual.v)):
        assert torch.equal(some.isnan(), others.isnan())
        torch.testing.assert_close(some, others, rtol=0.05, atol=0.05, equal_nan=True)
    assert (got - expected).abs().max() < 0.02 * expected.abs().max()


class _Wrapped(torch.Tensor):
    """A weight with a dispatch of its own, as quantising libraries put in a linear layer."""


@pytest.mark.parametrize("change", ["hook", "forward", "layer", "dtype", "weight", "compiled"])
def test_a_changed_layer_is_called(halved, change):
    x = torch.zeros(1, halved.config.text.hidden_size, dtype=torch.bfloat16)
    decoder, first = halved.model, halved.model.layers[0]
    with torch.inference_mode():
        assert decoder.steps(x)  # by the CPU's extension
        if change == "hook":
            first.mlp.register_forward_hook(lambda *_: None)
        elif change == "forward":
            first.mlp.up_proj.forward = lambda x: x
        elif change == "layer":
            first.self_attn.q_proj = torch.nn.Linear(x.shape[1], x.shape[1])
        elif change == "weight":
            weight = first.mlp.up_proj.weight.detach().as_subclass(_Wrapped)
            first.mlp.up_proj.weight = torch.nn.Parameter(weight, requires_grad=False)
        elif change == "compiled":
            first.mlp.compile(backend="eager")
        assert not decoder.steps(x.float() if change == "dtype" else x)


def test_layers_are_called_where_somebody_looks_on(halved):
    x = torch.zeros(1, halved.config.text.hidden_size, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert halved.model.steps(x)
        for register in (register_module_forward_hook, register_module_forward_pre_hook):
            with register(lambda *_: None):
                assert not halved.model.steps(x)
        with torch.device("cpu"):  # a function mode
            assert not halved.model.steps(x)
        assert halved.model.steps(x)


def test_a_cpus_step_calls_nothing_of_pytorchs_that_shares_work(halved, inputs):
    """Threads of OpenMP that have shared a region go on spinning, on the cores that the step's own need."""
    with torch.inference_mode():
        cache = KVCache(halved.config.text, 3, 60, device=halved.device, dtype=halved.dtype)
        halved(**inputs, cache=cache, last_only=True)
        ids = torch.tensor([[7], [8], [9]])
        with Recorder() as seen:
            halved.step(ids, cache)
    layers = halved.config.text.num_hidden_layers
    names = Counter(func.name().partition("::")[2].partition(".")[0] for func, *_ in seen.calls)
    own = {"rms_norm_linear": layers + 1, "rms_norm_swiglu": layers, "linear_add_": 2 * layers}
    own |= {"decode_attention_": layers}
    assert {name: names.pop(name) for name in own} == own
    assert not names.keys() - VIEWS - {"embedding", "add", "add_"}, names


def _addresses(run, times=3):
    found = []
    for _ in range(times):
        with FromOutside() as mode:
            run()
        found.append(mode.addresses)
    return found


def test_an_address_that_moves_is_seen():
    x = {"fixed": torch.ones(3)}
    x["moves"] = x["fixed"]
    for still in (lambda: x["fixed"].add_(1), lambda: x["fixed"] * torch.arange(3), lambda: x["fixed"][1:] + 1):
        first, *others = _addresses(still)
        assert first == {storage_of(x["fixed"])} and others == [first] * 2

    def replaced():
        x["moves"] = x["moves"] + 1

    for moving in (replaced, lambda: x["fixed"] + torch.tensor([1.0, 2.0, 3.0])):
        first, *others = _addresses(moving)
        assert first not in others


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_and_a_choice_find_everything_where_it_was(model, inputs, ahead, setting):
    """A step reads the weights, the cache and the ids; a choice the logits and what it keeps. Nothing of it moves."""
    with torch.inference_mode():
        cache = KVCache(model.config.text, 3, 96, device=model.device, dtype=model.dtype)
        model(**inputs, cache=cache)
        ids, logits = torch.zeros(3, 1, dtype=torch.int64), torch.zeros(3, model.config.text.vocab_size)
        choose = Chooser(model, inputs, GenerationConfig(seed=3, **SETTINGS[setting] | {"num_return_sequences": 1}))

        def step():
            logits.copy_(model.step_on_device(ids, cache).squeeze(1))

        def choice():
            ids.copy_(choose(logits, [[]] * 3, [False] * 3).tokens.unsqueeze(1))

        steps, choices = [], []
        for _ in range(3):
            steps += _addresses(step, 1)
            choices += _addresses(choice, 1)
    weights = {storage_of(one) for one in (*model.model.parameters(), model.head_weight)}
    state = {storage_of(getattr(cache, name)) for name in (*STATE, "_before", "inv_freq", "bounds")}
    known = weights | state | {storage_of(ids), storage_of(logits)}
    assert steps[0] <= known and weights <= steps[0] and steps == [steps[0]] * 3
    kept = {storage_of(one) for one in vars(choose).values() if isinstance(one, torch.Tensor)}
    assert choices[0] <= kept | {storage_of(ids), storage_of(logits)} and choices == [choices[0]] * 3


# ---- the same tokens ----


@pytest.fixture
def inputs(processor):
    return processor([[{"role": "user", "content": text}] for text in ("a", "Tell me more than that, please.", "12?")])


@pytest.fixture
def ahead(monkeypatch):
    """The CPU as a device that the host does not wait for; a list with what was captured."""
    captured: list[Recorder] = []
    monkeypatch.setattr(decoding, "capture", capture_into(captured))
    monkeypatch.setattr(decoding, "_of_models", weakref.WeakKeyDictionary())
    monkeypatch.setattr(graphs_of_models, "new_pool", object)
    monkeypatch.setattr(KVCache, "asynchronous", staticmethod(lambda device: True))
    return captured


def _run(model, inputs, processor=None, graphs=None, on_token=None, processors=(), **options):
    config = GenerationConfig(**{"max_new_tokens": 12, "eos_token_ids": ENDLESS, "seed": 5, **options})
    tokenizer = processor and processor.tokenizer
    given = {"config": config, "tokenizer": tokenizer, "on_token": on_token, "logits_processors": processors}
    return generate(model, inputs, **given, graphs=graphs)


def _on_host(monkeypatch, *arguments, **options):
    """What the host makes of it step by step, each draw from the generator's definition."""
    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "asynchronous", staticmethod(lambda device: False))
        config, generators = GenerationConfig(**{"seed": 5, **options.get("draws", {})}), []

        def draw(chooser, chances):
            if not generators:
                times = config.num_return_sequences
                seeds = [5 + n // times + 0x9E3779B1 * (n % times) for n in range(len(chances))]
                generators.extend(np.random.Generator(np.random.Philox(key=seed)) for seed in seeds)
            tokens = []
            for row, generator in zip(chances.double().numpy(), generators, strict=True):
                reached = list(accumulate(int(chance * 2**52) for chance in row))
                tokens.append(bisect_right(reached, int(generator.random() * reached[-1])))
            return torch.tensor(tokens)

        patch.setattr(Chooser, "draw", draw)
        draws = options.pop("draws", {})
        return _run(*arguments, graphs=False, **draws, **options)


@pytest.mark.parametrize("graphs", [False, True], ids=["steps", "graphs"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_tokens_are_those_of_the_host(model, processor, inputs, ahead, monkeypatch, setting, graphs):
    """Rows of different lengths, three of them on a graph of four, or nine on one of sixteen."""
    shown = {True: [], False: []}
    expected = _on_host(
        monkeypatch, model, inputs, processor, draws=SETTINGS[setting], on_token=lambda *a: shown[False].append(a)
    )
    got = _run(model, inputs, processor, graphs, on_token=lambda *a: shown[True].append(a), **SETTINGS[setting])
    assert got.sequences == expected.sequences and got.texts == expected.texts
    assert got.finish_reasons == expected.finish_reasons == ["length"] * len(got.sequences)
    assert shown[True] == shown[False] and got.timings["decode_steps"] == 11
    for some, others in zip(got.logprobs, expected.logprobs, strict=True):
        torch.testing.assert_close([one.logprob for one in some], [one.logprob for one in others], atol=1e-4, rtol=0)
    assert [recorder.replays for recorder in ahead] == [11] * graphs


@pytest.mark.parametrize("graphs", [False, True], ids=["steps", "graphs"])
def test_rows_end_on_their_own(model, processor, inputs, ahead, monkeypatch, graphs):
    """By an id, a stop string, their budget; the step that went too far changes nothing and is not counted."""
    free = _on_host(monkeypatch, model, inputs, processor, max_new_tokens=30)
    assert len(set(map(tuple, free.sequences))) == 3
    options = {"eos_token_ids": (free.sequences[0][3],), "stop": (free.texts[1][9:13],), "max_new_tokens": 30}
    expected = _on_host(monkeypatch, model, inputs, processor, **options)
    assert expected.finish_reasons[:2] == ["stop", "stop_string"]
    taken, call = [], decoding.CapturedSteps.__call__ if graphs else decoding.Steps.__call__
    owner = decoding.CapturedSteps if graphs else decoding.Steps

    def counted(steps, tokens):
        addresses = tuple(getattr(steps.cache, name).data_ptr() for name in STATE)
        taken.append((addresses, list(steps.cache.lengths), steps.cache.seqlens.tolist()))
        return call(steps, tokens)

    monkeypatch.setattr(owner, "__call__", counted)
    for row in (slice(0, 3), slice(0, 2), slice(0, 1)):
        some = {name: value[row] for name, value in inputs.items()}
        taken.clear()
        got = _run(model, some, processor, graphs, **options)
        assert got.sequences == expected.sequences[row] and got.texts == expected.texts[row]
        assert got.finish_reasons == expected.finish_reasons[row] and got.raw_texts == expected.raw_texts[row]
        assert len({addresses for addresses, _, _ in taken}) == 1
        assert all(lengths == seqlens for _, lengths, seqlens in taken)
        assert len(taken) - got.timings["decode_steps"] == ("length" not in got.finish_reasons)
    pieces = stream(
        model,
        some,
        tokenizer=processor.tokenizer,
        config=GenerationConfig(seed=5, **options),
        graphs=graphs,
    )
    assert "".join(pieces) == expected.texts[0]


@pytest.mark.skipif(unavailable("triton", "cpu") is not None, reason=f"triton: {unavailable('triton', 'cpu')}")
def test_the_kernel_for_lengths_on_the_device(model, inputs, ahead, monkeypatch):
    """Over a cache without more room than it needs: the interpreter is slow."""
    one = {name: value[:1] for name, value in inputs.items()}
    expected = _on_host(monkeypatch, model, one, max_new_tokens=4).sequences
    with use_backend(kvcache_attention_decode="triton"):
        assert _run(model, one, graphs=False, max_new_tokens=4).sequences == expected


def test_logits_processors_see_every_answer(model, inputs, ahead, monkeypatch):
    """Then the host reads each token before the next choice."""
    seen = []

    def count(answers, scores):
        seen.append([list(answer) for answer in answers])
        return scores.index_fill(1, torch.tensor([len(answers[0]) + 40]), 1e6)

    expected = _on_host(monkeypatch, model, inputs, processors=[count], max_new_tokens=4).sequences
    before = seen.copy()
    seen.clear()
    assert _run(model, inputs, graphs=True, processors=[count], max_new_tokens=4).sequences == expected
    assert seen == before and expected == [[40, 41, 42, 43]] * 3


def test_a_row_draws_the_same_whatever_is_beside_it(model, inputs, ahead):
    whole = _run(model, inputs, temperature=1.5, max_new_tokens=20)
    alone = {name: value[1:2] for name, value in inputs.items()}
    assert _run(model, alone, temperature=1.5, seed=6, max_new_tokens=7).sequences[0] == whole.sequences[1][:7]


def test_draws_by_numbers_fall_by_the_distribution(model, ahead):
    logits = torch.randn(1, 512, generator=torch.Generator().manual_seed(1))
    config = GenerationConfig(top_k=8, seed=3, max_new_tokens=4000)
    chooser = Chooser(model, {"input_ids": torch.tensor([[3]])}, config)
    expected = chooser.probabilities(chooser.scores(logits))[0]
    counts = torch.bincount(torch.cat([chooser(logits, [[]], [False]).tokens for _ in range(4000)]), minlength=512)
    assert torch.count_nonzero(counts[expected == 0]) == 0
    torch.testing.assert_close(counts / 4000, expected, rtol=0, atol=0.04)  # five standard deviations


# ---- graphs ----


def test_a_step_is_captured_once_for_a_number_of_rows(model, inputs, ahead, monkeypatch):
    model = deepcopy(model)
    one = {name: value[:1] for name, value in inputs.items()}
    for given, tokens in ((inputs, 4), (one, 30), (inputs, 40), (one, 3), (inputs, 9)):
        got = _run(model, given, max_new_tokens=tokens).sequences
        assert got == _on_host(monkeypatch, model, given, max_new_tokens=tokens).sequences
    assert len(ahead) == 2
    monkeypatch.setattr(decoding, "LEAST_CAPACITY", 8)
    fresh = deepcopy(model)
    for tokens, captures in ((8, 3), (7, 3), (60, 4), (8, 4)):
        assert len(_run(fresh, one, max_new_tokens=tokens).sequences[0]) == tokens
        assert len(ahead) == captures, "a capacity that does not suffice is captured anew, and then it does"


@pytest.mark.parametrize(
    ("rows", "wanted"), [(1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16), (16, 16), (17, 24), (100, 104)]
)
def test_rows_of_a_graph(rows, wanted):
    assert decoding.graph_rows(rows) == wanted


def test_capacities_of_a_graph():
    assert [decoding.graph_capacity(n) for n in (1, 256, 257, 384, 385, 513, 768, 769, 32768, 32769)] == [
        *(256, 256, 384, 384, 512, 768, 768, 1024),
        *(32768, 49152),
    ]


def test_answers_at_the_same_time_do_not_share_a_cache(model, processor, inputs, ahead, monkeypatch):
    given = [{name: value[n : n + 1] for name, value in inputs.items()} for n in (0, 1)]
    alone = [_on_host(monkeypatch, model, one, processor).texts[0] for one in given]
    config = GenerationConfig(max_new_tokens=12, eos_token_ids=ENDLESS)
    _run(model, given[0])  # leaves one for the next
    running = [stream(model, one, tokenizer=processor.tokenizer, config=config, graphs=True) for one in given]
    texts = ["", ""]
    while any(pieces := [next(one, "") for one in running]):
        texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
    assert texts == alone and alone[0] != alone[1] and len(ahead) == 2


def test_a_graph_is_used_in_whatever_mode(model, inputs, ahead):
    """Captured under inference mode, where generate runs, and replayed under no_grad."""
    made = []
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            cache = KVCache(model.config.text, 1, 100, device=model.device, dtype=model.dtype)
            model(inputs["input_ids"][1:2, -20:], cache=cache)
            steps = decoding.begin_steps(model, cache, 1, 100, graphs=True)
            made.append(steps(torch.tensor([7])).clone())
            assert steps.cache.lengths == [21] == steps.cache.seqlens.tolist()
            steps.cache.forget(1)
            assert torch.equal(steps(torch.tensor([7])), made[-1]), "the position is the same again"
            steps.close()
    assert torch.equal(*made) and len(ahead) == 1


def test_an_answer_that_is_left_gives_its_graph_back(model, processor, inputs, ahead):
    model, one = deepcopy(model), {name: value[:1] for name, value in inputs.items()}
    config = GenerationConfig(max_new_tokens=12, eos_token_ids=ENDLESS)
    for _ in range(3):
        pieces = stream(model, one, tokenizer=processor.tokenizer, config=config)
        next(pieces)
        del pieces
    with pytest.raises(ZeroDivisionError) as raised:  # whose traceback keeps the run alive
        _run(model, one, on_token=lambda *a: 1 / 0)
    assert len(_run(model, one).sequences[0]) == 12 and len(ahead) == 1, raised


def test_a_conversation_keeps_one_graph_as_it_grows(model, ahead):
    """A turn longer than what was captured takes its place, with room for those that follow."""
    model, ids = deepcopy(model), torch.arange(400)[None] % 256
    for turn in range(1, 21):
        _run(model, {"input_ids": ids[:, : 20 * turn]}, max_new_tokens=2)
        assert len(decoding._of_models[model].captured) == 1
    assert len(ahead) == 3


def test_a_conversation_goes_on_in_the_cache_of_its_graph(model, processor, ahead, monkeypatch):
    """Nothing is read twice or copied but where a capacity is outgrown; its graph is then let go of. Another backend
    takes another graph, with what was kept, and one that is let go of serves the next answer."""
    model, conversation, text = deepcopy(model), Conversation(), ""
    loads = []
    load = KVCache.load
    monkeypatch.setattr(KVCache, "load", lambda *a: loads.append(1) or load(*a))
    config = GenerationConfig(max_new_tokens=3, eos_token_ids=ENDLESS)

    def ask(text):
        inputs = processor([{"role": "user", "content": text}])
        got = generate(model, inputs, config=config, conversation=conversation)
        assert got.sequences == _on_host(monkeypatch, model, inputs, max_new_tokens=3).sequences
        return got.prompt_tokens[0], got.cached_tokens[0]

    monkeypatch.setattr(decoding, "LEAST_CAPACITY", 64)
    steps, last, capacities = None, 0, set()
    for _ in range(14):
        text += " and so on, and on"
        tokens, kept = ask(text)
        assert tokens > kept >= last - 6
        capacity = None if steps is None else steps.cache.capacity
        assert (steps is conversation._held.steps) == (conversation._held.steps.cache.capacity == capacity)
        steps, last = conversation._held.steps, tokens
        capacities.add(steps.cache.capacity)
        assert not decoding._of_models[model].captured, "it is the conversation's"
    assert sorted(capacities) == [64, 96, 128, 192] and len(ahead) == len(loads) == 4
    assert sum(one.replays for one in ahead) == 14 * 2
    with use_backend("eager"):
        assert ask(text) == (last, last - 1)
    assert len(ahead) == len(loads) == 5
    conversation.forget()
    assert len(decoding._of_models[model].captured) == 1
    with use_backend("eager"):
        assert ask(text) == (last, 0) and len(ahead) == 5


def test_other_weights_and_backends_are_captured_anew(model, inputs, ahead, monkeypatch):
    """A replay reads weights where they were."""
    model = deepcopy(model)
    before = _run(model, inputs).sequences
    with use_backend("eager"):
        _run(model, inputs)
    assert len(ahead) == 2
    with torch.no_grad():
        model.model.norm.weight.mul_(torch.linspace(-1, 1, model.config.text.hidden_size))
    changed = _run(model, inputs).sequences
    assert len(ahead) == 2 and changed == _on_host(monkeypatch, model, inputs).sequences != before
    for parameter in model.parameters():
        parameter.data = parameter.data.clone().neg()
    moved = _run(model, inputs).sequences
    assert len(ahead) == 3 and moved == _on_host(monkeypatch, model, inputs).sequences != changed


def test_what_is_kept_is_bounded_and_ends_with_the_model(model, inputs, ahead, monkeypatch):
    model = deepcopy(model)
    for rows in (1, 2, 1):
        _run(model, {name: value[:rows] for name, value in inputs.items()})
    assert len(ahead) == 2
    monkeypatch.setattr(decoding, "KEPT_BYTES", decoding._of_models[model].captured[0].bytes)
    _run(model, {name: value[:1] for name, value in inputs.items()})
    assert [one.cache.batch for one in decoding._of_models[model].captured] == [1]
    gone = weakref.ref(model)
    del model
    ahead.clear()
    gc.collect()
    assert gone() is None


def test_a_gpu_takes_them_where_they_are_asked_for(monkeypatch):
    """No GPU has run them: without a word all is as it was."""
    for value, wanted in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("QWEN2VL_GRAPHS", value)
        assert KVCache.asynchronous(torch.device("cuda")) is wanted
        assert not KVCache.asynchronous(torch.device("cpu"))


def test_graphs_that_cannot_be_are_refused(model, inputs, ahead, monkeypatch):
    _run(model, inputs, graphs=False)
    assert not ahead
    for layer, name, reason in ((0, "lora_A", "the model has an adapter"), (1, "hook", "the model has hooks")):
        module = deepcopy(model)
        place = module.model.layers[layer].self_attn.q_proj
        if name == "hook":
            place.register_forward_hook(lambda *a: None)
        else:
            place.lora_A = place.get_delta_weight = 1
        with pytest.raises(Qwen2VLError, match=f"graphs: {reason}"):
            _run(module, inputs, graphs=True)
        assert _run(module, inputs).sequences == _run(model, inputs, graphs=False).sequences
        assert not ahead
    monkeypatch.setattr(KVCache, "asynchronous", staticmethod(lambda device: False))
    with pytest.raises(Qwen2VLError, match="graphs: wants a model on a CUDA device, and QWEN2VL_GRAPHS=1 in the envir"):
        _run(model, inputs, graphs=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")
def test_a_captured_step_on_a_gpu(folder, inputs):
    """Tokens of captured steps are those of steps; a conversation's turns replay what the first captured."""
    model = Qwen2VL.from_pretrained(folder, device="cuda", dtype=torch.float32)
    for setting in SETTINGS.values():
        for tokens in (12, 30):
            expected = _run(model, inputs, graphs=False, max_new_tokens=tokens, **setting)
            got = _run(model, inputs, graphs=True, max_new_tokens=tokens, **setting)
            assert got.sequences == expected.sequences and got.timings["decode"] > 0
    assert len(decoding._of_models[model].captured) == 2
