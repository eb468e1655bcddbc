"""``qwen2vl chat``: a conversation in the terminal, with images and videos attached on the way."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from ..interrupts import caught_by_caller
from ..media.options import MediaOptions
from .common import (
    AdapterOption,
    AllowRemoteOption,
    DeviceOption,
    DTypeOption,
    FpsOption,
    MaxNewTokensOption,
    MaxPixelsOption,
    MaxVisionPatchesOption,
    MinPixelsOption,
    ModelOption,
    QuietOption,
    RepetitionPenaltyOption,
    SeedOption,
    StopOption,
    SystemOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    explain,
    generation_config,
    load,
    longest_answer,
    notes,
    print_error,
    printable,
    progress_bar,
    stderr,
    tell_who_answers,
    video_options,
)
from .limits import LimitOption

if TYPE_CHECKING:
    from ..generation import GenerationConfig
    from ..model import Qwen2VL
    from ..prompt.processor import Processor

_HELP = """\
/image PATH    attach an image to the next message
/video PATH    attach a video to the next message
/system TEXT   set the system prompt; without TEXT the default one
/reset         forget the conversation
/help          this list
/quit          leave (also Ctrl-D)
Ctrl-C stops an answer."""


def chat(
    model: ModelOption = None,
    adapter: AdapterOption = None,
    system: SystemOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    stop: StopOption = None,
    min_pixels: MinPixelsOption = None,
    max_pixels: MaxPixelsOption = None,
    fps: FpsOption = MediaOptions.fps,
    allow_remote: AllowRemoteOption = False,
    limit: LimitOption = None,
    device: DeviceOption = None,
    dtype: DTypeOption = None,
    max_vision_patches: MaxVisionPatchesOption = None,
    quiet: QuietOption = False,
) -> None:
    """Talk about images and videos, turn by turn. /help lists the commands.

    Lines may also come through a pipe, one message or command each; an error then ends the program.
    """
    from ..features import KeptFeatures

    notes.quiet = quiet
    max_new_tokens = longest_answer(model, max_new_tokens)
    loaded, processor = load(
        model,
        device=device,
        dtype=dtype,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        allow_remote=allow_remote,
        max_vision_patches=max_vision_patches,
        limit=limit,
        adapter=adapter,
    )
    loaded.kept_features = KeptFeatures()  # every turn shows the pictures of those before it
    config = generation_config(
        loaded,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        repetition_penalty=repetition_penalty,
        stop=stop,
    )
    options = video_options(min_pixels, max_pixels, fps)
    tell_who_answers(model)
    if sys.stdin.isatty():
        notes.print(f"[bold]qwen2vl chat[/] [dim]with {escape(printable(name_model(model, loaded), True))}\n{_HELP}[/]")
    _Chat(loaded, processor, config, options, system).run()


@dataclass
class _Chat:
    """The conversation so far; media are kept as pixels, so that no file is read twice."""

    model: Qwen2VL
    processor: Processor
    config: GenerationConfig
    options: dict[str, Any]
    system: str | None
    turns: list[dict[str, Any]] = field(default_factory=list)
    attached: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        from ..conversation import Conversation

        self.conversation = Conversation()

    def run(self) -> None:
        interactive = sys.stdin.isatty()
        with caught_by_caller() if self._stoppable else nullcontext():
            self._take_all(interactive)

    @property
    def _stoppable(self) -> bool:
        """Whether Ctrl-C stops an answer and not the conversation: not where other processes compute it as well."""
        return sys.stdin.isatty() and self.model.parallel is None

    def _take_all(self, interactive: bool) -> None:
        for line in _lines(interactive):
            try:
                if not self.take(line.strip()):
                    return
            except KeyboardInterrupt:
                if not self._stoppable:
                    raise
                notes.print("[dim](stopped)[/]")
            except Exception as error:
                message, parallel = explain(error), self.model.parallel
                if message is None or not interactive or (parallel is not None and parallel.busy):
                    raise
                print_error(message)

    def take(self, line: str) -> bool:
        """One line of input; False where it ends the conversation."""
        from ..errors import PromptError

        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if command == "/quit":
            return False
        if command in ("/image", "/video"):
            if not rest:
                raise PromptError(f"{command} wants a path")
            (self.attach_image if command == "/image" else self.attach_video)(_path(rest))
        elif command == "/system":
            self.system = rest or None
        elif command == "/reset":
            self.turns.clear()
            self.attached.clear()
            self.conversation.forget()
        elif command == "/help":
            stderr.print(_HELP)
        elif command.startswith("/"):
            raise PromptError(f"no command {command!r}; /help lists them")
        elif line:
            self.ask(line)
        return True

    def attach_image(self, path: str) -> None:
        from ..media.image import load_image

        pixels = load_image(path, access=self.processor.access)
        self.attach(path, {"type": "image", "image": pixels})

    def attach_video(self, path: str) -> None:
        from ..media.inspection import patches_to_frames

        processor = self.processor
        with progress_bar("reading video frames") as report:
            inputs = processor(_message({"type": "video", "video": path}), progress=report, **self.options)
        frames = patches_to_frames(
            inputs["pixel_values_videos"].numpy(),
            inputs["video_grid_thw"][0].tolist(),
            patch_size=processor.shape.patch_size,
            merge_size=processor.shape.merge_size,
        )
        info = inputs.media[0]
        # Both limits at the frames' own size: every turn sees them as they are.
        area = frames.shape[1] * frames.shape[2]
        item = {"type": "video", "video": list(frames), "min_pixels": area, "max_pixels": area}
        self.attach(path, item, f"{len(info.frame_times)} frames of {info.duration:.1f} s, ", info.source_size)

    def attach(self, path: str, item: dict[str, Any], what: str = "", size: tuple[int, int] | None = None) -> None:
        """Keep an item for the next message and say what it is; ``size`` is its file's, if now another."""
        (info,) = self.processor(_message(item), **self.options).media
        self.attached.append(item)
        name = path if len(path) <= 200 else path[:60] + "..."
        height, width = size or info.source_size
        said = printable(f"attached {name}: {what}{width} × {height}, {info.num_tokens} tokens", notes.is_terminal)
        notes.print(f"[dim]{escape(said)}[/]")

    def ask(self, text: str) -> None:
        """One turn. A question that cannot be answered leaves the conversation as it was."""
        from ..generation import generate

        question = {"role": "user", "content": [*self.attached, {"type": "text", "text": text}]}
        messages = [*self.turns, question]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        pieces: list[str] = []

        def show(row: int, token: int, piece: str) -> None:
            pieces.append(piece)
            print(printable(piece), end="", flush=True)

        stopped = False
        try:
            inputs = self.processor(messages, **self.options)
            generate(
                self.model,
                inputs,
                tokenizer=self.processor.tokenizer,
                config=self.config,
                on_token=show,
                conversation=self.conversation,
            )
        except KeyboardInterrupt:
            if not self._stoppable:
                raise
            stopped = True
        print(flush=True)
        if stopped:
            notes.print("[dim](stopped)[/]")
            if not pieces:
                return
        self.turns = [*self.turns, question, {"role": "assistant", "content": "".join(pieces)}]
        self.attached = []


def name_model(model: str | None, loaded: Qwen2VL) -> str:
    """Which model talks: its name, parameters, how they are quantised, dtype and device."""
    from ..quantization import parameter_count

    count, how = parameter_count(loaded), loaded.config.quantization
    size = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
    dtype = str(loaded.dtype).removeprefix("torch.")
    form = dtype if how is None else f"{how.label}, {dtype}"
    return f"{'the toy' if model is None else model}: {size} parameters, {form}, on {loaded.device}"


def _message(item: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [item]}]


def _lines(interactive: bool) -> Iterator[str]:
    if not interactive:
        yield from sys.stdin
        return
    import readline  # noqa: F401  (gives input() a history and line editing)

    while True:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        yield line


def _path(text: str) -> str:
    """A path as typed, as quoted, or as terminals write a file dropped on them (with backslashes)."""
    if Path(text).expanduser().exists():
        return str(Path(text).expanduser())
    try:
        words = shlex.split(text)
    except ValueError:  # an apostrophe
        return text
    return str(Path(words[0]).expanduser()) if len(words) == 1 and "://" not in text else text
