"""What a wheel holds, asked of setuptools without building one; ``make dist`` asks the same of a built one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.distribution import ROOT, sources, wrong_files

# The command that copies modules and data files into a wheel says which they would be.
_LIST = """
import json, sys
from pathlib import Path
from setuptools.dist import Distribution

distribution = Distribution({"script_name": "setup.py"})
distribution.parse_config_files()
command = distribution.get_command_obj("build_py")
command.ensure_finalized()
command.set_undefined_options("build", ("build_lib", "build_lib"))
outputs = command.get_outputs(include_bytecode=False)
print(json.dumps([str(Path(name).relative_to(command.build_lib)) for name in outputs]))
"""


@pytest.fixture(scope="module")
def names():
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", _LIST], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_a_wheel_holds_both_packages_whole_and_nothing_else(names):
    assert wrong_files(names) == []
    assert {name.partition("/")[0] for name in names} == {"qwen2vl", "qwen2vl_kernels"}
    wanted = {"qwen2vl/py.typed", "qwen2vl_kernels/py.typed", "qwen2vl/samples/screen_game.py"}
    assert wanted | {"qwen2vl/assets/small/model.safetensors", "qwen2vl/assets/small/tokenizer.json"} <= set(names)
    assert not [name for name in names if name.startswith(("examples", "benchmarks", "tests", "hub"))]


def test_wrong_files_are_named():
    whole = sources()
    assert wrong_files({*whole, "qwen2vl_kernels/_cpu.so", "qwen2vl-1.dist-info/METADATA"}) == []
    assert wrong_files({*whole, "examples/demo/steps.py"}) == ["holds examples/demo/steps.py"]
    assert wrong_files(whole - {"qwen2vl/py.typed"}) == ["lacks qwen2vl/py.typed"]
