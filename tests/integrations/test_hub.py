"""What ``hub/assemble.py`` writes, held to the rules of the kernels hub (kernel requirements, build.toml)."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LAYERS = ("RMSNorm", "LayerNorm", "QuickGELU", "SwiGLUMLP")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "project"
    result = subprocess.run([sys.executable, ROOT / "hub" / "assemble.py", folder], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


def _tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def test_build_toml(project):
    """Names and sections of edition 6; a kernel without compiled code is ``torch-noarch``."""
    lines = [line.strip() for line in (project / "build.toml").read_text().splitlines()]
    values = {key: ast.literal_eval(value) for key, found, value in (x.partition(" = ") for x in lines) if found}
    assert [line for line in lines if line.startswith("[")] == ["[general]", "[torch-noarch]"]
    assert set(values) == {"name", "version", "edition", "license", "backends"}
    assert re.fullmatch(r"[a-z][-a-z0-9]*[a-z0-9]", values["name"]) and values["version"] >= 0
    assert set(values["backends"]) <= {"cpu", "cuda", "rocm", "xpu", "metal"}
    assert (project / "torch-ext" / values["name"].replace("-", "_") / "__init__.py").is_file()
    assert (project / "LICENSE").is_file() and not (project / "assemble.py").exists()


def test_imports_are_relative_or_of_the_standard_library_and_torch(project):
    """Triton is part of PyTorch for the backends listed; what else is optional is not imported by a statement."""
    package = project / "torch-ext" / "qwen2vl_kernels"
    files = list(package.rglob("*.py"))
    assert len(files) > 15
    for path in files:
        for node in ast.walk(_tree(path)):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                assert node.level <= len(path.relative_to(package).parts), f"{path} imports from above the kernel"
                names = [] if node.level else [node.module]
            for name in names:
                assert name.split(".")[0] in {"torch", "triton", *sys.stdlib_module_names}, f"{path} imports {name}"


def test_layers_are_pure(project):
    classes = [n for n in _tree(project / "torch-ext/qwen2vl_kernels/layers.py").body if isinstance(n, ast.ClassDef)]
    assert tuple(c.name for c in classes) == LAYERS
    for cls in classes:
        assert [ast.unparse(base) for base in cls.bases] == ["nn.Module"]
        for node in cls.body[1:]:
            variable = isinstance(node, ast.Assign) and ast.unparse(node.targets[0])
            annotation = isinstance(node, ast.AnnAssign) and node.value is None
            method = isinstance(node, ast.FunctionDef) and node.name
            assert variable in ("has_backward", "can_torch_compile") or annotation or method == "forward", cls.name
    init = _tree(project / "torch-ext/qwen2vl_kernels/__init__.py")
    assert any(isinstance(n, ast.ImportFrom) and n.module is None and n.names[0].name == "layers" for n in init.body)


# What kernel-builder makes for each build, in our words.
_OPS = """
import torch
ops = torch.ops._qwen2vl_kernels_{unique}
def add_op_namespace_prefix(name): return "_qwen2vl_kernels_{unique}::" + name
"""

# Two builds and the installed package in one process; forwards are put into modules as kernelize does.
_CODE = """
import importlib.util, sys, types, torch, torch.nn.functional as F
from torch import nn
import qwen2vl_kernels
from transformers.activations import QuickGELUActivation
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2MLP, Qwen2VLRMSNorm

def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path + "/__init__.py", submodule_search_locations=[path])
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

kernels = [load(f"build_{n}", path) for n, path in enumerate(sys.argv[1:])]
torch.manual_seed(0)
config = types.SimpleNamespace(hidden_size=24, intermediate_size=40, hidden_act="silu")
stocks = {"RMSNorm": Qwen2VLRMSNorm(24, eps=1e-5), "LayerNorm": nn.LayerNorm(24, eps=1e-5),
          "QuickGELU": QuickGELUActivation(), "SwiGLUMLP": Qwen2MLP(config)}
for module in kernels:
    assert all(callable(getattr(module, name)) for name in module.__all__ if name != "layers")
    for name, stock in stocks.items():
        for parameter in stock.parameters():
            nn.init.normal_(parameter, std=0.5)
        x = torch.randn(7, 24, requires_grad=True)
        want = stock(x)
        want_dx, = torch.autograd.grad(want.square().sum(), x)
        forward = type(stock).forward
        layer = getattr(module.layers, name)
        stock.forward = types.MethodType(layer.forward, stock)
        for run in (stock, torch.compile(stock, backend="aot_eager", fullgraph=True)):
            got = run(x)
            dx, = torch.autograd.grad(got.square().sum(), x)
            torch.testing.assert_close(got, want)
            torch.testing.assert_close(dx, want_dx)
        del stock.forward
    name = module.__name__.removeprefix("build_")
    assert hasattr(getattr(torch.ops, f"_qwen2vl_kernels_{name}"), "norm_forward")
print("served by", kernels[0].layers.rms_norm.__module__, kernels[1].layers.rms_norm.__module__)
"""


def test_two_builds_beside_the_package_and_stock_layers(project, tmp_path):
    """Also under torch.compile without graph breaks, and with gradients, as layers say that they can."""
    paths = []
    for unique in ("0", "1"):
        path = tmp_path / unique
        subprocess.run(["cp", "-r", project / "torch-ext" / "qwen2vl_kernels", path], check=True)
        (path / "_ops.py").write_text(_OPS.format(unique=unique))
        paths.append(str(path))
    result = subprocess.run([sys.executable, "-c", _CODE, *paths], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "served by build_0.ops.rms_norm build_1.ops.rms_norm\n"


def test_sources_are_copied_byte_for_byte(project):
    """The namespace lies in one module, which the build brings itself, so that no source is rewritten."""
    package, own = project / "torch-ext" / "qwen2vl_kernels", ROOT / "hub" / "torch-ext" / "qwen2vl_kernels"
    brought = {path.relative_to(own) for path in own.rglob("*.py")}
    assert {str(path) for path in brought} == {"__init__.py", "layers.py", "core/namespace.py"}
    for path in package.rglob("*.py"):
        name = path.relative_to(package)
        source = own if name in brought else ROOT / "qwen2vl_kernels"
        assert path.read_bytes() == (source / name).read_bytes(), name


@pytest.mark.parametrize(
    "line",
    ['OPS = getattr(torch.ops, "qwen2vl")', "OPS = torch.ops.qwen2vl.norm_forward", 'NAME = "qwen2vl::norm_forward"'],
)
def test_a_namespace_written_elsewhere_is_refused(line, tmp_path):
    """A second place that names the namespace must not end up in the hub, where it would mean another build's ops."""
    copy = tmp_path / "repository"
    copy.mkdir()
    subprocess.run(["cp", "-r", ROOT / "hub", ROOT / "qwen2vl_kernels", ROOT / "LICENSE", copy], check=True)
    leaf = copy / "qwen2vl_kernels" / "triton" / "norm.py"
    leaf.write_text(f"{leaf.read_text()}\n{line}\n")
    command = [sys.executable, copy / "hub" / "assemble.py", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0 and "norm.py names the namespace qwen2vl" in result.stderr
    assert not (tmp_path / "out").exists()
