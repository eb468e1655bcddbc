"""A sitting that is killed at a measurement."""

from collections.abc import Callable


class Killed(Exception):
    """Nothing else raises it."""


def killed_at(step: int) -> Callable[[str], None]:
    """What a sitting says its measurements to, which kills it at the one of this step."""

    def said(line: str) -> None:
        if line.startswith(f"step {step},"):
            raise Killed

    return said
