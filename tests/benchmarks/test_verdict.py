"""What the tuner decides: whole shapes alone have a say, and what ships stays unless another is faster beyond doubt."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from rich.console import Console

from benchmarks import tune
from benchmarks.tune import verdict
from qwen2vl_kernels.core.launching import Target
from qwen2vl_kernels.triton.attention_forward import ForwardConfig

HOPPER = Target("cuda", 90)
SHIPS = ForwardConfig(128, 128, 8, 2)


def tried(subject, first, finals=None, left=0, again=()):
    """The trial of a subject with the seconds of its first pass by tile, and the samples of finals."""
    tiles = (*first, *(finals or ()))
    config = {tile: SHIPS if tile == "ships" else ForwardConfig(tile[0], tile[1], 4, 2) for tile in tiles}
    trial = tune.Trial(subject, SHIPS, [{}] * (len(first) + left), shapes=4, again=list(again))
    trial.rows = [
        {"literal": verdict.literal(config[tile]), "fields": dataclasses.asdict(config[tile]),
         "samples": [seconds], "median": seconds, "bits": str(config[tile].block_n),
         "check": {"name": "result 0", "error": 0.0, "allowed": 1.0}}
        for tile, seconds in first.items()
    ]  # fmt: skip
    trial.finals = {verdict.literal(config[tile]): samples for tile, samples in (finals or {}).items()}
    return trial


def verdict_of(*trials):
    found = tune.result(trials, HOPPER, torch.device("cpu"), True, "")
    (group,) = found["groups"]
    return group, found


FORWARDS = [s for s in tune.subjects() if s.group == "attention forward 16x80"]


def test_one_step_serves_all_lengths():
    """The step is chosen over the shapes before all else; faster candidates of one shape are named beside it."""
    times = ({(128, 64): 10.0, (64, 64): 9.0, (128, 128): 8.0}, {(128, 64): 10.0, (64, 64): 20.0, (128, 128): 30.0})
    trials = []
    for subject, by_tile in zip(FORWARDS[:2], times, strict=True):
        by_tile = by_tile | {"ships": 40.0}
        trials.append(tried(subject, by_tile, {tile: [s] * 5 for tile, s in by_tile.items()}))
    group, _ = verdict_of(*trials)
    assert group["fixed"] == {"block_n": 64} and group["best"] == "ForwardConfig(128, 64, 4, 2)"
    first, second = (group["shapes"][subject.shape] for subject in FORWARDS[:2])
    assert first["fastest"] == "ForwardConfig(128, 128, 4, 2)" and first["same_bits"] == "ForwardConfig(64, 64, 4, 2)"
    assert second["fastest"] == second["same_bits"] == "ForwardConfig(128, 64, 4, 2)"


def test_a_shape_that_the_limit_cut_has_no_say():
    """It looked at one candidate of three, which is all that the shapes would have in common."""
    slow, fast = (128, 64), (64, 64)
    whole = {"ships": 20.0, slow: 15.0, fast: 10.0}
    first = tried(FORWARDS[0], whole, {tile: [s] * 5 for tile, s in whole.items()})
    seen = {"ships": 20.0, slow: 15.0}
    cut = tried(FORWARDS[1], seen, {tile: [s] * 5 for tile, s in seen.items()}, left=1)
    group, found = verdict_of(first, cut)
    assert group["best"] == "ForwardConfig(64, 64, 4, 2)" and group["from"] == "1 of 4 shapes"
    assert list(group["shapes"]) == [FORWARDS[0].shape] and found["left"] == [FORWARDS[1].name]
    assert list(found["tables"].values()) == ["90: ((80, ForwardConfig(64, 64, 4, 2)),),  # 80 from 1 of 4 shapes"]
    group, found = verdict_of(cut)
    assert group["best"] is None and group["from"] == "0 of 4 shapes" and not found["tables"] and not found["rows"]


@pytest.mark.parametrize(
    ("candidate", "changes", "why"),
    [
        ([1.0] * 15, True, "faster by more"),
        ([1.085] * 15, False, "within 2%"),
        ([0.9, 1.05, 1.3] * 5, False, "rounds differ"),
        ([1.2] * 15, False, "within 2%"),
    ],
)
def test_the_comparison_in_turn_decides_and_not_the_first_pass(candidate, changes, why):
    """In which what ships took 1.1 as in the end, and the candidate half of that."""
    finals = {"ships": [1.1] * 15, (64, 64): candidate}
    trials = [tried(subject, {"ships": 1.1, (64, 64): 0.5}, finals) for subject in FORWARDS]
    group, found = verdict_of(*trials)
    assert group["candidate"] == "ForwardConfig(64, 64, 4, 2)" and group["from"] == "4 of 4 shapes"
    assert group["changes"] is changes and why in group["why"]
    assert group["best"] == (group["candidate"] if changes else verdict.literal(SHIPS))
    assert group["best"] in found["tables"]["qwen2vl_kernels.triton.attention_forward.forward_config"]
    console = Console(width=250, record=True, file=io.StringIO())
    tune.show(found, console)
    assert ("change to" if changes else "keep what ships") in console.export_text()


def test_the_group_names_who_is_compared():
    """Its first three of all shapes, beside what ships and the fastest of the shape itself."""
    tiles = [(rows, 64) for rows in (16, 32, 64, 128, 256)]
    seconds = (dict(zip(tiles, times, strict=True)) for times in ([1.0, 3, 4, 5, 9], [30.0, 3, 4, 5, 9]))
    one, other = (tried(s, {"ships": 20.0, **times}) for s, times in zip(FORWARDS, seconds, strict=False))
    fixed, ranked = verdict.ranking([one, other])
    assert fixed == {"block_n": 64} and ranked[:3] == [f"ForwardConfig({rows}, 64, 4, 2)" for rows in (32, 64, 128)]
    ships = verdict.literal(SHIPS)
    assert verdict.finalists(one, ranked) == [*ranked[:3], ships, "ForwardConfig(16, 64, 4, 2)"]
    assert verdict.finalists(other, ranked) == [*ranked[:3], ships]


def test_what_ships_is_timed_before_and_after_all_others():
    trial = tried(FORWARDS[0], {"ships": 4.0, (64, 64): 3.0}, again=[2.0])
    assert trial.medians == {verdict.literal(SHIPS): 3.0, "ForwardConfig(64, 64, 4, 2)": 3.0}
    (subject,) = verdict_of(trial)[1]["subjects"]
    assert subject["drift"] == 0.5


def test_what_fails_is_replaced():
    finals = {(64, 64): [5.0] * 3}
    group, _ = verdict_of(tried(FORWARDS[0], {(64, 64): 5.0}, finals))
    assert group["changes"] and group["best"] == "ForwardConfig(64, 64, 4, 2)" and "fails at" in group["why"]


def test_tables_hold_whole_entries():
    group = {"function": "m.backward_config", "columns": 80, "place": 0, "best": "B(1)", "from": "4 of 4 shapes"}
    both = [
        group,
        group | {"place": 1, "best": "B(2)"},
        group | {"columns": 72},
        group | {"columns": 128, "best": None},
        {"function": "m.tile", "best": "T(1)"},
    ]
    assert tune.tables(both, HOPPER) == {"m.backward_config": "90: ((80, B(1), B(2)),),"}
    both[1] |= {"from": "2 of 4 shapes"}
    assert tune.tables(both, HOPPER) == {"m.backward_config": "90: ((80, B(1), B(2)),),  # 80 from 2 of 4 shapes"}
