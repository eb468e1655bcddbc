"""One conversation for each tab of a browser, and what all of them may keep."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..conversation import Conversation
from ..errors import MediaError, PromptError, Qwen2VLError

if TYPE_CHECKING:
    from ..agents.loop import AgentRun
    from ..samples.screen_game import ScreenGame
    from .attachments import Attachment

MAX_SESSIONS = 64
MAX_KEPT_BYTES = 2 << 30  # of the pixels of all sessions
IDLE_SECONDS = 7200.0  # without a sign of its tab, after which a session ends; a tab gives one each minute


@dataclass
class Play:
    """A screen game and the agent that plays it. What it writes is told to ``on_token`` of the step underway."""

    game: ScreenGame
    run: AgentRun
    conversation: Conversation
    on_token: Callable[[int, int, str], None]


@dataclass
class Session:
    """One tab's conversation.

    Attributes:
        attachments: pictures and clips by their numbers, those that no question has shown yet included.
        turns: messages so far.
        shown: the numbers of the attachments in ``turns``, in order.
        conversation: the cache of ``turns``.
        play: the screen game of this tab.
        stop: set to end the answer or step that is asked for now.
        asked: what stands in the line for it, None where nothing does.
        ended: its tab is closed, and nothing of it is kept.
        seen: when its tab gave its last sign, by the monotonic clock.
        numbers: how many attachments were given one.
    """

    attachments: dict[int, Attachment] = field(default_factory=dict)
    turns: list[dict[str, Any]] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)
    conversation: Conversation = field(default_factory=Conversation)
    play: Play | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    asked: Callable[[], None] | None = None
    ended: bool = False
    seen: float = field(default_factory=time.monotonic)
    numbers: int = 0

    def attached(self, numbers: list[int]) -> list[Attachment]:
        """Those of a new question. Raises PromptError for a number that is unknown, or of an earlier question."""
        for n, number in enumerate(numbers):
            if number not in self.attachments or number in self.shown or number in numbers[:n]:
                raise PromptError(f"media: there is no attachment {number} that waits for a question")
        return [self.attachments[number] for number in numbers]


class Sessions:
    """All that are open. Its methods may be called from any thread.

    Args:
        max_tokens: of the pictures and clips of one session.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._open: dict[str, Session] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def begin(self) -> tuple[str, Session]:
        """A new session and the key that nobody guesses. Raises Qwen2VLError where there are too many."""
        with self._lock:
            if len(self._open) >= MAX_SESSIONS:
                raise Qwen2VLError(f"{MAX_SESSIONS} pages are open, and no more are served: close one")
            key, session = secrets.token_urlsafe(24), Session()
            self._open[key] = session
            return key, session

    def find(self, key: str) -> Session | None:
        """The session of a key, which has given a sign now."""
        with self._lock:
            session = self._open.get(key)
            if session is not None:
                session.seen = time.monotonic()
            return session

    def keep(self, session: Session, attachment: Attachment) -> int:
        """Take an attachment into a session, and give it a number.

        Raises:
            MediaError: those of the session would be too many tokens, or all pixels too many bytes.
            PromptError: the session has ended meanwhile.
        """
        with self._lock:
            if session.ended:
                raise PromptError("this conversation is over")
            tokens = sum(one.info.num_tokens for one in session.attachments.values()) + attachment.info.num_tokens
            if tokens > self.max_tokens:
                raise MediaError(
                    f"{attachment.name}: with it the conversation's pictures and clips would be {tokens} tokens, more "
                    f"than max_prompt_tokens = {self.max_tokens}; begin a new one, or raise limits.max_prompt_tokens"
                )
            kept = sum(one.frames.nbytes for other in self._open.values() for one in list(other.attachments.values()))
            if kept + attachment.frames.nbytes > MAX_KEPT_BYTES:
                raise MediaError(
                    f"{attachment.name}: the pictures and clips of all open pages would take more than "
                    f"{MAX_KEPT_BYTES >> 20} MiB; close one"
                )
            session.numbers += 1
            session.attachments[session.numbers] = attachment
            return session.numbers

    def drop(self, session: Session, number: int) -> None:
        """Let go of an attachment that no question has shown. Raises PromptError where there is none."""
        with self._lock:
            session.attached([number])
            del session.attachments[number]

    def clear(self, session: Session) -> None:
        """Begin a session's conversation anew."""
        with self._lock:
            session.attachments.clear()
            session.turns, session.shown = [], []

    def end(self, key: str) -> Session | None:
        """Let go of a session and of all that was attached to it. Its caches are the model thread's to free."""
        with self._lock:
            session = self._open.pop(key, None)
        if session is not None:
            session.ended = True
            session.stop.set()
            session.attachments.clear()
        return session

    def idle(self) -> list[str]:
        """The keys of those whose tab has given no sign for long, and that wait for nothing."""
        late = time.monotonic() - IDLE_SECONDS
        with self._lock:
            return [key for key, session in self._open.items() if session.seen < late and session.asked is None]
