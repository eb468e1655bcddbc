"""The line before the model: an order, places that are told, and nobody lost by another's failure."""

import pytest

from qwen2vl.web.line import Line


def test_one_after_another_and_each_is_told_how_many_are_ahead():
    line, done, told = Line(), [], []

    def first():
        done.append("first")
        line.join(lambda: done.append("late"), lambda ahead: told.append(("late", ahead)))
        assert len(line) == 4  # the one that is served included

    for name, work in {"first": first, "second": lambda: done.append("second"), "third": lambda: 1 / 0}.items():
        line.join(work, lambda ahead, name=name: told.append((name, ahead)))
    assert told == [("second", 1), ("third", 2)]
    line.serve_next()
    assert told[2:] == [("late", 3), ("second", 0), ("third", 1), ("late", 2)]
    line.serve_next()
    with pytest.raises(ZeroDivisionError):
        line.serve_next()
    line.serve_next()
    assert done == ["first", "second", "late"] and len(line) == 0 and not line.serve_next(0)


def test_who_leaves_is_not_served_and_the_others_move_up():
    line, done, told = Line(), [], []
    waits, leaves = (lambda: done.append("waits")), (lambda: done.append("leaves"))
    line.join(leaves)
    line.join(waits, told.append)
    assert line.leave(leaves) and not line.leave(leaves)
    assert told == [1, 0]
    line.serve_next()
    assert done == ["waits"] and not line.leave(waits)
