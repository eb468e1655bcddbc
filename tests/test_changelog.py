"""The migration note: what it sends people to is there, and what it says is gone is gone."""

from __future__ import annotations

import re
from pathlib import Path
from pkgutil import resolve_name

ROOT = Path(__file__).resolve().parent.parent
_MODULE = re.compile(r"(?:qwen2vl|qwen2vl_kernels|examples|benchmarks|)(?:\.\w+)+")


def paths(cell: str) -> list[str]:
    """The dotted names in a cell; one that begins with a point continues the parent of the full one before it."""
    found: list[str] = []
    parent = ""
    for code in re.findall(r"`([^`]+)`", cell):
        name = code.removeprefix("python -m ")
        if _MODULE.fullmatch(name):
            found.append(f"{parent}{name}" if name.startswith(".") else name)
            if not name.startswith("."):
                parent = name.rpartition(".")[0]
    return found


def exists(name: str) -> bool:
    """Whether it is a module, or a thing in one."""
    try:
        resolve_name(name)
        return True
    except (ImportError, AttributeError):
        return False


def test_shorthand_is_read():
    assert paths("`qwen2vl.a.b`, `.c`, and `D` in `qwen2vl.e`") == ["qwen2vl.a.b", "qwen2vl.a.c", "qwen2vl.e"]
    assert (
        exists("qwen2vl.assets.FOLDER") and not exists("qwen2vl.small.FOLDER") and not exists("qwen2vl.assets.NOTHING")
    )


def test_old_paths_are_gone_and_new_ones_are_there():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    old, new = ({name for row in rows for name in paths(row[side])} for side in (0, 1))
    assert len(old) >= 50 and len(new) >= 50
    assert not [name for name in sorted(new) if not exists(name)]
    assert [name for name in sorted(old) if exists(name)] == ["qwen2vl.prompt"], "a room has taken that name"
