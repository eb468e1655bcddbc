"""The import rules: which room may import which, and optional stacks only inside functions."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS, MODEL = ROOT / "qwen2vl_kernels", ROOT / "qwen2vl"
#: Needed at import time by nothing: each is imported where it is used.
OPTIONAL = {
    "transformers",
    "vllm",
    "sglang",
    "flash_attn",
    "liger_kernel",
    "lmms_eval",
    "peft",
    "pillow_heif",
    "spacy",
    "tensorboard",
    "av",
    "matplotlib",
    "torchvision",
    "triton",
    "starlette",
    "uvicorn",
}


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Absolute names of the modules that a file imports, those under ``TYPE_CHECKING`` left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = _module(path).split(".") if path.name == "__init__.py" else _module(path).split(".")[:-1]
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if top_level_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{stem}.{alias.name}"
                is_module = (ROOT / Path(*full.split("."))).with_suffix(".py").exists() or (
                    ROOT / Path(*full.split("."))
                ).is_dir()
                names.add(full if is_module else stem)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return names


def _files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


#: Whoever is named first may import those behind it, never the other way.
ROOMS = ("integrations", "ops", "triton", "core")


def test_kernels_never_import_the_model():
    for path in _files(KERNELS):
        wrong = {n for n in _imports(path) if n.split(".")[0] in ("qwen2vl", "examples", "benchmarks", "tests")}
        assert not wrong, f"{_module(path)} imports {wrong}"


def test_benchmarks_never_import_the_examples():
    for path in _files(ROOT / "benchmarks"):
        wrong = {name for name in _imports(path) if name.split(".")[0] in ("examples", "tests")}
        assert not wrong, f"{_module(path)} imports {wrong}"


def test_the_model_never_imports_what_is_not_installed():
    for path in _files(MODEL):
        wrong = {name for name in _imports(path) if name.split(".")[0] in ("examples", "benchmarks", "tests")}
        assert not wrong, f"{_module(path)} imports {wrong}"


@pytest.mark.parametrize("room", ROOMS)
def test_the_rooms_of_the_kernels_import_one_way(room):
    allowed = ROOMS[ROOMS.index(room) :]
    paths = _files(KERNELS / room)
    assert len(paths) > 3
    for path in paths:
        ours = {name for name in _imports(path) if name.startswith("qwen2vl_kernels.")}
        wrong = {name for name in ours if name.split(".")[1] not in allowed}
        assert not wrong, f"{_module(path)} imports {wrong}"


def test_no_op_imports_another():
    for path in _files(KERNELS / "ops"):
        wrong = {name for name in _imports(path) if name.startswith("qwen2vl_kernels.ops.")}
        assert not wrong, f"{_module(path)} imports {wrong}"
    assert not (KERNELS / "ops" / "__init__.py").read_text(), "an empty __init__: functions must not shadow modules"


def test_one_file_names_the_namespace_of_the_ops():
    """A build for the kernels hub replaces this file and nothing else."""
    found = set()
    for path in [path for room in ("ops", "triton", "core") for path in _files(KERNELS / room)]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            whole = ast.unparse(node) if isinstance(node, ast.Attribute) else getattr(node, "value", None)
            if isinstance(whole, str) and (whole in ("qwen2vl", "torch.ops.qwen2vl") or whole.startswith("qwen2vl::")):
                found.add(_module(path))
    assert found == {"qwen2vl_kernels.core.namespace"}


@pytest.mark.parametrize("folder", [KERNELS, MODEL], ids=lambda p: p.name)
def test_optional_packages_are_imported_inside_functions(folder):
    for path in _files(folder):
        allowed = {"triton"} if path.name == "launching.py" else set()  # the one guarded import
        found = {name.split(".")[0] for name in _imports(path, top_level_only=True)}
        wrong = (found & OPTIONAL) - allowed
        assert not wrong, f"{_module(path)} imports {wrong} at import time"


def _cycle(graph: dict[str, set[str]]) -> tuple[str, ...]:
    """Modules that import one another, the first one named again at the end; () where there are none."""
    done: set[str] = set()

    def walk(module: str, trail: tuple[str, ...]) -> tuple[str, ...]:
        if module in trail:
            return (*trail[trail.index(module) :], module)
        if module in done or module not in graph:
            return ()
        for other in sorted(graph[module]):
            if found := walk(other, (*trail, module)):
                return found
        done.add(module)
        return ()

    return next(filter(None, (walk(module, ()) for module in sorted(graph))), ())


def test_cycles_are_found():
    assert _cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ("b", "c", "b")
    assert _cycle({"a": {"b", "c"}, "b": {"c"}, "c": {"torch"}}) == ()


def test_no_import_cycles():
    graph = {
        _module(p): {n for n in _imports(p, top_level_only=True) if n.startswith(("qwen2vl", "qwen2vl_kernels"))}
        for folder in (KERNELS, MODEL)
        for p in _files(folder)
        if p.name != "__init__.py"
    }
    assert len(graph) > 100 and not _cycle(graph)


def test_no_import_cycles_in_benchmarks_and_examples():
    """Here imports inside of functions count, too: nothing of these is loaded late for a reason."""
    files = [p for folder in ("benchmarks", "examples") for p in _files(ROOT / folder) if p.name != "__init__.py"]
    graph = {_module(p): {n for n in _imports(p) if n.startswith(("benchmarks", "examples"))} for p in files}
    assert len(graph) > 60 and not _cycle(graph)


def test_importing_the_packages_has_no_side_effects():
    """No optional stack, no CUDA context, no output."""
    code = (
        "import sys, qwen2vl, qwen2vl_kernels, torch\n"
        f"loaded = {sorted(OPTIONAL - {'triton'})!r}\n"
        "assert not [m for m in loaded if m in sys.modules], [m for m in loaded if m in sys.modules]\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def test_the_model_is_imported_without_what_reads_media():
    """It has the constants of normalisation in its configuration, and neither decodes nor downloads anything."""
    code = (
        "import sys, torch\n"
        "sys.modules['urllib.request'] = None\n"  # PyTorch imports it, the model must not
        "import qwen2vl.model\n"
        "rooms = ('PIL', 'qwen2vl.media', 'qwen2vl.prompt')\n"
        "wrong = [m for m in sys.modules if m in rooms or m.startswith(tuple(f'{room}.' for room in rooms))]\n"
        "assert not wrong, wrong\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["qwen2vl.training.trainer", "qwen2vl.evaluation.metrics", "qwen2vl.cli"])
def test_generated_samples_load_only_when_they_are_asked_for(module):
    code = (
        f"import sys, {module}\n"
        "assert not (loaded := [name for name in sys.modules if name.startswith('qwen2vl.samples')]), loaded\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_only_functions_import_generated_samples():
    """A file outside of their room that imported them at its top would load them for everybody who imports it."""
    for path in _files(MODEL):
        if (MODEL / "samples") not in path.parents:
            wrong = {n for n in _imports(path, top_level_only=True) if n.startswith("qwen2vl.samples")}
            assert not wrong, f"{_module(path)} imports {wrong} at import time"


def test_packages_work_without_triton():
    """Every op imports, and a Triton backend says what is missing."""
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "import torch, qwen2vl, qwen2vl_kernels as K\n"
        "x, w = torch.ones(2, 8), torch.ones(8)\n"
        "K.rms_norm(x, w)\n"
        "try: K.rms_norm(x, w, backend='triton')\n"
        "except K.BackendError as error: assert 'Triton cannot be imported' in str(error), error\n"
        "else: raise AssertionError\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_exports_are_explicit_and_complete():
    import qwen2vl
    import qwen2vl_kernels

    for package in (qwen2vl, qwen2vl_kernels):
        for name in package.__all__:
            assert getattr(package, name).__doc__, f"{package.__name__}.{name} has no docstring"


def test_lazy_names_are_listed_alike_everywhere():
    """For type checkers, for ``import *``, for the lookup, and for whoever asks ``dir``."""
    import qwen2vl
    import qwen2vl.errors
    import qwen2vl_kernels

    tree = ast.parse((MODEL / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    checked = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert checked == set(qwen2vl.__all__) == set(qwen2vl._MODULE_OF)
    assert list(qwen2vl.__all__) == sorted(qwen2vl.__all__) and len(checked) == len(qwen2vl.__all__)
    errors = {name for name, value in vars(qwen2vl.errors).items() if isinstance(value, type)}
    assert errors <= checked
    assert {*qwen2vl.__all__, "__version__"} <= set(dir(qwen2vl))
    assert {*qwen2vl_kernels.__all__, "__version__"} <= set(dir(qwen2vl_kernels))
    for package in (qwen2vl, qwen2vl_kernels):
        with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'nothing'"):
            _ = package.nothing


def test_the_version_is_that_of_pyproject(monkeypatch):
    """Also where a checkout lies beside an installation of another version."""
    import importlib.metadata

    import qwen2vl
    import qwen2vl_kernels

    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9.9")
    assert qwen2vl.__version__ == qwen2vl_kernels.__version__ == wanted


def test_without_a_checkout_the_version_is_that_of_the_installation(monkeypatch, tmp_path):
    import importlib.metadata

    import qwen2vl
    import qwen2vl_kernels

    monkeypatch.setattr(importlib.metadata, "version", lambda name: {"qwen2vl": "9.9.9"}[name])
    monkeypatch.setattr(qwen2vl_kernels, "__file__", str(tmp_path / "qwen2vl_kernels" / "__init__.py"))
    assert qwen2vl.__version__ == "9.9.9"
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\nversion = "1.0"\n')
    assert qwen2vl_kernels.__version__ == "9.9.9"


def test_exports_are_no_modules_once_every_submodule_is_imported():
    """Importing a submodule sets its name on the package: one named like an export would take the export's place."""
    modules = [_module(path) for folder in (MODEL, KERNELS) for path in _files(folder) if path.stem != "__main__"]
    code = (
        "import importlib, qwen2vl, qwen2vl_kernels\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "for package in (qwen2vl, qwen2vl_kernels):\n"
        "    for name in package.__all__:\n"
        "        thing = getattr(package, name)\n"
        "        assert callable(thing), f'{package.__name__}.{name} is {thing!r}'\n"
        "        print(package.__name__, name)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "qwen2vl generate\n" in result.stdout and "qwen2vl_kernels mrope\n" in result.stdout


def test_files_can_be_read_whole():
    for folder in (KERNELS, MODEL, ROOT / "benchmarks", ROOT / "examples", ROOT / "csrc"):
        for path in folder.rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                lines = len(path.read_text(encoding="utf-8").splitlines())
                assert lines <= 450, f"{path.relative_to(ROOT)} has {lines} lines"


def test_adapters_are_thin():
    for path in _files(KERNELS / "integrations"):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines < 150, f"{path.relative_to(ROOT)} has {lines} lines; the work belongs into an op"


def test_csrc_knows_no_torch():
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file():
            assert "torch/" not in path.read_text(encoding="utf-8"), path


def test_lint_formats_every_file_of_c():
    """Those that no install builds, too."""
    plan = subprocess.run(["make", "-n", "lint"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (line,) = (line for line in plan.splitlines() if "clang-format" in line)
    suffixes = (".cpp", ".cu", ".cuh", ".h")
    files = {path.relative_to(ROOT) for top in ("csrc", "tests", "benchmarks") for path in (ROOT / top).rglob("*")}
    wanted = {str(path) for path in files if path.suffix in suffixes}
    assert len(wanted) > 20 and wanted <= set(line.split())
