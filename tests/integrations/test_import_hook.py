"""What watches imports where ``QWEN2VL_KERNELS`` is set: no import fails of it, and what was executed is patched."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
import warnings
import zipfile

import pytest

import _qwen2vl_kernels_switch as switch
from qwen2vl_kernels.integrations import transformers_import
from qwen2vl_kernels.integrations._patches import PatchWarning
from qwen2vl_kernels.integrations.transformers_targets import TESTED, places

from ..test_architecture import ROOT

SOURCE = "count = globals().get('count', 0) + 1\nloader = __loader__\n\ndef function(): return 1\n"


@pytest.fixture
def watched(monkeypatch, tmp_path):
    """``made_up.module``, watched; a list of the modules that were handed over."""
    (tmp_path / "made_up").mkdir()
    (tmp_path / "made_up" / "__init__.py").write_text("")
    (tmp_path / "made_up" / "module.py").write_text(SOURCE)
    (tmp_path / "made_up" / "other.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(switch, "WATCHED", {"made_up.module"})
    handed: list[str] = []
    monkeypatch.setattr(transformers_import, "imported", handed.append)
    switch.watch()
    yield handed
    for name in [name for name in sys.modules if name.partition(".")[0] == "made_up"]:
        del sys.modules[name]


def test_all_modules_with_a_target_are_watched():
    wanted = {f"transformers.models.{place.module}" for version in TESTED for place in places(version)}
    assert wanted <= switch.WATCHED


def test_a_module_is_handed_over_once_it_was_executed_and_keeps_its_loader(watched):
    module = importlib.import_module("made_up.module")
    assert watched == ["made_up.module"] and module.count == 1
    assert type(module.__loader__) is type(module.__spec__.loader) is importlib.machinery.SourceFileLoader
    assert module.loader is module.__loader__, "its own code sees it, too"
    assert "return 1" in inspect.getsource(module.function)
    importlib.import_module("made_up.other")
    importlib.import_module("made_up.module")
    assert watched == ["made_up.module"]
    assert importlib.reload(module) is module and module.count == 2
    assert watched == ["made_up.module"] * 2
    switch.watch()
    assert [type(finder) for finder in sys.meta_path].count(switch._Watcher) == 1


def test_to_look_for_a_module_executes_nothing(watched):
    spec = importlib.util.find_spec("made_up.module")
    assert (
        spec is not None and spec.origin.endswith("module.py") and "count" in spec.loader.get_source("made_up.module")
    )
    assert importlib.util.find_spec("made_up.nothing") is None
    assert watched == [] and "made_up.module" not in sys.modules


def test_from_an_archive(watched, monkeypatch, tmp_path):
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("zipped/__init__.py", "")
        archive.writestr("zipped/module.py", SOURCE)
    monkeypatch.setattr(switch, "WATCHED", {"zipped.module"})
    monkeypatch.syspath_prepend(tmp_path / "archive.zip")
    module = importlib.import_module("zipped.module")
    assert watched == ["zipped.module"] and module.count == 1
    del sys.modules["zipped.module"], sys.modules["zipped"]


def test_beside_another_finder_that_asks_all_others(watched):
    class Asks:
        busy = False

        def find_spec(self, name, path=None, target=None):
            if self.busy or not name.startswith("made_up."):
                return None
            self.busy = True
            try:
                return importlib.util.find_spec(name)
            finally:
                self.busy = False

    for place in (0, 1):
        sys.meta_path.insert(place, Asks())
    assert importlib.import_module("made_up.module").count == 1
    assert watched == ["made_up.module"]


def test_an_error_is_a_warning_and_the_import_goes_on(watched, monkeypatch, capsys):
    def fails(name):
        raise RuntimeError("nothing fits")

    monkeypatch.setattr(transformers_import, "imported", fails)
    with pytest.warns(PatchWarning, match=r"made_up.module stays as it is: RuntimeError: nothing fits"):
        module = importlib.import_module("made_up.module")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert importlib.reload(module).count == 2
    assert "stays as it is" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "qwen2vl_kernels.integrations.transformers_import", None)
    monkeypatch.setitem(sys.modules, "qwen2vl_kernels.integrations._patches", None)
    with pytest.warns(UserWarning, match=r"made_up.module stays as it is: ModuleNotFoundError"):
        assert importlib.reload(module).count == 3


def test_an_error_of_the_module_is_its_own(watched, tmp_path):
    (tmp_path / "made_up" / "module.py").write_text("raise KeyError('its own')")
    with pytest.raises(KeyError, match="its own"):
        importlib.import_module("made_up.module")
    assert watched == [] and "made_up.module" not in sys.modules


_PROGRAM = """
import sys, warnings
import _qwen2vl_kernels_switch
assert not {"torch", "transformers", "qwen2vl_kernels"} & sys.modules.keys()
import transformers
assert "qwen2vl_kernels" not in sys.modules, "transformers alone is no reason"
from transformers import Qwen2VLForConditionalGeneration as Model
source = sys.modules[Model.__module__]
names = [name for name in sys.modules if name.startswith("transformers.models.qwen") and ".modeling_" in name]
assert not [name for name in names if "2_5" in name or "qwen3" in name], "a family that nobody asked for"
from qwen2vl_kernels.integrations import transformers as kernels

def applied():
    return {row.feature for row in kernels.status() if row.state == "applied"}

def ours(cls):
    return hasattr(cls.forward, "__qwen2vl_kernels__")

assert applied() == {"qwen2_vl: norm", "qwen2_vl: activation"}, applied()
old = source.VisionMlp
import importlib
importlib.reload(source)
assert source.VisionMlp is not old and ours(source.VisionMlp) and ours(source.Qwen2VLVisionBlock)
with warnings.catch_warnings():
    warnings.simplefilter("error")
    kernels.apply()  # the rest, and of other families what their imports have not done already
assert {row.state for row in kernels.status()} == {"applied"}, [r for r in kernels.status() if r.state != "applied"]
kernels.restore()
assert not ours(old) and not ours(source.VisionMlp)
"""


def test_a_program_whose_code_knows_nothing_of_it():
    environment = {**os.environ, "QWEN2VL_KERNELS": "transformers:norm,activation", "PYTHONPATH": str(ROOT)}
    environment.pop("QWEN2VL_KERNELS_DISABLE", None)
    command = [sys.executable, "-W", "error::UserWarning", "-c", _PROGRAM]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "qwen2vl_kernels" not in run.stderr, run.stderr


def test_a_word_that_means_nothing_is_a_warning_as_transformers_is_imported(monkeypatch):
    monkeypatch.setenv("QWEN2VL_KERNELS", "transfomers")
    with pytest.warns(PatchWarning, match=r"there is no stack 'transfomers'; the stacks are .*transformers"):
        switch.executed("transformers.models.qwen2_vl.modeling_qwen2_vl")
