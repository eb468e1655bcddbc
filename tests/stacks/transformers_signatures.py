"""``python -m tests.stacks.transformers_signatures FOLDER...``: the parameters of what is replaced, by version.

Each FOLDER is called like a version of transformers and holds it (``pip install --target``); ``make signatures`` makes
them. Nothing is imported of them. Writes ``tests/integrations/transformers_signatures.json``, which a test compares to
the table of places: each list of parameters that a place of it ever had, and the versions that have it.
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


def main(folders: list[Path]) -> None:
    of = {folder.name: folder / "transformers" for folder in sorted(folders, key=lambda folder: numbers(folder.name))}
    found: dict[str, dict[str, list[str]]] = {}
    for version, package in of.items():
        for place in places(version):
            have = parameters(package, place)
            names = "absent" if have is None else " ".join(have)
            found.setdefault(key(place), {}).setdefault(names, []).append(version)
    lists = {place: {names: " ".join(where) for names, where in found[place].items()} for place in found}
    result = {"versions": list(of), "places": lists}
    RESULT.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    print(f"{len(of)} versions, {len(found)} places, {sum(map(len, found.values()))} lists of parameters")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main([Path(argument) for argument in sys.argv[1:]])
