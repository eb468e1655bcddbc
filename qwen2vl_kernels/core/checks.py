"""Argument checks shared by every op: one place that decides how a refusal reads.

A check costs about a microsecond and never touches tensor data, so it neither syncs a device nor breaks graph capture.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

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
