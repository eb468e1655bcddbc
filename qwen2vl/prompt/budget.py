"""How many tokens the images and videos of one call may become, counted before there is room for any."""

import threading

from ..errors import PromptError
from ..media.options import Limits


class TokenBudget:
    """Counts the tokens of one call, from several threads."""

    def __init__(self, limits: Limits):
        self._limits = limits
        self._lock = threading.Lock()
        self._rows: dict[int, int] = {}

    def reserve(self, row: int, tokens: int) -> None:
        """Count that many tokens of an image or video of conversation ``row``.

        Raises:
            PromptError: with them the conversation has more than ``max_prompt_tokens`` of images and videos, or the
                call more than ``max_call_tokens``. It names no item: which one comes last depends on the threads.
        """
        with self._lock:
            self._rows[row] = self._rows.get(row, 0) + tokens
            for name, what, total in (
                ("max_prompt_tokens", f"conversation {row}", self._rows[row]),
                ("max_call_tokens", "this call", sum(self._rows.values())),
            ):
                if total > (most := getattr(self._limits, name)):
                    raise PromptError(
                        f"the images and videos of {what} would be more than {name} = {most} tokens; give fewer or "
                        f"smaller ones, or raise limits.{name}"
                    )
