"""In-place ops refuse memory in which they would overwrite what they still read; transforms are refused, too."""

import random

import pytest
import torch

import qwen2vl_kernels as K
from qwen2vl_kernels.core import launching
from qwen2vl_kernels.core.checks import _apart, _apart_in_itself, no_overlap

POSITIONS, INV_FREQ, SECTION = torch.arange(18).view(3, 6), torch.tensor([1.0, 0.5, 0.25, 0.125]), (2, 1, 1)
TABLE = torch.rand(6, 4)


def _places(shape, strides, start=0):
    """The element numbers of a strided tensor, with repeats."""
    found = [start]
    for size, stride in zip(shape, strides, strict=True):
        found = [place + n * stride for place in found for n in range(size)]
    return found


def test_what_is_called_apart_is_apart():
    """Beside every element's place, on random small tensors; and what is refused in vain is rare among packed ones."""
    draw, accepted, needless = random.Random(0), 0, 0
    for _ in range(4000):
        shapes = [[draw.choice((1, 2, 3)) for _ in range(draw.choice((1, 2, 3)))] for _ in range(2)]
        strides = [[draw.choice((0, 1, 2, 3, 6, 12)) for _ in shape] for shape in shapes]
        distance = draw.randrange(-12, 13)
        first, second = _places(shapes[0], strides[0]), _places(shapes[1], strides[1], distance)
        alone = len(set(first)) == len(first)
        assert alone or not _apart_in_itself(tuple(shapes[0]), tuple(strides[0]))
        apart = not set(first) & set(second)
        said = _apart(tuple(shapes[0]), tuple(strides[0]), 4, tuple(shapes[1]), tuple(strides[1]), 4, 4 * distance)
        assert apart or not said, (shapes, strides, distance)
        accepted, needless = accepted + said, needless + (apart and not said)
    assert accepted > 500 and needless < accepted / 2, (accepted, needless)


@pytest.mark.parametrize("heads", [(2, 2, 2), (4, 1, 1)])
def test_parts_of_one_projection_are_apart(heads):
    packed = torch.zeros(6, sum(heads), 8)
    q, k, v = packed.split(heads, 1)
    no_overlap("op", {"q": q, "k": k}, {"v": v})
    no_overlap("op", {"q": packed[:3], "k": packed[3:]}, {})
    pages = torch.zeros(5, 2, 4, 2, 8)  # keys and values of a block side by side
    no_overlap("op", {"k_cache": pages[:, 0], "v_cache": pages[:, 1], "q": q}, {"k": k, "v": v})


REFUSED = [
    (
        lambda b: K.mrope_(_x(6, 2, 8), _x(6, 1, 8).expand(6, 2, 8), POSITIONS, INV_FREQ, SECTION, backend=b),
        "mrope_: k is",
    ),
    (lambda b: _twice(K.mrope_, _x(6, 2, 8), POSITIONS, INV_FREQ, SECTION, backend=b), "mrope_: q is.*k lies"),
    (lambda b: _twice(K.vision_rope_, _x(6, 2, 8), TABLE, TABLE, backend=b), "vision_rope_: q is.*k lies"),
    (
        lambda b: K.vision_rope_qkv_(_x(1, 3, 2, 8).expand(6, 3, 2, 8), TABLE, TABLE, backend=b),
        "vision_rope_qkv_: qkv is",
    ),
    (lambda b: _twice(K.swiglu_, _x(6, 8), backend=b), "swiglu_: gate is.*up lies"),
    (lambda b: K.swiglu_(_x(7, 8)[1:], _x(7, 8)[:1].expand(6, 8), backend=b), None),
    (lambda b: _shifted(K.swiglu_, b), "swiglu_: gate is.*up lies"),
    (lambda b: K.quick_gelu_(_x(8).expand(6, 8), backend=b), "quick_gelu_: x is"),
    (lambda b: _append(_x(3, 4, 1, 8), b), "append_kv: k_cache is.*v_cache lies"),
]


def _x(*shape):
    return torch.rand(shape)


def _twice(op, x, *arguments, **named):
    return op(x, x, *arguments, **named)


def _shifted(op, backend):
    x = _x(7, 8)
    return op(x[1:], x[:-1], backend=backend)


def _append(cache, backend):
    return K.append_kv(_x(6, 1, 8), _x(6, 1, 8), cache, cache, torch.arange(6), backend=backend)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize(("call", "words"), REFUSED, ids=[str(n) for n in range(len(REFUSED))])
def test_what_shares_memory_is_refused(call, words, backend):
    if backend == "triton" and (reason := launching.reason("cpu")) is not None:
        pytest.skip(reason)
    if words is None:  # what is only read may repeat itself
        call(backend)
        return
    with pytest.raises(ValueError, match=words):
        call(backend)


CALLS = [
    lambda x, b: K.rms_norm(x, torch.ones(8), backend=b),
    lambda x, b: K.layer_norm(x, torch.ones(8), torch.zeros(8), backend=b),
    lambda x, b: K.quick_gelu(x, backend=b),
    lambda x, b: K.swiglu(x, x, backend=b),
    lambda x, b: K.patch_embed(x, torch.ones(4, 8), backend=b),
    lambda x, b: K.mrope(x.view(6, 1, 8), x.view(6, 1, 8), POSITIONS, INV_FREQ, SECTION, backend=b)[0],
    lambda x, b: K.vision_rope(x.view(6, 1, 8), x.view(6, 1, 8), TABLE, TABLE, backend=b)[0],
    lambda x, b: K.varlen_attention(*[x.view(6, 1, 8)] * 3, torch.tensor([0, 6], dtype=torch.int32), 6, backend=b),
]


@pytest.mark.parametrize("call", CALLS, ids=[str(n) for n in range(len(CALLS))])
def test_tangents_are_refused_or_right(call):
    """The formula's tangent is that of finite differences; the kernels have none and say so."""
    x, tangent = torch.rand(6, 8, dtype=torch.float64), torch.rand(6, 8, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        x32, tangent32 = x.float(), tangent.float()
        dual = torch.autograd.forward_ad.make_dual(x32, tangent32)
        got = torch.autograd.forward_ad.unpack_dual(call(dual, "eager")).tangent
        assert got is not None
        if launching.reason("cpu") is None:
            with pytest.raises(NotImplementedError, match="no forward-mode derivatives; backend='eager'"):
                call(dual, "triton")
            call(x32, "triton")  # no tangent, no refusal
    step = 1e-3
    want = (call(x32 + step * tangent32, "eager") - call(x32 - step * tangent32, "eager")) / (2 * step)
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())])
def test_transforms_are_refused_or_right(transform):
    x = torch.rand(3, 6, 8)
    run = lambda backend: transform(lambda x: K.rms_norm(x, torch.ones(8), backend=backend))(x)  # noqa: E731
    assert run("eager").shape == x.shape
    if (reason := launching.reason("cpu")) is not None:
        pytest.skip(reason)
    with pytest.raises(NotImplementedError, match=r"no transform of torch\.func"):
        run("triton")
