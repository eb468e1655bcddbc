"""``python -m tests.stacks.transformers_signatures FOLDER``: the parameters of what is replaced, by version of transformers.

FOLDER has a folder for each version, made by ``pip install --no-deps --target FOLDER/VERSION transformers==VERSION``.
Nothing is imported of it. Writes ``tests/integrations/transformers_signatures.json``, which a test compares to the table
of places: each list of parameters that a place of it ever had, and the versions that have it.
"""

from __future__ import annotations

import ast
import json
import sys
from functools import cache
from pathlib import Path

from qwen2vl_kernels.integrations.transformers_targets import Place, places

RESULT = Path(__file__).resolve().parent.parent / "integrations" / "transformers_signatures.json"


def key(place: Place) -> str:
    return f"{place.module}:{place.cls}.{place.name}".replace(":.", ":")


@cache
def _tree(path: Path) -> ast.Module | None:
    return ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else None


def parameters(package: Path, place: Place) -> list[str] | None:
    """As ``inspect.signature`` names them; ``None`` where there is no such function of the class itself."""
    tree = _tree(package / "models" / f"{place.module.replace('.', '/')}.py")
    body = [] if tree is None else tree.body
    if place.cls:
        body = next((node.body for node in body if isinstance(node, ast.ClassDef) and node.name == place.cls), [])
    function = next((node for node in body if isinstance(node, ast.FunctionDef) and node.name == place.name), None)
    if function is None:
        return None
    a = function.args
    found = [*a.posonlyargs, *a.args, *filter(None, [a.vararg]), *a.kwonlyargs, *filter(None, [a.kwarg])]
    return [argument.arg for argument in found]


def numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def main(folder: Path) -> None:
    versions = sorted((path.name for path in folder.iterdir() if (path / "transformers").is_dir()), key=numbers)
    found: dict[str, dict[str, list[str]]] = {}
    for version in versions:
        for place in places(version):
            have = parameters(folder / version / "transformers", place)
            found.setdefault(key(place), {}).setdefault("absent" if have is None else " ".join(have), []).append(
                version
            )
    result = {
        "versions": versions,
        "places": {place: {names: " ".join(have) for names, have in lists.items()} for place, lists in found.items()},
    }
    RESULT.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{len(versions)} versions, {len(found)} places, {sum(map(len, found.values()))} lists of parameters")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
