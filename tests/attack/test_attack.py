"""A fixed number of the attack's cases, and that the arena tells what it is there to tell."""

import os

import pytest

from tests.attack.arena import BAD, TURNS, Arena, attack

needs_linux = pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="memory is read from Linux's /proc"
)


def test_no_case_is_answered_badly():
    found, lines = attack(seed=0, cases=400)
    assert not lines, "\n".join(lines)
    assert found.total() == 400 and {kind for kind, _ in found} == set(TURNS)
    assert all(found[kind, "ok"] > 0 for kind in set(TURNS)) and found["picture", "typed"] > 0


@needs_linux
def test_each_bad_outcome_is_told():
    arena = Arena()
    try:
        seen = {kind: arena.run(kind, 0, 0)[0] for kind in ("raise", "fill", "exhaust", "end")}
        seen["sleep"] = arena.run("sleep", 0, 0, seconds=1.0)[0]
        assert arena.run("archive", 0, 0)[0] == "ok", "a new process serves after one that was ended"
    finally:
        arena.close()
    assert seen == {"raise": "untyped", "fill": "memory", "exhaust": "memory", "end": "crash", "sleep": "hang"}
    assert set(seen.values()) == set(BAD)
