"""The table of files at the end of a run."""

import re

import pytest

from tests.times import MANY, ROWS, spent

pytest_plugins = "pytester"

#: What a test does to take CPU time, in its own process and in another.
_WORKS = """
    import subprocess, sys, time
    code = "import time; end = time.process_time() + {seconds}\\nwhile time.process_time() < end: pass"

    def test_here():
        exec(code)

    def test_in_another():
        subprocess.run([sys.executable, "-c", code], check=True)
"""


def test_the_files_that_take_most_are_told(pytester):
    pytester.makeconftest("from tests.times import *\n")
    quiet = {f"test_{n:02}": "def test_nothing(): pass" for n in range(MANY - 2)}
    pytester.makepyfile(**quiet, test_fails="def test_it(): assert False", test_works=_WORKS.format(seconds=0.3))
    before = spent()
    done = pytester.runpytest_inprocess("-p", "no:xdist", "-p", "no:cacheprovider")
    most = spent() - before
    rows = re.findall(r"^ +([\d.]+)  (.+)$", done.stdout.str(), re.MULTILINE)
    table = {name: float(seconds) for seconds, name in rows}
    assert len(table) == ROWS + 1 and next(iter(table)) == "test_works.py"
    assert 0.5 < table["test_works.py"] <= most + 0.1 and table[f"all {MANY} files"] >= table["test_works.py"]


@pytest.mark.parametrize("files", [1, MANY - 1])
def test_a_run_of_few_files_has_none(pytester, files):
    pytester.makeconftest("from tests.times import *\n")
    pytester.makepyfile(**{f"test_{n:02}": "def test_nothing(): pass" for n in range(files)})
    done = pytester.runpytest_inprocess("-p", "no:xdist", "-p", "no:cacheprovider")
    assert done.ret == 0 and "CPU seconds" not in done.stdout.str()
