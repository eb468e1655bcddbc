"""``python -m tests.stacks.transformers_own``: transformers' own tests of the three families, stock and switched on.

Those of the models are in its repository and in no distribution of it: where ``TRANSFORMERS_SRC`` names a checkout of
the version that is installed, they are run. Without it those that all its models share are, out of the source
distribution of that version, over models of our own (``transformers_common.py``); tests of generation are not among
them. What fails is compared by name, as some fail without a network or a GPU: whatever passes without these kernels
must pass with them. Both lists are written to ``build/transformers_own-*.json``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RESULT = ROOT / "build" / f"transformers_own-{version('transformers')}.json"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

#: What the shared tests of models import and the source distribution lacks. A version asks for some of them.
ABSENT = {
    "exporters/test_export.py": "class ExportTesterMixin: pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin: pass\n",
}


@dataclass(frozen=True)
class Suite:
    """What pytest is given, the folder that it runs in, and what Python finds beside this repository."""

    arguments: list[str]
    folder: Path
    path: Path | None = None


def checkout(source: Path) -> Suite:
    """Tests of one version say nothing about the code of another."""
    file = source / "src" / "transformers" / "__init__.py"
    if not file.is_file():
        raise SystemExit(f"TRANSFORMERS_SRC: {source} holds no {file.relative_to(source)}")
    found = re.search(r'^__version__ = "(.*)"', file.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None or found[1].removesuffix(".dev0") != version("transformers"):
        have = "no version" if found is None else found[1]
        raise SystemExit(f"TRANSFORMERS_SRC: must be a checkout of {version('transformers')}, {source} has {have}")
    folders = [f"tests/models/{family}" for family in FAMILIES if (source / "tests" / "models" / family).is_dir()]
    return Suite(folders, source)


def distribution(build: Path) -> Suite:
    """Fetches the source distribution of the version that is installed, and completes its tests into a package."""
    name = f"transformers-{version('transformers')}"
    archive, package = build / f"{name}.tar.gz", build / name / "transformers_tests"
    if not archive.is_file():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation"]
        command += ["--no-binary", "transformers", "--dest", str(build), name.replace("-", "==")]
        subprocess.run(command, check=True)
    shutil.rmtree(package.parent, ignore_errors=True)
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.name.startswith(f"{name}/tests/")]
        tar.extractall(build, members, filter="data")
    (build / name / "tests").rename(package)
    for file, text in ABSENT.items():
        (package / file).parent.mkdir(exist_ok=True)
        (package / file).write_text(text, encoding="utf-8")
    # Neither the options nor the fixtures of our own tests: these are another project's.
    arguments = ["-c", os.devnull, f"--rootdir={ROOT}", "--noconftest", "tests/stacks/transformers_common.py"]
    return Suite(arguments, ROOT, package.parent)


def outcomes(suite: Suite, switched: bool) -> dict[str, str]:
    """Whether each test passed, failed or was skipped, by name.

    What watches imports is a plugin of pytest here, so that every worker has it.
    """
    environment = os.environ | {"QWEN2VL_KERNELS": "transformers" if switched else "", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, filter(None, (ROOT, suite.path))))
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += ["-p", "_qwen2vl_kernels_switch", "-n", "auto", *suite.arguments]
        done = subprocess.run(command, cwd=suite.folder, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    if unread := [str(case.get("name")) for case in cases if not case.get("classname")]:
        raise SystemExit(
            f"{' '.join(command)}\npytest cannot collect " + ", ".join(unread) + f"\n{done.stdout[-3000:]}"
        )
    found = {}
    for case in cases:
        failed, skipped = ({child.tag for child in case} & tags for tags in ({"failure", "error"}, {"skipped"}))
        outcome = "failed" if failed else "skipped" if skipped else "passed"
        found[f"{case.get('classname')}::{case.get('name')}"] = outcome
    return found


def failures(found: dict[str, str]) -> list[str]:
    return sorted(name for name, outcome in found.items() if outcome == "failed")


def counts(found: dict[str, str]) -> str:
    counted = Counter(found.values())
    return f"{len(found)} tests, {counted['passed']} passed, {counted['failed']} failed, {counted['skipped']} skipped"


def main(suite: Suite) -> None:
    """Raises ``SystemExit`` where a test fails with these kernels alone."""
    stock, switched = outcomes(suite, False), outcomes(suite, True)
    RESULT.parent.mkdir(exist_ok=True)
    lists = {"version": version("transformers"), "tests": len(stock)}
    lists |= {"stock": failures(stock), "switched": failures(switched)}
    RESULT.write_text(json.dumps(lists, indent=1) + "\n", encoding="utf-8")
    print(f"transformers' own tests: stock {counts(stock)}; switched on {counts(switched)}")
    ours = {name for name in failures(switched) if stock.get(name) != "failed"}
    ours |= {name for name, outcome in stock.items() if outcome == "passed" and switched.get(name) != "passed"}
    if ours:
        raise SystemExit("with these kernels alone fail:\n" + "\n".join(sorted(ours)))


if __name__ == "__main__":
    source = os.environ.get("TRANSFORMERS_SRC")
    main(checkout(Path(source).resolve()) if source else distribution(ROOT / "build" / "transformers-own"))
