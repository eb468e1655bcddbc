"""Argument checks shared by every op: one place that decides how a refusal reads.

A check costs about a microsecond and never touches tensor data, so it neither syncs a device nor breaks graph capture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeGuard

import torch
from torch._C._functorch import peek_interpreter_stack

#: float64 is accepted by eager formulas so that gradients can be checked against finite differences.
EAGER_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTS = (torch.int64, torch.int32)


class Checker:
    """Checks the tensors of one call and binds the sizes that must agree between them.

    ``Checker("mrope").tensor("q", q, ("T", "Hq", "D"))`` binds T, Hq and D; a later tensor that names one of them
    must have the same size there. An integer in the shape is a fixed size, ``...`` may lead and matches any sizes.
    """

    __slots__ = ("device", "first", "op", "sizes")

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, int] = {}
        self.device: torch.device | None = None
        self.first = ""

    def tensor(
        self,
        name: str,
        value: object,
        shape: tuple,
        *,
        dtypes: Sequence[torch.dtype] = EAGER_FLOATS,
        like: torch.Tensor | None = None,
        any_device: bool = False,
        contiguous_last: bool = False,
    ) -> None:
        """Raise ``TypeError`` or ``ValueError`` unless ``value`` is a tensor of this shape, dtype and device.

        ``like``: a tensor whose dtype this one must share. ``any_device``: skip the same-device rule.
        """
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{self.op}: {name} must be a torch.Tensor, got {type(value).__name__}")
        want = shape[1:] if shape and shape[0] is ... else shape
        rank_ok = value.ndim >= len(want) if len(want) != len(shape) else value.ndim == len(want)
        if not rank_ok:
            self._shape_error(name, value, shape)
        for size, symbol in zip(value.shape[value.ndim - len(want) :], want, strict=True):
            if isinstance(symbol, str):
                if self.sizes.setdefault(symbol, size) != size:
                    self._shape_error(name, value, shape)
            elif size != symbol:
                self._shape_error(name, value, shape)
        if like is not None:
            if value.dtype != like.dtype:
                raise TypeError(f"{self.op}: {name} must have dtype {like.dtype}, got {value.dtype}")
        elif value.dtype not in dtypes:
            wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise TypeError(f"{self.op}: {name} must have one of the dtypes {wanted}, got {value.dtype}")
        if not any_device:
            if self.device is None:
                self.device, self.first = value.device, name
            elif value.device != self.device:
                raise ValueError(f"{self.op}: {name} must be on {self.device} like {self.first}, got {value.device}")
        if contiguous_last and value.numel() and value.stride(-1) != 1:
            raise ValueError(
                f"{self.op}: {name} must be contiguous in its last dimension, got strides {value.stride()}"
            )

    def require(self, ok: bool, message: str) -> None:
        """Raise ``ValueError`` with ``message`` unless ``ok``."""
        if not ok:
            raise ValueError(f"{self.op}: {message}")

    def _shape_error(self, name: str, value: torch.Tensor, shape: tuple) -> None:
        wanted = ", ".join("..." if s is ... else str(s) for s in shape)
        known = ", ".join(f"{s}={self.sizes[s]}" for s in shape if isinstance(s, str) and s in self.sizes)
        raise ValueError(
            f"{self.op}: {name} must have shape ({wanted}){f' with {known}' if known else ''}, got {tuple(value.shape)}"
        )


def no_grad_through(op: str, alternative: str, **tensors: torch.Tensor) -> None:
    """Refuse an in-place op on tensors that autograd tracks: the overwritten values may be needed for backward."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor.requires_grad:
                raise ValueError(f"{op}: {name} requires grad and is overwritten in place; call {alternative} instead")


def no_overlap(op: str, written: dict[str, torch.Tensor | None], read: dict[str, torch.Tensor | None]) -> None:
    """Refuse an in-place op whose writes meet other elements that it reads or writes.

    ``written``: tensors that the op overwrites, none of whose elements may lie in one place, as those of an expanded
    tensor do. ``read``: tensors that it reads beside these. What cannot be shown to lie apart is refused. Nothing is
    checked while a compiler or a transform traces, as no tensor has a place then.
    """
    if torch.compiler.is_compiling() or peek_interpreter_stack() is not None:
        return
    ours = [(name, x) for name, x in written.items() if _has_place(x)]
    others = [(name, x) for name, x in read.items() if _has_place(x)]
    for name, x in ours:
        if not _apart_in_itself(x.shape, x.stride()):
            raise ValueError(
                f"{op}: {name} is overwritten, and several of its elements share one place in memory, got shape "
                f"{tuple(x.shape)} with strides {x.stride()}; give it memory of its own, as .contiguous() does"
            )
    for place, (name, x) in enumerate(ours):
        for other, y in (*ours[place + 1 :], *others):
            if x.device != y.device or x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr():
                continue
            distance = y.data_ptr() - x.data_ptr()
            if not _apart(x.shape, x.stride(), x.element_size(), y.shape, y.stride(), y.element_size(), distance):
                words = f"{name} is overwritten, and {other} lies in the same memory"
                raise ValueError(f"{op}: {words}; give one of them memory of its own, as .clone() does")


def _has_place(x: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    """Whether elements lie in memory: tensors of other classes may have none."""
    return type(x) in (torch.Tensor, torch.nn.Parameter) and x is not None and not x.is_meta and x.numel() > 0


def _by_stride(shape: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    """``(stride, size)`` of the dimensions with more than one element, the widest stride first."""
    return sorted(((st, n) for st, n in zip(strides, shape, strict=True) if n > 1), reverse=True)


@lru_cache(maxsize=4096)
def _apart_in_itself(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether every dimension steps over all that the narrower ones hold, so that no two elements share a place."""
    reach = 0
    for stride, size in reversed(_by_stride(shape, strides)):
        if stride <= reach:
            return False
        reach += stride * (size - 1)
    return True


@lru_cache(maxsize=4096)
def _apart(shape, strides, itemsize, other_shape, other_strides, other_itemsize, distance: int) -> bool:
    """Whether two strided tensors, the second one ``distance`` bytes behind the first, share no byte.

    They do not where their ranges are apart, or where both repeat with one period and lie apart within it: the q and
    the k of a packed projection, which repeat with every token.
    """
    first, second = _by_stride(shape, strides), _by_stride(other_shape, other_strides)
    for outer in range(max(len(first), len(second)) + 1):
        one, two = first[:outer], second[:outer]
        period = math.gcd(*(s * itemsize for s, _ in one), *(s * other_itemsize for s, _ in two))
        span = sum(s * (n - 1) for s, n in first[outer:]) * itemsize + itemsize
        other_span = sum(s * (n - 1) for s, n in second[outer:]) * other_itemsize + other_itemsize
        if period == 0:
            if distance >= span or -distance >= other_span:
                return True
        elif distance % period >= span and distance % period + other_span <= period:
            return True
    return False
