"""What the patched rotary embedding of transformers' language models answers with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from ._modules import tracing


class _Angles:
    """What is kept from casts: FSDP casts tensors in containers and dataclasses, and looks into no other object."""

    def __init__(self, tables: Callable, inv_freq: torch.Tensor, section: list[int] | None, *arguments: Any) -> None:
        self.inv_freq, self.section = inv_freq, section
        self._tables, self._arguments, self._made = tables, arguments, None

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        if torch.compiler.is_compiling() or tracing():  # what a tracer makes is its own
            return self._tables(*self._arguments)
        if self._made is None:
            self._made = self._tables(*self._arguments)
        return self._made


@dataclass(eq=False)
class Rotation:
    """Stock's ``(cos, sin)``, built when they are read, and beside them what they are built of.

    Attributes:
        like: an empty tensor of the dtype and on the device that tables are wanted in. Where a framework casts or moves
            what a layer is called with, it casts or moves this.
        positions: ``(3, B, L)`` integers, B 1 where all sequences have the same.
        angles: frequencies, sections and stock's function.
    """

    like: torch.Tensor
    positions: torch.Tensor
    angles: _Angles

    @classmethod
    def of(
        cls,
        tables: Callable,
        inv_freq: torch.Tensor,
        section: list[int] | None,
        x: torch.Tensor,
        position_ids: torch.Tensor,
    ) -> Rotation:
        """``tables``: stock's function of ``x``, of which it reads device and dtype, and ``position_ids (3, B, L)``."""
        like = x.new_empty(0)
        positions = position_ids.expand(3, -1, -1).to(x.device).contiguous()
        frequencies = inv_freq.to(x.device, torch.float32)
        return cls(like, positions, _Angles(tables, frequencies, section, like, position_ids))

    def section(self, interleaved: bool) -> list[int] | None:
        """Pairs an axis as they come out: stock cuts interleaved sections at the last pair. None if they do not fit."""
        pairs, named = self.angles.inv_freq.shape[0], self.angles.section
        if named is None or (not interleaved and (len(named) != 3 or sum(named) != pairs)):
            return None
        if not interleaved:
            return named
        h, w = (len(range(axis, min(3 * named[axis], pairs), 3)) for axis in (1, 2))
        return [pairs - h - w, h, w]

    def of_rows(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``positions (3, B * L)`` and ``inv_freq (D/2,)`` float32 for ``x (B, L, ...)``, on its device."""
        positions = self.positions if self.positions.shape[1] == x.shape[0] else self.positions.expand(3, *x.shape[:2])
        return positions.to(x.device).flatten(1), self.angles.inv_freq.to(x.device)

    def to(self, *args: Any, **kwargs: Any) -> Rotation:
        """Tables as :meth:`torch.Tensor.to` would make them."""
        return replace(self, like=self.like.to(*args, **kwargs))

    def __iter__(self) -> Iterator[torch.Tensor]:
        cos, sin = self.angles.tables()
        return iter((cos.to(self.like.device, self.like.dtype), sin.to(self.like.device, self.like.dtype)))

    def __getitem__(self, index: Any) -> Any:
        return tuple(self)[index]

    def __len__(self) -> int:
        return 2
