"""What compares transformers' own tests, stock and switched on, with a checkout made up here."""

from __future__ import annotations

import json
import tarfile
from importlib.metadata import version

import pytest

from tests.stacks import transformers_own

TESTS = """
import pytest
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionMlp

def test_passes():
    assert VisionMlp

def test_fails_without_a_network():
    raise OSError

def test_fails_switched_on():
    assert not hasattr(VisionMlp.forward, "__qwen2vl_kernels__")

def test_skipped_switched_on():
    if hasattr(VisionMlp.forward, "__qwen2vl_kernels__"):
        pytest.skip()
"""

SHARED = """
from .exporters.test_export import ExportTesterMixin
from .generation.test_utils import GenerationTesterMixin

class ModelTesterMixin(ExportTesterMixin):
    def test_forward(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            assert model_class(config)(**inputs)[0].shape[:2] == inputs["input_ids"].shape
"""


@pytest.mark.long
def test_failures_are_compared_by_name(tmp_path, monkeypatch, capsys):
    package, tests = tmp_path / "src" / "transformers", tmp_path / "tests" / "models" / "qwen2_vl"
    package.mkdir(parents=True), tests.mkdir(parents=True)
    (tests / "test_modeling.py").write_text(TESTS)
    monkeypatch.setattr(transformers_own, "RESULT", tmp_path / "result.json")
    with pytest.raises(SystemExit, match=r"holds no src/transformers/__init__\.py"):
        transformers_own.checkout(tmp_path)
    (package / "__init__.py").write_text('__version__ = "4.0.0"\n')
    with pytest.raises(SystemExit, match=f"must be a checkout of {version('transformers')}, .* has 4.0.0"):
        transformers_own.checkout(tmp_path)
    (package / "__init__.py").write_text(f'__version__ = "{version("transformers")}"\n')
    with pytest.raises(SystemExit, match=r"alone fail:\n\S+::test_fails_switched_on\n\S+::test_skipped_switched_on$"):
        transformers_own.main(transformers_own.checkout(tmp_path))
    said = "stock 4 tests, 3 passed, 1 failed, 0 skipped; switched on 4 tests, 1 passed, 2 failed, 1 skipped"
    assert said in capsys.readouterr().out
    found = json.loads((tmp_path / "result.json").read_text())
    assert [len(found[name]) for name in ("stock", "switched")] == [1, 2]
    (tests / "test_more.py").write_text("import no_such_module\n")
    with pytest.raises(SystemExit, match=r"pytest cannot collect tests\.models\.qwen2_vl\.test_more"):
        transformers_own.main(transformers_own.checkout(tmp_path))


@pytest.mark.long
def test_shared_tests_of_a_source_distribution(tmp_path, monkeypatch):
    """Its layout, with one test: what it lacks is stood in for, and the models are the three families'."""
    name = f"transformers-{version('transformers')}"
    shared = tmp_path / name / "tests" / "test_modeling_common.py"
    shared.parent.mkdir(parents=True)
    shared.write_text(SHARED)
    with tarfile.open(tmp_path / f"{name}.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / name, name)
    monkeypatch.setattr(transformers_own, "RESULT", tmp_path / "result.json")
    suite = transformers_own.distribution(tmp_path)
    assert suite.folder == transformers_own.ROOT and not shared.exists()
    transformers_own.main(suite)
    assert json.loads((tmp_path / "result.json").read_text())["tests"] == 4
