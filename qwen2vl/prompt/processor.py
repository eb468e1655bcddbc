"""Chat messages with their images and videos in, the model's input tensors out."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import MediaError, PromptError
from ..hub import Checkpoint
from ..media.image import ImagePatches, preprocess_image
from ..media.options import DEFAULTS, OPTION_NAMES, Access, Limits, MediaOptions, PatchShape
from ..media.video import Progress, VideoPatches, preprocess_video
from .budget import TokenBudget
from .chatml import (
    DEFAULT_SYSTEM_PROMPT,
    LOW_DETAIL_PIXELS,
    Control,
    Media,
    Span,
    Text,
    as_flagged,
    render,
    render_document,
    render_spans,
)
from .files import (
    check_token_ids,
    read_chat_template,
    read_media_options,
    write_media_options,
    write_tokenizer_files,
)
from .inputs import Inputs, MediaInfo, joined, pad_rows
from .template import ChatTemplate
from .tokenizer import MAX_CHARACTERS, Tokenizer

IGNORED = -100  # the label of what is not taught, cross_entropy's default
Messages = Sequence[Mapping[str, Any]]
Roots = str | os.PathLike[str] | Iterable[str | os.PathLike[str]] | None


class Processor:
    """Tokenizer and media preprocessing of one checkpoint.

    Args:
        patch_size, merge_size, temporal_patch_size: as the checkpoint's vision tower has them.
        chat_template: the checkpoint's own; prompts are written by it where it differs from that of the released
            instruct models, which None stands for.
        allow_remote: fetch http and https URLs. Off by default: messages may come from people who should not
            make this machine send requests.
        allow_local_files: open paths and `file://` URLs. Set it False when messages come from people who should not
            read this machine's files; then only bytes, arrays, PIL images, file objects that the program opened
            itself, data URIs and, with `allow_remote`, http(s) URLs are taken.
        roots: a folder or several, below which local files must lie after symbolic links are followed; None means
            anywhere.
        base: the folder that relative paths begin at; None means the process's working folder.
        limits: what pictures, videos and all of a call may cost, whatever messages and calls ask for; see
            `qwen2vl.media.options.Limits`. Among them are the size of a picture and the time of a video.
        options: defaults of what `qwen2vl.media.options.MediaOptions` holds, by name, such as `max_pixels`.

    Attributes:
        options (MediaOptions), access (Access), shape (PatchShape): what the arguments say.

    Raises:
        MediaError: an option is out of range, or a root or the base is no folder. TypeError: an option is unknown.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        patch_size: int = PatchShape.patch_size,
        merge_size: int = PatchShape.merge_size,
        temporal_patch_size: int = PatchShape.temporal_patch_size,
        chat_template: ChatTemplate | None = None,
        allow_remote: bool = False,
        allow_local_files: bool = True,
        roots: Roots = None,
        base: str | os.PathLike[str] | None = None,
        limits: Limits | None = None,
        **options: Any,
    ):
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        if chat_template is None or chat_template.standard:
            self._render = partial(render, markers=tokenizer.markers)
            self._render_spans = partial(render_spans, markers=tokenizer.markers)
        else:
            self._render, self._render_spans = chat_template.render, chat_template.render_spans
        self.options = DEFAULTS.updated(options)
        self.shape = PatchShape(patch_size, merge_size, temporal_patch_size)
        self.access = Access(allow_local_files, allow_remote, roots, base, limits or Limits())  # type: ignore[arg-type]

    @property
    def default_system_prompt(self) -> str:
        """What the checkpoint's chat template begins with where no system turn is given; "" where with nothing."""
        own = self.chat_template
        return DEFAULT_SYSTEM_PROMPT if own is None or own.standard else own.default_system_prompt

    @property
    def min_pixels(self) -> int:
        """Least area of an image after resizing, in pixels."""
        return self.options.min_pixels

    @property
    def max_pixels(self) -> int:
        """Largest area of an image after resizing, in pixels."""
        return self.options.max_pixels

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str] | Checkpoint,
        *,
        allow_remote: bool = False,
        allow_local_files: bool = True,
        roots: Roots = None,
        base: str | os.PathLike[str] | None = None,
        limits: Limits | None = None,
        max_characters: int = MAX_CHARACTERS,
        **options: Any,
    ) -> "Processor":
        """Read tokenizer.json, config.json and, where present, the limits of images and of videos of a checkpoint, see
        `qwen2vl.prompt.files.read_media_options`.

        Args:
            name_or_path: a folder, a hub id such as "Qwen/Qwen2-VL-2B-Instruct", or a checkpoint that was found before.
            allow_remote, allow_local_files, roots, base, limits: what media may be named by messages, and what they
                may cost, see the class. The checkpoint itself is read in any case.
            max_characters: of text in one conversation, see `Tokenizer`.
            options: over the checkpoint's limits and the defaults, see the class.

        Raises:
            CheckpointError: a file is missing or unreadable, or the files contradict one another.
            MediaError, TypeError: see the class.
        """
        checkpoint = Checkpoint.find(name_or_path, with_weights=False)
        folder, vision = checkpoint.folder, checkpoint.config.vision
        tokenizer = Tokenizer.from_pretrained(folder, max_characters=max_characters)
        check_token_ids(checkpoint.config, tokenizer, folder)
        stated = read_media_options(folder, vision).updated(options)
        sizes = {
            "patch_size": vision.patch_size,
            "merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
        }
        access = {"allow_remote": allow_remote, "allow_local_files": allow_local_files, "roots": roots, "base": base}
        template = read_chat_template(folder, tokenizer)
        return cls(tokenizer, **sizes, chat_template=template, **access, limits=limits, **vars(stated))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write tokenizer.json, tokenizer_config.json, chat_template.json and, with this processor's limits,
        preprocessor_config.json and video_preprocessor_config.json, beside what `Qwen2VL.save_pretrained` writes;
        `from_pretrained` then reads the folder.

        The folder is made where missing, and may be the one that this processor was read from. The chat template is
        the checkpoint's own; where it had none, this package's wording of the released one.

        Returns:
            The folder.

        Raises:
            CheckpointError: the folder holds a processor_config.json that is no JSON.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tokenizer_files(folder, self.tokenizer, self.chat_template)
        write_media_options(folder, self.options, self.shape)
        return folder

    def __call__(
        self,
        messages: Messages | Sequence[Messages],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_vision_id: bool = False,
        padding_side: Literal["left", "right"] = "left",
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Inputs:
        """Inputs for one conversation, or for a list of conversations as one batch.

        An option of a media item wins over the same option given here, and this over the processor's own.
        Where only one of a pair of limits is given it moves the other out of its way.

        Args:
            messages: see `qwen2vl.prompt.chatml.render`, and `qwen2vl.prompt.template` for a checkpoint whose own chat
                template writes them otherwise.
            add_generation_prompt: end with the opening of an assistant turn.
            continue_final_message: leave the last message, an assistant's, open for the model to go on with.
            add_vision_id: number pictures and videos in the text.
            padding_side: where shorter rows are filled with <|endoftext|>, with attention_mask 0 there.
            progress: called with (frames done, frames in all) while a video is read.
            options: how images and videos are preprocessed, under the names of `qwen2vl.media.options.MediaOptions`:
                min_pixels and max_pixels of images, fps, num_frames, min_frames, max_frames, video_min_pixels,
                video_max_pixels and max_video_tokens of videos.

        Raises:
            PromptError: messages are malformed, or their images and videos would be too many tokens.
            MediaError: an image or video cannot be used or is too large, and the message begins with its place; or an
                option given here is out of range.
            TypeError: an option is unknown; the message lists those that there are.
        """
        chosen = self.options.updated(options) if options else self.options
        written: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "add_vision_id": add_vision_id,
        }
        prompts = [self._render(chat, **written, where=where) for chat, where in _conversations(messages)]
        spans = [[Span(tuple(segments), False)] for segments in prompts]
        return self._inputs(spans, chosen, padding_side, progress)

    def supervised(
        self,
        messages: Messages | Sequence[Messages],
        *,
        add_vision_id: bool = False,
        padding_side: Literal["left", "right"] = "right",
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Inputs:
        """Inputs to learn from: as calling the processor, without a generation prompt and with `labels` (B, L) int64.

        A label is the token's own id where it is taught, not shifted, and `IGNORED` elsewhere, placeholders and padding
        included. What is taught is said by `qwen2vl.prompt.chatml.render_spans`: an assistant's text and `<|im_end|>`.

        Args, raises: as `__call__`.
        """
        chosen = self.options.updated(options) if options else self.options
        spans = [
            self._render_spans(chat, add_vision_id=add_vision_id, where=where)
            for chat, where in _conversations(messages)
        ]
        return self._inputs(spans, chosen, padding_side, progress, labels=True)

    def supervised_document(
        self,
        content: str | Sequence[Mapping[str, Any]],
        *,
        padding_side: Literal["left", "right"] = "right",
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Inputs:
        """Inputs to learn one document from, all of its text and the `<|endoftext|>` behind it, as `supervised`.

        Args:
            content: text, or a list of text, image and video items; see `qwen2vl.prompt.chatml.render_document`.
            padding_side, progress, options: as `__call__`.
        """
        chosen = self.options.updated(options) if options else self.options
        spans = render_document(content, markers=self.tokenizer.markers)
        return self._inputs([spans], chosen, padding_side, progress, labels=True)

    def _inputs(
        self,
        prompts: Sequence[Sequence[Span]],
        options: MediaOptions,
        padding_side: str,
        progress: Progress | None,
        labels: bool = False,
    ) -> Inputs:
        if padding_side not in ("left", "right"):
            raise PromptError(f"padding_side: wants 'left' or 'right', got {padding_side!r}")
        for spans in prompts:  # before any media are read
            texts = (len(one.text) for span in spans for one in span.segments if isinstance(one, Text))
            self.tokenizer.check_length(sum(texts), "messages: characters of text")
        found = [
            (row, item)
            for row, spans in enumerate(prompts)
            for span in spans
            for item in span.segments
            if isinstance(item, Media)
        ]
        media = [item for _, item in found]
        loaded = list(zip(media, self._load(found, options, progress), strict=True))
        pads = iter([patches.num_tokens for _, patches in loaded])
        rows = [self._encode(as_flagged(spans, self.tokenizer.flagged), pads) for spans in prompts]

        ids = pad_rows([row for row, _ in rows], self.tokenizer.pad_id, padding_side)
        present = pad_rows([[1] * len(row) for row, _ in rows], 0, padding_side)
        tensors = {"input_ids": ids, "attention_mask": present}
        if labels:
            tensors["labels"] = pad_rows([row for _, row in rows], IGNORED, padding_side)
        for kind, pixels, grid in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            of_kind = [patches for item, patches in loaded if item.kind == kind]
            if of_kind:
                packed = [torch.from_numpy(patches.patches) for patches in of_kind]
                tensors[pixels] = torch.cat(packed) if len(packed) > 1 else packed[0]
                tensors[grid] = torch.tensor([patches.grid_thw for patches in of_kind], dtype=torch.int64)
        return Inputs(tensors, [_describe(*pair, row) for pair, (row, _) in zip(loaded, found, strict=True)])

    def join(self, inputs: Sequence[Inputs], *, padding_side: Literal["left", "right"] = "left") -> Inputs:
        """Several inputs as one batch, equal to that of one call with all their conversations.

        Args:
            inputs: what this processor gave, without padding, such as for one conversation each; without `labels`.
            padding_side: as `__call__`.

        Raises:
            PromptError: there are none, or one has padding or labels.
        """
        if padding_side not in ("left", "right"):
            raise PromptError(f"padding_side: wants 'left' or 'right', got {padding_side!r}")
        if not inputs:
            raise PromptError("inputs: wants at least one, got none")
        for n, one in enumerate(inputs):
            if "labels" in one or not bool(one["attention_mask"].all()):
                raise PromptError(f"inputs[{n}]: wants rows without padding and without labels")
        return joined(inputs, self.tokenizer.pad_id, padding_side)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of one sequence; see `Tokenizer.decode`."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, sequences: Iterable[Iterable[int]], *, skip_special_tokens: bool = True) -> list[str]:
        """Texts of several sequences."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=skip_special_tokens)

    def _load(
        self, found: Sequence[tuple[int, Media]], options: MediaOptions, progress: Progress | None
    ) -> list[ImagePatches | VideoPatches]:
        """All items, each given with its row, in order. Several images are read side by side, the rest one by one.

        A file object or PIL image may stand in two places and must not be read from two threads at once.
        """
        aside = [item.kind == "image" and isinstance(item.source, (str, bytes, os.PathLike)) for _, item in found]
        cores = torch.get_num_threads()
        workers = max(1, min(cores, sum(aside)))
        threads = None if workers == 1 else cores // workers
        budget = TokenBudget(self.access.limits)

        def load(row: int, item: Media) -> ImagePatches | VideoPatches:
            try:
                own, others = self._item_options(item, options)
                reserve = partial(budget.reserve, row)
                common = {"access": self.access, "shape": self.shape, "reserve": reserve, **others}
                if item.kind == "video":
                    return preprocess_video(item.source, own, progress=progress, **common)
                return preprocess_image(item.source, own, num_threads=threads, **common)
            except MediaError as error:
                raise MediaError(f"{item.where}: {error}") from error

        if workers == 1:
            return [load(*pair) for pair in found]
        with ThreadPoolExecutor(workers) as pool:
            waiting = [pool.submit(load, *pair) if ahead else None for pair, ahead in zip(found, aside, strict=True)]
            try:
                return [
                    load(*pair) if future is None else future.result()
                    for pair, future in zip(found, waiting, strict=True)
                ]
            finally:
                pool.shutdown(cancel_futures=True)  # after an error nobody waits for the rest

    def _item_options(self, item: Media, options: MediaOptions) -> tuple[MediaOptions, dict[str, Any]]:
        """The options of one item under those of its call, and what only an item can say."""
        own = {name: value for name, value in item.options.items() if name in OPTION_NAMES}
        others = {name: value for name, value in item.options.items() if name not in OPTION_NAMES}
        if "total_pixels" in others:
            # As in qwen-vl-utils, pixels are counted of one frame in every time step, so that this many make a token.
            pixels, per_token = others.pop("total_pixels"), self.shape.factor**2
            if pixels < per_token:
                raise PromptError(f"{item.where}.total_pixels: wants at least {per_token}, got {pixels}")
            own["max_video_tokens"] = pixels // per_token
        if own:
            options = options.updated(own)
        return options.capped(LOW_DETAIL_PIXELS) if item.detail == "low" else options, others

    def _encode(self, spans: Sequence[Span], pads: Iterator[int]) -> tuple[list[int], list[int]]:
        """Ids and labels of one prompt; each image or video takes the next number of ``pads`` as its placeholders."""
        ids: list[int] = []
        labels: list[int] = []
        for span in spans:
            start = len(ids)
            for segment in span.segments:
                if isinstance(segment, Text):
                    ids += self.tokenizer.encode_plain(segment.text)
                elif isinstance(segment, Control):
                    ids.append(self.tokenizer.id(segment.name))
                else:
                    ids += [self.tokenizer.id(segment.pad)] * next(pads)
            labels += ids[start:] if span.taught else [IGNORED] * (len(ids) - start)
        return ids, labels


def _conversations(messages: Any) -> list[tuple[Any, str]]:
    if isinstance(messages, (list, tuple)) and messages and isinstance(messages[0], (list, tuple)):
        return [(chat, f"messages[{n}]") for n, chat in enumerate(messages)]
    return [(messages, "messages")]


def _describe(item: Media, patches: ImagePatches | VideoPatches, row: int) -> MediaInfo:
    """What is told about an item that has been read."""
    sizes = (patches.source_size, patches.resized_size, patches.grid_thw, patches.num_tokens)
    if isinstance(patches, ImagePatches):
        return MediaInfo(item.kind, item.where, *sizes, row=row)
    times = tuple(float(time) for time in patches.frame_times)
    return MediaInfo(item.kind, item.where, *sizes, patches.duration, patches.native_fps, times, row)
