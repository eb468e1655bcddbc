"""Checkpoints: safetensors in, safetensors out, every name mapped by one literal table.

The model's own parameter names are the released ones (``visual.*``, ``model.*``, ``lm_head.weight``), so saving is the
identity and loading only rewrites prefixes; but experts' matrices, which files hold one by one, are stacked in the
model (:func:`qwen2vl.moe.expert_parts`). Nothing is unpickled.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .config import Qwen2VLConfig
from .errors import CheckpointError
from .files import read_json, write_json, write_whole
from .moe import expert_parts

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
HEAD_NAME = "lm_head.weight"
EMBEDDING_NAME = "model.embed_tokens.weight"

#: (prefix in a file, prefix here), first match wins. Released files need no row; transformers 4.52-4.57 may save the
#: module paths of its own classes, and its bare Qwen2VLModel saves them without the leading "model.".
PREFIXES = (
    ("model.language_model.", "model."),
    ("model.visual.", "visual."),
    ("language_model.", "model."),
)
#: Buffers that some writers store and that are computed here.
_DERIVED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
_MISSING = ": missing"
_SHARD = re.compile(r"model-(?:\d+-)?\d{5}-of-\d{5}\.safetensors")
_QUANTISED = (".qweight", ".qzeros", ".scales", ".g_idx", ".weight_scale", ".absmax")

Progress = Callable[[int, int], None]


def our_name(stored: str) -> str:
    """The model's name for a tensor that a file calls ``stored``."""
    for theirs, ours in PREFIXES:
        if stored.startswith(theirs):
            return ours + stored[len(theirs) :]
    return stored


def shards(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order.

    A folder may hold both a single file and an index. The single file is read where the files of the index are not all
    there, as a later save leaves it, or where both hold the same tensors.

    Raises:
        CheckpointError: files are missing, or the single file and those of the index disagree.
    """
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    if index.exists():
        try:
            listed = _listed(index, folder)
        except CheckpointError:
            if not single.is_file():
                raise
            return [single]  # whole or not: what it lacks is listed when it is loaded
        if single.is_file() and single not in listed:
            if difference := _difference([single], listed):
                raise CheckpointError(
                    f"{folder}: {SINGLE_NAME} and the files that {INDEX_NAME} lists disagree ({difference}); remove "
                    "those that are not meant"
                )
            return [single]
        return listed
    if single.is_file():
        return [single]
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: has only pickle weights ({', '.join(pickles[:3])}), which can run code when read and are "
            "refused; convert them to safetensors"
        )
    raise CheckpointError(f"{folder}: has neither {SINGLE_NAME} nor {INDEX_NAME}")


def _listed(index: Path, folder: Path) -> list[Path]:
    """The files that an index lists. Raises :class:`CheckpointError` where it is damaged or some are missing."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: is not a safetensors index: {error!r}") from error
    if outside := [n for n in names if not isinstance(n, str) or Path(n).name != n]:
        raise CheckpointError(f"{index}: names files outside the folder: {outside}")
    if absent := [n for n in names if not (folder / n).is_file()]:
        raise CheckpointError(f"{folder}: shards named by {INDEX_NAME} are missing: {', '.join(absent)}")
    return [folder / n for n in names]


def _difference(ones: list[Path], others: list[Path]) -> str:
    """What first differs between two sets of files, empty where they hold the same tensors."""
    with ExitStack() as stack:
        try:
            one, other = _open(stack, ones), _open(stack, others)
            if apart := sorted(one.keys() ^ other.keys()):
                return f"{apart[0]} is in one of them only"
            return next((f"{name} differs" for name in one if not _equal(one[name], other[name])), "")
        except (SafetensorError, OSError) as error:
            return f"one is damaged or truncated: {error}"


def _open(stack: ExitStack, paths: list[Path]) -> dict[str, tuple]:
    """The model's name of every tensor -> (open file, stored name)."""
    files = [stack.enter_context(safe_open(path, "pt")) for path in paths]
    return {our_name(stored): (file, stored) for file in files for stored in file.keys()}  # noqa: SIM118  (not a dict)


def _equal(one: tuple, other: tuple, rows: int = 4096) -> bool:
    """Whether two tensors of :func:`_open` have the same shape and values, read a few rows at a time."""
    a, b = (file.get_slice(stored) for file, stored in (one, other))
    shape = a.get_shape()
    if shape != b.get_shape():
        return False
    if not shape:
        return torch.equal(one[0].get_tensor(one[1]).double(), other[0].get_tensor(other[1]).double())
    return all(
        torch.equal(a[begin : begin + rows].double(), b[begin : begin + rows].double())
        for begin in range(0, shape[0], rows)
    )


def holds_own_head(folder: Path) -> bool:
    """Whether the files hold an ``lm_head.weight`` that is no copy of the embedding: that of a model which is not tied,
    whatever its config says. Raises :class:`CheckpointError` as :func:`shards`; damage is for the loading to report."""
    with ExitStack() as stack:
        try:
            stored = _open(stack, shards(folder))
            head, embedding = stored.get(HEAD_NAME), stored.get(EMBEDDING_NAME)
            return head is not None and embedding is not None and not _equal(head, embedding)
        except (SafetensorError, OSError):
            return False


def check_sizes(config: Qwen2VLConfig, folder: Path) -> None:
    """Hold a config's sizes to what the headers of the files say, before a module is built of them.

    This refuses what could not be built at all; every shape that differs is listed by :func:`load_weights`.

    Raises:
        CheckpointError: there are fewer tensors than layers, or a matrix would be larger than all tensors together.
    """
    count = total = 0
    for path in shards(folder):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict)
                    count, total = count + 1, total + math.prod(file.get_slice(name).get_shape())
        except (SafetensorError, OSError):  # listed with all else by the loading; any model may have been in it
            count, total = max(count, 1000), max(total, 2**36)
    text, vision = config.text, config.vision
    layers = text.num_hidden_layers + vision.depth
    if layers > count:
        raise CheckpointError(
            f"{folder}: num_hidden_layers and depth make {layers} layers, but the files hold {count} tensors"
        )
    merged = vision.embed_dim * vision.spatial_merge_size**2
    dense = any(text.experts(layer) is None for layer in range(text.num_hidden_layers))
    routed = 0 if text.moe is None else text.moe.num_experts * text.moe.moe_intermediate_size
    shared = 0 if text.moe is None else text.moe.shared_expert_intermediate_size
    for name, values in (
        ("vocab_size", text.vocab_size * text.hidden_size),
        ("hidden_size", text.hidden_size**2),
        ("intermediate_size", dense * text.intermediate_size * text.hidden_size),
        ("num_experts", routed * text.hidden_size),
        ("shared_expert_intermediate_size", shared * text.hidden_size),
        ("vision_config.embed_dim", 3 * vision.embed_dim**2),
        ("vision_config.mlp_ratio", vision.embed_dim * int(vision.embed_dim * vision.mlp_ratio)),
        ("vision_config.patch_size", vision.embed_dim * vision.patch_values),
        ("vision_config.spatial_merge_size", merged**2),
    ):
        if values > total:
            raise CheckpointError(
                f"{folder}: {name} asks for a matrix of {values} values, but the files hold {total} in all"
            )


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
    copied: parameters are private (copy-on-write) maps of the file, whose pages are read when first used; experts that
    lie apart are, one by one, into the matrices that hold them all.

    Args:
        ignore: names that a file may hold and the model does not need (the head of a tied model, where it is a copy of
            the embedding: see :func:`holds_own_head`).
        progress: called with (tensors done, tensors in all).

    Raises:
        CheckpointError: one error that lists every missing, unexpected, mis-shaped or quantised tensor, or the files
            that cannot be read, behind which no tensor is missed. The model is not touched then.
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
        damaged = bool(problems)
        problems += [one for one in _compare(wanted, where) if not (damaged and one.endswith(_MISSING))]
        if problems:
            raise CheckpointError(_listing(folder, problems))
        for done, name in enumerate(wanted, 1):
            if name in where:
                file, stored, _ = where[name]
                # Device first, then dtype: a conversion runs where it is fast and the host never holds a second copy.
                found[name] = file.get_tensor(stored).to(device).to(dtype)
            else:  # experts, each of which lies apart in the files
                found[name] = torch.empty_like(wanted[name], device=device, dtype=dtype, requires_grad=False)
                for part, view in expert_parts(name, found[name]):
                    file, stored, _ = where[part]
                    view.copy_(file.get_tensor(stored))
            if progress is not None:
                progress(done, len(wanted))
    model.load_state_dict(found, strict=True, assign=True)  # keeps each parameter's requires_grad


def _compare(wanted: dict[str, nn.Parameter], where: dict[str, tuple]) -> list[str]:
    quantised = [name for name in where if name.endswith(_QUANTISED)]
    if quantised:
        return [f"quantised weights are not supported ({quantised[0]} and {len(quantised) - 1} more)"]
    # Experts may lie in the files as they do in the model, too: transformers 5 can save them so.
    pieces = [expert_parts(name, one.detach()) if name not in where else [(name, one)] for name, one in wanted.items()]
    shapes = {name: tuple(one.shape) for piece in pieces for name, one in piece}
    problems = [f"{name}{_MISSING}" for name in shapes if name not in where]
    for name, (file, stored, _) in where.items():
        if name not in shapes:
            problems.append(f"{name}: unexpected")
            continue
        view = file.get_slice(stored)
        if tuple(view.get_shape()) != shapes[name]:
            problems.append(f"{name}: shape {tuple(view.get_shape())}, the config wants {shapes[name]}")
        elif view.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            problems.append(f"{name}: dtype {view.get_dtype()} is no float type")
    return problems


def _listing(folder: Path, problems: list[str], most: int = 20) -> str:
    lines = [f"  {problem}" for problem in problems[:most]]
    if len(problems) > most:
        lines.append(f"  ... and {len(problems) - most} more")
    return f"{folder}: {len(problems)} tensor(s) do not fit:\n" + "\n".join(lines)


def save_weights(
    model: nn.Module,
    folder: Path,
    max_shard_bytes: int,
    metadata: Mapping[str, str] | None = None,
    *,
    before: Callable[[], object] = lambda: None,
) -> None:
    """Write ``model``'s parameters under the released names, experts one by one, sharded when larger than
    ``max_shard_bytes``.

    ``metadata``: for the header of every file, beside the format. ``before``: called when everything is on the disk and
    nothing of it has taken the place of what was there.

    Shards get names that no file of the folder has, then the index its place, then shards that it does not list go:
    whenever this is cut short, the folder is read as it was or as it is to be. (Where one file takes the place of
    shards or shards that of one file, it may be refused: both are there for a moment.) The parameters being saved may
    be maps of the very files that they replace.

    Raises :class:`CheckpointError` where a file cannot be written, as on a full disk; what was there is there then.
    """
    parts = (part for name, one in model.named_parameters() for part in expert_parts(name, one.detach()))
    groups = list(_shard(dict(parts), max_shard_bytes))
    index, single = folder / INDEX_NAME, folder / SINGLE_NAME
    header = {"format": "pt", **(metadata or {})}
    stale = _own_shards(folder)
    if len(groups) == 1:

        def write(path: Path) -> None:
            save_file(groups[0], path, metadata=header)
            before()

        write_whole(single, write)
        index.unlink(missing_ok=True)
    else:
        names = _free_names(folder, len(groups))
        try:
            for name, group in zip(names, groups, strict=True):
                write_whole(folder / name, lambda path, group=group: save_file(group, path, metadata=header))
            before()
            total = sum(p.numel() * p.element_size() for p in model.parameters())
            where = {key: name for name, group in zip(names, groups, strict=True) for key in group}
            write_json(index, {"metadata": {"total_size": total}, "weight_map": where})
        except BaseException:
            for name in set(names) - _shards_of(index):  # Ctrl-C may come when the index has its place
                (folder / name).unlink(missing_ok=True)
            raise
        stale.add(single)
    for path in stale:
        path.unlink(missing_ok=True)


def _free_names(folder: Path, count: int) -> list[str]:
    """Names of shards, the usual ones unless a file has one of them."""
    for prefix in itertools.chain([""], (f"{number}-" for number in itertools.count(2))):
        names = [f"model-{prefix}{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if not any((folder / name).exists() for name in names):
            return names
    raise AssertionError  # there is always another number


def _own_shards(folder: Path) -> set[Path]:
    """Shards that a save may have left here: those that the index lists, and those with names of :func:`_free_names`,
    which a save that was killed leaves unlisted."""
    left = (path for path in folder.glob("model-*.safetensors") if _SHARD.fullmatch(path.name))
    return {*(folder / name for name in _shards_of(folder / INDEX_NAME)), *left}


def _shards_of(index: Path) -> set[str]:
    """File names that an earlier save's index lists; none where it is absent or not to be understood."""
    try:
        names = set(read_json(index)["weight_map"].values())
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return set()
    return {name for name in names if isinstance(name, str) and Path(name).name == name}


def _shard(tensors: dict[str, torch.Tensor], most: int) -> Iterator[dict[str, torch.Tensor]]:
    group: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        bytes_ = tensor.numel() * tensor.element_size()
        if group and size + bytes_ > most:
            yield group
            group, size = {}, 0
        group[name] = tensor.contiguous()
        size += bytes_
    yield group
