"""What compares transformers' own tests, stock and switched on, with a checkout made up here."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest

from tests.stacks import transformers_own

TESTS = """
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionMlp

def test_passes():
    assert VisionMlp

def test_fails_without_a_network():
    raise OSError

def test_fails_switched_on():
    assert not hasattr(VisionMlp.forward, "__qwen2vl_kernels__")
"""


@pytest.mark.long
def test_failures_are_compared_by_name(tmp_path, monkeypatch, capsys):
    package, tests = tmp_path / "src" / "transformers", tmp_path / "tests" / "models" / "qwen2_vl"
    package.mkdir(parents=True), tests.mkdir(parents=True)
    (tests / "test_modeling.py").write_text(TESTS)
    monkeypatch.setattr(transformers_own, "RESULT", tmp_path / "result.json")
    with pytest.raises(SystemExit, match=r"holds no src/transformers/__init__\.py"):
        transformers_own.main(tmp_path)
    (package / "__init__.py").write_text('__version__ = "4.0.0"\n')
    with pytest.raises(SystemExit, match=f"must be a checkout of {version('transformers')}, .* has 4.0.0"):
        transformers_own.main(tmp_path)
    (package / "__init__.py").write_text(f'__version__ = "{version("transformers")}"\n')
    with pytest.raises(SystemExit, match=r"alone fail:\n\S+::test_fails_switched_on$"):
        transformers_own.main(tmp_path)
    assert "own tests: 3, 1 fail, 2 switched on" in capsys.readouterr().out
    found = json.loads((tmp_path / "result.json").read_text())
    assert [len(found[name]) for name in ("stock", "switched")] == [1, 2]
