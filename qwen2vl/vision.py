"""The vision tower: any number of images and videos, packed into one sequence of patches.

675M parameters in every released size: patch embedding, 32 pre-norm blocks whose attention stays inside one image or
one frame pair, 2D rotary embedding, and the 2x2 merger (Qwen2-VL, arXiv 2409.12191, section 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from qwen2vl_kernels import (
    TilePlan,
    fold_patch_embed,
    patch_embed,
    patch_merge,
    plan_tiles,
    quick_gelu,
    quick_gelu_,
    varlen_attention,
    vision_positions,
    vision_rope_tables,
)

from .checks import Grid, Patches, check_patches
from .config import IMAGE_MEAN, IMAGE_STD, VisionConfig
from .errors import PromptError
from .layers import LayerNorm, Linear, idle_rows, length_bound


class Pack:
    """What every block needs to know about the packed patches of one call; no dataclass, as that of the text.

    Attributes:
        rope: cosines and sines of the patches' positions, ``(T, D/2)`` float32 each.
        cu_seqlens: ``(S + 1,)`` int32, the bounds of the segments inside which patches attend to one another.
        max_seqlen: no segment has more patches.
        tiles: the plan of the segments for the attention's kernels.
    """

    def __init__(
        self, rope: tuple[torch.Tensor, torch.Tensor], cu_seqlens: torch.Tensor, max_seqlen: int, tiles: TilePlan
    ) -> None:
        self.rope, self.cu_seqlens, self.max_seqlen, self.tiles = rope, cu_seqlens, max_seqlen, tiles


class ConvWeight(nn.Module):
    """The parameter of a convolution that is never run as one."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))


class PatchEmbed(nn.Module):
    """The strided 3D convolution of the checkpoint, held as its 5-D weight and run as a matrix product."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        p = config.patch_size
        self.proj = ConvWeight(config.embed_dim, config.in_channels, config.temporal_patch_size, p, p)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """``(T, K)`` patches, uint8 pixels or normalised floats, to ``(T, C)``.

        Pixels may be those of still images, ``(T, K / temporal_patch_size)``: one of their equal frames.
        """
        weight = self.proj.weight
        if patches.dtype != torch.uint8:
            return patch_embed(patches, weight)
        still = patches.shape[1] != weight[0].numel()
        return patch_embed(patches, *fold_patch_embed(weight, IMAGE_MEAN, IMAGE_STD, still))


class Attention(nn.Module):
    """Bidirectional attention inside each segment, with 2D rotary embedding."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.shape = (3, config.num_heads, config.head_dim)
        self.qkv = Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: torch.Tensor, pack: Pack) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, self.shape).unbind(1)  # (T, H, D)
        out = varlen_attention(q, k, v, pack.cu_seqlens, pack.max_seqlen, tiles=pack.tiles, rope=pack.rope)
        return self.proj(out.flatten(1))


class MLP(nn.Module):
    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = int(config.embed_dim * config.mlp_ratio)
        self.fc1 = Linear(config.embed_dim, width)
        self.fc2 = Linear(width, config.embed_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc1(x)
        return self.fc2(quick_gelu(h) if h.requires_grad else quick_gelu_(h))


class Block(nn.Module):
    """Pre-norm block. The MLP's output stays unadded until the next norm, which adds and normalises in one pass."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.embed_dim, config.layer_norm_eps)
        self.norm2 = LayerNorm(config.embed_dim, config.layer_norm_eps)
        self.attn = Attention(config)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None, pack: Pack) -> tuple[torch.Tensor, torch.Tensor]:
        x, total = self.norm1(x, residual)
        x, total = self.norm2(self.attn(x, pack), total)
        return self.mlp(x), total


class Merger(nn.Module):
    """2x2 patches into one token of the language model's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.merge_size = config.spatial_merge_size
        width = config.embed_dim * self.merge_size**2
        self.ln_q = LayerNorm(config.embed_dim, config.layer_norm_eps)
        self.mlp = nn.ModuleDict({"0": Linear(width, width), "2": Linear(width, config.hidden_size)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fc1, fc2 = cast(Linear, self.mlp["0"]), cast(Linear, self.mlp["2"])
        return patch_merge(
            x, self.ln_q.weight, self.ln_q.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias,
            merge_size=self.merge_size, eps=self.ln_q.eps,
        )  # fmt: skip


class VisionTower(nn.Module):
    """Packed patches to packed tokens."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.merger = Merger(config)

    def forward(
        self,
        pixel_values: torch.Tensor | Sequence[torch.Tensor] | Sequence[Patches],
        grid_thw: torch.Tensor | Sequence[torch.Tensor] | None = None,
        *,
        max_patches: int | None = None,
    ) -> torch.Tensor:
        """Encode packed patches.

        Args:
            pixel_values: ``(T, K)`` rows in block order, uint8 pixels or floats already normalised (K 1176), or uint8
                pixels of still images, one of two equal frames each (K 588). Several kinds come as a sequence, of
                images and of videos for instance, and are encoded together. Patches that were checked before know
                their grids.
            grid_thw: ``(n, 3)`` integers, patches of each item in time, height and width; a sequence if pixel_values
                is one.
            max_patches: encode at most this many patches at a time (at least one frame pair), to bound memory.

        Returns ``(T / merge_size^2, hidden_size)``. Raises :class:`PromptError` when the rows and grids disagree.
        """
        given: Sequence[Any] = [pixel_values] if isinstance(pixel_values, torch.Tensor) else pixel_values
        if not all(isinstance(one, Patches) for one in given):
            if grid_thw is None:
                raise PromptError("pixel_values and grid_thw must be given together")
            grids = [grid_thw] if isinstance(grid_thw, torch.Tensor) else grid_thw
            given = [check_patches(self.config, rows, grid) for rows, grid in zip(given, grids, strict=True)]
        kinds = [one.rows for one in given]
        items = [item for one in given for item in one.grids]
        limit = sum(rows.shape[0] for rows in kinds) if max_patches is None else max_patches
        parts, start = [], 0
        for group in _groups(items, limit):
            stop = start + sum(t * h * w for t, h, w in group)
            parts.append(self._encode(_slice(kinds, start, stop), group))
            start = stop
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _encode(self, kinds: list[torch.Tensor], grids: list[Grid]) -> torch.Tensor:
        device = self.patch_embed.proj.weight.device
        count = sum(rows.shape[0] for rows in kinds)
        # The grids are a few bytes to copy, the positions of a GPU's pack would be hundreds of kilobytes.
        grid_thw = torch.tensor(grids).to(device)
        positions = vision_positions(grid_thw, self.config.spatial_merge_size, num_patches=count)
        cos, sin = vision_rope_tables(positions, self._inv_freq(device))
        lengths = [h * w for t, h, w in grids for _ in range(t)]
        # The bounds stay on the host: attention that splits there need not wait for the device in every block.
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        embedded = [self.patch_embed(rows.to(device)) for rows in kinds]
        x, residual = embedded[0] if len(embedded) == 1 else torch.cat(embedded), None
        patches = x.shape[0]
        if idle := idle_rows(x):
            x, cos, sin = (F.pad(rows, (0, 0, 0, idle)) for rows in (x, cos, sin))
        tiles = plan_tiles(cu_seqlens, x.shape[0], device=device)
        pack = Pack((cos, sin), cu_seqlens, length_bound(lengths), tiles)
        for block in self.blocks:
            x, residual = block(x, residual, pack)
        x = x if residual is None else x + residual
        return self.merger(x[:patches])

    def _inv_freq(self, device: torch.device) -> torch.Tensor:
        # Computed in float32 at every call: a buffer would be rounded by model.to(bfloat16).
        half = self.config.head_dim // 2
        exponent = torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
        return 1.0 / self.config.rope_theta**exponent  # (D/4,)


def _slice(kinds: list[torch.Tensor], start: int, stop: int) -> list[torch.Tensor]:
    """Rows ``start`` to ``stop`` of the kinds one after the other."""
    found = []
    for rows in kinds:
        if start < rows.shape[0] and stop > 0:
            found.append(rows[max(start, 0) : stop])
        start, stop = start - rows.shape[0], stop - rows.shape[0]
    return found


def _groups(grids: list[Grid], limit: int) -> list[list[Grid]]:
    """Split items, and videos between frame pairs, into runs of at most ``limit`` patches where one pair allows it."""
    groups: list[list[Grid]] = [[]]
    free = limit
    for t, h, w in grids:
        while t:
            fit = min(t, free // (h * w))
            if fit < 1 and groups[-1]:
                groups.append([])
                free = limit
                continue
            fit = max(fit, 1)  # a frame pair larger than the limit goes alone
            groups[-1].append((fit, h, w))
            free -= fit * h * w
            t -= fit
    return groups
