"""What holds for every op: registration, torch.compile without graph breaks, typed refusals, backends."""

from types import SimpleNamespace

import pytest
import torch

import qwen2vl_kernels as K
from qwen2vl_kernels import BackendError, use_backend
from qwen2vl_kernels.core import native
from qwen2vl_kernels.core.backends import PREFERENCE, resolve, table, unavailable


def _x(*shape):
    return torch.randn(shape, requires_grad=True)


CU = torch.tensor([0, 2, 4], dtype=torch.int32)
POSITIONS = torch.arange(12).view(3, 4)
TARGET = torch.arange(4)
LENGTHS = torch.tensor([3, 5], dtype=torch.int32)  # of a cache's rows, on the device
INV_FREQ = torch.tensor([1.0, 0.1, 0.01, 0.001])
#: Of attention: neither keys' boundaries nor angles; lengths, causal, scale, neither fused nor with lse, backend.
SETTINGS = (None, None, None, 2, 2, True, 0.35, False, False, "sdpa")
QUANTISED = (torch.arange(192).byte().view(6, 32), torch.rand(6, 2), torch.arange(6).byte().unsqueeze(1))
#: op under torch.ops -> arguments
CALLS = {
    "rms_norm": lambda: (_x(4, 8), _x(8)),
    "add_rms_norm": lambda: (_x(4, 8), _x(4, 8), _x(8)),
    "layer_norm": lambda: (_x(4, 8), _x(8), _x(8)),
    "add_layer_norm": lambda: (_x(4, 8), _x(4, 8), _x(8), _x(8)),
    "swiglu": lambda: (_x(4, 8), _x(4, 8)),
    "quick_gelu": lambda: (_x(4, 8), _x(8)),
    "swiglu_": lambda: (torch.randn(4, 8), torch.randn(4, 8)),
    "quick_gelu_": lambda: (torch.randn(4, 8), torch.randn(8)),
    "mrope": lambda: (_x(4, 2, 8), _x(4, 1, 8), POSITIONS, INV_FREQ, [2, 1, 1]),
    "mrope_": lambda: (torch.randn(4, 2, 8), torch.randn(4, 1, 8), POSITIONS, INV_FREQ, [2, 1, 1]),
    "vision_rope": lambda: (_x(4, 2, 8), _x(4, 2, 8), torch.rand(4, 4), torch.rand(4, 4)),
    "vision_rope_": lambda: (torch.randn(4, 2, 8), torch.randn(4, 2, 8), torch.rand(4, 4), torch.rand(4, 4)),
    "vision_rope_qkv_": lambda: (torch.randn(4, 3, 2, 8), torch.rand(4, 4), torch.rand(4, 4)),
    "patch_embed": lambda: (torch.randn(4, 8), _x(6, 8), _x(6)),
    "patch_merge": lambda: (_x(8, 4), _x(4), _x(4), _x(16, 16), _x(16), _x(6, 16), _x(6)),
    "linear_cross_entropy": lambda: (_x(4, 8), _x(6, 8), torch.tensor([5, -100, 0, 3]), _x(6)),
    "quant_linear": lambda: (_x(4, 64), *QUANTISED, _x(6), [1, 32], torch.arange(64).flip(0)),
    "varlen_attention": lambda: (_x(4, 2, 8), _x(4, 1, 8), _x(4, 1, 8), CU, *SETTINGS),
    "image_to_patches": lambda: (torch.randint(0, 256, (30, 40, 3)).byte(), 28, 56, 14, 2, None, None, None, "native"),
    "kvcache_attention": lambda: (torch.randn(3, 2, 8), *torch.randn(2, 2, 5, 1, 8), [1, 2], [3, 5], 0.35, "sdpa"),
    "kvcache_attention_decode": lambda: (torch.randn(2, 2, 8), *torch.randn(2, 2, 5, 1, 8), LENGTHS, 0.35, "eager"),
    "decode_attention_": lambda: (
        torch.randn(2, 2, 8),
        *torch.randn(2, 2, 1, 8),
        *torch.randn(2, 2, 5, 1, 8),
        LENGTHS,
        POSITIONS[0, :2],
        INV_FREQ,
        torch.zeros(2, 1, dtype=torch.int32),
        0.35,
        False,
        "eager",
    ),
    "rms_norm_linear": lambda: (
        torch.randn(4, 8),
        torch.randn(8),
        list(torch.randn(2, 3, 8)),
        [None, torch.randn(3)],
        0.1,
        False,
        "eager",
    ),
    "rms_norm_swiglu": lambda: (torch.randn(4, 8), torch.randn(8), *torch.randn(2, 6, 8), 0.1, False, "eager"),
    "linear_add_": lambda: (torch.randn(4, 6), torch.randn(4, 8), torch.randn(6, 8), False, "eager"),
    "sample_tokens_": lambda: (
        torch.randn(2, 9),
        torch.rand(2).double(),
        torch.rand(2, 9) < 0.5,
        torch.tensor([3]),
        *(0.7, 5, 0.9, 1.3, "eager"),
    ),
    "grouped_linear": lambda: (_x(4, 8), _x(3, 6, 8), torch.tensor([0, 1, 1, 4], dtype=torch.int32)),
    "grouped_quant_linear": lambda: (
        *(_x(4, 64), torch.arange(576).byte().view(3, 6, 32), torch.rand(3, 6, 2)),
        *(torch.tensor([0, 1, 1, 4], dtype=torch.int32), torch.arange(18).byte().view(3, 6, 1), [1, 32]),
        torch.arange(64).flip(0).repeat(3, 1),
    ),
    "group_by_expert": lambda: (torch.tensor([[2, 0], [1, 2], [3, 0]]), 3),
}


@pytest.mark.parametrize("name", CALLS)
def test_registered_op_passes_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.qwen2vl, name).default, CALLS[name]())


def _public(name):
    def call(*arguments):
        if name == "varlen_attention":
            *tensors, _, _, _, longest, _, causal, scale, _, _, backend = arguments
            return K.varlen_attention(*tensors, longest, causal=causal, softmax_scale=scale, backend=backend)
        if name == "kvcache_attention":
            *arguments, scale, backend = arguments
            return K.kvcache_attention(*arguments, softmax_scale=scale, backend=backend)
        if name == "kvcache_attention_decode":
            *tensors, lengths, scale, backend = arguments
            return K.kvcache_attention(*tensors, None, lengths, softmax_scale=scale, backend=backend)
        if name == "decode_attention_":
            *tensors, scale, prefetch, backend = arguments
            return K.decode_attention_(*tensors, softmax_scale=scale, prefetch=prefetch, backend=backend)
        if name in ("rms_norm_linear", "rms_norm_swiglu"):
            *tensors, eps, prefetch, backend = arguments
            return getattr(K, name)(*tensors, eps=eps, prefetch=prefetch, backend=backend)
        if name == "linear_add_":
            *tensors, prefetch, backend = arguments
            return K.linear_add_(*tensors, prefetch=prefetch, backend=backend)
        if name == "sample_tokens_":
            *tensors, temperature, top_k, top_p, penalty, backend = arguments
            shaped = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": penalty}
            return K.sample_tokens_(*tensors, **shaped, backend=backend)
        if name in ("quant_linear", "grouped_quant_linear"):
            *tensors, block, order = arguments
            return getattr(K, name)(*tensors, block=tuple(block), order=order)
        if name == "image_to_patches":
            return K.image_to_patches(*arguments[:3])
        return getattr(K, name)(*arguments)

    return call


@pytest.mark.parametrize("name", CALLS)
def test_public_function_and_registered_op_agree(name):
    def outputs(call, arguments):
        result = call(*arguments)
        tensors = [result] if isinstance(result, torch.Tensor) else list(result or ())
        if name == "varlen_attention":  # the op also returns what its backward needs
            tensors = tensors[:1]
        return tensors + [a for a in arguments if isinstance(a, torch.Tensor)]  # in-place results are arguments

    torch.manual_seed(1)
    ours = outputs(_public(name), CALLS[name]())
    torch.manual_seed(1)
    registered = outputs(getattr(torch.ops.qwen2vl, name), CALLS[name]())
    for a, b in zip(ours[-len(registered) :], registered, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CALLS)
def test_compiles_without_a_graph_break(name):
    arguments = CALLS[name]()
    torch._dynamo.reset()  # every name compiles the same wrapper anew
    call = torch.compile(_public(name), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.manual_seed(2)
        compiled = call(*[a.clone() if isinstance(a, torch.Tensor) else a for a in arguments])
        eager = _public(name)(*[a.clone() if isinstance(a, torch.Tensor) else a for a in arguments])
    torch.testing.assert_close(compiled, eager)


def test_whether_the_cuda_extension_serves_is_no_break_in_a_graph(monkeypatch):
    """Asking it is a call into C++, which is not to be traced."""
    asked = SimpleNamespace(device_problem=lambda device: (native.cpu().build_info(), None)[1])
    monkeypatch.setattr(native, "_cuda", asked)
    run = torch.compile(lambda x: x + (1 if native._device_reason(123) is None else 2), fullgraph=True, backend="eager")
    assert run(torch.zeros(2)).tolist() == [1, 1]


def test_attention_compiles_with_its_backward():
    """Through AOT autograd: the opaque op's registered backward gives the eager gradients."""
    torch._dynamo.reset()
    arguments = [torch.randn(4, heads, 8, requires_grad=True) for heads in (2, 1, 1)]

    def loss(q, k, v):
        return K.varlen_attention(q, k, v, CU, 2, causal=True).square().sum()

    expected = torch.autograd.grad(loss(*arguments), arguments)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*arguments), arguments)
    torch.testing.assert_close(got, expected)


def test_no_mutation_of_inputs_by_name():
    """Only ops whose name ends in _ may declare that they write to an argument."""
    for name in CALLS:
        schema = str(getattr(torch.ops.qwen2vl, name).default._schema)
        assert ("!" in schema) == name.endswith("_"), schema


def _decode(new=None, lengths=LENGTHS, q=None, backend=None):
    q = torch.randn(2, 2, 8) if q is None else q
    return K.kvcache_attention(q, *torch.randn(2, 2, 5, 1, 8), new, lengths, backend=backend)


def _step(rows, weights, biases=None):
    return K.rms_norm_linear(torch.zeros(rows, 4), torch.zeros(4), weights, biases)


def _append(**other):
    names = ("q", "k", "v", "k_cache", "v_cache", "cache_seqlens", "positions", "inv_freq", "arrived")
    given = dict(zip(names, CALLS["decode_attention_"](), strict=False))
    return K.decode_attention_(**(given | other))


def _paged(table, lengths=LENGTHS, pages=4):
    return K.kvcache_attention(torch.randn(2, 2, 8), *torch.randn(2, pages, 3, 1, 8), None, lengths, block_table=table)


TABLE = torch.tensor([[0, 99], [3, 1]], dtype=torch.int32)  # of pages of 3 slots; the first row holds 3 tokens
REFUSALS = [
    (lambda: _paged([[0]]), TypeError, "block_table must be a torch.Tensor, got list"),
    (lambda: _paged(TABLE.long()), TypeError, "block_table must have one of the dtypes int32"),
    (lambda: _paged(TABLE[:1]), ValueError, r"block_table must have shape \(B, blocks\) with B=2, got \(1, 2\)"),
    (lambda: _paged(TABLE.t().contiguous().t()), ValueError, "block_table must be contiguous in its last dimension"),
    (lambda: _paged(TABLE.to("meta")), ValueError, "block_table must be on cpu like q, got meta"),
    (lambda: _paged(TABLE, pages=3), ValueError, r"block_table must hold pages in \[0, 3\) .*, got 3"),
    (lambda: _paged(TABLE, LENGTHS + 1), ValueError, r"block_table must hold pages in \[0, 4\) .*, got 99"),
    (lambda: _paged(TABLE - 1), ValueError, r"block_table must hold pages in \[0, 4\) .*, got -1"),
    (lambda: _paged(TABLE, [3, 5]), TypeError, "new_tokens must be a sequence .*, got None"),
    (
        lambda: K.kvcache_attention(
            torch.randn(3, 2, 8), *torch.randn(2, 2, 5, 1, 8), [1, 2], [3, 5], block_table=TABLE
        ),
        TypeError,
        "block_table must be None with lengths in a sequence, got a tensor",
    ),
    (
        lambda: _decode([1, 1]),
        TypeError,
        "kvcache_attention: new_tokens must be None with lengths in a tensor, got list",
    ),
    (lambda: _decode(None, [3, 5]), TypeError, "kvcache_attention: new_tokens must be a sequence .*, got None"),
    (lambda: _decode(lengths=LENGTHS.long()), TypeError, "cache_seqlens must have one of the dtypes int32"),
    (lambda: _decode(lengths=LENGTHS[:1]), ValueError, r"cache_seqlens must have shape \(B\) with B=2, got \(1,\)"),
    (lambda: _decode(lengths=LENGTHS.to("meta")), ValueError, "cache_seqlens must be on cpu like q, got meta"),
    (lambda: _decode(q=torch.randn(3, 2, 8)), ValueError, r"k_cache must have shape \(B, capacity, .* B=3, D=8"),
    (
        lambda: _decode(q=torch.randn(2, 2, 8, requires_grad=True)),
        ValueError,
        "q, k_cache and v_cache must not require",
    ),
    (
        lambda: _decode(backend="sdpa"),
        ValueError,
        "kvcache_attention_decode: backend 'sdpa' does not serve cpu tensors",
    ),
    (lambda: _step(2, [torch.zeros(2, 8)]), ValueError, r"weights\[0\] must have shape \(N0, K\) with .*K=4"),
    (lambda: _step(2, []), ValueError, "rms_norm_linear: weights must be one to three, got 0"),
    (
        lambda: _step(2, [torch.zeros(3, 4)], biases=[]),
        ValueError,
        "biases must be one for each weight, None too, got 0",
    ),
    (
        lambda: _step(2, [torch.zeros(3, 4)], biases=[torch.zeros(4)]),
        ValueError,
        r"biases\[0\] must have shape \(N0\) with N0=3",
    ),
    (lambda: _step(2, [_x(3, 4)]), ValueError, "rms_norm_linear: no argument may require grad"),
    (lambda: K.rms_norm_swiglu(*torch.zeros(4, 4, 4)), ValueError, r"norm_weight must have shape \(K\) with K=4"),
    (
        lambda: K.linear_add_(torch.zeros(1, 4).expand(4, 4), *torch.zeros(2, 4, 4)),
        ValueError,
        "residual is overwritten",
    ),
    (lambda: _append(cache_seqlens=LENGTHS.long()), TypeError, "cache_seqlens must have one of the dtypes int32"),
    (lambda: _append(arrived=torch.zeros(2, 2, dtype=torch.int32)), ValueError, "arrived must have shape .* Hk=1"),
    (lambda: _append(arrived=torch.zeros(2, 2, dtype=torch.int32)[:, :1]), ValueError, "arrived must be contiguous"),
    (lambda: _append(inv_freq=INV_FREQ[:3]), ValueError, r"inv_freq must have shape \(4\), got \(3,\)"),
    (lambda: _append(k_cache=torch.zeros(1, 5, 1, 8).expand(2, 5, 1, 8)), ValueError, "k_cache is overwritten"),
    (lambda: _append(q=_x(2, 2, 8)), ValueError, "decode_attention_: q requires grad"),
    (lambda: K.rms_norm([1.0], _x(8)), TypeError, "rms_norm: x must be a torch.Tensor, got list"),
    (
        lambda: K.rms_norm(_x(4, 8), _x(9)),
        ValueError,
        r"rms_norm: weight must have shape \(C\) with C=8, got \(9,\)",
    ),
    (
        lambda: K.rms_norm(_x(4, 8).long(), _x(8)),
        TypeError,
        "rms_norm: x must have one of the dtypes float32",
    ),
    (lambda: K.rms_norm(_x(4, 8), _x(8).half()), TypeError, "rms_norm: weight must have dtype torch.float32"),
    (
        lambda: K.rms_norm(_x(4, 8), _x(8).to("meta")),
        ValueError,
        "rms_norm: weight must be on cpu like x, got meta",
    ),
    (lambda: K.add_rms_norm(_x(4, 8), _x(3, 8), _x(8)), ValueError, r"residual must have shape \(4, 8\)"),
    (lambda: K.layer_norm(_x(4, 8), _x(8), _x(7)), ValueError, r"layer_norm: bias must have shape"),
    (lambda: K.add_layer_norm(_x(4, 8), _x(4, 9), _x(8), _x(8)), ValueError, "add_layer_norm: residual"),
    (lambda: K.swiglu(_x(4, 7)), ValueError, "swiglu: packed gate must have an even last size, got 7"),
    (lambda: K.swiglu(_x(4, 8), _x(4, 6)), ValueError, "swiglu: up must have shape"),
    (lambda: K.quick_gelu(_x(4, 8), _x(4)), ValueError, "quick_gelu: bias must have shape"),
    (lambda: K.quick_gelu(None), TypeError, "quick_gelu: x must be a torch.Tensor, got NoneType"),
    (
        lambda: K.mrope(_x(4, 2, 8), _x(3, 1, 8), POSITIONS, INV_FREQ, (2, 1, 1)),
        ValueError,
        "mrope: k must have shape",
    ),
    (
        lambda: K.mrope(_x(4, 2, 8), _x(4, 1, 8), POSITIONS.float(), INV_FREQ, (2, 1, 1)),
        TypeError,
        "mrope: positions",
    ),
    (
        lambda: K.mrope(_x(4, 2, 8), _x(4, 1, 8), POSITIONS[:2], INV_FREQ, (2, 1, 1)),
        ValueError,
        "mrope: positions",
    ),
    (
        lambda: K.mrope(_x(4, 2, 8), _x(4, 1, 8), POSITIONS, INV_FREQ, (2, 1, 2)),
        ValueError,
        "section .* must sum to",
    ),
    (
        lambda: K.mrope(_x(4, 2, 8), _x(4, 1, 8), POSITIONS, INV_FREQ, (4,)),
        ValueError,
        "section must be three",
    ),
    (
        lambda: K.mrope(_x(4, 2, 6), _x(4, 1, 6), POSITIONS, INV_FREQ, (2, 1, 1)),
        ValueError,
        "inv_freq has 4 pairs",
    ),
    (
        lambda: K.mrope(_x(4, 2, 8).transpose(1, 2), _x(4, 1, 2), POSITIONS, INV_FREQ[:1], (1, 0, 0)),
        ValueError,
        "mrope: q must be contiguous in its last dimension",
    ),
    (lambda: K.vision_rope(_x(4, 2, 8), _x(4, 2, 8), _x(4, 5), _x(4, 5)), ValueError, "cos has 5 pairs"),
    (lambda: K.vision_rope(_x(4, 2, 8), _x(4, 2, 8), _x(4, 4), _x(3, 4)), ValueError, "vision_rope: sin"),
    (lambda: K.vision_rope_qkv_(_x(4, 2, 2, 8), _x(4, 4), _x(4, 4)), ValueError, "qkv must have shape"),
    (lambda: K.vision_rope_tables(_x(4, 2), _x(2)), TypeError, "vision_rope_tables: positions"),
    (lambda: K.patch_embed(_x(4, 8), None), TypeError, "patch_embed: weight must be a torch.Tensor"),
    (
        lambda: K.patch_merge(_x(8, 4), _x(4), _x(4), _x(16, 15), _x(16), _x(6, 16), _x(6)),
        ValueError,
        "fc1_weight",
    ),
    (lambda: K.grouped_linear(_x(4, 8), _x(2, 6, 7), CU), ValueError, r"weight must have .*K\) with G=2, N=6, K=8"),
    (lambda: K.grouped_linear(_x(4, 8), _x(2, 6, 8).half(), CU), TypeError, "weight must have dtype torch.float32"),
    (lambda: K.grouped_linear(_x(4, 8), _x(3, 6, 8), CU), ValueError, r"bounds must have shape \(4\), got \(3,\)"),
    (lambda: K.grouped_linear(_x(4, 8), _x(2, 0, 8), CU), ValueError, "weight must have a group, a row and a column"),
    (lambda: K.grouped_linear(_x(4, 8), _x(2, 6, 8), CU.long()), TypeError, "bounds must have one of the dtypes int32"),
    (lambda: K.grouped_linear(_x(3, 8), _x(2, 6, 8), CU), ValueError, r"rise from 0 to .* the 3 rows of x, got \[0, 2"),
    (lambda: K.grouped_linear(_x(4, 8), _x(2, 6, 8), CU.flip(0)), ValueError, r"bounds must rise .* got \[4, 2, 0\]"),
    (lambda: K.group_by_expert(POSITIONS.float(), 3), TypeError, "experts must have one of the dtypes int64, int32"),
    (lambda: K.group_by_expert(POSITIONS[0], 3), ValueError, r"experts must have shape \(T, k\), got \(4,\)"),
    (lambda: K.group_by_expert(POSITIONS, 0), ValueError, "num_experts must be from 1 to 32767, got 0"),
    (
        lambda: K.linear_cross_entropy(_x(4, 8), _x(6, 7), TARGET),
        ValueError,
        r"linear_cross_entropy: weight must have shape \(V, C\) with V=6, C=8, got \(6, 7\)",
    ),
    (lambda: K.linear_cross_entropy(_x(4, 8), _x(6, 8).half(), TARGET), TypeError, "weight must have dtype torch.flo"),
    (lambda: K.linear_cross_entropy(_x(4, 8), _x(6, 8), TARGET[:3]), ValueError, r"target must have shape \(4\), got"),
    (lambda: K.linear_cross_entropy(_x(4, 8), _x(6, 8), TARGET.int()), TypeError, "one of the dtypes int64, got"),
    (lambda: K.linear_cross_entropy(_x(4, 8), _x(6, 8), TARGET, _x(5)), ValueError, r"bias must have shape \(V\) with"),
    (lambda: K.linear_cross_entropy(_x(4, 8), _x(0, 8), TARGET), ValueError, "weight must have a row at least"),
    (
        lambda: K.linear_cross_entropy(_x(4, 8), _x(6, 8), TARGET, reduction="avg"),
        ValueError,
        "reduction must be one of mean, sum, none, got 'avg'",
    ),
    (
        lambda: K.linear_cross_entropy(_x(4, 8), _x(6, 8), TARGET, label_smoothing=1.5),
        ValueError,
        r"label_smoothing must be in \[0, 1\], got 1.5",
    ),
    (lambda: K.linear_cross_entropy(_x(4, 8), _x(6, 8), TARGET, chunk_rows=0), ValueError, "chunk_rows must be posi"),
    (
        lambda: K.linear_cross_entropy(_x(4, 8), _x(6, 8), TARGET + 3),
        ValueError,
        r"target must be in \[0, 6\) or ignore_index = -100, got 6",
    ),
    (
        lambda: K.linear_cross_entropy(_x(4, 8), _x(6, 8), TARGET - 1),
        ValueError,
        r"target must be in \[0, 6\) or ignore_index = -100, got -1",
    ),
    (
        lambda: K.varlen_attention(_x(4, 2, 8), _x(4, 1, 7), _x(4, 1, 7), CU, 2),
        ValueError,
        "varlen_attention: k",
    ),
    (
        lambda: K.varlen_attention(_x(4, 2, 8), _x(4, 1, 8), _x(4, 1, 8), CU, 2.0),
        ValueError,
        "max_seqlen must be",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS, ids=[m for _, _, m in REFUSALS])
def test_refusals_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_named_backends_that_cannot_serve_raise():
    x, w = torch.randn(4, 8), torch.randn(8)
    with pytest.raises(BackendError, match="rms_norm: backend 'native' does not serve cpu tensors; these do: eager"):
        K.rms_norm(x, w, backend="native")
    with (
        pytest.raises(BackendError, match="mrope_positions has no backend 'sdpa'"),
        use_backend(mrope_positions="sdpa"),
    ):
        pass
    with pytest.raises(BackendError, match="no op is called 'rope'"), use_backend(rope="eager"):
        pass
    with pytest.raises(BackendError, match="backend 'cuda' does not serve cpu tensors"):
        resolve("mrope_positions", "cpu", "cuda")


def test_use_backend_nests_and_restores():
    assert resolve("varlen_attention", "cpu", None) == "sdpa"
    with use_backend("eager"):
        assert resolve("varlen_attention", "cpu", None) == "eager"
        with use_backend(varlen_attention="blocked"):
            assert resolve("varlen_attention", "cpu", None) == "blocked"
            assert resolve("varlen_attention", "cpu", "sdpa") == "sdpa", "the argument wins"
        assert resolve("varlen_attention", "cpu", None) == "eager"
    assert resolve("varlen_attention", "cpu", None) == "sdpa"


def test_table_has_a_row_for_every_op():
    assert [row[0] for row in table("cpu")] == list(PREFERENCE)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("op", ["swiglu_", "quick_gelu_", "vision_rope_", "append_kv"])
def test_what_is_written_in_place_is_known_to_autograd(op, backend):
    """A backward that needs what was there before fails instead of taking what is there now."""
    if (reason := unavailable(backend, "cpu")) is not None:
        pytest.skip(f"{backend}: {reason}")
    x, new = torch.randn(4, 2, 16), torch.randn(2, 2, 16)
    writes = {
        "swiglu_": lambda: K.swiglu_(x, torch.randn(4, 2, 16), backend=backend),
        "quick_gelu_": lambda: K.quick_gelu_(x, backend=backend),
        "vision_rope_": lambda: K.vision_rope_(x, torch.randn(4, 2, 16), *torch.rand(2, 4, 8), backend=backend),
        "append_kv": lambda: K.append_kv(new, new, x[None], x[None].clone(), torch.arange(2), backend=backend),
    }
    weight = torch.randn(16, requires_grad=True)
    y = x * weight
    writes[op]()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
