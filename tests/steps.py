"""Work that is counted, for showing that it grows with the size of what is given and no faster."""

import sys
from collections.abc import Callable
from typing import Any


def count_lines(function: Callable[[], Any]) -> int:
    """Lines of Python that a call runs, in all functions that it calls."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(previous)
    return count


def assert_linear(function: Callable[[int], Any], size: int) -> None:
    """Hold the lines that `function` runs for four times the size to little more than four times those for the size."""
    function(size)  # caches
    small, large = (count_lines(lambda n=n: function(n)) for n in (size, 4 * size))
    assert large <= 4.2 * small + 200, f"{small} lines for {size}, {large} for {4 * size}"
