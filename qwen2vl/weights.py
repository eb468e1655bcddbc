"""Checkpoints: safetensors in, safetensors out, every name mapped by one literal table.

The model's own parameter names are the released ones (``visual.*``, ``model.*``, ``lm_head.weight``), so saving is the
identity and loading only rewrites prefixes; but experts' matrices, which files hold one by one, are stacked in the
model (:func:`qwen2vl.moe.expert_parts`) unless they are quantised. Nothing is unpickled.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from .errors import CheckpointError
from .files import read_json, write_json, write_whole
from .interrupts import scratch
from .moe import expert_parts, held_elsewhere
from .quantised_experts import put_together
from .quantised_slices import Slice, own_part, stored_slices
from .quantization import QuantisedTogether, QuantLinear, from_stored, quantised, to_stored
from .stacked_fp8 import in_files, part_of, read_part

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


def stored_dtypes(folder: Path) -> dict[str, str]:
    """The model's name of every tensor in the files -> its dtype as safetensors calls it; what cannot be read is left
    out, and reported when it is loaded. Raises :class:`CheckpointError` as :func:`shards`."""
    found: dict[str, str] = {}
    for path in shards(folder):
        with suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
            found |= {our_name(name): file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return found


def load_weights(
    model: nn.Module,
    folder: Path,
    *,
    device: torch.device,
    dtype: torch.dtype,
    ignore: tuple[str, ...] = (),
    cuts: Mapping[str, Slice] = MappingProxyType({}),
    progress: Progress | None = None,
) -> None:
    """Fill ``model``, built on the meta device, with the tensors of ``folder``.

    Each tensor goes straight to ``device`` and ``dtype``, one at a time. On the CPU in the stored dtype nothing is
    copied: parameters are private (copy-on-write) maps of the file, whose pages are read when first used; experts that
    lie apart are, one by one, into the matrices that hold them all.

    Args:
        ignore: names that a file may hold and the model does not need (the head of a tied model, where it is a copy of
            the embedding: see :func:`holds_own_head`).
        cuts: what ``model`` holds of tensors that are split over ranks; no more of them is read.
        progress: called with (tensors done, tensors in all).

    Raises:
        CheckpointError: one error that lists every missing, unexpected, mis-shaped or quantised tensor, or the files
            that cannot be read, behind which no tensor is missed. The model is not touched then.
    """
    layers = quantised(model)
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
                if name in ignore or name.endswith(_DERIVED) or held_elsewhere(name, cuts):
                    continue
                if name in where:
                    problems.append(f"{name}: stored twice, in {where[name][2]} and {path.name}")
                where[name] = (file, stored, path.name)
        damaged = bool(problems)
        wanted, spare = _wanted(model, layers, cuts, where)
        problems += [one for one in _compare(wanted, spare, where) if not (damaged and one.endswith(_MISSING))]
        if problems:
            raise CheckpointError(_listing(folder, problems))
        plain = _plain(model, layers)
        count = len(plain) + len(layers)
        for done, (name, parameter) in enumerate(plain.items(), 1):
            if _holds(where, name):
                # Device first, then dtype: a conversion runs where it is fast and the host never holds a second copy.
                found[name] = _read(where, name, cuts.get(name)).to(device).to(dtype)
            else:  # experts, each of which lies apart in the files
                found[name] = torch.empty_like(parameter, device=device, dtype=dtype, requires_grad=False)
                for part, view in expert_parts(name, found[name], _first(cuts.get(name))):
                    view.copy_(_read(where, part, None))
            if progress is not None:
                progress(done, count)
        last = {prefix.rpartition(".experts.")[0]: prefix for prefix in layers}
        for done, prefix in enumerate(list(layers), len(plain) + 1):
            layer = layers.pop(prefix)  # which nobody holds then but the model
            suffixes = (*_stored(layer, cuts.get(f"{prefix}.weight")), *layer.how.may_be_stored)
            held = [one for one in suffixes if _holds(where, f"{prefix}.{one}")]
            parts_of = stored_slices(layer.how, cuts.get(f"{prefix}.weight"))
            tensors = {one: _read(where, f"{prefix}.{one}", parts_of.get(one)) for one in held}
            try:
                tensors, layer.block, order = own_part(layer, cuts.get(f"{prefix}.weight"), tensors)
                parts = from_stored(layer, {one: tensor.to(device) for one, tensor in tensors.items()}, order)
            except CheckpointError as error:
                raise CheckpointError(f"{folder}: {prefix}.{error}") from None
            for one, tensor in parts.items():
                layer.set(one, tensor)
                if tensor is not None:
                    found[f"{prefix}.{one}"] = tensor
            mlp = prefix.rpartition(".experts.")[0]
            if mlp and prefix == last[mlp] and (together := put_together(model.get_submodule(mlp))) is not None:
                within = f"{mlp}.experts."
                found = {name: tensor for name, tensor in found.items() if not name.startswith(within)}
                found |= {f"{within}{name}": one.detach() for name, one in together.named_parameters()}
            if progress is not None:
                progress(done, count)
    model.load_state_dict(found, strict=True, assign=True)  # keeps each parameter's requires_grad


def _holds(where: Mapping[str, tuple], name: str) -> bool:
    """Whether files hold a tensor of this name, or an expert's in a stack."""
    return name in where or ((part := part_of(name)) is not None and part.stack in where)


def _read(where: Mapping[str, tuple], name: str, cut: Slice | None) -> torch.Tensor:
    """A tensor, or what a rank holds of it, contiguous."""
    if name not in where and (part := part_of(name)) is not None:
        file, stored, _ = where[part.stack]
        return read_part(file, stored, part)
    file, stored, _ = where[name]
    if cut is None:
        return file.get_tensor(stored)
    view, rows = file.get_slice(stored), slice(cut.begin, cut.end)
    return (view[rows] if cut.dim == 0 else view[:, rows]).contiguous()


_Fits = dict[str, tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]]


def _stored(layer: QuantLinear, cut: Slice | None) -> _Fits:
    return layer.how.stored(*_whole((layer.out_features, layer.in_features), cut))


def _whole(shape: Sequence[int], cut: Slice | None) -> tuple[int, ...]:
    """The shape in a file of what the model holds in ``shape``."""
    return tuple(cut.whole if cut is not None and dim == cut.dim else size for dim, size in enumerate(shape))


def _first(cut: Slice | None) -> int:
    return 0 if cut is None else cut.begin


def _plain(model: nn.Module, layers: Mapping[str, QuantLinear]) -> dict[str, nn.Parameter]:
    """The parameters of ``model`` that are not quantised."""
    named = model.named_parameters()
    return {name: one for name, one in named if name.rpartition(".")[0] not in layers or name.endswith(".bias")}


def _wanted(
    model: nn.Module, layers: Mapping[str, QuantLinear], cuts: Mapping[str, Slice], where: Collection[str]
) -> tuple[_Fits, _Fits]:
    """The shapes and dtypes of every tensor that files must hold, and of those that they may; ``where``: what they
    hold. Experts may lie there as they do in the model, too: transformers 5 can save them so."""
    floats = ("F64", "F32", "F16", "BF16")
    wanted: _Fits = {
        part: ((_whole(view.shape, cuts.get(part)),), floats)
        for name, one in _plain(model, layers).items()
        for part, view in ([(name, one)] if name in where else expert_parts(name, one.detach(), _first(cuts.get(name))))
    }
    spare: _Fits = {}
    for prefix, layer in layers.items():
        cut = cuts.get(f"{prefix}.weight")
        wanted |= {f"{prefix}.{suffix}": fits for suffix, fits in _stored(layer, cut).items()}
        spare |= {f"{prefix}.{suffix}": fits for suffix, fits in layer.how.may_be_stored.items()}
        if layer.bias is None:  # GPTQ's writers give every layer one, of zeros
            spare[f"{prefix}.bias"] = ((_whole((layer.out_features,), cut),), floats)
    return in_files(wanted, where, cuts), spare


def _compare(wanted: _Fits, spare: _Fits, where: dict[str, tuple]) -> list[str]:
    known = wanted | spare
    packed = [name for name in where if name not in known and name.endswith(_QUANTISED)]
    if packed:
        more = f" and {len(packed) - 1} more" if len(packed) > 1 else ""
        return [f"quantised weights that config.json's quantization_config does not tell of ({packed[0]}{more})"]
    problems = [f"{name}{_MISSING}" for name in wanted if name not in where]
    for name, (file, stored, _) in where.items():
        if name not in known:
            problems.append(f"{name}: unexpected")
            continue
        view, (shapes, dtypes) = file.get_slice(stored), known[name]
        shape, dtype = tuple(view.get_shape()), view.get_dtype()
        if shape not in shapes:
            problems.append(f"{name}: shape {shape}, the config wants {' or '.join(map(str, shapes))}")
        elif dtype not in dtypes:
            kind = "no float type" if "F64" in dtypes else f"not {' or '.join(dtypes)}"
            problems.append(f"{name}: dtype {dtype} is {kind}")
        elif name in spare and name.endswith(".bias") and file.get_tensor(stored).any():
            problems.append(f"{name}: unexpected, and not zero")
    return problems


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The model's parameters as files hold them: under their own names, experts one by one, quantised ones in their
    format's layout."""
    written: set[nn.Parameter] = set()  # those of modules that lie together, and tied ones
    for path, module in model.named_modules():
        if isinstance(module, QuantisedTogether):
            written.update(module.parameters())
            layers = {f"{path}.{name}": one for name, one in module.layers().items()}
        else:
            layers = {path: module} if isinstance(module, QuantLinear) else {}
        for name, one in layers.items():
            yield from ((f"{name}.{suffix}", tensor) for suffix, tensor in to_stored(one))
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter not in written and (path not in layers or name.endswith(".bias")):
                written.add(parameter)
                yield from expert_parts(name, parameter.detach())


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
    groups = list(_shard(stored_tensors(model), max_shard_bytes))
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
            with scratch(*(folder / name for name in names)):
                for name, group in zip(names, groups, strict=True):
                    write_whole(folder / name, lambda path, group=group: save_file(group, path, metadata=header))
            before()
            total = sum(tensor.nbytes for group in groups for tensor in group.values())
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


def _shard(tensors: Iterable[tuple[str, torch.Tensor]], most: int) -> Iterator[dict[str, torch.Tensor]]:
    group: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in tensors:
        bytes_ = tensor.numel() * tensor.element_size()
        if group and size + bytes_ > most:
            yield group
            group, size = {}, 0
        group[name] = tensor.contiguous()
        size += bytes_
    yield group
