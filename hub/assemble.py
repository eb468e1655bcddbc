"""``python hub/assemble.py FOLDER``: the project that ``kernel-builder`` builds and uploads to the kernels hub.

FOLDER gets what lies beside this file, and from ``qwen2vl_kernels`` the modules of the ops that it imports, with all
that these import, byte for byte. One module comes from here instead of the package, ``core/namespace.py``: a process
may load several builds of a kernel at once, so that each build registers its ops under a name of its own, which
``kernel-builder`` makes up (module ``_ops``).
"""

from __future__ import annotations

import ast
import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "qwen2vl_kernels"
INSIDE = Path("torch-ext", "qwen2vl_kernels")


def assemble(folder: Path) -> list[Path]:
    """Write the project; returns the modules that were taken from the package, relative to it.

    Raises ``FileExistsError`` where ``folder`` exists, ``ValueError`` where a source names the package's own namespace.
    """
    taken = _imported()
    for path in taken:
        _check_namespace(path)
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns("assemble.py", "__pycache__"))
    for path in taken:
        target = folder / INSIDE / path
        target.parent.mkdir(exist_ok=True)
        shutil.copy(SOURCE / path, target)
    shutil.copy(HERE.parent / "LICENSE", folder)
    return taken


def _imported() -> list[Path]:
    """Modules of the package that the files here import, and those that these import, in any of their functions."""
    waiting = sorted((HERE / INSIDE).rglob("*.py"))
    found: set[Path] = set()
    while waiting:
        path = waiting.pop()
        base = path.parent.relative_to(HERE / INSIDE if HERE in path.parents else SOURCE)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            within = base.parents[node.level - 2] if node.level > 1 else base
            inside = [f"{node.module or ''}.{alias.name}".removeprefix(".") for alias in node.names]
            names = [node.module, *inside] if node.module else inside
            for name in names:
                module = within / f"{name.replace('.', '/')}.py"
                if (HERE / INSIDE / module).exists():
                    continue
                if (SOURCE / module).exists() and module not in found:
                    found.add(module)
                    waiting.append(SOURCE / module)
    rooms = {path.parent for path in found if path.parent.name}
    return sorted([*found, *(room / "__init__.py" for room in rooms)])


def _check_namespace(path: Path) -> None:
    """Refuse a module that registers or calls ops by the package's own namespace: a build would take another's ops."""
    code = ast.unparse(_without_docstrings(ast.parse((SOURCE / path).read_text(encoding="utf-8"))))
    if re.search(r"torch\.ops\.qwen2vl\b|['\"]qwen2vl(::|['\"])", code):
        raise ValueError(f"assemble: {path} names the namespace qwen2vl, which only core/namespace.py may")


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0].value.value = ""
    return tree


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(*assemble(Path(sys.argv[1])), sep="\n")
