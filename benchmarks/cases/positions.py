"""Positions of one long sequence with images and of its patches, on the host or the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch

from qwen2vl_kernels import BackendError, mrope_positions, vision_positions

from .. import providers
from ..case import Case, Check, Context, Provider, Workload, equal

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
        gate=lambda outputs: [equal(f"{name} positions", got, outputs["eager"]) for name, got in outputs.items()],
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
    try:
        call()
    except BackendError as error:
        return Provider(backend, skipped=str(error))
    return Provider(backend, call)


def _transformers(ids: torch.Tensor, grids: torch.Tensor) -> Provider:
    name = "transformers"
    if (reason := providers.why_not("transformers")) is not None:
        return Provider(name, skipped=reason, peer=True)
    from transformers import Qwen2VLConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    with torch.device("meta"):  # the method needs the configuration only
        model = Qwen2VLModel(Qwen2VLConfig())
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int(),
        "image_grid_thw": grids,
    }
    return Provider(name, partial(model.get_rope_index, **inputs), peer=True)


def _patches(backend: str, grids: torch.Tensor, patches: int) -> Provider:
    call = partial(vision_positions, grids, num_patches=patches, backend=backend)
    try:
        call()
    except BackendError as error:
        return Provider(backend, skipped=str(error))
    return Provider(backend, call)


def _transformers_patches(grids: torch.Tensor) -> Provider:
    if (reason := providers.why_not("transformers")) is not None:
        return Provider("transformers", skipped=reason, peer=True)
    try:
        from transformers.vision_utils import get_vision_position_ids
    except ImportError:
        return Provider("transformers", skipped="this version has no get_vision_position_ids", peer=True)
    return Provider("transformers", partial(get_vision_position_ids, grids, 2), peer=True)


def _gate(outputs: Mapping[str, Any]) -> list[Check]:
    """Bitwise equal to the eager reference: images only, where transformers' positions are right too."""
    positions, delta = outputs["eager"]
    checks = []
    for name, (got, got_delta) in outputs.items():
        checks.append(equal(f"{name} positions", got, positions))
        checks.append(equal(f"{name} delta", got_delta.flatten(), delta.flatten()))
    return checks


CASE = Case(
    "positions", "position ids built from token ids and grids: of M-RoPE, and of the tower's patches", workloads
)
