"""``python hub/assemble.py FOLDER``: the project that ``kernel-builder`` builds and uploads to the kernels hub.

FOLDER gets what lies beside this file, and from ``qwen2vl_kernels`` the ops that it imports with the leaves that they
import. One thing is changed in these: a kernel may be loaded in several versions at once, so that ops are registered
under the name that ``kernel-builder`` makes up for each build (module ``_ops``) instead of ``torch.ops.qwen2vl``.
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

    Raises ``FileExistsError`` where ``folder`` exists, ``ValueError`` where a source keeps the package's own namespace.
    """
    taken = _imported()
    shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns("assemble.py", "__pycache__"))
    for path in taken:
        target = folder / INSIDE / path
        target.parent.mkdir(exist_ok=True)
        target.write_text(_in_namespace_of_build(path), encoding="utf-8")
    shutil.copy(HERE.parent / "LICENSE", folder)
    return taken


def _imported() -> list[Path]:
    """Modules of the package that the files here import, and those that these import, in any of their functions."""
    waiting = [HERE / INSIDE / name for name in ("__init__.py", "layers.py")]
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
                if (SOURCE / module).exists() and module not in found:
                    found.add(module)
                    waiting.append(SOURCE / module)
    rooms = {path.parent for path in found if path.parent.name}
    return sorted([*found, *(room / "__init__.py" for room in rooms)])


def _in_namespace_of_build(path: Path) -> str:
    text, dots = (SOURCE / path).read_text(encoding="utf-8"), "." * len(path.parts)
    imports = []
    if "torch.ops.qwen2vl." in text:
        text = text.replace("torch.ops.qwen2vl.", "_build_ops.")
        imports.append(f"from {dots}_ops import ops as _build_ops")
    if "torch.library.Library(" in text:
        text = text.replace('Library("qwen2vl", ', 'Library(_prefixed("").removesuffix("::"), ')
        text = text.replace('f"qwen2vl::{_name(schema)}"', "_prefixed(_name(schema))")
        imports.append(f"from {dots}_ops import add_op_namespace_prefix as _prefixed")
    if imports:
        text = re.sub(r"^import torch$", "\n".join(["import torch", "", *imports]), text, count=1, flags=re.M)
    code = ast.unparse(_without_docstrings(ast.parse(text)))
    if re.search(r"torch\.ops\.qwen2vl\b|['\"]qwen2vl(::|['\"])", code):
        raise ValueError(f"assemble: {path} registers or calls ops of torch.ops.qwen2vl in a way unknown here")
    return text


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
