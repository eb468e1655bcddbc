"""What the page asks of the model: answers and an agent's steps, told piece by piece, all computed by one thread."""

from __future__ import annotations

import base64
import io
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..agents.answers import Located, locate
from ..agents.grounding import Box, parse_point
from ..agents.loop import AgentRun, AgentStep, model_writer
from ..errors import GroundingError, PromptError
from ..generation import GenerationConfig, GenerationResult, generate
from .line import Line
from .sessions import Play, Session, Sessions

if TYPE_CHECKING:
    from PIL import Image

    from ..conversation import Conversation
    from ..model import Qwen2VL
    from ..prompt.processor import Processor
    from .attachments import Attachment

logger = logging.getLogger("qwen2vl.web")

Event = dict[str, Any]
Send = Callable[[Event], None]
KEPT_CACHES = 2  # conversations whose keys and values stay in memory; the others' prompts are read again
MAX_AGENT_STEPS = 12
_SETTINGS = {
    "max_new_tokens": int,
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "repetition_penalty": float,
    "seed": int,
    "stop": list,
}


class _Stopped(Exception):
    """Raised in the middle of an answer that nobody wants any more."""


class Engine:
    """A checkpoint as the page's model.

    Args:
        configure: makes a GenerationConfig of the settings of ``defaults``, as the command line has them.
        defaults: of each setting, where the page gives none; None is the checkpoint's own.
        explain: the message for an error that comes from what was given or from the machine; None for a fault of ours.
        options: of the processor, for pictures and clips.
        system: the system prompt where the page gives none.

    :meth:`answer` and :meth:`step` are for the thread that serves ``line``. They send events and raise nothing but what
    ends the command.
    """

    def __init__(
        self,
        model: Qwen2VL,
        processor: Processor,
        *,
        configure: Callable[..., GenerationConfig],
        defaults: Mapping[str, Any],
        explain: Callable[[Exception], str | None],
        options: Mapping[str, Any],
        system: str | None = None,
    ) -> None:
        self.model, self.processor, self.options, self.system = model, processor, dict(options), system
        self.defaults = {name: defaults.get(name) for name in _SETTINGS}
        self._configure, self._explain = configure, explain
        self.line = Line()
        self.sessions = Sessions(processor.access.limits.max_prompt_tokens)
        self._cached: list[Conversation] = []  # in the order of their use

    def message(self, error: Exception) -> str:
        """What is said of an error. One that nobody's input explains is a fault of this program: it is logged whole."""
        said = self._explain(error)
        if said is None:
            logger.error("a request failed by a fault of this program", exc_info=error)
            said = f"a fault of qwen2vl ({type(error).__name__}: {error}); its log has the traceback"
        return said

    def settings(self, given: Any) -> GenerationConfig:
        """The configuration for a page's settings, of which those that are None or left out are the defaults.

        Raises :class:`~qwen2vl.errors.Qwen2VLError` naming the one that is unknown or out of range.
        """
        if not isinstance(given, Mapping):
            raise PromptError(f"settings: wants an object, got {type(given).__name__}")
        chosen = dict(self.defaults)
        for name, value in given.items():
            if name not in _SETTINGS:
                raise PromptError(f"settings: {name!r} is none; there are {', '.join(_SETTINGS)}")
            if value is None:
                continue
            kind = (int, float) if _SETTINGS[name] is float else _SETTINGS[name]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise PromptError(f"{name}: wants {_SETTINGS[name].__name__}, got {type(value).__name__}")
            chosen[name] = value
        if not all(isinstance(text, str) and text for text in chosen["stop"] or ()):
            raise PromptError("stop: wants texts that are not empty")
        return self._configure(self.model, **chosen)

    # -------------------------------------------------------------------------------------------------- conversation

    def answer(
        self,
        session: Session,
        stop: threading.Event,
        send: Send,
        *,
        text: str,
        media: Sequence[int],
        config: GenerationConfig,
        system: str | None,
    ) -> None:
        """One turn: ``text`` events as it is written, then an ``answer`` or an ``error``. One that is stopped stays as
        far as it came; one that fails leaves the conversation as it was."""

        def work() -> Event:
            new = session.attached(list(media))
            content = [*(one.item for one in new), {"type": "text", "text": text}]
            question = {"role": "user", "content": content}
            prompt = system if system is not None else self.system
            opening = [] if prompt is None else [{"role": "system", "content": prompt}]
            inputs = self.processor([*opening, *session.turns, question], **self.options)
            shown = [*session.shown, *media]
            send({"event": "prompt", "tokens": inputs["input_ids"].shape[1]})
            ids, pieces, on_token = _listener(stop, send)
            result = None
            try:
                result = generate(
                    self.model,
                    inputs,
                    tokenizer=self.processor.tokenizer,
                    config=config,
                    on_token=on_token,
                    conversation=self._using(session.conversation),
                )
            except _Stopped:
                if not pieces:
                    raise
            answer = result.texts[0] if result is not None else "".join(pieces)
            raw = self.processor.tokenizer.decode(ids, skip_special_tokens=False)
            places = [_place(one, session, shown) for one in locate(raw, inputs.media)]
            event = {"event": "answer", "text": answer, "places": places, "shown": shown, **_told(result, ids)}
            session.turns = [*session.turns, question, {"role": "assistant", "content": answer}]
            session.shown = shown
            return event

        self._guarded(session.conversation, work, stop, send)
        if session.ended:
            session.conversation.forget()

    # --------------------------------------------------------------------------------------------------- screen game

    def new_game(self, session: Session, level: Any, language: Any, seed: Any, config: GenerationConfig) -> Event:
        """Give the session another game, and say what there is to see. Raises DataError as
        :func:`qwen2vl.samples.skills.play` does."""
        from ..samples.skills import play as begin

        game = begin(level, seed=seed, languages=(language,))
        writer = model_writer(
            self.model,
            self.processor,
            config=config,
            on_token=lambda *token: play.on_token(*token),
            **self.options,
        )
        play = Play(game, AgentRun(writer, game, max_steps=MAX_AGENT_STEPS), writer.conversation, _nobody)
        session.play = play
        return {"instruction": game.instruction, "size": game.size, **_state(play)}

    def step(self, session: Session, stop: threading.Event, send: Send) -> None:
        """One step of the session's game: ``text`` events as the model writes, then a ``step`` or an ``error``. One
        that is stopped has not happened."""
        play = session.play
        if play is None:
            send({"event": "error", "message": "there is no game: begin one"})
            return

        def work() -> Event:
            _, _, play.on_token = _listener(stop, send)
            self._using(play.conversation)
            return {"event": "step", **_described(play.run.step()), **_state(play)}

        self._guarded(play.conversation, work, stop, send)
        if session.ended or play.run.episode.outcome is not None:
            play.conversation.forget()

    # ------------------------------------------------------------------------------------------------------- shared

    def free(self, session: Session) -> None:
        """Let go of the caches of a session, on the thread that computes with them."""
        session.conversation.forget()
        if session.play is not None:
            session.play.conversation.forget()

    def end(self, key: str) -> None:
        """End a session, from any thread."""
        if (session := self.sessions.end(key)) is not None:
            self.line.join(lambda: self.free(session))

    def end_idle(self) -> None:
        """End the sessions whose tabs are gone."""
        for key in self.sessions.idle():
            self.end(key)

    def _using(self, conversation: Conversation) -> Conversation:
        """A conversation that is used now: only the latest keep their caches."""
        self._cached = [other for other in self._cached if other is not conversation and other.tokens]
        while len(self._cached) >= KEPT_CACHES:
            self._cached.pop(0).forget()
        self._cached.append(conversation)
        return conversation

    def _guarded(
        self, conversation: Conversation, work: Callable[[], Event], stop: threading.Event, send: Send
    ) -> None:
        """Do the work and send what it returns, or what became of it."""
        try:
            if stop.is_set():
                raise _Stopped
            last = work()
        except _Stopped:
            last = {"event": "stopped"}
        except Exception as error:
            if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
                for other in (*self._cached, conversation):
                    other.forget()
            parallel = self.model.parallel
            if parallel is not None and parallel.busy:
                raise  # the other processes wait in the middle of an answer, and give no other
            last = {"event": "error", "message": self.message(error)}
        send(last)


def _nobody(row: int, token: int, piece: str) -> None:
    """Who listens while no step is underway."""


def _listener(stop: threading.Event, send: Send) -> tuple[list[int], list[str], Callable[[int, int, str], None]]:
    """The ids and the text so far, and the function that gathers and tells them until it is stopped."""
    ids: list[int] = []
    pieces: list[str] = []

    def on_token(row: int, token: int, piece: str) -> None:
        ids.append(token)
        if piece:
            pieces.append(piece)
            send({"event": "text", "text": piece})
        if stop.is_set():
            raise _Stopped

    return ids, pieces, on_token


def _told(result: GenerationResult | None, ids: Sequence[int]) -> Event:
    """How an answer ended and what it took; None is one that was stopped. Times are in seconds."""
    if result is None:
        return {"finish": "stopped", "new_tokens": len(ids)}
    timings = result.timings
    return {
        "finish": result.finish_reasons[0],
        "new_tokens": len(result.sequences[0]),
        "prompt_tokens": result.prompt_tokens[0],
        "cached_tokens": result.cached_tokens[0],
        "first_token": timings["vision"] + timings["prefill"],
        "tokens_per_s": timings["decode_steps"] / timings["decode"] if timings["decode"] else None,
    }


def _place(found: Located, session: Session, shown: Sequence[int]) -> Event:
    """A place of an answer: its points in thousandths, and in pixels of the file where one picture or clip is meant."""
    number = None if found.media is None else shown[found.media]
    attachment: Attachment | None = None if number is None else session.attachments.get(number)
    place = {
        "label": found.label,
        "kind": "box" if isinstance(found.place, Box) else "quad",
        "points": found.place.points,
        "media": number,
        "pixels": None,
    }
    if attachment is not None:
        height, width = attachment.info.source_size
        place["pixels"] = [(round(x * width / 1000), round(y * height / 1000)) for x, y in found.place.points]
    return place


def _described(step: AgentStep | None) -> Event:
    """A step of an agent for the page; ``taps`` are the points of its calls, in thousandths of the screen."""
    if step is None:
        return {"text": "", "calls": [], "taps": [], "error": ""}
    taps = []
    for call in step.calls:
        try:
            taps.append(parse_point(call.arguments.get("point")))
        except GroundingError:  # a call without a point, or with none that can be read
            continue
    calls = [{"name": call.name, "arguments": dict(call.arguments)} for call in step.calls]
    return {"text": step.text, "calls": calls, "taps": taps, "error": step.error}


def _state(play: Play) -> Event:
    """A game as it is now."""
    episode = play.run.episode
    return {
        "screen": _data_uri(play.game.draw()),
        "steps": len(episode.steps),
        "outcome": episode.outcome,
        "success": play.game.success,
    }


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
