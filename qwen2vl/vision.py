"""The vision tower: any number of images and videos, packed into one sequence of patches.

675M parameters in every released size: patch embedding, 32 pre-norm blocks whose attention stays inside one image or
one frame pair, 2D rotary embedding, and the 2x2 merger (Qwen2-VL, arXiv 2409.12191, section 2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

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

#: Rows of each kind, one kind after the other, and the grids of all: to tokens.
Encode = Callable[[list[torch.Tensor], list[Grid]], torch.Tensor]


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
        return patch_embed(patches, *_folded(weight, still=patches.shape[1] != weight[0].numel()))


#: Folded weights by the weight that they were made from, and what it was then.
_FOLDED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _folded(weight: torch.Tensor, still: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """``fold_patch_embed`` for the model's pixels, once for a weight, until it changes.

    On a CPU its values are compared. On a GPU the host would wait for these, so PyTorch's count of writes is looked at,
    which does not see what goes through ``weight.data``: some optimizers and averages of weights do, so a weight that
    requires grad is folded there every time. One that does not is to be written by ``copy_`` or ``load_state_dict``.
    """
    watched = weight.requires_grad and (torch.is_grad_enabled() or weight.is_cuda)
    plain = type(weight) in (torch.Tensor, nn.Parameter) and not (weight.is_inference() or weight.is_meta)
    capturing = weight.is_cuda and torch.cuda.is_current_stream_capturing()  # the result lies in the graph's memory
    if watched or capturing or not plain or torch.compiler.is_compiling():
        return fold_patch_embed(weight, IMAGE_MEAN, IMAGE_STD, still)
    state = (weight._version, weight.data_ptr(), weight.dtype, weight.device)
    known = _FOLDED.get(weight)
    if known is None or known[0] != state or not (weight.is_cuda or torch.equal(known[1], weight)):
        known = _FOLDED[weight] = (state, None if weight.is_cuda else weight.detach().clone(), {})
    if still not in known[2]:
        with torch.inference_mode(False), torch.no_grad():
            known[2][still] = fold_patch_embed(weight, IMAGE_MEAN, IMAGE_STD, still)
    return known[2][still]


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
        encode: Encode | None = None,
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
            encode: what encodes those, as :mod:`qwen2vl.tower_graph` by replay; default :meth:`encode`.

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
            parts.append((encode or self.encode)(rows_between(kinds, start, stop), group))
            start = stop
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def encode(self, kinds: list[torch.Tensor], grids: list[Grid]) -> torch.Tensor:
        """Checked patches of all kinds, one after the other, to tokens; the plan is made by the host."""
        return self.encode_embedded(self.embed(kinds), grids)

    def embed(self, kinds: list[torch.Tensor]) -> torch.Tensor:
        """Patches of all kinds to ``(T, C)`` on the tower's device."""
        device = self.patch_embed.proj.weight.device
        embedded = [self.patch_embed(rows.to(device)) for rows in kinds]
        return embedded[0] if len(embedded) == 1 else torch.cat(embedded)

    def encode_embedded(self, x: torch.Tensor, grids: list[Grid]) -> torch.Tensor:
        """As :meth:`encode`, behind :meth:`embed`."""
        patches, device = x.shape[0], x.device
        # The grids are a few bytes to copy, the positions of a GPU's pack would be hundreds of kilobytes.
        grid_thw = torch.tensor(grids).to(device)
        positions = vision_positions(grid_thw, self.config.spatial_merge_size, num_patches=patches)
        cos, sin = vision_rope_tables(positions, self.inv_freq(device))
        lengths = [h * w for t, h, w in grids for _ in range(t)]
        # The bounds stay on the host: attention that splits there need not wait for the device in every block.
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
        if idle := idle_rows(x):
            x, cos, sin = (F.pad(rows, (0, 0, 0, idle)) for rows in (x, cos, sin))
        tiles = plan_tiles(cu_seqlens, x.shape[0], device=device)
        x = self.run(x, Pack((cos, sin), cu_seqlens, length_bound(lengths), tiles))
        return self.merger(x[:patches])

    def run(self, x: torch.Tensor, pack: Pack) -> torch.Tensor:
        """Embedded patches ``(T, C)`` through all blocks."""
        residual = None
        for block in self.blocks:
            x, residual = block(x, residual, pack)
        return x if residual is None else x + residual

    def inv_freq(self, device: torch.device) -> torch.Tensor:
        # Computed in float32 at every call: a buffer would be rounded by model.to(bfloat16).
        half = self.config.head_dim // 2
        exponent = torch.arange(0, half, 2, dtype=torch.float32, device=device) / half
        return 1.0 / self.config.rope_theta**exponent  # (D/4,)


def frame_bounds(grid_thw: torch.Tensor) -> torch.Tensor:
    """``(N + 1,)`` int32 bounds of all items' frames, of which there are at most N, where ``grid_thw (N, 3)`` is.

    Nothing is read on the host. Grids of zeros hold no frame; frames that there are not are empty.
    """
    t, height, width = grid_thw.unbind(1)
    ends = t.cumsum(0)
    frame = torch.arange(grid_thw.shape[0], device=grid_thw.device)
    item = torch.searchsorted(ends, frame, right=True).clamp(max=grid_thw.shape[0] - 1)
    lengths = (height * width).index_select(0, item) * (frame < t.sum())
    return F.pad(lengths.cumsum(0), (1, 0)).int()


def rows_between(kinds: list[torch.Tensor], start: int, stop: int) -> list[torch.Tensor]:
    """Rows ``start`` to ``stop`` of the kinds one after the other."""
    found = []
    for rows in kinds:
        if start < rows.shape[0] and stop > 0:
            found.append(rows[max(start, 0) : stop])
        start, stop = start - rows.shape[0], stop - rows.shape[0]
    return found


def frame_pairs(grids: list[Grid]) -> list[Grid]:
    """The grids of all items' frame pairs, of which none attends to another."""
    return [(1, h, w) for t, h, w in grids for _ in range(t)]


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
