"""What a wheel holds, asked of setuptools without building one; ``make dist`` asks the same of a built one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib

import pytest

from qwen2vl.errors import install_hint
from tests.distribution import AT_START, PTH, ROOT, sources, wrong_files

# The commands that bring files into a wheel say which they would be; what compiles is left out.
_LIST = """
import json, sys
from pathlib import Path
from setuptools import Distribution
from distutils.core import run_setup

distribution = run_setup("setup.py", stop_after="config")
build = distribution.get_command_obj("build")
build.ensure_finalized()
outputs = []
for name in build.get_sub_commands():
    command = distribution.get_command_obj(name)
    command.ensure_finalized()
    if name != "build_ext":
        outputs += command.get_outputs(**({"include_bytecode": False} if name == "build_py" else {}))
print(json.dumps([str(Path(name).relative_to(build.build_lib)) for name in outputs]))
"""

# Runs the command that writes the line for starts, for a wheel and for an editable one, into these folders.
_WRITE = """
import sys
from setuptools import Distribution
from distutils.core import run_setup

for editable, folder in enumerate(sys.argv[1:3]):
    distribution = run_setup("setup.py", stop_after="config")
    distribution.get_command_obj("build").build_lib = sys.argv[1]
    distribution.get_command_obj("install").install_lib = sys.argv[2]
    command = distribution.get_command_obj("build_pth")
    command.editable_mode = bool(editable)
    command.ensure_finalized()
    command.run()
"""


@pytest.fixture(scope="module")
def names():
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", _LIST], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_a_wheel_holds_both_packages_whole_and_nothing_else(names):
    assert wrong_files(names) == []
    assert {name.partition("/")[0] for name in names} == {"qwen2vl", "qwen2vl_kernels", *AT_START}
    wanted = {"qwen2vl/py.typed", "qwen2vl_kernels/py.typed", "qwen2vl/samples/screen_game.py"}
    assert wanted | {"qwen2vl/assets/small/model.safetensors", "qwen2vl/assets/small/tokenizer.json"} <= set(names)
    assert not [name for name in names if name.startswith(("examples", "benchmarks", "tests", "hub"))]


def test_wrong_files_are_named():
    whole = sources()
    assert wrong_files({*whole, "qwen2vl_kernels/_cpu.so", "qwen2vl-1.dist-info/METADATA"}) == []
    assert wrong_files({*whole, "examples/demo/steps.py"}) == ["holds examples/demo/steps.py"]
    assert wrong_files(whole - {"qwen2vl/py.typed"}) == ["lacks qwen2vl/py.typed"]


def test_a_start_loads_the_switch_only_where_it_is_asked_for(tmp_path):
    """As it is in site-packages: also from an editable installation, in whose wheel the line stands by itself."""
    folders = [tmp_path / name for name in ("wheel", "editable")]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _WRITE, *map(str, folders)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    for folder in folders:
        assert [path.name for path in folder.iterdir()] == [PTH]
        assert len((folder / PTH).read_text().splitlines()) == 1
    (folders[0] / "_qwen2vl_kernels_switch.py").symlink_to(ROOT / "_qwen2vl_kernels_switch.py")
    code = (
        "import sys, site\n"
        f"sys.path = [path for path in sys.path if path not in ('', {str(ROOT)!r})]\n"
        "before = set(sys.modules)\n"
        f"site.addsitedir({str(folders[0])!r})\n"
        "loaded = set(sys.modules) - before\n"
        "watched = [type(finder).__module__ for finder in sys.meta_path].count('_qwen2vl_kernels_switch')\n"
        "heavy = sorted({'torch', 'transformers', 'qwen2vl_kernels'} & loaded)\n"
        "print('_qwen2vl_kernels_switch' in loaded, watched, heavy, bool(loaded))"
    )
    for variables, expected in (
        ({}, "False 0 [] False"),
        ({"QWEN2VL_KERNELS": ""}, "False 0 [] False"),
        ({"QWEN2VL_KERNELS": "transformers"}, "True 1 [] True"),
        ({"QWEN2VL_KERNELS": "transformers", "QWEN2VL_KERNELS_DISABLE": "1"}, "True 0 [] True"),
    ):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("QWEN2VL_KERNELS")}
        # Without -S the environment that runs this would have its own line in site-packages.
        command = [sys.executable, "-S", "-c", code]
        run = subprocess.run(command, env=kept | variables, capture_output=True, text=True)
        assert (run.stdout.strip(), run.stderr) == (expected, ""), variables


def test_hints_of_what_to_install_work_as_printed():
    """They name packages of an index, within our bounds; ``qwen2vl[video]`` is on none."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    texts = [path.read_text() for folder in ("qwen2vl", "examples") for path in (ROOT / folder).rglob("*.py")]
    asked = {name for text in texts for name in re.findall(r"install_hint\(['\"](\w+)['\"]\)", text)}
    assert asked == {"av", "matplotlib", "peft", "starlette", "transformers", "uvicorn"}
    names = ("video", "train", "inspect", "web", "bench")
    bounds = {re.split(r"\W", one)[0]: one for name in names for one in extras[name]}
    for name in (*asked, "tensorboard"):
        assert install_hint(name) == f'pip install "{bounds[name]}"'
    assert install_hint("torchvision") == 'pip install "torchvision"'
    assert not any(re.search(r"install \W*qwen2vl\[", text) for text in texts)
