"""Keys and values of the tokens already seen, and where each sequence's positions continue."""

from __future__ import annotations

from copy import copy

import torch

from .config import TextConfig
from .errors import ContextLengthError


class KVCache:
    """One contiguous slot a token: ``k`` and ``v`` are ``(layers, B, capacity, Hk, D)``, rows filled from slot 0.

    Sequences are stored without padding, so ``lengths[b]`` is both the number of tokens row b has seen and its next
    free slot. ``next_position[b]`` is the M-RoPE position that follows them, on all three axes; it belongs to the
    request, not to the model (a model that remembers it answers the next request with the last one's positions).

    A call of the model takes slots with :meth:`slots`, stores into them layer by layer (``append_kv``), and ends with
    :meth:`commit`, so a call that fails on the way leaves the cache as it was.
    """

    def __init__(
        self, config: TextConfig, batch: int, capacity: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_hidden_layers, batch, capacity, config.num_key_value_heads, config.head_dim)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.capacity = capacity
        self.lengths = [0] * batch
        self.next_position = torch.zeros(batch, dtype=torch.int64, device=device)

    def repeated(self, times: int, capacity: int) -> KVCache:
        """Each row ``times`` times, one copy behind the other, with room for ``capacity`` tokens a row."""
        new, held = copy(self), max(self.lengths)
        layers, batch, _, heads, head_dim = self.k.shape
        for name in ("k", "v"):
            old = getattr(self, name)[:, :, None, :held]
            slots = old.new_empty((layers, batch, times, capacity, heads, head_dim))
            slots[:, :, :, :held] = old
            setattr(new, name, slots.flatten(1, 2))
        new.capacity = capacity
        new.lengths = [have for have in self.lengths for _ in range(times)]
        new.next_position = self.next_position.repeat_interleave(times)
        return new

    @property
    def batch(self) -> int:
        return len(self.lengths)

    def slots(self, counts: list[int]) -> torch.Tensor:
        """The flat slots of ``counts[b]`` new tokens in every row, row after row.

        Raises :class:`ContextLengthError` when a row would outgrow the capacity.
        """
        after = [have + new for have, new in zip(self.lengths, counts, strict=True)]
        if max(after) > self.capacity:
            raise ContextLengthError(f"the cache holds {self.capacity} tokens a sequence, {max(after)} are needed")
        begins = [row * self.capacity + have for row, have in enumerate(self.lengths)]
        flat = [torch.arange(begin, begin + new) for begin, new in zip(begins, counts, strict=True)]
        return torch.cat(flat).to(self.k.device)

    def commit(self, counts: list[int], next_position: torch.Tensor) -> None:
        """The new tokens are stored in every layer: count them."""
        self.lengths = [have + new for have, new in zip(self.lengths, counts, strict=True)]
        self.next_position = next_position

    def hold(self, rows: list[int]) -> None:
        """The next token of these rows takes the place of their last, so that they do not grow; none may be empty."""
        for row in rows:
            self.lengths[row] -= 1
