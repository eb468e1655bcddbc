"""What serves varlen_attention by default: the table, the measurements behind it, and what a choice may depend on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

import qwen2vl_kernels
from qwen2vl_kernels import BackendError, plan_tiles, use_backend
from qwen2vl_kernels import varlen_attention as attend
from qwen2vl_kernels.core import attention_choice, attention_peers, launching
from qwen2vl_kernels.core.attention_choice import TABLE, UNMEASURED, bucket, choose, entry_of
from qwen2vl_kernels.core.attention_peers import Call
from qwen2vl_kernels.integrations import transformers_attention
from qwen2vl_kernels.ops import varlen_attention as op
from qwen2vl_kernels.triton import tail
from tests.conftest import DEVICE

RESULTS = Path(__file__).resolve().parents[3] / "benchmarks" / "results"
#: Backends of the table by what the benchmark calls them.
PROVIDERS = {
    "torch": ("torch varlen",), "triton": ("triton",), "sm90": ("sm90",), "flash 3": ("flash-attn 3", "fa3-fwd"),
}  # fmt: skip
CALL = Call("cuda", 90, torch.bfloat16, 80, 80)


def _seconds(entry, pack, rows):
    """Of each backend that was measured on a pack: the forward, or both ways where gradients are wanted."""
    ways = ("", ", backward") if entry.gradients else ("",)
    found = {}
    for backend in entry.backends:
        for provider in PROVIDERS[backend]:
            parts = [rows.get((f"{pack}{way}", provider)) for way in ways]
            if all(parts):
                found[backend] = sum(parts)
    return found


@pytest.mark.parametrize("entry", TABLE, ids=lambda e: f"{e.capability}, {e.gradients}, {e.rows}")
def test_every_entry_is_what_its_file_says(entry):
    """The order of medians: nobody later in an entry is more than 3 % faster, on any pack that the entry covers."""
    result = json.loads((RESULTS / entry.measured).read_text(encoding="utf-8"))
    assert result["device_type"] == "cuda" and not result["quick"]
    assert f"at commit {result['commit']}" in entry.note
    assert ("have changed since" in entry.note) == ("has changed since" in result["note"])
    rows = {(row["workload"], row["provider"]): row["median"] for row in result["rows"] if row["metric"] == "time"}
    later = [e.rows for e in TABLE if replace(e, rows=0, backends=()) == replace(entry, rows=0, backends=())]
    stop = min((rows for rows in later if rows > entry.rows), default=10**9)
    seen = set()
    for workload in dict.fromkeys(name for name, _ in rows):
        pack, heads = workload.split(", ")[:2]
        longest = max(int(part.split(" of ")[1]) for part in pack.split(" and "))
        columns = int(heads.split()[-1])
        if not (entry.rows <= longest < stop and entry.columns[0] <= columns <= entry.columns[1]):
            continue
        found = list(_seconds(entry, f"{pack}, {heads}", rows).items())
        for n, (name, seconds) in enumerate(found):
            seen.add(name)
            for other, fewer in found[n + 1 :]:
                assert seconds <= 1.03 * fewer, f"{workload}: {name} is put before {other}"
    assert seen == set(entry.backends), "a backend in the order was not measured"


def test_the_docs_say_how_far_backends_with_a_plan_for_every_shape_lead():
    """The default's time over the best of cuDNN's, at most over all packs, without gradients and with them."""
    result = json.loads((RESULTS / "nvidia-h200" / "attention.json").read_text(encoding="utf-8"))
    rows = {(row["workload"], row["provider"]): row["median"] for row in result["rows"] if row["metric"] == "time"}
    most = {False: 0.0, True: 0.0}
    for pack in {name for name, _ in rows if "backward" not in name}:
        longest = max(int(part.split(" of ")[1]) for part in pack.split(",")[0].split(" and "))
        for gradients in most:
            entry = entry_of(replace(CALL, gradients=gradients, rows=bucket(longest)))
            found = _seconds(entry, pack.removesuffix(", 16 heads of 80") + ", 16 heads of 80", rows)
            ours = next(found[name] for name in entry.backends if name in found and name != "flash 3")
            ways = ("", ", backward") if gradients else ("",)
            for provider in ("cuDNN", "sdpa"):
                parts = [rows.get((pack + way, provider)) for way in ways]
                most[gradients] = max(most[gradients], ours / sum(parts)) if all(parts) else most[gradients]
    text = " ".join((RESULTS.parents[1] / "docs" / "kernels.md").read_text(encoding="utf-8").split())
    assert f"up to {most[True]:.1f} times faster with gradients and {most[False]:.1f} times without" in text


def test_a_backend_with_a_plan_for_every_shape_is_not_in_the_table():
    assert not {"cudnn", "sdpa"} & {name for entry in TABLE for name in entry.backends}


@pytest.fixture
def gpu(monkeypatch):
    """As on a Hopper card with PyTorch's FlashAttention and no flash-attn; returns what changes that."""
    monkeypatch.setattr(attention_peers, "torch_reason", lambda: None)
    monkeypatch.setattr(attention_peers, "_loaded", lambda name: f"No module named {name!r}")
    monkeypatch.setattr(launching, "_target", lambda index: launching.Target("cuda", 90))
    if (reason := launching.reason("cuda")) is not None:
        pytest.skip(reason)

    attention_choice._known.cache_clear()

    def install(*names):
        attention_choice._known.cache_clear()
        monkeypatch.setattr(attention_peers, "_loaded", lambda name: RESULTS if name in names else "not installed")
        flags = {"build_flags": {"FLASHATTENTION_DISABLE_FP16": True}}
        modules = {"fa3_fwd_config": SimpleNamespace(CONFIG=flags)}
        finds = SimpleNamespace(import_module=lambda name: modules.get(name, SimpleNamespace()))
        monkeypatch.setattr(attention_peers, "importlib", finds)

    yield install
    attention_choice._known.cache_clear()


def test_what_was_measured_on_capability_9(gpu):
    training = replace(CALL, gradients=True)
    assert choose(training).backend == "torch" and choose(training).measured == "nvidia-h200/attention.json"
    for rows in (0, 1024):
        choice = choose(replace(CALL, rows=rows))
        assert choice.backend == "triton" and choice.measured and "first of what was measured" in choice.why
    gpu("fa3_fwd_interface")
    assert choose(CALL).backend == "triton", "below 1024 rows"
    long = replace(CALL, rows=1024)
    assert (choose(long).backend, choose(long).peer) == ("flash", "fa3_fwd_interface")
    assert choose(replace(long, dtype=torch.float16)).backend == "triton", "the wheel has no float16"
    assert choose(replace(training, rows=1024)).backend == "torch", "it has no backward"
    gpu("flash_attn.cute", "flash_attn")
    assert choose(long).backend == "triton", "nobody measured FlashAttention 4 or the distribution's 2"
    gpu("flash_attn.cute", "flash_attn_interface")
    assert choose(long).peer == "flash_attn_interface"


@pytest.mark.parametrize(
    "changed",
    [{"capability": c} for c in (80, 86, 89, 100, 120)]
    + [{"columns": c, "value_columns": c} for c in (64, 96, 128)]
    + [{"causal": True}, {"grouped": True}, {"gradients": True, "causal": True}],
    ids=str,
)
def test_what_nobody_measured_is_pytorchs_own_kernel(gpu, monkeypatch, changed):
    gpu("flash_attn_interface", "flash_attn.cute", "flash_attn")
    call = replace(CALL, **changed)
    for rows in (0, 1024):
        choice = choose(replace(call, rows=rows))
        assert entry_of(call) is None and (choice.backend, choice.measured) == ("torch", None)
    monkeypatch.setattr(attention_peers, "torch_reason", lambda: "it was left out")
    choice = choose(call)
    assert choice.backend == "triton" and "torch: it was left out" in choice.why


def test_what_pytorch_has_activated_is_asked_at_every_call(gpu, monkeypatch):
    """``torch.nn.attention.activate_flash_attention_impl`` puts other kernels under PyTorch's operators."""
    active = [None]
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: active[0])
    with FakeTensorMode():
        inputs = _inputs(300, gradients=True)
        for active[0], want in ((None, "torch"), ("FA4", "triton"), ("FA3", "torch"), ("mine", "triton")):
            assert attention_choice.chosen(*inputs, 256) == want
    training = replace(CALL, gradients=True, replaced="FA3")
    assert choose(training).measured is None, "FlashAttention 2 was measured"


@pytest.mark.parametrize(
    ("changed", "backend"),
    [
        ({"many": True, "gradients": True}, "triton"),
        ({"aligned": False, "gradients": True}, "triton"),
        ({"value_columns": 64}, "triton"),
        ({"columns": 81, "value_columns": 81}, "triton"),
        ({"capability": 75}, "triton"),
        ({"capability": 0}, "triton"),
        ({"empty": True}, "triton"),
        ({"columns": 264, "value_columns": 264}, "sdpa"),
        ({"dtype": torch.float32}, "sdpa"),
        ({"dtype": torch.float32, "gradients": True}, "sdpa"),
    ],
    ids=str,
)
def test_what_pytorchs_kernel_does_not_take_falls_to_the_next(gpu, changed, backend):
    assert choose(replace(CALL, **changed)).backend == backend


def _inputs(rows, *, columns=80, dtype=torch.bfloat16, gradients=False, device="cuda"):
    return [torch.empty(rows, 16, columns, dtype=dtype, device=device, requires_grad=gradients) for _ in range(3)]


def test_nothing_is_read_from_a_device(gpu):
    """Tensors without values, whose every read raises; boundaries on the device too."""
    with FakeTensorMode():
        cu_seqlens = torch.zeros(5, dtype=torch.int32, device="cuda")
        for gradients, longest, want in ((False, 256, "triton"), (False, 16384, "triton"), (True, 256, "torch")):
            inputs = _inputs(300, gradients=gradients)
            assert attention_choice.chosen(*inputs, longest) == want
            with torch.no_grad():  # autograd asks for a stream
                out = attend(*inputs, cu_seqlens, longest)
            assert out.shape == (300, 16, 80) and out.device.type == "cuda"
        packed = torch.empty(300, 3, 16, 80, dtype=torch.bfloat16, device="cuda").unbind(1)
        assert attention_choice.chosen(*(x.detach().requires_grad_() for x in packed), 256) == "torch", "it is aligned"
        strides = (16 * 84, 84, 1)
        off = torch.empty_strided((300, 16, 80), strides, dtype=torch.bfloat16, device="cuda", requires_grad=True)
        assert attention_choice.chosen(off, off, off, 256) == "triton", "its heads are not"
        assert attention_choice.chosen(*_inputs(0, gradients=True), 0) == "triton"
        for segments, want in ((0, "triton"), (1, "torch"), (65535, "torch"), (65536, "triton")):
            assert attention_choice.chosen(*_inputs(9, gradients=True), 9, segments=segments) == want


@pytest.fixture
def shapes_of_cudnn():
    """What cuDNN's operators give for tensors without values, which PyTorch does not say."""
    library = torch.library.Library("aten", "IMPL")

    def forward(q, k, v, *_, **__):
        empty = q.new_empty(0)
        lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
        return torch.empty_like(q), lse, empty, empty, 0, 0, empty, empty, empty

    def backward(grad, q, k, v, *_, **__):
        return tuple(torch.empty_like(x) for x in (q, k, v))

    library.impl("_cudnn_attention_forward", forward, "Meta")
    library.impl("_cudnn_attention_backward", backward, "Meta")
    yield
    library._destroy()


@pytest.mark.usefixtures("shapes_of_cudnn")
@pytest.mark.parametrize("name", ["torch", "cudnn"])
def test_peers_read_nothing_from_a_device(name, monkeypatch):
    """On tensors that have no values, forward and backward; a padded plan is what boundaries on a device have."""
    monkeypatch.setattr(tail, "reason", lambda kind: "the kernel is left out")
    q, k, v = (torch.empty(300, 16, 80, dtype=torch.bfloat16, device="meta") for _ in range(3))
    plan = plan_tiles(torch.empty(5, dtype=torch.int32, device="meta"), 300)
    assert plan.padded and plan.queries.longest is None and plan.queries.held() is None
    settings = (256, 256), False, 0.3, False, name
    out, lse = op._forward(q, k, v, plan, None, None, *settings)
    grads = op._backward(out, None, q, k, v, out, lse, plan, None, None, *settings)
    assert [x.shape for x in (out, *grads)] == [q.shape] * 4
    with pytest.raises(RuntimeError, match="meta tensors"):
        plan.cu_seqlens.max().item()  # as a read would


def test_the_choice_is_the_same_in_capture(gpu, monkeypatch):
    """Nothing that a choice is made of may ask whether there is one."""
    with FakeTensorMode():
        wants = [attention_choice.chosen(*_inputs(300, gradients=gradients), 256) for gradients in (False, True)]
        attention_choice._known.cache_clear()

        def asked():
            raise AssertionError("the choice asks whether a graph is captured")

        for owner in (torch.cuda, torch.cuda.graphs):
            monkeypatch.setattr(owner, "is_current_stream_capturing", asked)
        monkeypatch.setattr(torch.cuda, "synchronize", asked)
        assert (
            [attention_choice.chosen(*_inputs(300, gradients=g), 256) for g in (False, True)]
            == wants
            == ["triton", "torch"]
        )
    assert bucket(0) == 0 == bucket(1023) and bucket(1024) == 1024 == bucket(10**6)


def _in_graph(call, *inputs):
    """The backends that a compiled function's attention is told."""
    found = []

    def backend(graph, _):
        for node in graph.graph.nodes:
            if "varlen_attention" in str(node.target):
                found.extend(a for a in node.args if isinstance(a, str))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(call, fullgraph=True, backend=backend)(*inputs)
    return found


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_choice_is_the_same_in_compiled_code(gpu, dynamic):
    names = ("triton", "torch", "sdpa")
    with FakeTensorMode(allow_non_fake_inputs=True):
        for gradients, deterministic, invariant, want in (
            (False, False, False, "triton"),
            (True, False, False, "torch"),
            (True, True, False, "triton"),
            (True, False, True, "triton"),
        ):
            inputs = _inputs(300, gradients=gradients)
            for x in inputs if dynamic else ():
                torch._dynamo.mark_dynamic(x, 0)

            def call(one, *inputs, invariant=invariant):
                return one + names.index(attention_choice.chosen(*inputs, 256, invariant=invariant))

            torch._dynamo.reset()
            torch.use_deterministic_algorithms(deterministic)
            try:
                assert attention_choice.chosen(*inputs, 256, invariant=invariant) == want
                graphs = []
                one = torch.ones(())
                torch.compile(call, fullgraph=True, backend=lambda graph, _, to=graphs: to.append(graph) or graph)(
                    one, *inputs
                )
                (node,) = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
                assert node.args[1] == names.index(want)
            finally:
                torch.use_deterministic_algorithms(False)
    for dtype in (torch.bfloat16, torch.float32):
        inputs, cu_seqlens = _inputs(300, dtype=dtype, device="cpu"), torch.tensor([0, 300], dtype=torch.int32)
        assert _in_graph(lambda *a, cu=cu_seqlens: attend(*a, cu, 300), *inputs) == [
            attention_choice.chosen(*inputs, 300)
        ]


def test_transformers_adapter_chooses_in_compiled_code(gpu):
    """Boundaries stay unread there: Triton instead of others' kernels without gradients, where it serves."""
    names = ("triton", None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        cu_seqlens = torch.empty(4, dtype=torch.int32, device="cuda")
        for gradients, columns, want in (
            (False, 80, None),
            (False, 64, "triton"),
            (True, 64, None),
            (False, 264, None),
        ):
            served = {None: attention_choice.chosen(*_inputs(300, gradients=gradients, columns=columns), 300)}.get(
                want, want
            )
            assert served == {264: "sdpa"}.get(columns, "torch" if gradients else "triton")

            def call(one, cu_seqlens, *qkv):
                return one + names.index(transformers_attention.bounds({}, cu_seqlens, None, *qkv)[2])

            torch._dynamo.reset()
            graphs, inputs = [], _inputs(300, gradients=gradients, columns=columns)
            torch.compile(call, fullgraph=True, backend=lambda graph, _, to=graphs: to.append(graph) or graph)(
                torch.ones(()), cu_seqlens, *inputs
            )
            (node,) = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
            assert node.args[1] == names.index(want)


def test_a_refusal_in_compiled_code_is_one_of_ours():
    torch._dynamo.reset()
    x, cu_seqlens = torch.randn(6, 2, 8), torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(BackendError, match="backend 'flash' does not serve cpu tensors"):
        torch.compile(attend, backend="eager")(x, x, x, cu_seqlens, 6, backend="flash")


def test_one_compiled_function_for_several_widths():
    """A second width makes Dynamo take it for a number that changes."""
    torch._dynamo.reset()
    call = torch.compile(attend, fullgraph=True, backend="eager")
    for columns, rows, heads in ((80, 30, 4), (64, 40, 2), (128, 50, 4), (72, 60, 3)):
        x, cu_seqlens = torch.randn(rows, heads, columns), torch.tensor([0, 10, rows], dtype=torch.int32)
        assert torch.equal(call(x, x, x, cu_seqlens, rows), attend(x, x, x, cu_seqlens, rows))


# -------------------------------------------------------------------------------------------------- invariance


def test_ours_runs_where_the_same_bits_are_demanded(gpu):
    gpu("flash_attn_interface")
    with FakeTensorMode():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for gradients in (False, True):
                inputs = _inputs(9, dtype=dtype, gradients=gradients)
                assert attention_choice.chosen(*inputs, 4096, invariant=True) == "triton"
                torch.use_deterministic_algorithms(True)
                try:
                    assert attention_choice.chosen(*inputs, 4096) == "triton"
                finally:
                    torch.use_deterministic_algorithms(False)
        inputs = _inputs(9)
        for backend in ("torch", "flash", "sdpa", "eager"):
            for call in (
                lambda b=backend: attention_choice.chosen(*inputs, 9, invariant=True, backend=b),
                lambda b=backend: _under(b, lambda: attention_choice.chosen(*inputs, 9, invariant=True)),
            ):
                with pytest.raises(BackendError, match="invariant=True asks for the same bits twice and in every pack"):
                    call()
        assert attention_choice.chosen(*inputs, 9, invariant=True, backend="triton") == "triton"
        with pytest.raises(BackendError, match="invariant=True has only Triton's kernels here, and a head of more t"):
            attention_choice.chosen(*_inputs(9, columns=264), 9, invariant=True)


def _under(backend, call):
    with use_backend(varlen_attention=backend):
        return call()


@pytest.mark.parametrize("backend", [None, "sdpa", "blocked", "eager"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_on_a_cpu_every_backend_is_invariant(backend, causal):
    """Forward and backward, alone and among others, with more than one thread, twice."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for dtype in (torch.bfloat16, torch.float32):
            _check_invariant(dtype, causal, backend)
    finally:
        torch.set_num_threads(threads)


def _check_invariant(dtype, causal, backend):
    q, grad = torch.randn(2, 817, 4, 80).to(dtype)
    k, v = torch.randn(2, 817, 2, 80).to(dtype)
    cu = torch.tensor([0, 300, 317, 617, 817], dtype=torch.int32)
    gradients = backend != "blocked"

    def run(rows, bounds):
        leaves = [x[rows].detach().clone().requires_grad_(gradients) for x in (q, k, v)]
        longest = int(bounds.diff().max())
        out = attend(*leaves, bounds, longest, causal=causal, invariant=True, backend=backend)
        return (out, *(torch.autograd.grad(out, leaves, grad[rows]) if gradients else ()))

    whole = run(slice(0, 817), cu)
    assert all(torch.equal(a, b) for a, b in zip(whole, run(slice(0, 817), cu), strict=True))
    for a, b in zip(cu.tolist(), cu[1:].tolist(), strict=False):
        alone = run(slice(a, b), torch.tensor([0, b - a], dtype=torch.int32))
        for one, two in zip(alone, whole, strict=True):
            assert torch.equal(one.detach(), two[a:b].detach())


# ------------------------------------------------------------------------------- statistics that a backward keeps


def test_sdpa_on_a_cpu_keeps_its_statistics_in_compiled_code():
    """One forward for forward and backward together, and the bits of eager."""
    cu = torch.tensor([0, 7, 14, 14, 20], dtype=torch.int32)
    inputs = [torch.randn(22, heads, 80, requires_grad=True) for heads in (4, 2, 2)]
    grad = torch.randn(22, 4, 80)

    def call(q, k, v):
        return attend(q, k, v, cu, 7, causal=True, backend="sdpa")

    torch._dynamo.reset()
    eager = None
    for run in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        with torch.profiler.profile() as profile:
            out = run(*inputs)
            grads = torch.autograd.grad(out, inputs, grad)
        name = "aten::_scaled_dot_product_flash_attention_for_cpu"
        counts = {event.key: event.count for event in profile.key_averages()}
        assert (counts[name], counts[f"{name}_backward"]) == (2, 2), "two runs of equal segments"
        results = (out, *grads)
        assert not any(x[20:].any() for x in results)
        eager = eager or results
        assert all(torch.equal(a, b) for a, b in zip(results, eager, strict=True))


@pytest.mark.parametrize("backend", ["sdpa", "eager", "triton"])
def test_derivatives_of_second_order_are_refused(backend):
    """PyTorch takes the derivatives of an operator that has none registered for zero."""
    q = torch.randn(6, 2, 16, requires_grad=True, device=DEVICE if backend == "triton" else "cpu")
    cu_seqlens = torch.tensor([0, 6], dtype=torch.int32, device=q.device)
    if backend == "triton":
        if (reason := launching.reason(DEVICE)) is not None:
            pytest.skip(reason)
        out = attend(q, q, q, cu_seqlens, 6, backend=backend)
    else:
        out = torch.ops.qwen2vl.varlen_attention(
            q, q, q, cu_seqlens, *(None,) * 3, 6, 6, False, 0.3, False, False, backend
        )[0]
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="varlen_attention: its gradients have no derivatives of their own"):
        torch.autograd.grad(first.sum(), q)


@pytest.mark.parametrize("op", ["swiglu", "quick_gelu", "rms_norm", "layer_norm"])
def test_so_are_those_of_the_other_kernels_that_have_none(op):
    if (reason := launching.reason(DEVICE)) is not None:
        pytest.skip(reason)
    x, weight = torch.randn(4, 16, requires_grad=True, device=DEVICE), torch.ones(16, device=DEVICE)
    others = {"swiglu": (x.detach(),), "quick_gelu": (), "rms_norm": (weight, 1e-6), "layer_norm": (weight, weight)}
    with use_backend(**{op: "triton"}):
        out = getattr(qwen2vl_kernels, op)(x, *others[op])
    (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{op}: its gradients have no derivatives of their own"):
        torch.autograd.grad(first.sum(), x)


def test_pytorch_picks_the_kernel_whose_statistics_are_kept():
    """``keeps_statistics`` must say what PyTorch's own choice is."""
    from qwen2vl_kernels.core.attention_cpu import keeps_statistics

    fused = torch.nn.attention.SDPBackend.FLASH_ATTENTION.value
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for heads, kv_heads, columns, value_columns, length in ((4, 4, 80, 80, 9), (4, 2, 8, 8, 1), (4, 4, 80, 64, 9)):
            q, k = torch.empty(length, heads, columns, dtype=dtype), torch.empty(length, kv_heads, columns, dtype=dtype)
            v = torch.empty(length, kv_heads, value_columns, dtype=dtype)
            batch = [x[None].transpose(1, 2) for x in (q, k, v)]
            picked = torch._fused_sdp_choice(*batch, None, 0.0, True, enable_gqa=heads != kv_heads)
            assert keeps_statistics(q, v) == (picked == fused)


def test_the_table_for_people(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    rows = {(row["dtype"], row["head_dim"]): row for row in attention_choice.choices("cuda")}
    assert rows["float32", 80]["training"]["backend"] == "sdpa"
    assert all(row[kind]["why"] for row in rows.values() for kind in attention_choice.KINDS)
    served = {kind: rows["bfloat16", 80][kind] for kind in attention_choice.KINDS}
    assert [of["backend"] for of in served.values()] == ["triton", "triton", "torch", "torch"]
    assert [bool(of["measured"]) for of in served.values()] == [True, True, True, False]
    assert "at commit 3dc270fec4c9; the Triton kernels have changed since" in served["training"]["why"]
    assert set(UNMEASURED) <= set({*op._BACKENDS, *attention_peers.PEERS, "triton"})
    assert attention_choice.choose(replace(CALL, device_type="cpu")).backend in ("blocked", "sdpa")


def test_on_a_cpu_nothing_is_called_measured_that_was_not(monkeypatch):
    monkeypatch.setattr(attention_choice, "slow_on_cpu", lambda dtype: False)
    monkeypatch.setattr(attention_choice, "cpu_vendor", lambda: attention_choice.CPU_VENDOR)
    result = json.loads((RESULTS / attention_choice._CPU).read_text(encoding="utf-8"))
    heads = {row["workload"].split(", ")[1] for row in result["rows"] if not row["workload"].startswith("causal")}
    causal = {row["workload"].split(", ")[1] for row in result["rows"] if row["workload"].startswith("causal")}
    assert (heads, causal) == ({"16 heads of 80"}, {"28/4 heads of 128"})
    found = {
        (columns, causal, grouped)
        for columns in (64, 72, 80, 96, 128)
        for causal in (False, True)
        for grouped in (False, True)
        if choose(Call("cpu", 0, torch.bfloat16, columns, columns, grouped, causal)).measured
    }
    assert found == {(80, False, False), (128, True, True)}


def test_boundaries_are_copied_to_the_device_once():
    cu = torch.tensor([0, 3, 9], dtype=torch.int32)
    plan = plan_tiles(cu, 9, device="meta")
    side = plan.queries
    assert side.bounds() is side.bounds() and side.bounds().device.type == "meta" and side.held() == 9
    assert plan_tiles(cu, 10).queries.held() == 9 and plan_tiles(cu, 9, padded=True).queries.held() is None
