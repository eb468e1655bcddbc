"""A set of samples to read, as a table of a configuration file describes it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from ...agents.actions import STYLES, Style
from ...errors import DataError
from ...media.options import OPTION_NAMES, finite_number, read_option

if TYPE_CHECKING:
    from ...samples.skills import Split

Format = Literal["conversations", "sharegpt", "webdataset", "generated"]
_GENERATED_KEYS = ("difficulty", "split", "languages", "samples")


@dataclass(frozen=True)
class DataEntry:
    """One set of samples.

    Attributes:
        path: file, glob pattern, range of shards ("shard-{0000..0099}.tar"), http(s) address of a shard where the
            processor may fetch, or a list of these. For generated samples it is a skill of `qwen2vl.samples.SKILLS`,
            or a list of them.
        format: "conversations", Qwen's JSON or JSONL of `conversations` with `from` and `value`; "sharegpt", JSON or
            JSONL of `messages` with `role` and `content`; "webdataset", tar files; "generated", samples made on the
            spot.
        weight: samples drawn from it in proportion to those from the other entries.
        media_root: folder that the paths of images and videos start from, and that they must lie in, by name; default
            the folder of the file. A processor with `roots` decides by those instead. Media of shards are in the
            shards.
        shuffle: read in another order each epoch, of samples or of shards and the samples inside each.
        max_sample_bytes: for shards: the most bytes of one sample's members, which are held at once.
        agent: "paper" or "qwen" where assistants' turns hold function calls in that form as text; "qwen" is the form
            that structured calls (`function_call`, `observation`, `tools`) are written in where this is not given.
        add_vision_id: number pictures and videos in the text.
        difficulty: for generated samples: one or several of `qwen2vl.samples.LEVELS`, drawn equally often, as the
            skills are.
        split: for generated samples: "train" or "held-out".
        languages: for generated samples: of the questions, some of `qwen2vl.samples.words.LANGUAGES`; None for all.
        samples: for generated samples: how many make an epoch. Each epoch has others; without it there is no end.
        options: how images and videos are preprocessed, under the names of `qwen2vl.media.options.MediaOptions`; in a
            table they stand beside the other keys.
    """

    path: str | tuple[str, ...]
    format: Format
    weight: float = 1.0
    media_root: str | None = None
    shuffle: bool = True
    max_sample_bytes: int = 2 << 30
    agent: Style | None = None
    add_vision_id: bool = False
    difficulty: tuple[int, ...] = (0,)
    split: Split = "train"
    languages: tuple[str, ...] | None = None
    samples: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    @classmethod
    def from_config(cls, table: Mapping[str, Any], where: str = "data") -> DataEntry:
        """From a table of a configuration file.

        Raises:
            DataError: naming an unknown or missing key, or a value of the wrong type or out of range.
        """
        if not isinstance(table, Mapping):
            raise DataError(f"{where}: wants a table, got {type(table).__name__}")
        names = [f.name for f in fields(cls) if f.name != "options"]
        if unknown := [key for key in table if key not in (*names, *OPTION_NAMES)]:
            raise DataError(f"{where}: unknown key {unknown[0]!r}; wants {', '.join((*names, *OPTION_NAMES))}")
        for key in ("path", "format"):
            if key not in table:
                raise DataError(f"{where}.{key}: is missing")
        format = _one_of(table["format"], get_args(Format), f"{where}.format")
        for key in ("media_root", "agent") if format == "generated" else _GENERATED_KEYS:
            if table.get(key) is not None:
                raise DataError(f"{where}.{key}: is not taken with format {format!r}")
        path = _read_paths(table["path"], f"{where}.path")
        generated = _generated_options(table, path, where) if format == "generated" else {}
        return cls(
            path=path,
            format=format,
            weight=_number(table.get("weight", 1.0), f"{where}.weight"),
            media_root=_path(table.get("media_root"), f"{where}.media_root"),
            shuffle=_flag(table.get("shuffle", True), f"{where}.shuffle"),
            max_sample_bytes=check_count(
                table.get("max_sample_bytes", cls.max_sample_bytes), f"{where}.max_sample_bytes"
            ),
            agent=None if table.get("agent") is None else _one_of(table["agent"], STYLES, f"{where}.agent"),
            add_vision_id=_flag(table.get("add_vision_id", False), f"{where}.add_vision_id"),
            **generated,
            options={
                key: _option(key, table[key], f"{where}.{key}") for key in OPTION_NAMES if table.get(key) is not None
            },
        )


def check_count(value: object, where: str, *, least: int = 1) -> int:
    """The value as a whole number not below `least`, else DataError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise DataError(f"{where}: wants an int of at least {least}, got {value!r}")
    return value


def _number(value: object, where: str) -> float:
    if (number := finite_number(value)) is None:
        raise DataError(f"{where}: wants a positive number, got {value!r}")
    return number


def _option(name: str, value: object, where: str) -> int | float:
    if (number := read_option(name, value)) is None:
        wanted = "a positive number" if name == "fps" else "an int of at least 1"
        raise DataError(f"{where}: wants {wanted}, got {value!r}")
    return number


def _flag(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise DataError(f"{where}: wants true or false, got {value!r}")
    return value


def _one_of(value: object, allowed: tuple[str, ...], where: str) -> Any:
    if not isinstance(value, str) or value not in allowed:
        raise DataError(f"{where}: wants one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def _generated_options(table: Mapping[str, Any], path: str | tuple[str, ...], where: str) -> dict[str, Any]:
    """The values of the keys that only generated samples have. Their `path` must name skills."""
    # Only who asks for generated samples loads them.
    from ...samples.skills import LEVELS, SKILLS, SPLITS, check_languages

    for name in (path,) if isinstance(path, str) else path:
        _one_of(name, tuple(SKILLS), f"{where}.path")
    if (languages := table.get("languages")) is not None:
        check_languages(languages, f"{where}.languages")
    return {
        "difficulty": _levels(table.get("difficulty", 0), LEVELS, f"{where}.difficulty"),
        "split": _one_of(table.get("split", "train"), SPLITS, f"{where}.split"),
        "languages": None if languages is None else tuple(languages),
        "samples": None if table.get("samples") is None else check_count(table["samples"], f"{where}.samples"),
    }


def _levels(value: object, allowed: tuple[int, ...], where: str) -> tuple[int, ...]:
    levels = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not levels or not all(isinstance(n, int) and not isinstance(n, bool) and n in allowed for n in levels):
        raise DataError(f"{where}: wants one or several of {', '.join(map(str, allowed))}, got {value!r}")
    return levels  # type: ignore[return-value]


def _path(value: object, where: str) -> str | None:
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise DataError(f"{where}: wants a path, got {value!r}")
    return None if value is None else os.fspath(value)  # type: ignore[arg-type]


def _read_paths(value: object, where: str) -> str | tuple[str, ...]:
    if isinstance(value, (list, tuple)):
        if not value:
            raise DataError(f"{where}: wants at least one path, got none")
        return tuple(str(_path(item, f"{where}[{n}]")) for n, item in enumerate(value))
    if value is None:
        raise DataError(f"{where}: wants a path, got None")
    return str(_path(value, where))
