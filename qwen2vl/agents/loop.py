"""An agent's loop: the model writes, its calls are carried out, what they led to is shown to it, and it goes on.

The forms are those of :mod:`qwen2vl.agents.function_calls` (arXiv 2409.12191, section 2.2.1, and Qwen-Agent's).
Thoughts, calls and results stand in one turn of the assistant, which stays open until the model answers without a
call. A call that cannot be read ends the turn, and a user's turn says what was wrong; one that can be read but is not
allowed gets its error as a result. Nothing that the model writes is evaluated: a call is a name among those declared,
and arguments that are JSON.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..errors import ContextLengthError, FunctionCallError, PromptError
from ..prompt.chatml import DEFAULT_SYSTEM_PROMPT
from .function_calls import (
    Action,
    Call,
    Result,
    Step,
    Style,
    check_call,
    declare_actions,
    parse_turn,
    render_call,
    render_turn,
    stop_words,
)

if TYPE_CHECKING:
    from ..conversation import Conversation
    from ..generation import GenerationConfig
    from ..model import Qwen2VL
    from ..prompt.processor import Processor

Content = str | Sequence[Mapping[str, Any]]
#: From a conversation to what the model writes next, up to a stop word of the form. Where the last message is the
#: assistant's, the model goes on with it.
Writer = Callable[[Sequence[Mapping[str, Any]]], str]
Outcome = Literal["done", "answered", "step limit", "error limit", "context limit"]


class Environment(Protocol):
    """What an agent acts in."""

    @property
    def actions(self) -> Sequence[Action]:
        """What may be called."""
        ...

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        ...

    def reset(self) -> Content:
        """Begin again. Returns the user's turn: the task, and the first observation."""
        ...

    def execute(self, call: Call) -> Result:
        """Carry out one call, which :func:`qwen2vl.agents.function_calls.check_call` has let pass.

        Returns what the model is to see of it, a new observation as a rule. Raises :class:`FunctionCallError`, with a
        message for the model, for a call that is not allowed or makes no sense now; nothing must have changed then.
        """
        ...


@dataclass(frozen=True)
class AgentStep:
    """What the model wrote at once, and what came of it.

    Attributes:
        text: as written, without the stop word.
        calls, results: those carried out or refused; a refusal's result begins with "Error: ".
        error: why a call could not be read, or was refused; "" where all went well.
    """

    text: str
    calls: tuple[Call, ...] = ()
    results: tuple[Result, ...] = ()
    error: str = ""


@dataclass
class Episode:
    """One run of an agent.

    Attributes:
        outcome: "done", the environment said so; "answered", the model wrote without a call; or the limit that was met.
            None while an :class:`AgentRun` is not over.
        messages: the conversation, as a processor takes it.
        steps: what happened, in order.
        answer: what the model wrote last without a call, "" where it never did.
    """

    outcome: Outcome | None
    messages: list[dict[str, Any]]
    steps: list[AgentStep] = field(default_factory=list)
    answer: str = ""


class AgentRun:
    """A run of an agent one step at a time, for who looks on between two. Arguments and errors are those of
    :func:`run_agent`; the environment is reset here.

    Attributes:
        episode: what happened so far; its outcome is None until the run is over.
    """

    def __init__(
        self,
        write: Writer,
        environment: Environment,
        *,
        style: Style = "paper",
        system: str | None = None,
        max_steps: int = 20,
        max_errors: int = 3,
        max_images: int | None = None,
    ) -> None:
        for name, value, least in (("max_steps", max_steps, 1), ("max_errors", max_errors, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise PromptError(f"{name}: wants an integer >= {least}, got {value!r}")
        if max_images is not None and (
            not isinstance(max_images, int) or isinstance(max_images, bool) or max_images < 1
        ):
            raise PromptError(f"max_images: wants None or an integer >= 1, got {max_images!r}")
        if system is None:
            system = write.system_prompt if isinstance(write, ModelWriter) else DEFAULT_SYSTEM_PROMPT
        self._write, self._environment = write, environment
        self._style: Style = style
        self._max_steps, self._max_errors, self._max_images = max_steps, max_errors, max_images
        self._actions = list(environment.actions)
        self._turn: list[Step] = []  # of the assistant, so far
        self._errors = 0
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": declare_actions(self._actions, style, system=system)},
            {"role": "user", "content": environment.reset()},
        ]
        self.episode = Episode(None, messages)

    def step(self) -> AgentStep | None:
        """Let the model write once, and carry out what it wrote. None where there was no room for it in its context.

        Where ``write`` raises anything else nothing has happened, and the step may be tried again.

        Raises:
            PromptError: the run is over.
        """
        episode = self.episode
        if episode.outcome is not None:
            raise PromptError(f"the run is over ({episode.outcome}), no more steps are taken")
        messages = episode.messages
        try:
            text = self._write(_forget_images([*messages, *self._open_turn()], self._max_images))
        except ContextLengthError:
            self._end("context limit")
            return None
        step, added = _take(text, self._environment, self._actions, self._style)
        episode.steps.append(step)
        self._errors = self._errors + 1 if step.error else 0
        self._turn += added
        if step.error and not step.calls:  # the turn cannot be gone on with: what was written is no part of the form
            written = [*render_turn(self._turn, self._style), {"type": "text", "text": text}]
            messages += [
                {"role": "assistant", "content": written},
                {"role": "user", "content": f"Error: {step.error}. Write the call again."},
            ]
            self._turn = []
        if not (step.calls or step.error):
            episode.answer = "".join(part for part in added if isinstance(part, str))
            self._end("done" if self._environment.done else "answered")
        elif self._environment.done:
            self._end("done")
        elif self._errors > self._max_errors:
            self._end("error limit")
        elif len(episode.steps) == self._max_steps:
            self._end("step limit")
        return step

    def _open_turn(self) -> list[dict[str, Any]]:
        return [{"role": "assistant", "content": render_turn(self._turn, self._style)}] if self._turn else []

    def _end(self, outcome: Outcome) -> None:
        self.episode.outcome = outcome
        self.episode.messages += self._open_turn()


def run_agent(
    write: Writer,
    environment: Environment,
    *,
    style: Style = "paper",
    system: str | None = None,
    max_steps: int = 20,
    max_errors: int = 3,
    max_images: int | None = None,
    on_step: Callable[[AgentStep], None] | None = None,
) -> Episode:
    """Let a model act until the environment is done or the model answers without acting.

    Args:
        write: the model; :func:`model_writer` makes one of a checkpoint.
        environment: reset first.
        style: form of the calls. Released checkpoints know both; "paper" is for user interfaces.
        system: what stands in the system prompt before the actions. None: what the checkpoint of a :class:`ModelWriter`
            begins with where nothing is given, that of the released models for another writer.
        max_steps: times the model may write.
        max_errors: so many times in a row its call may be unreadable or refused; the next one ends the run.
        max_images: only the latest so many observations keep their images; in place of an earlier one the model reads
            that it was left out. None keeps all, each of which takes its tokens at every step.
        on_step: called after every step.

    Raises:
        PromptError: a limit that is no positive integer, or an environment whose first turn is malformed.
        FunctionCallError: actions that cannot be declared in this form.
    """
    run = AgentRun(
        write,
        environment,
        style=style,
        system=system,
        max_steps=max_steps,
        max_errors=max_errors,
        max_images=max_images,
    )
    while run.episode.outcome is None:
        step = run.step()
        if step is not None and on_step is not None:
            on_step(step)
    return run.episode


def _take(text: str, environment: Environment, actions: Sequence[Action], style: Style) -> tuple[AgentStep, list[Step]]:
    """What the model wrote, carried out: the step, and what it adds to the assistant's turn."""
    try:
        written = parse_turn(text, style)
        for step in written:
            if isinstance(step, Call):
                render_call(step, style).encode()  # what JSON can spell, but the prompt not hold
    except (FunctionCallError, UnicodeEncodeError) as error:
        return AgentStep(text, error=str(error)), []
    # Results are the environment's to give: from one that the model made up on, nothing counts.
    end = next((n for n, step in enumerate(written) if isinstance(step, Result)), len(written))
    added: list[Step] = []
    calls: list[Call] = []
    results: list[Result] = []
    problem = ""
    for step in written[:end]:
        if isinstance(step, str) and calls:
            break  # text behind a call was written without having seen its result
        added.append(step)
        if isinstance(step, Call):
            calls.append(step)
    for call in calls:
        try:
            if environment.done:
                raise FunctionCallError("the task is over; nothing was done")
            check_call(call, actions)
            result = environment.execute(call)
        except FunctionCallError as error:
            problem = problem or str(error)
            result = Result(f"Error: {error}")
        results.append(result)
    return AgentStep(text, tuple(calls), tuple(results), problem), [*added, *results]


def _forget_images(messages: Sequence[Mapping[str, Any]], keep: int | None) -> list[dict[str, Any]]:
    """The messages with only the latest ``keep`` images."""
    if keep is None:
        return [dict(message) for message in messages]
    kept: list[dict[str, Any]] = []
    for message in reversed(messages):
        content = message["content"]
        if not isinstance(content, str):
            items: list[Mapping[str, Any]] = []
            for item in reversed(content):
                if "text" not in item:
                    keep -= 1
                    if keep < 0:
                        marks = {"loss": item["loss"]} if "loss" in item else {}
                        item = {"type": "text", "text": "(an earlier image, left out)", **marks}
                items.append(item)
            content = items[::-1]
        kept.append({**message, "content": content})
    return kept[::-1]


def _new_conversation() -> Conversation:
    from ..conversation import Conversation  # which loads PyTorch

    return Conversation()


@dataclass(frozen=True)
class ModelWriter:
    """A checkpoint as the one who writes; :func:`model_writer` makes it. What it has read of a conversation it keeps
    for the next step, in ``conversation``."""

    model: Qwen2VL
    processor: Processor
    config: GenerationConfig
    options: Mapping[str, Any] = field(default_factory=dict)
    conversation: Conversation = field(default_factory=_new_conversation, compare=False, repr=False)
    on_token: Callable[[int, int, str], None] | None = field(default=None, compare=False, repr=False)

    @property
    def system_prompt(self) -> str:
        """What the checkpoint's chat template begins with where no system prompt is given."""
        return self.processor.default_system_prompt

    def __call__(self, messages: Sequence[Mapping[str, Any]]) -> str:
        from ..generation import generate

        going_on = messages[-1]["role"] == "assistant"
        inputs = self.processor(messages, continue_final_message=going_on, **self.options)
        return generate(
            self.model,
            inputs,
            tokenizer=self.processor.tokenizer,
            config=self.config,
            on_token=self.on_token,
            conversation=self.conversation,
        ).texts[0]


def model_writer(
    model: Qwen2VL,
    processor: Processor,
    *,
    style: Style = "paper",
    config: GenerationConfig | None = None,
    on_token: Callable[[int, int, str], None] | None = None,
    **options: Any,
) -> ModelWriter:
    """A checkpoint as the one who writes. Pictures that it was shown before are not encoded again: the model is given
    :class:`qwen2vl.features.KeptFeatures` unless it has some.

    Args:
        style: whose stop words end what is written; that of :func:`run_agent`.
        config: default :meth:`GenerationConfig.from_model` with 512 new tokens; its ``stop`` is added to.
        on_token: told what is written while it is, as by :func:`qwen2vl.generate`; what it raises ends the step.
        options: of the processor, for images.
    """
    from ..features import KeptFeatures
    from ..generation import GenerationConfig

    if model.kept_features is None:
        model.kept_features = KeptFeatures()
    config = config or GenerationConfig.from_model(model, max_new_tokens=512)
    return ModelWriter(
        model, processor, replace(config, stop=(*config.stop, *stop_words(style))), options, on_token=on_token
    )
