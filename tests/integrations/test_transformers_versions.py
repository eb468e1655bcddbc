"""The parameters that each version of transformers has, as they were found in its wheel, and the table of places.

``python -m tests.stacks.transformers_signatures`` writes what is compared here; ``make test-stacks`` compares whole
models, patched and stock, in an environment for each of the versions.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import transformers
from transformers.models.qwen2_vl import modeling_qwen2_vl

from qwen2vl_kernels.integrations._target import fits
from qwen2vl_kernels.integrations.transformers_targets import TESTED, places

FOUND = json.loads((Path(__file__).parent / "transformers_signatures.json").read_text(encoding="utf-8"))
#: What is not replaced, and why.
LEFT_OFF = {
    "5.2.0": {"positions": "its deltas count padding as 4.x does and are cut off at zero, as no other version's"},
}


def parameters(version: str) -> dict[str, tuple[str, ...] | None]:
    """Of each place that is looked for in a version."""
    return {
        place: None if names == "absent" else tuple(names.split())
        for place, lists in FOUND["places"].items()
        for names, versions in lists.items()
        if version in versions.split()
    }


def key(place) -> str:
    return f"{place.module}:{place.cls}.{place.name}".replace(":.", ":")


@pytest.mark.parametrize("version", FOUND["versions"])
def test_every_place_of_a_version_fits_or_is_known_not_to(version):
    have, table = parameters(version), places(version)
    assert have.keys() == {key(place) for place in table}
    checked = [place for place in table if place.parameters is not None]
    unfit = {place.feature for place in checked if not fits(have[key(place)], place.parameters)}
    assert unfit == LEFT_OFF.get(version, {}).keys()


def test_the_versions_that_are_called_tested_are_those_that_were_looked_at():
    assert [*dict.fromkeys(version.rpartition(".")[0] for version in FOUND["versions"])] == list(TESTED)


def test_the_version_at_hand_is_as_its_wheel():
    assert transformers.__version__ in FOUND["versions"]
    found = tuple(inspect.signature(modeling_qwen2_vl.Qwen2VLAttention.forward).parameters)
    assert found == parameters(transformers.__version__)["qwen2_vl.modeling_qwen2_vl:Qwen2VLAttention.forward"]


@pytest.mark.parametrize(
    ("have", "fit"),
    [
        (("self", "x", "y", "kwargs"), True),
        (("self", "x", "kwargs"), True),
        (("self", "x"), False),
        (("self", "y", "x", "kwargs"), False),
        (("self", "x", "z", "kwargs"), False),
        ((), False),
        (None, False),
    ],
)
def test_parameters_that_not_all_versions_have(have, fit):
    assert fits(have, ("self", "x", "y?", "kwargs")) is fit
