"""Positions of one long sequence with images and of its patches, on the host or the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from qwen2vl_kernels import mrope_positions, vision_positions

from ..case import Case, Check, Context, Provider, Skip, Workload, equal
from ._ops import MODELING, made

IMAGE, VIDEO, VISION_START, VISION_END = 151655, 151656, 151652, 151653
_BACKENDS = {"cpu": ("native", "eager"), "cuda": ("cuda", "eager")}


def workloads(context: Context) -> Iterator[Workload]:
    tokens, images, side = (256, 2, 8) if context.quick else (16384, 8, 72)  # side: patches; 72 is 1008 pixels
    ids, grids = _sequence(tokens, images, side, context.device)
    found = [_ours(name, ids, grids) for name in _BACKENDS[context.device.type]]
    yield Workload(
        name=f"{tokens} tokens, {images} images of {side // 2}x{side // 2} tokens",
        providers=[*found, _transformers(ids, grids)],
        gate=_gate,
        bytes=ids.nbytes + 3 * ids.nbytes,  # ids in, three rows of positions out
    )
    patches = images * side * side
    yield Workload(
        name=f"rows and columns of the {patches} patches of these images",
        providers=[
            *(_patches(name, grids, patches) for name in _BACKENDS[context.device.type]),
            _transformers_patches(grids),
        ],
        gate=lambda outputs: [equal(f"{name} positions", got, outputs["eager"], name) for name, got in outputs.items()],
        bytes=grids.nbytes + 16 * patches,  # grids in, two numbers a patch out
    )


def _sequence(tokens: int, images: int, side: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of ids with text spread evenly between square images."""
    item = [VISION_START, *[IMAGE] * (side * side // 4), VISION_END]
    text, rest = divmod(tokens - images * len(item), images + 1)
    ids = ([1] * text + item) * images + [1] * (text + rest)
    return torch.tensor([ids], device=device), torch.tensor([[1, side, side]] * images, device=device)


def _ours(backend: str, ids: torch.Tensor, grids: torch.Tensor) -> Provider:
    tokens = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    call = partial(mrope_positions, ids, grids, None, backend=backend, **tokens)
    return made(backend, lambda: call, peer=False)


def _transformers(ids: torch.Tensor, grids: torch.Tensor) -> Provider:
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int(),
        "image_grid_thw": grids,
    }

    def make() -> Callable[[], Any]:
        from transformers import Qwen2VLConfig
        from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

        with torch.device("meta"):  # the method needs the configuration only
            model = Qwen2VLModel(Qwen2VLConfig())
        return partial(model.get_rope_index, **inputs)

    return made("transformers", make, module="transformers")


def _patches(backend: str, grids: torch.Tensor, patches: int) -> Provider:
    return made(backend, lambda: partial(vision_positions, grids, num_patches=patches, backend=backend), peer=False)


def _transformers_patches(grids: torch.Tensor) -> Provider:
    def make() -> Callable[[], Any]:
        try:
            from transformers.vision_utils import get_vision_position_ids
        except ImportError:
            raise Skip("this version has no get_vision_position_ids") from None
        return partial(get_vision_position_ids, grids, 2)

    return made("transformers", make, module="transformers")


def _gate(outputs: Mapping[str, Any]) -> list[Check]:
    """Bitwise equal to the eager reference: images only, where transformers' positions are right too."""
    positions, delta = outputs["eager"]
    checks = []
    for name, (got, got_delta) in outputs.items():
        checks.append(equal(f"{name} positions", got, positions, name))
        checks.append(equal(f"{name} delta", got_delta.flatten(), delta.flatten(), name))
    return checks


CASE = Case(
    "positions",
    "position ids built from token ids and grids: of M-RoPE, and of the tower's patches",
    workloads,
    imports=MODELING,
)
