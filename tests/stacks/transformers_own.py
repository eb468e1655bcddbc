"""``python -m tests.stacks.transformers_own``: transformers' own tests of the three families, stock and switched on.

They are in its repository and in no distribution of it, so ``TRANSFORMERS_SRC`` names a checkout of the version that is
installed; without it nothing is run. What fails is compared by name, as some fail without a network or a GPU: whatever
fails with these kernels must fail without them. Both lists are written to ``build/transformers_own.json``.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RESULT = ROOT / "build" / "transformers_own.json"
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def check_version(source: Path) -> None:
    """Tests of one version say nothing about the code of another."""
    file = source / "src" / "transformers" / "__init__.py"
    if not file.is_file():
        raise SystemExit(f"TRANSFORMERS_SRC: {source} holds no {file.relative_to(source)}")
    found = re.search(r'^__version__ = "(.*)"', file.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None or found[1].removesuffix(".dev0") != version("transformers"):
        have = "no version" if found is None else found[1]
        raise SystemExit(f"TRANSFORMERS_SRC: must be a checkout of {version('transformers')}, {source} has {have}")


def failures(source: Path, switched: bool) -> tuple[list[str], int]:
    """Names of the tests that fail, and how many there are.

    What watches imports is a plugin of pytest here, so that every worker has it.
    """
    folders = [f"tests/models/{family}" for family in FAMILIES if (source / "tests" / "models" / family).is_dir()]
    environment = os.environ | {"QWEN2VL_KERNELS": "transformers" if switched else "", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "no:cacheprovider", f"--junitxml={report}"]
        command += ["-p", "_qwen2vl_kernels_switch", "-n", "auto", *folders]
        done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise SystemExit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return sorted(f"{case.get('classname')}::{case.get('name')}" for case in failed), len(cases)


def main(source: Path) -> None:
    """Raises ``SystemExit`` where a test fails with these kernels alone."""
    check_version(source)
    (stock, total), (switched, _) = failures(source, False), failures(source, True)
    RESULT.parent.mkdir(exist_ok=True)
    lists = {"version": version("transformers"), "tests": total, "stock": stock, "switched": switched}
    RESULT.write_text(json.dumps(lists, indent=1) + "\n", encoding="utf-8")
    print(f"transformers' own tests: {total}, {len(stock)} fail, {len(switched)} switched on")
    if ours := sorted(set(switched) - set(stock)):
        raise SystemExit("with these kernels alone fail:\n" + "\n".join(ours))


if __name__ == "__main__":
    if "TRANSFORMERS_SRC" in os.environ:
        main(Path(os.environ["TRANSFORMERS_SRC"]).resolve())
    else:
        print("transformers' own tests were not run: TRANSFORMERS_SRC names no checkout of it")
