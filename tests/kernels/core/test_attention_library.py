"""varlen_attention by others' kernels: what they are asked for, and what is closed that they leave open.

Their kernels run on GPUs; here functions with their names and parameters stand for them, which check what they get and
answer with the formula, with NaN in the rows that nobody writes. PyTorch's operators are called through its dispatcher,
so that the installed version's schema says whether the arguments are its own.
"""

from __future__ import annotations

import types
from dataclasses import replace

import pytest
import torch

from qwen2vl_kernels import BackendError, plan_tiles, varlen_attention
from qwen2vl_kernels.core import attention_calls, attention_peers, launching, tile_plan
from qwen2vl_kernels.core.attention_peers import FLASH, Call, peer_of, why_not
from qwen2vl_kernels.core.backends import unavailable
from qwen2vl_kernels.core.tile_plan import Side
from qwen2vl_kernels.ops import varlen_attention as op
from qwen2vl_kernels.ops.varlen_attention import varlen_attention_ref
from qwen2vl_kernels.triton import tail
from tests.conftest import DEVICE, assert_two_times

SCALE = 0.3
CALL = Call("cuda", 90, torch.bfloat16, 80, 80)


@pytest.fixture
def pack():
    """Two segments, an empty one and three rows past the last; grouped heads in a packed projection."""
    q = torch.randn(17, 3, 4, 80).double()  # a stand-in takes what no kernel does
    q, k, v = q[:, 0], q[:, 1, :2], q[:, 2, :2]
    return q, k, v, torch.tensor([0, 9, 9, 14], dtype=torch.int32)


class Kernel:
    """Stands for one of others' kernels: the formula, with NaN where nobody writes."""

    def __init__(self, statistics: str = "HT") -> None:
        self.statistics, self.longest, self.stride, self.forwards, self.backwards = statistics, 9, 960, 0, 0

    def forward(self, q, k, v, bounds, longest, causal, scale):
        self.forwards += 1
        assert self.stride is None or q.stride(0) == v.stride(0) == self.stride, "read in place"
        assert bounds.dtype == torch.int32 and bounds.is_contiguous() and longest == self.longest and scale == SCALE
        out = varlen_attention_ref(q, k, v, bounds, causal, scale)
        out[int(bounds[-1]) :] = torch.nan
        lse = torch.arange(q.shape[0] * q.shape[1], dtype=torch.float32)
        return out, lse.view(q.shape[0], -1, 1) if self.statistics == "TH1" else lse.view(q.shape[1], -1)

    def backward(self, grad, q, k, v, out, lse, bounds, longest, causal, scale):
        self.backwards += 1
        assert grad.is_contiguous() and longest == self.longest and scale == SCALE and not out[int(bounds[-1]) :].any()
        shape = (q.shape[0], q.shape[1], 1) if self.statistics == "TH1" else (q.shape[1], q.shape[0])
        assert lse.shape == shape and torch.equal(lse.flatten(), torch.arange(lse.numel(), dtype=torch.float32))
        grads = _gradients(grad, q, k, v, bounds.tolist(), causal, scale)
        for x in grads:
            x[int(bounds[-1]) :] = torch.nan
        return grads


def _gradients(grad, q, k, v, bounds, causal, scale):
    """By hand, as there is no autograd inside of an operator."""
    group = q.shape[1] // k.shape[1]
    made = [torch.zeros(q.shape, dtype=q.dtype) for _ in range(3)]
    for a, b in zip(bounds, bounds[1:], strict=False):
        g, qs, ks, vs = (x[a:b].transpose(0, 1) for x in (grad, q, k, v))
        ks, vs = ks.repeat_interleave(group, 0), vs.repeat_interleave(group, 0)
        scores = (qs @ ks.mT) * scale
        if causal:
            scores = scores.masked_fill(torch.ones(b - a, b - a, dtype=torch.bool).triu(1), float("-inf"))
        p = scores.softmax(-1)
        dp = g @ vs.mT
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
        for whole, part in zip(made, (ds @ ks, ds.mT @ qs, p.mT @ g), strict=True):
            whole[a:b] = part.transpose(0, 1)
    return made[0], *(x.unflatten(1, (-1, group)).sum(2) for x in made[1:])


def _operator(library, name, answer):
    """``answer`` by the schema's names in the place of an operator, also what equals a default and is not handed on."""
    arguments = getattr(torch.ops.aten, name).default._schema.arguments
    defaults = {argument.name: argument.default_value for argument in arguments if argument.has_default_value()}

    def run(*given, **more):
        values = defaults | dict(zip((argument.name for argument in arguments), given, strict=False)) | more
        assert values["max_q"] == values["max_k"] and values["cum_seq_q"] is values["cum_seq_k"]
        assert not values["dropout_p"] and not values.get("return_debug_mask") and values.get("attn_bias") is None
        return answer(values)

    library.impl(name, run, "CPU")


def _operators(kernel, name, library):
    def forward(values):
        tensors = [values[key] for key in ("query", "key", "value", "cum_seq_q")]
        out, lse = kernel.forward(*tensors, values["max_q"], values["is_causal"], values["scale"])
        empty = torch.empty(0)
        if name == "torch":
            return out, lse, empty, empty, empty
        return out, lse if values["compute_log_sumexp"] else empty, empty, empty, 0, 0, empty, empty, empty

    def backward(values):
        keys = ("grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "max_q", "is_causal", "scale")
        return kernel.backward(*(values[key] for key in keys))

    stem = "_flash_attention" if name == "torch" else "_cudnn_attention"
    _operator(library, f"{stem}_forward", forward)
    _operator(library, f"{stem}_backward", backward)


@pytest.fixture(params=["torch", "cudnn", "cudnn of later versions"])
def stand_in(request):
    """PyTorch's operators on CPU tensors: the peer's name and what counts the calls."""
    name, kernel = request.param.split()[0], Kernel("TH1" if request.param == "cudnn" else "HT")
    library = torch.library.Library("aten", "IMPL")  # what is registered goes with it
    _operators(kernel, name, library)
    yield name, kernel
    library._destroy()


def _attend(name, q, k, v, cu, causal):
    return torch.ops.qwen2vl.varlen_attention(q, k, v, *_settings(name, cu, causal))[0]


def _settings(name, cu, causal=False, most=9):
    """What the operator is told besides the tensors."""
    return cu, None, None, None, most, most, causal, SCALE, False, False, name


def _planned(name, inputs, plan, longest):
    return op._forward(*inputs, plan, None, None, (longest, longest), False, SCALE, False, name, keep=False)


def _check_gradients(name, kernel, pack, causal, attend=_attend):
    *inputs, cu = pack
    assert torch.equal(attend(name, *inputs, cu, causal), varlen_attention_ref(*inputs, cu, causal, SCALE))
    before = kernel.forwards
    leaves = [x.detach().requires_grad_() for x in inputs]
    grad = torch.randn(4, 17, 80).double().transpose(0, 1)
    got = torch.autograd.grad(attend(name, *leaves, cu, causal), leaves, grad)
    assert (kernel.forwards - before, kernel.backwards) == (1, 1), "the statistics of the forward are kept"
    want = torch.autograd.grad(varlen_attention_ref(*leaves, cu, causal, SCALE), leaves, grad)
    for one, two in zip(got, want, strict=True):
        torch.testing.assert_close(one, two)
        assert not one[14:].any()


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_pytorchs_operators_forward_and_backward(stand_in, pack, causal):
    _check_gradients(*stand_in, pack, causal)


def test_one_forward_also_in_compiled_code(stand_in, pack):
    torch._dynamo.reset()
    _check_gradients(*stand_in, pack, True, torch.compile(_attend, fullgraph=True, backend="aot_eager"))


def test_registered_peers_pass_opcheck(stand_in, pack):
    *inputs, cu = pack
    name, kernel = stand_in
    kernel.stride = None  # opcheck clones what it is given
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.qwen2vl.varlen_attention.default, (*leaves, *_settings(name, cu)))


def test_boundaries_that_may_change_and_a_longest_segment_of_one_row(stand_in, pack):
    """A padded plan stands for boundaries that only a device knows: the rows past the last are found there."""
    name, kernel = stand_in
    *inputs, cu = pack
    plan = plan_tiles(cu.clone(), 17, padded=True)
    assert plan.queries.held() is None and plan_tiles(cu, 17).queries.held() == 14
    for longest in (9, 1):  # FlashAttention 2 takes a longest segment of 1 for decoding, where all have one row
        kernel.longest = max(2, longest)
        if longest == 1:
            cu = torch.arange(4, dtype=torch.int32)
            plan.update_(cu)
        out, lse = _planned(name, inputs, plan, longest)
        assert lse is None and torch.equal(out, varlen_attention_ref(*inputs, cu, False, SCALE))
    other = torch.tensor([0, 2, 3, 4], dtype=torch.int32)
    plan.update_(other)
    assert torch.equal(plan.queries.bounds(), other)


def test_a_view_that_begins_off_16_bytes_is_copied(stand_in, pack):
    name, kernel = stand_in
    *inputs, cu = pack
    kernel.stride = None
    off = [torch.empty(17, x.shape[1], 88, dtype=x.dtype)[..., 1:81] for x in inputs]
    for view, x in zip(off, inputs, strict=True):
        view.copy_(x)
    seen = []
    forward = kernel.forward
    kernel.forward = lambda *a: seen.extend(x.data_ptr() % 16 for x in a[:3]) or forward(*a)
    assert off[0].data_ptr() % 16 and torch.equal(_attend(name, *off, cu, False), _attend(name, *inputs, cu, False))
    assert seen == [0] * 6
    backward = kernel.backward
    kernel.backward = lambda *a: seen.extend(x.data_ptr() % 16 for x in a[:5]) or backward(*a)
    out, lse = torch.ops.qwen2vl.varlen_attention(*inputs, *_settings(name, cu))
    grad = torch.randn(17 * 4 * 80 + 1).double()[1:].view(17, 4, 80)  # whole, as the backward of a concatenation gives
    shifted = torch.empty(17 * 4 * 80 + 1).double()[1:].view(17, 4, 80).copy_(out)
    assert grad.is_contiguous() and grad.data_ptr() % 16 and shifted.data_ptr() % 16
    rest = (lse, None, None, cu, None, 9, 9, False, SCALE, False, name)
    got = torch.ops.qwen2vl.varlen_attention_backward(grad, None, *off, shifted, *rest)
    want = torch.ops.qwen2vl.varlen_attention_backward(grad.clone(), None, *inputs, out, *rest)
    assert all(torch.equal(one, two) for one, two in zip(got, want, strict=True))
    assert seen[6 + 3 :] == [0] * 10


def _by_max_seqlen(kernel):
    """Makes the stand-in write no more rows of a segment than its grid has."""
    forward = kernel.forward

    def limited(q, k, v, bounds, longest, *settings):
        kernel.longest = longest
        out, lse = forward(q, k, v, bounds, longest, *settings)
        for a, b in zip(bounds.tolist(), bounds[1:].tolist(), strict=False):
            out[min(a + longest, b) : b] = torch.nan
        return out, lse

    kernel.forward = limited


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
def test_a_plan_takes_no_segment_longer_than_a_grid(stand_in, pack, monkeypatch, on_device):
    """What a graph does: the call that was captured is repeated as it was, on the boundaries of an update."""
    name, kernel = stand_in
    _by_max_seqlen(kernel)
    *inputs, cu = pack
    plan = plan_tiles(cu.clone(), 17, padded=True)

    def replay():
        return _planned(name, inputs, plan, 9)[0]

    assert plan.update_(torch.tensor([0, 0, 0, 17], dtype=torch.int32)).queries.longest == 17, "nothing was captured"
    plan.update_(cu)
    with monkeypatch.context() as patch:
        patch.setattr(tile_plan, "_capturing", lambda device: True)
        assert torch.equal(replay(), varlen_attention_ref(*inputs, cu, False, SCALE))
    fits, longer = (torch.tensor(b, dtype=torch.int32) for b in ([0, 2, 11, 17], [0, 1, 1, 11]))
    assert torch.equal(plan.update_(fits).queries.bounds(), fits) and plan.queries.longest == 9
    assert torch.equal(replay(), varlen_attention_ref(*inputs, fits, False, SCALE))
    if on_device:  # boundaries that the host may not read: the assertion is one of the device's
        check = Side._check_longest
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a segment is longer than max_seqlen"):
            patch.setattr(Side, "_check_longest", lambda self, name, cu, most: check(self, name, _Far(cu), most))
            plan.update_(longer)
    else:
        with pytest.raises(ValueError, match=r"a segment of 10 rows, but another's kernel was .* max_seqlen=9; give"):
            plan.update_(longer)
    assert torch.equal(plan.queries.bounds(), fits), "what is refused is not written"
    plan = plan_tiles(longer.clone(), 17, padded=True)
    with pytest.raises(ValueError, match="max_seqlen is 9, but cu_seqlens has a segment of 10 rows"):
        replay()
    plan.update_(cu)
    assert torch.equal(replay(), varlen_attention_ref(*inputs, cu, False, SCALE))


class _Far:
    """Boundaries that say they are on a GPU."""

    device = torch.device("cuda", 0)

    def __init__(self, tensor):
        self.shape, self.diff = tensor.shape, tensor.diff


def test_a_max_seqlen_that_is_too_small_reaches_no_kernel(stand_in, pack):
    """Compiled code calls the operator, which checks nothing but this."""
    name, kernel = stand_in
    *inputs, cu = pack
    with pytest.raises(ValueError, match="max_seqlen is 8, but cu_seqlens has a segment of 9 rows"):
        torch.ops.qwen2vl.varlen_attention(*inputs, *_settings(name, cu, most=8))
    assert not kernel.forwards
    with pytest.raises(ValueError, match="max_seqlen is 8, but tiles are planned for a segment of 9 rows"):
        varlen_attention(*(x.float() for x in inputs), cu, 8, tiles=plan_tiles(cu, 17))
    kernel.longest = 17  # not more than there are rows
    torch.ops.qwen2vl.varlen_attention(*inputs, *_settings(name, cu, most=10**6))


@pytest.mark.parametrize("triton", [True, False], ids=["kernel", "masked_fill_"])
@pytest.mark.parametrize(("total", "held"), [(300, 130), (300, 0), (300, 300), (64, 63), (65, 1)])
def test_zeros_past_what_a_device_knows(total, held, triton, monkeypatch):
    if triton and (reason := launching.reason(DEVICE)) is not None:
        pytest.skip(reason)
    monkeypatch.setattr(tail, "reason", lambda kind: None if triton else "left out")
    for shape, dtype in (((16, 80), torch.bfloat16), ((3, 5), torch.float32), ((28, 128), torch.float16)):
        x = torch.full((total, *shape), torch.nan, dtype=dtype, device=DEVICE)
        x[:held] = 1
        bounds = torch.tensor([0, 0, held], dtype=torch.int32, device=DEVICE)
        tail.zero_behind(x, Side(bounds, total, bounds.device, padded=True))
        assert (x[:held] == 1).all() and (x[held:] == 0).all()


# ------------------------------------------------------------------------------------------------- flash-attn


def _modules(kernel):
    """flash-attn 4.0.0b36, 3, fa3-fwd 0.0.3 and 2.8 by the names and parameters that are relied on."""

    def answer(q, k, v, bounds, other, longest, causal, scale):
        assert bounds is other
        return kernel.forward(q, k, v, bounds, longest, causal, scale)

    def gradients(made, *given):
        for x, value in zip(made, kernel.backward(*given), strict=True):
            x.copy_(value)

    def four(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        softmax_scale=None, causal=False, window_size=(None, None), deterministic=False, return_lse=False,
    ):  # fmt: skip
        out, lse = answer(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, causal, softmax_scale)
        return out, lse if return_lse else None

    def four_backward(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        deterministic=False, dq=None, dk=None, dv=None,
    ):  # fmt: skip
        assert window_size_left is window_size_right is None and softcap == 0
        gradients((dq, dk, dv), dout, q, k, v, out, lse, cu_seqlens_q, max_seqlen_q, causal, softmax_scale)
        return dq, dk, dv

    def three(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False,
        return_attn_probs=False,
    ):  # fmt: skip
        out, lse = answer(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, causal, softmax_scale)
        return (out, lse) if return_attn_probs else out

    def three_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        gradients((dq, dk, dv), dout, q, k, v, out, softmax_lse, cu_seqlens_q, max_seqlen_q, is_causal, softmax_scale)

    def two(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, return_attn_probs=False,
    ):  # fmt: skip
        out, lse = answer(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, causal, softmax_scale)
        return (out, lse, None) if return_attn_probs else out

    def two_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0, -1, -1, 0, None)
        gradients((dq, dk, dv), dout, q, k, v, out, softmax_lse, cu_seqlens_q, max_seqlen_q, causal, softmax_scale)

    def older_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size, alibi_slopes, deterministic,
    ):  # fmt: skip
        raise AssertionError("its window is asked for in another form")

    flags = {"build_flags": {"FLASHATTENTION_DISABLE_FP16": True, "FLASHATTENTION_DISABLE_BACKWARD": True}}
    space = types.SimpleNamespace
    made = {
        "flash_attn.cute": space(flash_attn_varlen_func=four),
        "flash_attn.cute.interface": space(_flash_attn_bwd=four_backward),
        "flash_attn_interface": space(flash_attn_varlen_func=three, _flash_attn_backward=three_backward),
        "fa3_fwd_interface": space(flash_attn_varlen_func=three),
        "fa3_fwd_config": space(CONFIG=flags),
        "flash_attn": space(flash_attn_varlen_func=two),
        "flash_attn.flash_attn_interface": space(_flash_attn_varlen_backward=two_backward),
        "flash_attn 2.6": space(_flash_attn_varlen_backward=older_backward),
    }
    return made


@pytest.fixture
def installed(monkeypatch):
    """Says which modules there are; the stand-in that they all call."""
    kernel = Kernel()
    made = _modules(kernel)

    def install(*names, older=False):
        def importing(name):
            if name.removesuffix(".interface").removesuffix(".flash_attn_interface") not in (*names, "fa3_fwd_config"):
                raise ImportError(f"No module named {name!r}")
            return made["flash_attn 2.6" if older and name == "flash_attn.flash_attn_interface" else name]

        for asked in (attention_peers._loaded, attention_peers.backward_of):
            asked.cache_clear()
        monkeypatch.setattr(attention_peers, "importlib", types.SimpleNamespace(import_module=importing))
        return kernel

    yield install
    for asked in (attention_peers._loaded, attention_peers.backward_of):
        asked.cache_clear()


ALL = tuple(flash.module for flash in FLASH)


@pytest.mark.parametrize("module", ["flash_attn.cute", "flash_attn_interface", "flash_attn"])
def test_flash_attn_forward_and_backward(installed, pack, module):
    _check_gradients(module, installed(*ALL), pack, True)


def test_the_forward_alone(installed, pack):
    kernel = installed("fa3_fwd_interface")
    *inputs, cu = pack
    got = _attend("fa3_fwd_interface", *inputs, cu, False)
    assert kernel.forwards == 1 and torch.equal(got, varlen_attention_ref(*inputs, cu, False, SCALE))


def test_flash_is_the_newest_that_serves_the_call(installed):
    installed(*ALL)
    training, wide = replace(CALL, gradients=True), replace(CALL, columns=96, value_columns=96)
    for call, backend, module in (
        (CALL, "flash", "flash_attn.cute"),
        (CALL, "flash 3", "flash_attn_interface"),
        (training, "flash", "flash_attn_interface"),
        (replace(wide, gradients=True), "flash", "flash_attn.cute"),
        (replace(training, capability=100), "flash", "flash_attn.cute"),
        (replace(training, capability=80), "flash", "flash_attn"),
        (replace(CALL, capability=86), "flash", "flash_attn"),
    ):
        assert peer_of(backend, call) == (module, "")
    installed("fa3_fwd_interface")
    assert peer_of("flash 3", CALL) == peer_of("flash", CALL) == ("fa3_fwd_interface", "")
    peer, reason = peer_of("flash", training)
    assert peer is None and "fa3_fwd_interface: it has a forward pass only; q, k and v must not require grad" in reason
    assert "this build is without FP16" in peer_of("flash", replace(CALL, dtype=torch.float16))[1]
    installed("flash_attn.cute")
    assert (
        "silently wrong dq where head_dim is no multiple of 32 (flash-attention#2896)" in peer_of("flash", training)[1]
    )
    assert peer_of("flash 3", CALL)[0] is None, "another generation is not what was measured"


@pytest.mark.parametrize(
    ("module", "part", "changed"),
    [
        (module, part, changed)
        for module in ("flash_attn_interface", "fa3_fwd_interface")
        for part, changed in (
            ("VARLEN", {}),
            ("HDIM96", {}),
            ("HDIM96", {"columns": 72, "value_columns": 72}),
            ("HDIM64", {"columns": 64, "value_columns": 64}),
            ("HDIM256", {"columns": 200, "value_columns": 200}),
            ("FP16", {"dtype": torch.float16}),
        )
    ]
    + [("flash_attn_interface", "BACKWARD", {"gradients": True})],
    ids=str,
)
def test_a_build_is_asked_what_it_was_made_without(installed, monkeypatch, module, part, changed):
    installed(module)
    finds, flags = attention_peers.importlib.import_module, {}
    configs = {module.replace("interface", "config"): types.SimpleNamespace(CONFIG={"build_flags": flags})}
    monkeypatch.setattr(attention_peers.importlib, "import_module", lambda name: configs.get(name) or finds(name))
    call = replace(CALL, **changed)
    assert why_not(module, call) is None
    flags[f"FLASHATTENTION_DISABLE_{part}"] = True
    assert why_not(module, call) == f"this build is without {part}"
    other = replace(CALL, columns=128, value_columns=128)
    assert (why_not(module, other) is None) == (part != "VARLEN")


def test_they_run_on_the_gpu_of_their_tensors(monkeypatch):
    """PyTorch's dispatcher sees to it for its operators, not for kernels from Python."""
    entered = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append(None)

    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

    def attend(q, k, v, **_):
        entered.append("forward")
        return q

    def gradients(dout, q, **_):
        entered.append("backward")

    monkeypatch.setattr(attention_peers, "_loaded", lambda name: types.SimpleNamespace(flash_attn_varlen_func=attend))
    monkeypatch.setattr(attention_peers, "backward_of", lambda name: (gradients, {"dout", "q"}))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    for index, around in ((0, False), (1, True)):
        device = torch.device("cuda", index)
        q = types.SimpleNamespace(is_cuda=True, device=device, shape=(1,), dtype=torch.bfloat16)
        entered.clear()
        attention_calls._flash_forward("flash_attn", q, q, q, {}, False, 1.0, False)
        attention_calls._flash_backward("flash_attn", q, q, q, q, q, None, {}, False, 1.0)
        want = [device, "forward", None, device, "backward", None] if around else ["forward", "backward"]
        assert entered == want


def test_determinism_that_is_demanded_between_forward_and_backward(installed, pack):
    """PyTorch's FlashAttention looks for itself, the others are told, and cuDNN has none."""
    installed(*ALL)
    *inputs, cu = pack
    out = torch.zeros(17, 4, 80)
    arguments = (out, *inputs, out, torch.zeros(68), plan_tiles(cu, 17), (9, 9), False, SCALE)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match=r"the backward of cudnn is not deterministic, and .* call it before"):
            attention_calls.backward("cudnn", *arguments)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_backward_of_another_form_is_not_called(installed):
    installed("flash_attn", older=True)
    assert peer_of("flash", CALL)[0] == "flash_attn"
    reason = peer_of("flash", replace(CALL, gradients=True))[1]
    assert "its backward takes other arguments than those known: window_size" in reason


@pytest.mark.parametrize("flash", FLASH, ids=lambda flash: flash.module)
def test_installed_modules_have_the_arguments_that_are_relied_on(flash):
    module = attention_peers._loaded(flash.module)
    if isinstance(module, str):
        pytest.skip(f"{flash.module}: {module}")
    if flash.backward is not None:
        assert not isinstance(attention_peers.backward_of(flash.module), str)


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "changed", "reason"),
    [
        ("torch", {"dtype": torch.float32}, "it takes bfloat16 and float16, got torch.float32"),
        ("torch", {"columns": 81, "value_columns": 81}, "a multiple of 8 up to 256, got 81 and 81"),
        ("torch", {"columns": 264, "value_columns": 264}, "a multiple of 8 up to 256, got 264 and 264"),
        ("torch", {"value_columns": 64}, "it takes one head_dim, a multiple of 8 up to 256, got 80 and 64"),
        ("torch", {"aligned": False}, "must be multiples of 8 elements"),
        ("torch", {"empty": True}, "at least one segment and one row"),
        ("torch", {"many": True}, "a grid's second or third dimension, which ends at 65535"),
        ("flash_attn", {"many": True}, "a grid's second or third dimension, which ends at 65535"),
        ("torch", {"replaced": "FA4", "gradients": True}, "FA4 activated in its place: its backward on capability 9"),
        ("torch", {"replaced": "FA4", "capability": 80}, "FA4 activated in its place: it serves capability 9 and 10"),
        ("torch", {"replaced": "FA3", "capability": 100}, "FA3 activated in its place: it serves capability 9"),
        ("torch", {"replaced": "mine"}, "has 'mine' activated in its place, which nobody has tried"),
        ("torch", {"capability": 75}, "it needs a GPU of capability 8.0, this one has 7.5"),
        ("torch", {"capability": 0}, "it needs an NVIDIA GPU"),
        ("torch", {"capability": 89, "columns": 224, "value_columns": 224, "gradients": True}, "heads of 224"),
        ("cudnn", {"capability": 80}, "it needs a GPU of capability 9.0, this one has 8.0"),
        ("cudnn", {"columns": 136, "value_columns": 136}, "up to 128 columns on packs, got 136"),
        ("cudnn", {"grouped": True}, "refuses grouped heads"),
        ("cudnn", {"wide": True}, "offsets into a pack have 32 bits"),
        ("cudnn", {"gradients": True}, "takes head_dim for the longest segment"),
        ("flash_attn.cute", {"capability": 80}, "built for capability 9.0 and later ones of its kind, this is capab"),
        ("flash_attn_interface", {"capability": 100}, "built for capability 9.0 and later ones"),
        ("flash_attn.cute", {"capability": 100, "columns": 192, "value_columns": 192}, "or of 256 there, got 192"),
    ],
)
def test_what_they_refuse(name, changed, reason, installed, monkeypatch):
    installed(*ALL)
    for asked in ("torch_reason", "cudnn_reason"):
        monkeypatch.setattr(attention_peers, asked, lambda: None)
    monkeypatch.setattr(attention_peers, "_torch_version", lambda: (2, 13))
    assert why_not(name, CALL) is None
    assert reason in (why_not(name, replace(CALL, **changed)) or "")


def test_cudnns_backward_where_pytorch_is_right(monkeypatch):
    monkeypatch.setattr(attention_peers, "cudnn_reason", lambda: None)
    monkeypatch.setattr(attention_peers, "_torch_version", lambda: (2, 14))
    call = replace(CALL, gradients=True)
    assert why_not("cudnn", call) is None
    assert "sums with atomics" in (why_not("cudnn", replace(call, repeatable=True)) or "")


def test_they_do_not_serve_a_cpu():
    x = torch.empty(3, 2, 80, dtype=torch.bfloat16)
    for backend in ("flash", "torch", "cudnn"):
        with pytest.raises(BackendError, match=f"backend '{backend}' does not serve cpu tensors; these do: sdpa, blo"):
            varlen_attention(x, x, x, torch.tensor([0, 3]).int(), 3, backend=backend)


# --------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "flash", "cudnn"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["heads", "grouped heads"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu(backend, causal, gradients, kv_heads, dtype):
    """Parts of a packed projection, segments that no tile divides, rows past the last, and a gradient that begins off
    16 bytes."""
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no CUDA device")
    if (reason := unavailable(backend, "cuda")) is not None:
        pytest.skip(f"{backend}: {reason}")
    parts = (4, kv_heads, kv_heads)
    packed = torch.randn(403, sum(parts), 80, device="cuda").to(dtype)
    cu = torch.tensor([0, 131, 131, 132, 389], dtype=torch.int32)
    grad = torch.randn(403 * 4 * 80 + 1, device="cuda").to(dtype)[1:].view(403, 4, 80)
    assert grad.is_contiguous() and grad.data_ptr() % 16

    def formula(*a):
        return varlen_attention_ref(*a, cu, causal)

    def served(*a):
        return varlen_attention(*a, cu.cuda(), 257, causal=causal, backend=backend)

    results = []
    for call, whole in ((served, packed), (formula, packed), (formula, packed.double())):
        leaf = whole.detach().clone().requires_grad_(gradients)
        try:
            out = call(*leaf.split(parts, 1))
        except BackendError as error:
            pytest.skip(str(error))
        results.append((out, *(torch.autograd.grad(out, leaf, grad.to(out.dtype)) if gradients else ())))
    for got, eager, exact in zip(*results, strict=True):
        assert not got[389:].any()
        assert_two_times(got, eager, exact, 2e-6)
