"""The vision tower captured as a CUDA graph, once for a capacity of patches, and replayed for any mix of images and
frames up to it.

Patches of whatever kind are embedded as ever and copied to where the graph reads them; what it is captured from begins
there, with the grids on the device. Bounds of frames, positions, rotary tables and the plan of attention's tiles are
made of these by every replay, so that nothing in a graph depends on the pack. What it has room for is a :class:`Shape`,
of few values, as the host knows the pack's.

Tokens are bit for bit those of the eager tower on as many rows: the products of a library may sum in another order for
another number of rows. No GPU has run this yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from qwen2vl_kernels import plan_tiles, vision_positions, vision_rope_tables
from qwen2vl_kernels.core.attention_choice import chosen, reads_host

from .checks import Grid
from .errors import Qwen2VLError
from .graphs import capture, capturing, pool_of, round_up, setting_of, unfit, weights_of
from .layers import length_bound
from .vision import Encode, Pack, VisionTower, frame_bounds

if TYPE_CHECKING:
    from .model import Qwen2VL

#: Packs of more patches are encoded one launch after the other: the host is far ahead of the device there, and what a
#: graph works in, some 30 kB a patch, stays allocated with it.
MOST_PATCHES = 1 << 14
#: Graphs have room for at least so many patches and so many frames, and for frames of so many patches.
LEAST_PATCHES, LEAST_FRAMES = 256, 16
#: What the graphs of a model read and write, beside what they work in, takes at most so many bytes.
KEPT_BYTES = 1 << 28


class Shape(NamedTuple):
    """What a graph has room for: patches; items, and frames of all of them together; patches of a frame.

    Attention launches a program for each tile that so many patches in so many frames may need, and others' kernels for
    each frame as many as the longest may need, so rooms for frames and their lengths are as tight as few graphs allow:
    powers of four and of two. A kernel is chosen by the length alone, and as for the eager tower.
    """

    patches: int
    frames: int
    longest: int

    @classmethod
    def of(cls, grids: list[Grid], merge_size: int) -> Shape:
        """The least that serves such a pack."""
        block, frames = merge_size**2, LEAST_FRAMES
        while frames < sum(t for t, _, _ in grids):
            frames *= 4
        patches = max(LEAST_PATCHES, round_up(sum(t * h * w for t, h, w in grids)))
        patches = -(-patches // block) * block
        longest = max(LEAST_PATCHES, length_bound([h * w for _, h, w in grids]))
        return cls(patches, min(frames, patches // block), longest)


def device_pack(tower: VisionTower, grid_thw: torch.Tensor, shape: Shape) -> Pack:
    """The plan of the items in ``grid_thw (frames, 3)``, behind which zeros stand, where that is; nothing is read on
    the host. Patches beyond the last item are in no segment, at position (0, 0)."""
    positions = vision_positions(grid_thw, tower.config.spatial_merge_size, num_patches=shape.patches)
    rope = vision_rope_tables(positions, tower.inv_freq(grid_thw.device))
    bounds = frame_bounds(grid_thw)
    return Pack(rope, bounds, shape.longest, plan_tiles(bounds, shape.patches, padded=True))


def encode_padded(tower: VisionTower, x: torch.Tensor, grid_thw: torch.Tensor, shape: Shape) -> torch.Tensor:
    """What is captured: embedded patches ``(shape.patches, C)``, zero beyond the last, to as many tokens as they make;
    those beyond the last item's mean nothing."""
    return tower.merger(tower.run(x, device_pack(tower, grid_thw, shape)))


@dataclass(frozen=True)
class _Key:
    """What a graph was captured for and under."""

    shape: Shape
    dtype: torch.dtype
    setting: tuple


class _Captured:
    """A graph, and where it reads and writes. It holds no tower, which it would keep alive."""

    @torch.inference_mode(False)  # tensors that the next call can change in whatever mode it runs
    @torch.no_grad()  # inside, as leaving inference mode switches gradients on
    def __init__(self, tower: VisionTower, key: _Key, x: torch.Tensor, pool: Any) -> None:
        self.key, self.weights, shape = key, weights_of(tower), key.shape
        self.x = torch.zeros((shape.patches, x.shape[1]), dtype=x.dtype, device=x.device)
        self.grid_thw = torch.zeros((shape.frames, 3), dtype=torch.int64, device=x.device)
        self.used, self._lock = 0, Lock()
        self._replay, self.tokens = capture(lambda: encode_padded(tower, self.x, self.grid_thw, shape), x.device, pool)

    @property
    def bytes(self) -> int:
        return self.x.nbytes + self.grid_thw.nbytes + self.tokens.nbytes

    def __call__(self, x: torch.Tensor, grids: list[Grid], tokens: int) -> torch.Tensor:
        """``(tokens, hidden)``, which no later replay changes."""
        with self._lock:
            self.x[: x.shape[0]].copy_(x)
            if self.used > x.shape[0]:
                self.x[x.shape[0] : self.used].zero_()
            self.used = x.shape[0]
            self.grid_thw.copy_(F.pad(torch.tensor(grids), (0, 0, 0, self.key.shape.frames - len(grids))))
            self._replay()
            return self.tokens[:tokens].clone()


class _Kept:
    """What a model has captured of its tower, the one used last at the end."""

    def __init__(self) -> None:
        self.captured: list[_Captured] = []
        self._lock = Lock()

    def get(self, model: Qwen2VL, key: _Key, x: torch.Tensor) -> _Captured:
        weights = weights_of(model.visual)
        with self._lock:
            self.captured = [one for one in self.captured if one.weights == weights]
            found = next((one for one in self.captured if one.key == key), None)
            if found is None:
                found = _Captured(model.visual, key, x, pool_of(model, key.setting))
            else:
                self.captured.remove(found)
            self.captured.append(found)
            while len(self.captured) > 1 and sum(one.bytes for one in self.captured) > KEPT_BYTES:
                self.captured.pop(0)
            return found


_lock = Lock()
_of_models: WeakKeyDictionary[Qwen2VL, _Kept] = WeakKeyDictionary()


def replayed(model: Qwen2VL, asked: bool | None) -> Encode | None:
    """What encodes a pack of ``model``'s tower by a graph, which is captured at the first use of a :class:`Shape`; None
    where the eager tower does: unless ``QWEN2VL_GRAPHS=1`` is set and the model is on CUDA, where ``asked`` is False,
    and for training, hooks, adapters and compilers.

    Packs of more than :data:`MOST_PATCHES` patches, and those whose attention would read bounds on the host, as it does
    for float32 unless Triton's is named, go through the eager tower, too.

    Raises :class:`Qwen2VLError` where graphs are asked for and cannot be; for attention that reads on the host, where
    a pack is encoded.
    """
    if asked is False:
        return None
    reason = unfit(model, model.visual)
    if not reason and torch.is_grad_enabled() and any(one.requires_grad for one in model.visual.parameters()):
        reason = "gradients of the tower are wanted, and a replay has none; call under torch.no_grad()"
    elif not reason and (torch.compiler.is_compiling() or capturing(model.device)):
        reason = "a compiler or another graph is taking in what runs here"
    if not reason:
        return lambda kinds, grids: _encode(model, kinds, grids, bool(asked))
    if asked:
        raise Qwen2VLError(f"graphs: {reason}")
    return None


def _encode(model: Qwen2VL, kinds: list[torch.Tensor], grids: list[Grid], asked: bool) -> torch.Tensor:
    tower = model.visual
    x, shape = tower.embed(kinds), Shape.of(grids, tower.config.spatial_merge_size)
    if shape.patches > MOST_PATCHES or x.requires_grad:  # of pixels, whose gradients a replay would not give
        return tower.encode_embedded(x, grids)
    attention = _attention(tower, x, shape)
    if reads_host(attention):
        if asked:
            raise Qwen2VLError(f"graphs: attention {attention!r} reads the bounds of frames on the host")
        return tower.encode_embedded(x, grids)
    with _lock:
        kept = _of_models.setdefault(model, _Kept())
    captured = kept.get(model, _Key(shape, x.dtype, setting_of(x.device)), x)
    return captured(x, grids, x.shape[0] // tower.config.spatial_merge_size**2)


def _attention(tower: VisionTower, x: torch.Tensor, shape: Shape) -> str:
    """The backend that serves the tower's attention."""
    config = tower.config
    q, k, v = x.new_empty((1, 3, config.num_heads, config.head_dim)).unbind(1)
    return chosen(q, k, v, shape.longest, segments=shape.frames)
