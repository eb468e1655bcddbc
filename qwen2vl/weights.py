"""Checkpoints: safetensors in, safetensors out, every name mapped by one literal table.

The model's own parameter names are the released ones (``visual.*``, ``model.*``, ``lm_head.weight``), so saving is the
identity and loading only rewrites prefixes. Nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .errors import CheckpointError
from .files import read_json, write_json, write_whole

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

#: (prefix in a file, prefix here), first match wins. Released files need no row; transformers 4.52-4.57 may save the
#: module paths of its own classes, and its bare Qwen2VLModel saves them without the leading "model.".
PREFIXES = (
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
    ("language_model.", "model."),
)
#: Buffers that some writers store and that are computed here.
_DERIVED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
_QUANTISED = (".qweight", ".qzeros", ".scales", ".g_idx", ".weight_scale", ".absmax")

Progress = Callable[[int, int], None]


def our_name(stored: str) -> str:
    """The model's name for a tensor that a file calls ``stored``."""
    for theirs, ours in PREFIXES:
        if stored.startswith(theirs):
            return ours + stored[len(theirs) :]
    return stored


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order. Raises :class:`CheckpointError` when some are missing."""
    index = folder / INDEX_NAME
    if index.exists():
        try:
            names = sorted(set(read_json(index)["weight_map"].values()))
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: is not a safetensors index: {error!r}") from error
        if outside := [n for n in names if not isinstance(n, str) or Path(n).name != n]:
            raise CheckpointError(f"{index}: names files outside the folder: {outside}")
        if absent := [n for n in names if not (folder / n).is_file()]:
            raise CheckpointError(f"{folder}: shards named by {INDEX_NAME} are missing: {', '.join(absent)}")
        return [folder / n for n in names]
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: has only pickle weights ({', '.join(pickles[:3])}), which can run code when read and are "
            "refused; convert them to safetensors"
        )
    raise CheckpointError(f"{folder}: has neither {SINGLE_NAME} nor {INDEX_NAME}")


def load_weights(
    model: nn.Module,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    ignore: tuple[str, ...] = (),
    progress: Progress | None = None,
) -> None:
    """Fill ``model``, built on the meta device, with the tensors of ``folder``.

    Each tensor goes straight to ``device`` and ``dtype``, one at a time. On the CPU in the stored dtype nothing is
    copied: parameters are private (copy-on-write) maps of the file, whose pages are read when first used.

    Args:
        ignore: names that a file may hold and the model does not need (the head of a tied model).
        progress: called with (tensors done, tensors in all).

    Raises:
        CheckpointError: one error that lists every missing, unexpected, mis-shaped, quantised or unreadable tensor.
            The model is not touched then.
    """
    wanted = dict(model.named_parameters())
    found: dict[str, torch.Tensor] = {}
    problems: list[str] = []
    with ExitStack() as stack:
        where: dict[str, tuple] = {}
        for path in shards(folder):
            try:
                file = stack.enter_context(safe_open(path, "pt"))
                names = list(file.keys())
            except (SafetensorError, OSError) as error:
                problems.append(f"{path.name}: damaged or truncated: {error}")
                continue
            for stored in names:
                name = our_name(stored)
                if name in ignore or name.endswith(_DERIVED):
                    continue
                if name in where:
                    problems.append(f"{name}: stored twice, in {where[name][2]} and {path.name}")
                where[name] = (file, stored, path.name)
        problems += _compare(wanted, where)
        if problems:
            raise CheckpointError(_listing(folder, problems))
        for done, name in enumerate(wanted, 1):
            file, stored, _ = where[name]
            # Device first, then dtype: a conversion runs where it is fast and the host never holds a second copy.
            found[name] = file.get_tensor(stored).to(device).to(dtype)
            if progress is not None:
                progress(done, len(wanted))
    model.load_state_dict(found, strict=True, assign=True)  # keeps each parameter's requires_grad


def _compare(wanted: dict[str, nn.Parameter], where: dict[str, tuple]) -> list[str]:
    quantised = [name for name in where if name.endswith(_QUANTISED)]
    if quantised:
        return [f"quantised weights are not supported ({quantised[0]} and {len(quantised) - 1} more)"]
    problems = [f"{name}: missing" for name in wanted if name not in where]
    for name, (file, stored, _) in where.items():
        if name not in wanted:
            problems.append(f"{name}: unexpected")
            continue
        view = file.get_slice(stored)
        if tuple(view.get_shape()) != tuple(wanted[name].shape):
            problems.append(f"{name}: shape {tuple(view.get_shape())}, the config wants {tuple(wanted[name].shape)}")
        elif view.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            problems.append(f"{name}: dtype {view.get_dtype()} is no float type")
    return problems


def _listing(folder: Path, problems: list[str], most: int = 20) -> str:
    lines = [f"  {problem}" for problem in problems[:most]]
    if len(problems) > most:
        lines.append(f"  ... and {len(problems) - most} more")
    return f"{folder}: {len(problems)} tensor(s) do not fit:\n" + "\n".join(lines)


def save_weights(
    model: nn.Module, folder: Path, max_shard_bytes: int, metadata: Mapping[str, str] | None = None
) -> None:
    """Write ``model``'s parameters under the released names, sharded when larger than ``max_shard_bytes``.

    ``metadata``: for the header of every file, beside the format.

    Files are written beside their place and moved in whole, because the parameters being saved may be maps of the
    very files they replace.
    """
    groups = list(_shard(dict(model.named_parameters()), max_shard_bytes))
    names = [SINGLE_NAME] if len(groups) == 1 else [
        f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)
    ]  # fmt: skip
    index = folder / INDEX_NAME
    stale = _shards_of(index) | {SINGLE_NAME}
    weight_map: dict[str, str] = {}
    header = {"format": "pt", **(metadata or {})}
    for name, group in zip(names, groups, strict=True):
        write_whole(folder / name, lambda path, group=group: save_file(group, path, metadata=header))
        weight_map.update(dict.fromkeys(group, name))
    if len(groups) > 1:
        total = sum(p.numel() * p.element_size() for p in model.parameters())
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    else:
        index.unlink(missing_ok=True)
    for name in stale - set(names):
        (folder / name).unlink(missing_ok=True)


def _shards_of(index: Path) -> set[str]:
    """File names that an earlier save's index lists; none where it is absent or not to be understood."""
    try:
        names = set(read_json(index)["weight_map"].values())
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return set()
    return {name for name in names if isinstance(name, str) and Path(name).name == name}


def _shard(parameters: dict[str, nn.Parameter], most: int) -> Iterator[dict[str, torch.Tensor]]:
    group: dict[str, torch.Tensor] = {}
    size = 0
    for name, parameter in parameters.items():
        tensor = parameter.detach()
        bytes_ = tensor.numel() * tensor.element_size()
        if group and size + bytes_ > most:
            yield group
            group, size = {}, 0
        group[name] = tensor.contiguous()
        size += bytes_
    yield group
