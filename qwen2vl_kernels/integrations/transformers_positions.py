"""M-RoPE positions in the place of transformers' own; :mod:`.transformers` exports and applies them.

from types import MethodType
from qwen2vl_kernels.integrations.transformers import get_rope_index

model.model.get_rope_index = MethodType(get_rope_index, model.model)  # one model
Qwen2VLModel.get_rope_index = get_rope_index                          # or every model
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch

from ..ops.mrope_positions import mrope_positions

_PARAMETERS_4 = ("input_ids", "image_grid_thw", "video_grid_thw", "attention_mask")
_PARAMETERS_5 = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "attention_mask")


def get_rope_index(self: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """``Qwen2VLModel.get_rope_index`` of the transformers that is installed: up to 5.1 ("4.x" below), or from 5.3 on.

    Parameters, in the order of that version (keywords of other names are ignored, as 5.x does):

        4.x:  input_ids, image_grid_thw, video_grid_thw, attention_mask
        5.x:  input_ids, mm_token_type_ids, image_grid_thw, video_grid_thw, attention_mask

    Args:
        self: anything with a Qwen2-VL ``config``: ``image_token_id``, ``video_token_id`` and
            ``vision_config.spatial_merge_size``.
        input_ids: ``(B, L)`` int64 or int32. 4.x takes all for text without it (None, beside a mask) or without grids.
        mm_token_type_ids: ``(B, L)`` integers: 0 text, also where the token is a placeholder's (a sampled answer may
            hold one), 1 image, 2 video. None: placeholders are found in ``input_ids`` by the ids of ``config``.
        image_grid_thw, video_grid_thw: ``(n, 3)`` or None, of the whole batch in order of appearance.
        attention_mask: ``(B, L)``, zeros for padding on either side, or None. Where it hides images or videos, those
            that it leaves take the grids in order, from the first on, as in transformers.

    Returns:
        position_ids: ``(3, B, L)`` in the dtype of ``input_ids``. Masked slots hold 0, in 4.x 1.
        mrope_position_deltas: ``(B, 1)`` int64, largest position + 1 - number of unmasked tokens of the row; in
            4.x - L, the padded length. Either is what that version's decoding adds to its own count.

    Positions follow the paper's rule. transformers 5.3 to 5.23 leave it after a video of more frame pairs than
    tokens a side, where the text that follows starts too early; those positions differ from theirs on purpose,
    and so do two images without a token between them, which 5.x takes for one.

    Raises:
        TypeError, ValueError: as ``mrope_positions`` does: on the CPU also for placeholders and grids that do
            not match one to one, a grid too many included.
        RuntimeError: with transformers 5.2, whose deltas are those of 4.x cut off at zero.
    """
    counts_padding = not _takes_token_types()
    given = _by_name(_PARAMETERS_4 if counts_padding else _PARAMETERS_5, args, kwargs)
    input_ids, mask = given.get("input_ids"), given.get("attention_mask")
    grids = [given.get(f"{name}_grid_thw") for name in ("image", "video")]
    if input_ids is None:
        if mask is None or not counts_padding:
            raise TypeError("get_rope_index: input_ids must be a tensor, got None")
        input_ids, grids = mask.long(), [None, None]
    if counts_padding and all(grid is None for grid in grids):
        input_ids = torch.full_like(input_ids, -1)  # no placeholder has this id
    device = input_ids.device
    mask = None if mask is None else mask.to(device).bool()
    images, videos = (None if grid is None else grid.to(device) for grid in grids)
    tokens, image, video = input_ids, self.config.image_token_id, self.config.video_token_id
    if (types := given.get("mm_token_type_ids")) is not None:
        tokens, image, video = types.to(device, input_ids.dtype), 1, 2
    size = self.config.vision_config.spatial_merge_size
    positions, delta = mrope_positions(
        tokens,
        _seen(images, tokens, image, mask, size),
        _seen(videos, tokens, video, mask, size),
        mask,
        image_token_id=image,
        video_token_id=video,
        spatial_merge_size=size,
    )
    if counts_padding and mask is not None:
        positions = positions.masked_fill(~mask, 1)
        delta = delta - (~mask).sum(1)
    return positions.to(input_ids.dtype), delta.unsqueeze(1)


def _seen(
    grids: torch.Tensor | None, tokens: torch.Tensor, placeholder: int, mask: torch.Tensor | None, size: int
) -> torch.Tensor | None:
    """The grids that begin among the placeholders which the mask leaves, if it hides some. On the CPU: a device's
    kernel takes grids too many, without anybody waiting for it."""
    if grids is None or mask is None or grids.device.type != "cpu":
        return grids
    found = tokens == placeholder
    if not bool((found & ~mask).any()):
        return grids
    length = grids.prod(-1) // size**2
    return grids[length.cumsum(0) - length < (found & mask).sum()]


def get_rope_index_qwen3(self: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """``Qwen3VLModel.get_rope_index``: as :func:`get_rope_index`, but each frame pair of a video stands for itself.

    Timestamps between them are text, so that a video's grid ``(t, h, w)`` counts as t grids ``(1, h, w)``.
    """
    given = _by_name(_PARAMETERS_5 if _takes_token_types() else _PARAMETERS_4, args, kwargs)
    if (video := given.get("video_grid_thw")) is not None:
        pairs = video.repeat_interleave(video[:, 0], 0)
        given["video_grid_thw"] = torch.cat([torch.ones_like(pairs[:, :1]), pairs[:, 1:]], 1)
    return get_rope_index(self, **given)


def of_qwen2(stock: Any) -> Any:
    return _in_place_of(stock, get_rope_index)


def of_qwen3(stock: Any) -> Any:
    return _in_place_of(stock, get_rope_index_qwen3)


def _in_place_of(stock: Any, function: Any) -> Any:
    """``function`` with stock's name and signature, an object of its own that a patch can be told by."""

    @wraps(stock)
    def get_rope_index(self: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return function(self, *args, **kwargs)

    return get_rope_index


def _takes_token_types() -> bool:
    """Whether ``mm_token_type_ids`` is a parameter in the transformers at hand, with 5.x's conventions."""
    from transformers import __version__

    version = tuple(int(part) for part in __version__.split(".")[:2])
    if version == (5, 2):
        raise RuntimeError(f"get_rope_index: transformers must be any version but 5.2, got {__version__}")
    return version >= (5, 3)


def _by_name(names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by parameter name, refused as Python refuses them."""
    if len(args) > len(names):
        raise TypeError(f"get_rope_index: takes {len(names)} positional arguments, got {len(args)}")
    given = dict(zip(names, args, strict=False))
    for name in kwargs:
        if name in given:
            raise TypeError(f"get_rope_index: got {name} twice")
    return given | kwargs
