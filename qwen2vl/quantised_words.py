"""Small integers in 32-bit words, as AWQ's and GPTQ's files hold them."""

from __future__ import annotations

import torch

#: Where in a word AWQ puts eight neighbouring columns: four bits at place p are those of column _AWQ_ORDER[p].
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
#: A word of ones, by bits.
ONES = {4: 0x11111111, 8: 0x01010101}


def awq_places(columns: int) -> torch.Tensor:
    """Where the columns lie among the integers of their words."""
    within = torch.argsort(torch.tensor(_AWQ_ORDER))
    return (torch.arange(0, columns, 8).unsqueeze(1) + within).flatten()


def unpack_rows(words: torch.Tensor, bits: int) -> torch.Tensor:
    """``(R, C)`` int32 as the ``(R, C * 32 / bits)`` uint8 that lie in the words, lowest bits first."""
    bytes_ = words.contiguous().view(torch.uint8)
    return bytes_ if bits == 8 else torch.stack([bytes_ & 15, bytes_ >> 4], 2).flatten(1)


def pack_rows(q: torch.Tensor, bits: int) -> torch.Tensor:
    """What :func:`unpack_rows` unpacks."""
    q = q.contiguous()
    return (q if bits == 8 else q[:, ::2] | q[:, 1::2] << 4).contiguous().view(torch.int32)
