"""The bookkeeping of every adapter, on a stack made up here: whole or not at all, and back to what was there."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import warnings
from types import ModuleType

import pytest

from qwen2vl_kernels.integrations._patches import SWITCH, PatchSet, PatchWarning


@pytest.fixture
def stack(monkeypatch):
    """A module with a class, a subclass that inherits, a static method, a function and a table."""
    module = ModuleType("made_up_stack")
    exec(
        "class Layer:\n"
        "    def forward(self, x): return x\n"
        "    @staticmethod\n"
        "    def scale(x): return 2 * x\n"
        "class Sub(Layer): pass\n"
        "def rotate(q, k): return q, k\n"
        "table = {'there': 1}\n",
        module.__dict__,
    )
    monkeypatch.setitem(sys.modules, "made_up_stack", module)
    monkeypatch.delenv(SWITCH, raising=False)
    return module


def _plus(n):
    def make(stock):
        return lambda self, x: stock(self, x) + n

    return make


def _set(version="1.2.3"):
    return PatchSet("made up", version, ("1.2", "2.0"))


def _everything(stack):
    return [dict(vars(owner)) for owner in (stack, stack.Layer, stack.Sub)] + [dict(stack.table)]


def _identical(before, after):
    return all(a.keys() == b.keys() and all(a[k] is b[k] for k in a) for a, b in zip(before, after, strict=True))


def _states(patches):
    return {t.label: t.state for t in patches.status()}


def test_apply_and_restore_of_every_kind_of_owner(stack):
    before, layer = _everything(stack), stack.Layer()
    patches = _set()
    patches.add("b", stack.Sub, "forward", ("self", "x"), lambda stock: lambda self, x: -x)  # inherited until now
    patches.add("a", "made_up_stack:Layer", "forward", ("self", "x"), _plus(1))
    patches.add("a", stack.Layer, "scale", ("x",), lambda stock: staticmethod(lambda x: stock(x) + 100))
    patches.add("b", "made_up_stack", "rotate", ("q", "k"), lambda stock: lambda q, k: (k, q))
    patches.add("c", stack.table, "new", None, lambda stock: (stock, "new"))
    patches.add("c", stack.table, "there", None, lambda stock: stock + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = patches.apply()
    assert [row.state for row in rows] == ["applied"] * 6
    assert (layer.forward(1), stack.Layer.scale(1), stack.Sub().forward(1), stack.rotate(1, 2)) == (2, 102, -1, (2, 1))
    assert stack.table == {"there": 2, "new": (None, "new")}
    patches.restore()
    assert _identical(before, _everything(stack))
    assert {row.state for row in patches.status()} == {"off"}


def test_an_object_gets_a_class_of_its_own(stack):
    one, other = stack.Layer(), stack.Layer()
    patches = _set()
    patches.add("a", one, "forward", ("self", "x"), _plus(1))
    patches.apply()
    assert (one.forward(1), other.forward(1)) == (2, 1) and vars(one) == {} and isinstance(one, stack.Layer)
    assert str(type(one)) == str(stack.Layer)
    patches.restore()
    assert type(one) is stack.Layer and one.forward(1) == 1
    del one
    gc.collect()
    assert patches.status() == [], "a dead object is no longer listed, nor kept alive"


def test_copies_of_an_object_are_patched_and_restored_with_it(stack):
    """And run with what they hold themselves."""
    one = stack.Layer()
    one.held = [1]
    patches = _set()
    patches.add("a", one, "forward", ("self", "x"), lambda stock: lambda self, x: self.held[0] + x)
    patches.apply()
    copies = [copy.copy(one), copy.deepcopy(one), copy.deepcopy(copy.deepcopy(one))]
    copies[1].held[0], copies[2].held[0] = 10, 20
    one.held[0] = 5
    assert [c.forward(1) for c in (one, *copies)] == [6, 6, 11, 21]
    assert [row.state for row in patches.status()] == ["applied"] * 4, "the copy that was copied is dead"
    patches.restore()
    assert {type(c) for c in (one, *copies)} == {stack.Layer} and [c.forward(1) for c in copies] == [1, 1, 1]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_of_what_was_there_before(stack, protocol):
    one = stack.Layer()
    one.held = 1
    patches = _set()
    patches.add("a", one, "forward", ("self", "x"), _plus(1))
    patches.apply()
    pickled = pickle.dumps(one, protocol)
    assert b"qwen2vl_kernels" not in pickled
    loaded = pickle.loads(pickled)
    assert type(loaded) is stack.Layer and loaded.held == 1


def test_an_object_with_code_of_its_own_is_left_alone_and_no_other(stack):
    layers = [stack.Layer() for _ in range(3)]
    theirs = layers[1].forward = lambda x: 7
    patches = _set()
    for layer in layers:
        patches.add("a", layer, "forward", ("self", "x"), _plus(1))
    with pytest.warns(PatchWarning, match=r"a leaves alone what runs other code: Layer.forward of one object has a fo"):
        patches.apply()
    assert [layer.forward(1) for layer in layers] == [2, 7, 2] and layers[1].forward is theirs
    assert [row.state for row in patches.status()] == ["applied", "skipped", "applied"]
    patches.restore()
    assert [layer.forward(1) for layer in layers] == [1, 7, 1]


def test_an_object_that_was_wrapped_since_is_told(stack):
    hooked, wrapped = stack.Layer(), stack.Layer()
    patches = _set()
    for layer in (hooked, wrapped):
        patches.add("a", layer, "forward", ("self", "x"), _plus(1))
    patches.apply()
    kept = hooked.forward
    hooked.forward = lambda x: kept(x)
    wrapped.__class__ = type("FSDP", (type(wrapped),), {})
    with pytest.warns(PatchWarning, match="was replaced by somebody else after apply") as told:
        patches.restore()
    assert len(told) == 2 and type(hooked) is stack.Layer


def test_only_code_of_the_package_is_replaced(stack):
    """A class or function that somebody has put under the stack's name, and a subclass with code of its own."""

    class Faster(stack.Layer):
        def forward(self, x):
            return 10 * x

    class Renamed(stack.Layer):
        pass

    stack.rotate = rotate = lambda q, k: (k, q)
    patches = PatchSet("made up", "1.2.3", ("1.2",), package="made_up_stack")
    patches.add("class", "made_up_stack:Layer", "forward", ("self", "x"), _plus(1))
    patches.add("function", "made_up_stack", "rotate", ("q", "k"), lambda stock: stock)
    objects = [Faster(), Renamed(), stack.Layer()]
    for one in objects:
        patches.add("object", one, "forward", ("self", "x"), _plus(1))
    layer, stack.Layer = stack.Layer, Faster
    with pytest.warns(PatchWarning) as told:
        patches.apply()
    stack.Layer = layer
    reasons = [row.reason for row in patches.status()]
    assert reasons[0] == f"is {__name__}.{Faster.__qualname__}, which somebody put there"
    assert reasons[1] == reasons[2] == f"runs code of {__name__}, which is left alone"
    assert len(told) == 3 and reasons[3:] == ["", ""]
    assert stack.rotate is rotate and [one.forward(1) for one in objects] == [10, 2, 2]
    assert layer().forward(1) == 1


def test_double_apply_changes_nothing(stack):
    patches = _set()
    for _ in range(2):
        patches.add("a", "made_up_stack:Layer", "forward", ("self", "x"), _plus(1))
        patches.apply()
    assert stack.Layer().forward(1) == 2 and len(patches.status()) == 1


def test_what_another_set_has_patched_is_not_patched_again(stack):
    first, second, before = _set(), _set(), _everything(stack)
    first.add("a", stack.Layer, "forward", ("self", "x"), _plus(1))
    first.apply()
    second.add("a", stack.Layer(), "forward", ("self", "x"), _plus(1))
    layer = stack.Layer()
    second.add("a", layer, "forward", ("self", "x"), _plus(1))
    with pytest.warns(PatchWarning, match="is patched already"):
        second.apply()
    assert layer.forward(1) == 2
    first.restore()
    assert _identical(before, _everything(stack))


def test_a_changed_signature_leaves_the_feature_whole_and_others_on(stack):
    before = _everything(stack)
    patches = _set()
    patches.add("a", "made_up_stack:Layer", "forward", ("self", "x"), _plus(1))
    patches.add("a", "made_up_stack", "rotate", ("q", "k", "positions"), lambda stock: stock)
    patches.add("b", stack.table, "new", None, lambda stock: 1)
    with pytest.warns(PatchWarning, match=r"a is left off: made_up_stack.rotate takes \('q', 'k'\), not \('q', 'k', "):
        patches.apply()
    reasons = {t.label: (t.state, t.reason) for t in patches.status()}
    assert reasons["made_up_stack.Layer.forward"] == ("skipped", "a goes whole or not at all")
    assert reasons["made_up_stack.rotate"][0] == "skipped" and reasons["dict.new"] == ("applied", "")
    patches.restore()
    assert _identical(before, _everything(stack))


@pytest.mark.parametrize("owner", ["made_up_stack:Gone", "made_up_stack.gone", "made_up_stack:Layer"])
def test_what_is_not_there_is_a_reason(stack, owner):
    patches = _set()
    patches.add("a", owner, "nothing", ("self",), lambda stock: stock)
    with pytest.warns(PatchWarning, match=r"was not found|takes None"):
        patches.apply()
    assert [t.state for t in patches.status()] == ["skipped"]


def test_a_replacement_that_cannot_be_made_sets_nothing(stack):
    before = _everything(stack)
    patches = _set()
    patches.add("a", stack.Layer, "forward", ("self", "x"), _plus(1))
    patches.add("a", stack, "rotate", ("q", "k"), lambda stock: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        patches.apply()
    assert _identical(before, _everything(stack))


def test_an_owner_that_refuses_sets_nothing(stack):
    """Found out only when the attribute is set: by then another of the feature is."""

    class Sealed(type):
        def __setattr__(cls, name, value):
            raise TypeError("sealed")

    sealed = Sealed("sealed", (), {"forward": lambda self, x: x})
    before = _everything(stack)
    patches = _set()
    patches.add("a", stack.Layer, "forward", ("self", "x"), _plus(1))
    patches.add("a", sealed, "forward", ("self", "x"), _plus(1))
    with pytest.raises(TypeError, match="sealed"):
        patches.apply()
    assert _identical(before, _everything(stack)) and {t.state for t in patches.status()} == {"off"}


@pytest.mark.parametrize(("version", "known"), [("1.2", True), ("1.2.9", True), ("1.20", False), ("3.0", False)])
def test_an_unknown_version_warns_and_goes_by_signatures(stack, version, known):
    patches = _set(version)
    patches.add("a", stack.Layer, "forward", ("self", "x"), _plus(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        patches.apply()
    assert [str(w.message) for w in caught if w.category is PatchWarning] == (
        [] if known else [f"qwen2vl_kernels in made up: version {version} was never tested, only 1.2, 2.0"]
    )
    assert stack.Layer().forward(1) == 2
    patches.restore()


@pytest.mark.parametrize(("value", "off"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_the_switch_in_the_environment(stack, monkeypatch, value, off):
    monkeypatch.setenv(SWITCH, value)
    patches, before = _set(), _everything(stack)
    patches.add("a", stack.Layer, "forward", ("self", "x"), _plus(1))
    (row,) = patches.apply()
    assert (row.state, row.reason) == (("skipped", f"{SWITCH} is set") if off else ("applied", ""))
    assert _identical(before, _everything(stack)) == off
    monkeypatch.delenv(SWITCH)
    patches.apply()
    assert stack.Layer().forward(1) == 2, "once the switch is gone the same set applies"


def test_restore_leaves_what_somebody_else_has_set_since(stack):
    patches = _set()
    patches.add("a", stack.Layer, "forward", ("self", "x"), _plus(1))
    patches.apply()
    theirs = stack.Layer.forward = lambda self, x: 7
    with pytest.warns(PatchWarning, match=r"Layer.forward was replaced by somebody else after apply\(\)"):
        patches.restore()
    assert stack.Layer.forward is theirs


def test_an_unknown_feature_is_refused(stack):
    patches = _set()
    patches.add("a", stack.Layer, "forward", ("self", "x"), _plus(1))
    with pytest.raises(ValueError, match="there is no feature 'b'; the features are a"):
        patches.apply(["a", "b"])
    assert stack.Layer().forward(1) == 1
