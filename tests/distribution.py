"""``python -m tests.distribution FOLDER``: what ``make dist`` holds the sdist and the wheel in FOLDER to.

The files of the wheel are those that they should be, its metadata are valid, and in an environment that has nothing of
this checkout, the embedded model answers a question about a generated picture. Prints both sizes.

The environment is new but for PyTorch and the other dependencies, which it borrows from the interpreter that runs this:
they are gigabytes, and which versions pip finds for them is what ``make resolve`` shows.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Collection
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("qwen2vl", "qwen2vl_kernels")
PTH = "qwen2vl_kernels.pth"
AT_START = {PTH, "_qwen2vl_kernels_switch.py"}

# What runs in the new environment, far from the checkout. The picture is the first of those that no training saw.
_ASK = """
import importlib.util, itertools, subprocess, sys
from importlib.resources import files
from pathlib import Path
from PIL import Image
import qwen2vl, qwen2vl_kernels
from qwen2vl.samples import generate
from qwen2vl.samples.sample import from_ppm

home = Path(sys.prefix).resolve()
for package in (qwen2vl, qwen2vl_kernels):
    assert home in Path(package.__file__).resolve().parents, package.__file__
    assert package.__version__ == sys.argv[1], package.__version__
    assert files(package).joinpath("py.typed").is_file()
for name in ("examples", "benchmarks", "tests"):
    assert importlib.util.find_spec(name) is None, f"{name} was installed"
samples = (generate("colour_shape", 0, index=index, split="held-out") for index in itertools.count())
sample = next(sample for sample in samples if sample.language == "en")
asked = sample.record["messages"][0]["content"].removeprefix("<image>")
Image.fromarray(from_ppm(sample.members["0.ppm"])).save("picture.png")
command = [str(home / "bin" / "qwen2vl"), "generate", "--image", "picture.png", "--prompt", asked, "--device", "cpu"]
done = subprocess.run(command, capture_output=True, text=True)
print(f"asked {asked!r}, answered {done.stdout.strip()!r}, true is {sample.answer!r}")
assert done.stdout.strip().rstrip(".") == sample.answer, done.stderr
"""

# Which start loads what, and what becomes of transformers. A process that is spawned inherits the variable.
_STARTED = """
import multiprocessing, sys
watched = "_qwen2vl_kernels_switch" in sys.modules
heavy = {"torch", "transformers", "qwen2vl_kernels"} & sys.modules.keys()

def patched():
    from transformers import Qwen2VLModel
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLVisionBlock
    return hasattr(Qwen2VLVisionBlock.forward, "__qwen2vl_kernels__")

if __name__ == "__main__":
    assert not heavy, heavy
    assert watched == (sys.argv[1] != "off"), watched
    if sys.argv[1] == "on":
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            assert patched() and pool.apply(patched)
    elif len(sys.argv) > 2:
        assert not patched()
"""


def sources() -> set[str]:
    """The files of the two packages and what Python runs as it starts: paths in the wheel, which must hold them."""
    found = (path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file())
    unwanted = {".so", ".pyc"}  # made here, by another build
    return {str(path.relative_to(ROOT)) for path in found if path.suffix not in unwanted} | AT_START


def wrong_files(names: Collection[str]) -> list[str]:
    """What is wrong with the files of a wheel, compiled extensions and metadata left out; [] where nothing is."""
    files = {name for name in names if not name.endswith(".so") and ".dist-info/" not in name}
    problems = [f"holds {name}" for name in sorted(files - sources())]
    problems += [f"lacks {name}" for name in sorted(sources() - files)]
    return problems


def check_start(python: Path, library: Path, folder: Path, environment: dict[str, str]) -> None:
    """What is installed in ``library`` is loaded at the starts that ask for it, and goes with the package."""
    script = folder / "started.py"
    script.write_text(_STARTED, encoding="utf-8")
    on = {"QWEN2VL_KERNELS": "transformers:norm"}
    for expected, flags, variables in (
        (["off"], [], {}),
        (["off"], [], {"QWEN2VL_KERNELS": ""}),
        (["off"], ["-S"], on),  # the module "site" runs no files
        (["other", "stock"], [], on | {"QWEN2VL_KERNELS_DISABLE": "1"}),
        (["other", "stock"], [], {"QWEN2VL_KERNELS": "vllm"}),
        (["on"], [], on),
        (["on"], ["-I"], on),
    ):
        command = [python, *flags, script, *expected]
        subprocess.run(command, check=True, cwd=folder, env={**environment, **variables})
    subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", "qwen2vl"], check=True, env=environment)
    if left := [name for name in AT_START if (library / name).exists()]:
        raise SystemExit(f"an uninstall leaves {', '.join(left)}")
    done = subprocess.run([python, script, "off"], env=environment | on, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0 or done.stderr:
        raise SystemExit(f"after an uninstall Python does not start as before: {done.stderr}")
    print(f"{PTH}: loaded where {next(iter(on))} asks for it, gone with the package")


def main(folder: Path) -> None:
    """Check the one sdist and the one wheel in the folder; raises where something is wrong."""
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    if problems := wrong_files(names):
        raise SystemExit(f"{wheel.name}: " + "; ".join(problems))
    if not any(name.startswith("qwen2vl_kernels/_cpu.") for name in names):
        raise SystemExit(f"{wheel.name}: lacks the extension _cpu")
    with tempfile.TemporaryDirectory(prefix="qwen2vl-dist-") as temporary:
        home = Path(temporary).resolve() / "environment"
        venv.create(home, with_pip=True)
        python = home / "bin" / "python"
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel.resolve()]
        subprocess.run(install, check=True, env=environment)
        # A .pth file adds a folder and runs no .pth file in it, so that an editable install there stays without effect.
        library = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
        (library / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
        subprocess.run([python, "-c", _ASK, version], check=True, cwd=temporary, env=environment)
        check_start(python, library, Path(temporary), environment)
    for file in (sdist, wheel):
        print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
