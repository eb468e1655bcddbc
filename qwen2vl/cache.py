"""Keys and values of the tokens already seen, and where each sequence's positions continue."""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch

from .config import TextConfig
from .errors import ContextLengthError
from .layers import inverse_frequencies


class KVCache:
    """One contiguous slot a token: ``k`` and ``v`` are ``(layers, B, capacity, Hk, D)``, rows filled from slot 0.

    Sequences are stored without padding, so ``lengths[b]`` is both the number of tokens row b has seen and its next
    free slot. ``next_position[b]`` is the M-RoPE position that follows them, on all three axes; it belongs to the
    request, not to the model (a model that remembers it answers the next request with the last one's positions).

    A call of the model takes slots with :meth:`slots`, stores into them layer by layer (``append_kv``), and ends with
    :meth:`commit`, so a call that fails on the way leaves the cache as it was.

    What a step of decoding needs is kept on the device too, in tensors that are changed in place, so that a step makes
    nothing on the host and a captured one finds them where they were: ``seqlens (B,)`` int32, which equals ``lengths``,
    ``growth (B,)`` int32, 1, and 0 for rows that :meth:`hold` names, and ``next_position (B,)`` int64.
    """

    def __init__(
        self, config: TextConfig, batch: int, capacity: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.config, self.capacity = config, capacity
        shape = (config.num_hidden_layers, batch, capacity, config.num_key_value_heads, config.head_dim)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        # Made once: a step has an operation less for each of them.
        self.layers = [(self.k.select(0, n), self.v.select(0, n)) for n in range(config.num_hidden_layers)]
        self.lengths = [0] * batch
        self.held: set[int] = set()
        self.seqlens = torch.zeros(batch, dtype=torch.int32, device=device)
        self.growth = torch.ones(batch, dtype=torch.int32, device=device)
        self.next_position = torch.zeros(batch, dtype=torch.int64, device=device)
        self._before = torch.arange(batch, device=device) * capacity - 1  # the slot before each row's first
        # Programs of a step's attention count in it; zero between launches.
        self.arrived = torch.zeros((batch, config.num_key_value_heads), dtype=torch.int32, device=device)
        self.inv_freq = inverse_frequencies(config, device)
        self.bounds = torch.arange(batch + 1, dtype=torch.int32)  # of one token a row, on the host

    @staticmethod
    def asynchronous(device: torch.device) -> bool:
        """Whether the host goes on while ``device`` works: then a step reads nothing on the host, lengths included.

        Elsewhere attention takes them from the host, sequence by sequence, which is faster on a CPU. No GPU has run the
        other way yet, so that it is taken where ``QWEN2VL_GRAPHS=1`` asks for it, and by itself once one has.
        """
        return device.type == "cuda" and os.environ.get("QWEN2VL_GRAPHS") == "1"

    def repeated(self, times: int, capacity: int) -> KVCache:
        """Each row ``times`` times, one copy behind the other, with room for ``capacity`` tokens a row."""
        device, dtype = self.k.device, self.k.dtype
        new = KVCache(self.config, self.batch * times, capacity, device=device, dtype=dtype)
        new.load(self, times)
        return new

    def load(self, other: KVCache, times: int = 1) -> None:
        """Take over the rows of ``other``, each ``times`` times, in place. Rows beyond them idle."""
        count, batch, used = other.batch * times, other.batch, max(other.lengths)
        for old, new in ((other.k, self.k), (other.v, self.v)):
            new[:, :count].unflatten(1, (batch, times))[:, :, :, :used] = old[:, :, None, :used]
        for name in ("seqlens", "growth", "next_position"):
            getattr(self, name)[:count].unflatten(0, (batch, times)).copy_(getattr(other, name).unsqueeze(1))
        self.lengths[:count] = [have for have in other.lengths for _ in range(times)]
        self.held = {row * times + n for row in other.held for n in range(times)}
        self.idle(range(count, self.batch))

    def idle(self, rows: range) -> None:
        """These rows hold one token that nobody reads, and do not grow."""
        begin, end = rows.start, rows.stop
        for name, value in (("seqlens", 1), ("growth", 0), ("next_position", 0)):
            getattr(self, name)[begin:end].fill_(value)
        self.lengths[begin:end] = [1] * len(rows)
        self.held.update(rows)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    def slots(self, counts: list[int]) -> torch.Tensor:
        """The flat slots of ``counts[b]`` new tokens in every row, row after row.

        Raises :class:`ContextLengthError` when a row would outgrow the capacity.
        """
        self._room(have + new for have, new in zip(self.lengths, counts, strict=True))
        begins = [row * self.capacity + have for row, have in enumerate(self.lengths)]
        flat = [torch.arange(begin, begin + new) for begin, new in zip(begins, counts, strict=True)]
        return torch.cat(flat).to(self.k.device)

    def commit(self, counts: list[int], next_position: torch.Tensor) -> None:
        """The new tokens are stored in every layer: count them."""
        self.lengths = [have + new for have, new in zip(self.lengths, counts, strict=True)]
        self.seqlens.copy_(torch.tensor(self.lengths))
        self.next_position.copy_(next_position)

    # ------------------------------------------------------------------------------------------------- one token a row

    def lengths_after_step(self) -> list[int]:
        """Tokens in each row with one more, on the host; a row that is held keeps its number.

        Raises :class:`ContextLengthError` when a row would outgrow the capacity.
        """
        after = [have + (row not in self.held) for row, have in enumerate(self.lengths)]
        self._room(after)
        return after

    def step_seqlens(self) -> torch.Tensor:
        """``(B,)`` int32 on the device: the tokens of each row with one more; a held row's number again."""
        return self.seqlens + self.growth

    def step_slots(self, seqlens: torch.Tensor) -> torch.Tensor:
        """``(B,)`` on the device: the slots of the last tokens of rows of these lengths."""
        return self._before + seqlens

    def commit_step(self) -> None:
        """The tokens of a step are stored in every layer: count them on the device. The host's ``lengths`` are set by
        the caller, as a step that is replayed on the device runs nothing here."""
        self.seqlens.add_(self.growth)
        self.next_position.add_(1)

    def hold(self, rows: Iterable[int]) -> None:
        """From now on the next token of these rows takes the place of their last, so that they do not grow; none may
        be empty."""
        for row in rows:
            if row not in self.held:
                self.held.add(row)
                self.growth.select(0, row).zero_()

    def forget(self, tokens: int) -> None:
        """Drop the last ``tokens`` of every row that is not held, all of them plain text."""
        self.lengths = [have - (0 if row in self.held else tokens) for row, have in enumerate(self.lengths)]
        self.seqlens.sub_(self.growth * tokens)
        self.next_position.sub_(tokens)

    def rewind(self, tokens: int) -> None:
        """Keep the first ``tokens`` of every row. Where positions go on is not known then: the next call of the model
        is to be given its ``position_ids``."""
        self.lengths = [tokens] * self.batch
        self.seqlens.fill_(tokens)

    def _room(self, after: Iterable[int]) -> None:
        if (most := max(after)) > self.capacity:
            raise ContextLengthError(f"the cache holds {self.capacity} tokens a sequence, {most} are needed")
