"""Keys and values of the tokens already seen, and where each sequence's positions continue."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .config import TextConfig
from .errors import ContextLengthError


class KVCache:
    """One contiguous slot a token: ``k`` and ``v`` are ``(layers, B, capacity, Hk, D)``, rows filled from slot 0.

    Sequences are stored without padding, so ``lengths[b]`` is both the number of tokens row b has seen and its next
    free slot. ``next_position[b]`` is the M-RoPE position that follows them, on all three axes; it belongs to the
    request, not to the model (a model that remembers it answers the next request with the last one's positions).
    """

    def __init__(
        self, config: TextConfig, batch: int, capacity: int, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_hidden_layers, batch, capacity, config.num_key_value_heads, config.head_dim)
        # Zeros, not empty: a shorter row's unwritten slots are masked, but 0 * NaN of stale memory is NaN.
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.capacity = capacity
        self.lengths = [0] * batch
        self.next_position = torch.zeros(batch, dtype=torch.int64, device=device)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    def reserve(self, counts: list[int]) -> torch.Tensor:
        """Take ``counts[b]`` new slots in every row; returns the flat slot of each new token, row after row.

        Raises :class:`ContextLengthError` when a row would outgrow the capacity.
        """
        after = [have + new for have, new in zip(self.lengths, counts, strict=True)]
        if max(after) > self.capacity:
            raise ContextLengthError(f"the cache holds {self.capacity} tokens a sequence, {max(after)} are needed")
        slots = torch.cat(
            [
                torch.arange(row * self.capacity + have, row * self.capacity + end)
                for row, (have, end) in enumerate(zip(self.lengths, after, strict=True))
            ]
        )
        self.lengths = after
        return slots.to(self.k.device)

    def write(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store ``k, v (T, Hk, D)`` at the flat ``slots (T,)`` of a layer."""
        self.k[layer].flatten(0, 1).index_copy_(0, slots, k)
        self.v[layer].flatten(0, 1).index_copy_(0, slots, v)

    def attend(self, layer: int, q: torch.Tensor, counts: list[int], scale: float) -> torch.Tensor:
        """Attention of each row's newest ``counts[b]`` tokens (already written) to all of that row's tokens.

        ``q (T, Hq, D)`` packed row after row; returns ``(T, Hq, D)``.
        """
        keys, values = self.k[layer], self.v[layer]
        gqa = q.shape[1] != keys.shape[2]
        if all(count == 1 for count in counts):
            longest = max(self.lengths)
            mask = None
            if min(self.lengths) < longest:
                ends = torch.tensor(self.lengths, device=q.device)
                mask = (torch.arange(longest, device=q.device) < ends[:, None])[:, None, None]  # (B, 1, 1, longest)
            # (B, H, 1, D) against (B, Hk, longest, D)
            ks, vs = (x[:, :longest].transpose(1, 2) for x in (keys, values))
            out = F.scaled_dot_product_attention(q.unsqueeze(2), ks, vs, mask, scale=scale, enable_gqa=gqa)
            return out.squeeze(2)
        parts = []
        for row, part in enumerate(q.split(counts)):
            seen, new = self.lengths[row], counts[row]
            # The i-th new token is token seen - new + i of its row.
            mask = torch.ones((new, seen), dtype=torch.bool, device=q.device).tril(seen - new)
            ks, vs = (x[row, :seen].transpose(0, 1).unsqueeze(0) for x in (keys, values))
            out = F.scaled_dot_product_attention(
                part.transpose(0, 1).unsqueeze(0), ks, vs, mask, scale=scale, enable_gqa=gqa
            )
            parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)
