"""One answer in progress: its ids, its text, and whether a stop string or an id has ended it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .choosing import TokenLogprobs
from .errors import PromptError

if TYPE_CHECKING:
    from .model import Qwen2VL
    from .prompt.tokenizer import Tokenizer


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


def end_ids(model: Qwen2VL, ends: Sequence[int]) -> dict[int, str]:
    """The ids that end a row, by default the checkpoint's, with the reason that is then given."""
    if not ends:
        stated = model.generation_defaults.get("eos_token_id")
        if stated is None:
            stated = [model.config.eos_token_id, model.config.bos_token_id]
        ends = stated if isinstance(stated, list) else [stated]
    return dict.fromkeys(ends, "stop")


def stop_ids(tokenizer: Tokenizer, stop: Sequence[str]) -> dict[int, str]:
    """The ids of those stop strings that are control tokens: a text does not show them, so they end a row by id.

    Raises :class:`PromptError` for one that has text beside a control token, which would never be found.
    """
    for text in stop:
        held = [name for name in tokenizer.special_ids if name in text]
        if held and text not in held:
            raise PromptError(
                f"stop: wants control tokens by themselves, as texts leave them out, got {text!r} with {held[0]}"
            )
    return {tokenizer.special_ids[text]: "stop_string" for text in stop if text in tokenizer.special_ids}
