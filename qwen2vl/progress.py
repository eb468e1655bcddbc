"""One answer in progress: its ids, its text, and whether a stop string or an id has ended it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .choosing import TokenLogprobs


@dataclass
class Row:
    """One sequence in progress: its ids, its text, and the tail held back while it may begin a stop string."""

    decoder: Any
    stop: tuple[str, ...]
    ids: list[int] = field(default_factory=list)
    text: str = ""
    shown: int = 0
    reason: str = ""
    end: list[int] = field(default_factory=list)  # the id that ended it, where one did
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def push(self, token: int, ends: Mapping[int, str], budget: int) -> str:
        """Take a token; returns the text that is now certain to be part of the answer.

        ``ends``: ids that end the sequence, each with the reason that is then given.
        """
        if token in ends:
            self.reason, self.end = ends[token], [token]
        else:
            self.ids.append(token)
            if self.decoder is not None:
                self.text += self.decoder.push(token)
            if len(self.ids) >= budget:
                self.reason = "length"
        if self.reason and self.decoder is not None:
            self.text += self.decoder.finish()
        hits = [at for s in self.stop if (at := self.text.find(s)) >= 0]
        if hits:
            self.text, self.reason = self.text[: min(hits)], "stop_string"
        certain = len(self.text) if self.reason else len(self.text) - self._held()
        piece, self.shown = self.text[self.shown : certain], max(self.shown, certain)
        return piece

    def _held(self) -> int:
        """Length of the longest tail of the text that begins a stop string."""
        longest = max(map(len, self.stop), default=1) - 1
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(s.startswith(self.text[-length:]) for s in self.stop):
                return length
        return 0
