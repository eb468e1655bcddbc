"""Backend "sm90" without a GPU: who is refused and why, and by a stand-in for the extension what is launched.

The stand-in computes what it is told to at the addresses that it is given, so results show that classes of segments,
tiles, strides and bounds are right; the kernel itself is proven elsewhere.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

from qwen2vl_kernels import BackendError, kvcache_attention, plan_tiles, use_backend, varlen_attention
from qwen2vl_kernels.core import attention_choice, attention_sm90, launching, native
from qwen2vl_kernels.core.attention_choice import Entry, choose
from qwen2vl_kernels.core.attention_peers import HALVES, Call
from qwen2vl_kernels.core.attention_sm90 import COLUMNS, Kernel, Sm90Config, configs, kernels, launches, tried
from qwen2vl_kernels.core.rotation import rotate
from qwen2vl_kernels.core.tile_plan import Side, plan_for
from qwen2vl_kernels.integrations import transformers_attention
from qwen2vl_kernels.ops import kvcache_attention as of_cache
from qwen2vl_kernels.ops import varlen_attention as op
from qwen2vl_kernels.ops.varlen_attention import varlen_attention_ref
from tests.conftest import assert_two_times
from tests.kernels import sm90_stand_in

CALL = Call("cuda", 90, torch.bfloat16, 80, 80)
LIMIT, SHORT, LONG = configs(80)
ALL = (-1, 2**31 - 1)
HOPPER = launching.Target("cuda", 90)


@pytest.fixture
def extension(monkeypatch):
    attention_choice._known.cache_clear()
    yield sm90_stand_in.install(monkeypatch)
    attention_choice._known.cache_clear()


# ----------------------------------------------------------------------------------------------------- who is served


def test_on_cpu_tensors_it_is_refused_by_name():
    q = torch.zeros(4, 2, 80, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match="backend 'sm90' does not serve cpu tensors; these do: sdpa"):
        varlen_attention(q, q, q, torch.tensor([0, 4], dtype=torch.int32), 4, backend="sm90")


def test_where_the_extension_cannot_serve_it_says_so(monkeypatch):
    with FakeTensorMode():
        q = torch.empty(4, 2, 80, dtype=torch.bfloat16, device="cuda")
        monkeypatch.setattr(launching, "_target", lambda index: HOPPER)
        attention_choice._known.cache_clear()
        missing = native.sm90_reason()
        if missing is not None:  # whatever is missing on this machine
            with pytest.raises(BackendError) as caught:
                attention_choice.chosen(q, q, q, 4, backend="sm90")
            assert str(caught.value) == f"varlen_attention: backend 'sm90' is not available here: {missing}"
        monkeypatch.setattr(native, "sm90_reason", lambda: "left out: C7512")
        attention_choice._known.cache_clear()
        with pytest.raises(BackendError, match="'sm90' is not available here: left out: C7512"):
            attention_choice.chosen(q, q, q, 4, backend="sm90")
        attention_choice._known.cache_clear()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"capability": 80}, "made of capability 9.0's own instructions, this GPU has 8.0"),
        ({"capability": 100}, "this GPU has 10.0"),
        ({"capability": 0}, "this GPU is not NVIDIA's"),
        ({"dtype": torch.float32}, "it takes bfloat16 and float16, got torch.float32"),
        ({"columns": 88, "value_columns": 88}, "one of 64, 72, 80, 96, 128, got 88 and 88"),
        ({"value_columns": 64}, "one head_dim, one of 64, 72, 80, 96, 128, got 80 and 64"),
        ({"aligned": False}, "strides of rows and heads must be multiples of 8 elements"),
        ({"mapped": False}, "with strides that are not 0 as those of expanded tensors are"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("extension")
def test_what_it_does_not_serve(changed, message):
    assert message in attention_sm90.reason(replace(CALL, **changed))
    for served in ({}, {"causal": True}, {"grouped": True}, {"split": True}, {"empty": True}, {"many": True},
                   {"wide": True}, {"statistics": True}, {"repeatable": True}, {"dtype": torch.float16}):  # fmt: skip
        assert attention_sm90.reason(replace(CALL, **served)) is None


@pytest.mark.usefixtures("extension")
def test_gradients_need_triton(monkeypatch):
    training = replace(CALL, gradients=True, statistics=True)
    assert attention_sm90.reason(training) == (None if (r := launching.reason("cuda")) is None else f"its backward {r}")
    monkeypatch.setattr(launching, "reason", lambda kind: "Triton cannot be imported")
    assert attention_sm90.reason(training) == "its backward is Triton's: Triton cannot be imported"
    assert attention_sm90.reason(CALL) is None


@pytest.mark.usefixtures("extension")
def test_the_host_tells_them_from_the_tensors(monkeypatch):
    monkeypatch.setattr(launching, "_target", lambda index: HOPPER)

    def made(rows=9, heads=4, columns=80, strides=None, dtype=torch.bfloat16):
        strides = strides or (heads * columns, columns, 1)
        return torch.empty_strided((rows, heads, columns), strides, dtype=dtype, device="cuda")

    def chosen(q, k, v, **named):
        return attention_choice.chosen(q, k, v, 9, backend="sm90", **named)

    with FakeTensorMode():
        x = made()
        assert chosen(x, x, x) == chosen(x, x, x, causal=True, invariant=True, split=True, statistics=True) == "sm90"
        assert chosen(made(0), made(0), made(0)) == "sm90"
        packed = torch.empty(9, 3, 4, 80, dtype=torch.bfloat16, device="cuda").unbind(1)
        assert chosen(*packed) == "sm90"
        expanded = torch.empty(9, 1, 80, dtype=torch.bfloat16, device="cuda").expand(9, 4, 80)
        for q, k, v, words in (
            (made(strides=(336, 84, 1)), x, x, "multiples of 8 elements"),
            (x, x, made(strides=(324, 80, 1)), "multiples of 8 elements"),
            (x, expanded, x, "not 0 as those of expanded"),
            (x, x, made(1, 4).expand(9, 4, 80), "not 0 as those of expanded"),
            (x, made(2**31, 4), made(2**31, 4), r"tiles of up to 2\^31 rows"),
            (*[made(dtype=torch.float32)] * 3, "bfloat16 and float16, got torch.float32"),
            (x, x, made(columns=64), "got 80 and 64"),
        ):
            with pytest.raises(BackendError, match=f"backend 'sm90' does not serve this call: .*{words}"):
                chosen(q, k, v)
        with use_backend(varlen_attention="sm90"):
            assert attention_choice.chosen(x, x, x, 9) == "sm90"
        with pytest.raises(BackendError, match="'torch' does not promise; 'triton' and 'sm90' do"):
            attention_choice.chosen(x, x, x, 9, invariant=True, backend="torch")
    assert not attention_choice.reads_host("sm90") and not attention_choice.by_max_seqlen("sm90")


@pytest.mark.usefixtures("extension")
def test_it_is_the_default_where_an_entry_says_so_and_nowhere_else(monkeypatch):
    monkeypatch.setattr(attention_choice, "unavailable", lambda name, kind: None)
    for call in (CALL, replace(CALL, rows=1024), replace(CALL, gradients=True), replace(CALL, columns=128)):
        assert choose(call).backend != "sm90", "nobody measured it"
        assert choose(call, invariant=True).backend == "triton"
    entry = Entry(90, HALVES, (72, 80), False, False, 0, ("sm90", "triton"), "a file", "at a commit")
    monkeypatch.setattr(attention_choice, "TABLE", (entry,))
    choice = choose(CALL)
    assert (choice.backend, choice.peer, choice.measured) == ("sm90", None, "a file")
    assert choose(CALL, invariant=True).backend == choose(replace(CALL, repeatable=True)).backend == "triton"
    monkeypatch.setattr(native, "sm90_reason", lambda: "left out")
    choice = choose(CALL)
    assert choice.backend == "triton" and "sm90: left out" in choice.why


@pytest.mark.usefixtures("extension")
def test_the_name_is_the_same_in_compiled_code(monkeypatch):
    """Of tensors on a GPU without values, with the boundaries there, too; a number of rows that changes is no other."""
    monkeypatch.setattr(launching, "_target", lambda index: HOPPER)
    found = []

    def backend(graph, _):
        found.extend(a for node in graph.graph.nodes for a in node.args if a == "sm90")
        return graph.forward

    def call(q, k, v, cu_seqlens):
        return varlen_attention(q, k, v, cu_seqlens, 300, backend="sm90")

    with FakeTensorMode():
        cu_seqlens = torch.zeros(5, dtype=torch.int32, device="cuda")
        q, k, v = torch.empty(300, 3, 4, 80, dtype=torch.bfloat16, device="cuda").unbind(1)
        for x in (q, k, v):
            torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.reset()
        out = torch.compile(call, fullgraph=True, backend=backend)(q, k, v, cu_seqlens)
    assert found == ["sm90"] and out.shape == (300, 4, 80)


@pytest.mark.usefixtures("extension")
def test_transformers_towers_read_no_boundary_for_it(monkeypatch):
    """It takes all rows for a bound; named, or chosen."""
    monkeypatch.setattr(launching, "_target", lambda index: HOPPER)
    monkeypatch.setattr(attention_choice, "unavailable", lambda name, kind: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    entry = Entry(90, HALVES, (72, 80), False, False, 0, ("sm90",), "a file", "at a commit")
    with FakeTensorMode():  # where every read raises
        q = torch.empty(300, 4, 80, dtype=torch.bfloat16, device="cuda")
        cu_seqlens = torch.zeros(5, dtype=torch.int32, device="cuda")
        on_host = torch.zeros(5, dtype=torch.int32)
        with use_backend(varlen_attention="sm90"):
            for given in (cu_seqlens, on_host):
                assert transformers_attention.bounds({}, given, None, q, q, q) == (given, 300, None)
        monkeypatch.setattr(attention_choice, "TABLE", (entry,))
        attention_choice._known.cache_clear()
        assert transformers_attention.bounds({}, cu_seqlens, None, q, q, q) == (cu_seqlens, 300, None)


# --------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize("columns", COLUMNS)
def test_configurations_fit_a_multiprocessor(columns):
    """Registers of a consumer's thread, by what ptxas took where it was tried, and 227 KiB of shared memory."""
    _, *shipped = configs(columns)
    assert set(shipped) <= set(tried(columns)) and len(set(tried(columns))) == len(tried(columns))
    for config in tried(columns):
        kernel = Kernel(columns, torch.bfloat16, False, config)
        width = -(-columns // kernel.block) * kernel.block
        weights = 0 if config.p_shared else config.keys / 4
        registers = kernel.across / 2 + config.keys / 2 + weights + 24
        assert registers <= (240 if config.consumers == 2 else 160), config
        tiles = 2 * width * (config.rows + 4 * config.keys)  # q, and two of k and of v
        staged = config.rows * (16 * (columns // 8 | 1) + 2 * config.keys * config.p_shared)  # results, weights
        assert tiles + staged + 120 <= 227 * 1024, config
        assert config.keys % 16 == 0 and config.rows == 64 * config.consumers


def test_what_may_be_chosen_is_what_is_built():
    keys = [kernel.key for kernel in kernels()]
    assert len(set(keys)) == len(keys) and (80, 0, False, 2, 128, 0, False, 16, 80) in keys
    assert {key[:3] for key in keys} == {(d, e, c) for d in COLUMNS for e in (0, 1) for c in (False, True)}
    built = getattr(native._cuda, "attention_built", None)
    if built is None or not built():
        pytest.skip("the extension is without attention for Hopper")
    assert set(keys) <= set(map(tuple, built()))


def _side(lengths, *, padded=False, total=None, device="cpu"):
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return Side(bounds.to(device), total or sum(lengths), torch.device(device), padded)


BOTH = [(LONG, LIMIT, ALL[1]), (SHORT, ALL[0], LIMIT)]


@pytest.mark.parametrize(
    ("side", "longest", "wanted"),
    [
        (_side([512, 1]), 512, [(SHORT, *ALL)]),
        (_side([512, 1]), 9000, [(SHORT, *ALL)]),  # the host knows them
        (_side([513, 4096]), 4096, [(LONG, *ALL)]),
        (_side([513, 0, 4096]), 4096, [(LONG, *ALL)]),
        (_side([513, 512]), 513, BOTH),
        (_side([0, 0]), 0, [(SHORT, *ALL)]),
        (_side([]), 9, [(SHORT, *ALL)]),
        (_side([513, 4096], padded=True), 4096, BOTH),  # a replay may bring others
        (_side([100], padded=True, total=600), 512, [(SHORT, *ALL)]),
        (_side([100], padded=True, total=512), 9000, [(SHORT, *ALL)]),  # there are no more rows
        (_side([600], padded=True, device="meta"), 600, BOTH),
        (_side([600], padded=True, device="meta"), 512, [(SHORT, *ALL)]),
    ],
)
def test_classes(side, longest, wanted):
    assert launches(80, side, longest) == wanted


def test_one_configuration_is_one_launch(monkeypatch):
    monkeypatch.setattr(attention_sm90, "configs", lambda columns: (512, SHORT, SHORT))
    assert launches(128, _side([513, 1]), 513) == [(SHORT, *ALL)]


# ------------------------------------------------------------------------------------------------------------ launches


def _pack(lengths, keys=None, heads=4, kv_heads=2, columns=80, dtype=torch.bfloat16, tail=3):
    """Slices of packed projections, NaN in the rows that no segment holds; boundaries of queries and of keys."""

    def projection(lengths, n):
        total = sum(lengths) + tail
        packed = torch.randn(total, n, columns).to(dtype)
        packed[sum(lengths) :] = torch.nan
        return packed, torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)

    packed, cu = projection(lengths, heads + 2 * kv_heads)
    q, k, v = packed.split((heads, kv_heads, kv_heads), 1)
    if keys is None:
        return q, k, v, cu, None
    packed, cu_k = projection(keys, 2 * kv_heads)
    return q, *packed.split((kv_heads, kv_heads), 1), cu, cu_k


def _most(cu):
    return int(cu.diff().max()) if cu.shape[0] > 1 else 0


def _settings(cu, cu_k, causal, with_lse=True):
    longest = _most(cu), _most(cu if cu_k is None else cu_k)
    return cu, cu_k, None, None, *longest, causal, 0.3, False, with_lse, "sm90"


def _registered(q, k, v, cu, cu_k=None, causal=False):
    return torch.ops.qwen2vl.varlen_attention(q, k, v, *_settings(cu, cu_k, causal))


def _check(out, lse, q, k, v, cu, cu_k, causal):
    held = int(cu[-1])
    settings = cu, causal, 0.3, cu_k
    inside = [q[:held], k, v] if cu_k is not None else [x[:held] for x in (q, k, v)]
    eager = varlen_attention_ref(*inside, *settings)
    exact, logs = varlen_attention_ref(*(x.double() for x in inside), *settings, return_lse=True)
    assert_two_times(out[:held], eager, exact, 2e-6)
    torch.testing.assert_close(lse[:, :held] * math.log(2), logs.float(), rtol=1e-5, atol=1e-5)
    assert not out[held:].any()


LENGTHS = [[1], [1, 63, 64, 65], [0, 130, 0], [513, 512, 7], [], [0, 0]]


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_ragged_packs(extension, lengths, causal):
    for dtype, heads, kv_heads, columns in ((torch.bfloat16, 4, 2, 80), (torch.float16, 7, 1, 72)):
        extension.launches.clear()
        q, k, v, cu, _ = _pack(lengths, heads=heads, kv_heads=kv_heads, columns=columns, dtype=dtype)
        _check(*_registered(q, k, v, cu, causal=causal), q, k, v, cu, None, causal)
        rows = [row for one in extension.launches for row in one.rows]
        assert sorted(rows) == list(range(sum(lengths))), "every row by one launch"
        assert len(extension.launches) == (2 if 513 in lengths else 1 if sum(lengths) else 0)
        assert all(one.config in configs(columns)[1:] for one in extension.launches)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("group", [1, 6])
def test_widths_and_groups(extension, columns, group):
    q, k, v, cu, _ = _pack([70, 30], heads=6, kv_heads=6 // group, columns=columns)
    _check(*_registered(q, k, v, cu, causal=True), q, k, v, cu, None, True)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_keys_of_their_own_number(extension, causal):
    """Rows that see no key, segments without keys, and classes by the keys, however many queries there are."""
    for longest in (60, 600):
        q, k, v, cu, cu_k = _pack([5, 9, 3, longest, 2], [520, 4, 0, 30, 6])
        extension.launches.clear()
        out, lse = _registered(q, k, v, cu, cu_k, causal)
        _check(out, lse, q, k, v, cu, cu_k, causal)
        long, short = extension.launches
        assert (long.config, short.config) == (LONG, SHORT) and long.bounds == (LIMIT, ALL[1])
        assert sorted(long.rows) == list(range(5)) and sorted(short.rows) == list(range(5, 19 + longest))
        assert (lse[:, 14:17] == -math.inf).all() and not out[14:17].any()
    extension.launches.clear()
    plan = plan_tiles(cu, q.shape[0], cu_seqlens_k=cu_k, total_k=k.shape[0], padded=True)
    again = op._forward(q, k, v, plan, None, None, (600, 512), causal, 0.3, False, "sm90")
    _check(*again, q, k, v, cu, cu_k, causal)
    assert [one.bounds for one in extension.launches] == [ALL], "512 keys were promised"


def test_no_keys_at_all(extension):
    q, k, v, cu, cu_k = _pack([5, 2], [0, 0], tail=0)
    out, lse = _registered(q, k, v, cu, cu_k)
    assert not out.any() and (lse == -math.inf).all()
    assert [sorted(one.rows) for one in extension.launches] == [list(range(7))]


def test_a_segment_longer_than_was_promised_is_computed(extension):
    """A padded plan holds 600 rows where 512 were promised: one launch, and it takes all tiles."""
    q, k, v, cu, _ = _pack([600, 8], tail=0)
    plan = plan_tiles(cu, 608, padded=True)
    out, lse = attention_sm90.launch_forward(q, k, v, plan, 512, False, 0.3)
    _check(out, lse, q, k, v, cu, None, False)
    assert [one.bounds for one in extension.launches] == [ALL]


def test_a_padded_plan_takes_other_boundaries(extension):
    q, k, v, cu, _ = _pack([600, 8, 30])
    plan = plan_tiles(cu, 641, padded=True)
    for lengths in ([600, 8, 30], [1, 2, 638], [0, 0, 0], [100, 0, 513]):
        other = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        plan.update_(other)
        extension.launches.clear()
        packed = _pack(lengths)[0:3]
        for x, fresh in zip((q, k, v), packed, strict=True):
            x[: sum(lengths)] = fresh[: sum(lengths)]
        out, lse = op._forward(q, k, v, plan, None, None, (641, 641), True, 0.3, False, "sm90")
        _check(out, lse, q, k, v, other, None, True)
        assert [one.bounds for one in extension.launches] == [(LIMIT, ALL[1]), (ALL[0], LIMIT)]


def test_a_segment_has_the_same_bits_in_every_pack(extension):
    q, k, v, cu, _ = _pack([513, 40, 512], tail=0)
    together, logs = _registered(q, k, v, cu)
    for a, b in zip(cu.tolist(), cu[1:].tolist(), strict=False):
        extension.launches.clear()
        alone = torch.tensor([0, b - a], dtype=torch.int32)
        out, lse = _registered(q[a:b], k[a:b], v[a:b], alone)
        assert torch.equal(out, together[a:b]) and torch.equal(lse, logs[:, a:b])
        (one,) = extension.launches
        assert one.config == (LONG if b - a > LIMIT else SHORT)


def test_what_begins_off_16_bytes_is_copied(extension):
    q, k, v, cu, _ = _pack([40, 9])
    off = [torch.empty(52, x.shape[1], 88, dtype=x.dtype)[..., 1:81].copy_(x) for x in (q, k, v)]
    assert all(x.data_ptr() % 16 for x in off)
    assert torch.equal(_registered(*off, cu)[0], _registered(q, k, v, cu)[0])


def test_launches_are_recorded_as_tritons_are():
    """Without an extension; so the tuner finds what ships, on tensors without memory."""
    q = torch.empty(700, 4, 80, dtype=torch.float16, device="meta")
    plan = plan_tiles(torch.tensor([0, 600, 700], dtype=torch.int32), 700, device="meta")
    with launching.record(HOPPER) as seen:
        attention_sm90.launch_forward(q, q, q, plan, 700, True, 1.0, keep=False)
    assert [one.kernel.key for one in seen] == [
        (80, 1, True, c.consumers, c.keys, 0, False, 16, 80) for c in (LONG, SHORT)
    ]
    assert seen[0].arguments["lse"] is None and seen[0].arguments["scale"] == pytest.approx(1.442695)
    assert [one.arguments["tiles"].shape for one in seen] == [(5, 3), (6, 3)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would read the CPU's memory")
def test_the_binding_takes_what_the_stand_in_takes(monkeypatch):
    """All arguments are read and checked before CUDA is asked, which says that there is no device."""
    if not getattr(native._cuda, "attention_built", list)():
        pytest.skip("the extension is without attention for Hopper")
    monkeypatch.setattr(native, "cuda", lambda: native._cuda)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    q, k, v, cu, _ = _pack([600, 8])
    given = {"q": q, "k": k, "v": v, "out": torch.empty_like(q), "lse": torch.empty(4, 611), "least": 512, "most": 9000}
    for config, error, message in (
        (LONG, RuntimeError, "attention_forward: launch failed: .*(CUDA|driver)"),
        (Sm90Config(3, 112), RuntimeError, "no such kernel is built or loaded"),
        (Sm90Config(3, 100), ValueError, "config"),
    ):
        kernel = attention_sm90.Kernel(80, q.dtype, True, config)
        with pytest.raises(error, match=message):
            attention_sm90.launch(
                kernel, SimpleNamespace(index=0), **given, tiles=plan_for(cu, 611, q.device).tiles(192), scale=1.0
            )


# ---------------------------------------------------------------------------------------------- the op around it


@pytest.fixture
def named(extension, monkeypatch):
    """The public functions on CPU tensors as on a GPU's, with the backend that they would find there."""
    for module in (op, of_cache):
        monkeypatch.setattr(module, "chosen", lambda *_, **__: "sm90")
    return extension


def _interpreted():
    if (reason := launching.reason("cpu")) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("how", ["planned", "registered", "compiled"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_gradients(named, how, causal):
    """Triton's backward on what was kept, of the result and of the logs of its sums."""
    _interpreted()
    q, k, v, cu, _ = _pack([70, 5, 33], kv_heads=1)
    grad, dlse = torch.randn_like(q), torch.randn(4, 108)
    inside = [x[:108].double() for x in (q, k, v)]

    def run(q, k, v):
        if how == "registered":
            out, lse = _registered(q, k, v, cu, None, causal)
            return out, lse * math.log(2)
        return varlen_attention(q, k, v, cu, 70, causal=causal, softmax_scale=0.3, return_lse=True)

    def gradients(run, tensors, rounded):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        out, lse = run(*leaves)
        given = [grad[: out.shape[0]].to(out.dtype), dlse.to(lse.dtype)]
        if rounded:
            return torch.autograd.grad([out, lse[:, :108]], leaves, given)
        return torch.autograd.grad([out, lse], leaves, given)

    formula = lambda *x: varlen_attention_ref(*x, cu, causal, 0.3, return_lse=True)  # noqa: E731
    exact = gradients(formula, inside, False)
    eager = gradients(formula, [x[:108] for x in (q, k, v)], False)
    if how == "compiled":
        torch._dynamo.reset()
        run = torch.compile(run, fullgraph=True, backend="aot_eager")
    got = gradients(run, (q, k, v), True)
    for one, theirs, right in zip(got, eager, exact, strict=True):
        assert not one[108:].any()
        assert_two_times(one[:108], theirs, right, 2e-6)
    assert len(named.launches) == 1, "the statistics of the forward are kept"


def test_the_public_function_and_the_registered_op_agree(named):
    q, k, v, cu, cu_k = _pack([5, 9], [20, 4])
    bounds = {"cu_seqlens_q": cu, "cu_seqlens_k": cu_k, "max_seqlen_q": 9, "max_seqlen_k": 20}
    got, lse = varlen_attention(q, k, v, **bounds, causal=True, softmax_scale=0.3, return_lse=True)
    out, logs = _registered(q, k, v, cu, cu_k, True)
    assert torch.equal(got, out) and torch.equal(lse[:, :14], logs[:, :14] * math.log(2))
    assert (lse[:, 14:] == -math.inf).all(), "behind the last segment"
    assert torch.equal(varlen_attention(q, k, v, **bounds, causal=True, softmax_scale=0.3), out)
    torch._dynamo.reset()
    call = lambda q, k, v: varlen_attention(q, k, v, **bounds, causal=True, softmax_scale=0.3)  # noqa: E731
    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(q, k, v), out)


def test_rope_goes_by_a_pass_of_its_own(named):
    q, k, v, cu, _ = _pack([40, 9], tail=0)
    angles = torch.rand(49, 40)
    tables = angles.cos(), angles.sin()
    kept = [x.clone() for x in (q, k, v)]
    with torch.no_grad():
        got = varlen_attention(q, k, v, cu, 40, rope=tables)
        want = varlen_attention(rotate(q, *tables), rotate(k, *tables), v, cu, 40)
    assert torch.equal(got, want) and all(torch.equal(x, y) for x, y in zip((q, k, v), kept, strict=True))
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = varlen_attention(*leaves, cu, 40, rope=tables)
    assert torch.equal(out.detach(), want)
    if launching.reason("cpu") is None:
        for x, y in zip(torch.autograd.grad(out.sum(), leaves), leaves, strict=True):
            assert x.shape == y.shape and x.isfinite().all()


def test_opcheck(extension):
    _interpreted()
    q, k, v, cu, _ = _pack([5, 3], tail=0)
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.qwen2vl.varlen_attention.default, (*leaves, *_settings(cu, None, True)))


def test_tensors_without_values_have_its_shapes():
    q = torch.empty(9, 4, 80, dtype=torch.bfloat16, device="meta")
    cu = torch.zeros(3, dtype=torch.int32, device="meta")
    for with_lse in (False, True):
        settings = *(None,) * 3, 9, 9, False, 0.3, False, with_lse, "sm90"
        out, lse = torch.ops.qwen2vl.varlen_attention(q, q, q, cu, *settings)
        assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, (4, 9), torch.float32)


def test_a_prompt_over_a_cache(named):
    """Several new tokens of a row, bit for bit as the op itself; single ones are PyTorch's."""
    q = torch.randn(31, 4, 128).bfloat16()
    caches = torch.randn(2, 2, 600, 2, 128).bfloat16()
    got = kvcache_attention(q, *caches, [30, 1], [550, 70], backend="varlen")
    (one,) = named.launches
    assert sorted(one.rows) == list(range(30))
    bounds = [torch.tensor([0, n], dtype=torch.int32) for n in (30, 550)]
    keys = [cache[0, :550] for cache in caches]
    names = dict(zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), (*bounds, 30, 550), strict=True))
    assert torch.equal(got[:30], varlen_attention(q[:30], *keys, **names, causal=True))


def test_calls_to_the_launch(named, monkeypatch):
    """At most three from the public function."""
    found = []
    launch = attention_sm90.launch

    def count(*given, **more):
        frame, calls = sys._getframe(1), 1
        while frame.f_code is not varlen_attention.__code__:
            frame, calls = frame.f_back, calls + 1
        found.append(calls)
        launch(*given, **more)

    monkeypatch.setattr(attention_sm90, "launch", count)
    q, k, v, cu, _ = _pack([20, 600], tail=0)
    varlen_attention(q, k, v, cu, 600)
    assert found == [3, 3]


def test_plans_are_shared_by_layers_and_made_once(named, monkeypatch):
    q, k, v, cu, _ = _pack([20, 600], tail=0)
    plan = plan_for(cu, 620, q.device)
    lists = plan.tiles(LONG.rows), plan.tiles(SHORT.rows)
    for _ in range(2):
        varlen_attention(q, k, v, cu, 600)
    assert plan_for(cu, 620, q.device) is plan and plan.tiles(LONG.rows) is lists[0]
    assert [one.count for one in named.launches] == [len(lists[0]), len(lists[1])] * 2
    assert Sm90Config(3, 96) == LONG and lists[0].shape == (5, 3)
