"""Chat messages with their images and videos in, the model's input tensors out."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import Qwen2VLConfig
from ..errors import CheckpointError, MediaError, PromptError
from ..hub import resolve
from ..media.image import MAX_PIXELS, MIN_PIXELS, ImagePatches, check_positive_int, preprocess_image
from ..media.video import MAX_FRAME_PIXELS, MAX_VIDEO_TOKENS, MIN_FRAME_PIXELS, VideoPatches, preprocess_video
from .chatml import (
    LOW_DETAIL_PIXELS,
    Control,
    Media,
    Span,
    Text,
    check_placeholders,
    render,
    render_document,
    render_spans,
)
from .files import check_token_ids, pixel_limits_of, read_image_settings, write_image_settings, write_tokenizer_files
from .inputs import IGNORED, Inputs, MediaInfo, describe_media, pad_rows
from .tokenizer import IMAGE_PAD, VIDEO_PAD, Tokenizer

__all__ = ["IGNORED", "Inputs", "MediaInfo", "Messages", "Processor"]

Messages = Sequence[Mapping[str, Any]]

# (min, max) pixels of one image and of one video frame where nobody says otherwise.
_IMAGE_PIXELS = (MIN_PIXELS, MAX_PIXELS)
_FRAME_PIXELS = (MIN_FRAME_PIXELS, MAX_FRAME_PIXELS)


class Processor:
    """Tokenizer and media preprocessing of one checkpoint.

    Args:
        min_pixels, max_pixels: limits of an image's area after resizing; its sides become multiples of
            patch_size x merge_size within them.
        patch_size, merge_size, temporal_patch_size: as the checkpoint's vision tower has them.
        allow_remote: fetch http and https URLs. Off by default: messages may come from people who should not
            make this machine send requests.
        allow_local_files: open paths and `file://` URLs. Set it False when messages come from people who should not
            read this machine's files; then only bytes, arrays, PIL images, file objects that the program opened
            itself, data URIs and, with `allow_remote`, http(s) URLs are taken.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        patch_size: int = 14,
        merge_size: int = 2,
        temporal_patch_size: int = 2,
        allow_remote: bool = False,
        allow_local_files: bool = True,
    ):
        self.tokenizer = tokenizer
        self.min_pixels, self.max_pixels = _pixel_limits(_IMAGE_PIXELS, (min_pixels, max_pixels))
        self.patch_size = patch_size
        self.merge_size = merge_size
        self.temporal_patch_size = temporal_patch_size
        self.allow_remote = allow_remote
        self.allow_local_files = allow_local_files

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        allow_remote: bool = False,
        allow_local_files: bool = True,
    ) -> "Processor":
        """Read tokenizer.json, config.json and, where present, preprocessor_config.json of a checkpoint.

        Args:
            name_or_path: a folder, or a hub id such as "Qwen/Qwen2-VL-2B-Instruct".
            min_pixels, max_pixels: override the checkpoint's limits for images.
            allow_remote, allow_local_files: what media may be named by messages, see the class. The checkpoint itself
                is read either way.

        Raises:
            CheckpointError: a file is missing or unreadable, or the files contradict one another.
        """
        folder = resolve(os.fspath(name_or_path), with_weights=False)
        config = Qwen2VLConfig.from_pretrained(folder)
        tokenizer = Tokenizer.from_pretrained(folder)
        check_token_ids(config, tokenizer, folder)
        settings = read_image_settings(folder)
        vision = config.vision
        sizes = {
            "patch_size": vision.patch_size,
            "merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
        }
        for name, value in sizes.items():
            if settings.get(name, value) != value:
                raise CheckpointError(f"{folder}: {name} is {settings[name]!r} for images, but {value} in config.json")
        limits = _pixel_limits(_IMAGE_PIXELS, pixel_limits_of(settings, folder), (min_pixels, max_pixels))
        return cls(
            tokenizer,
            min_pixels=limits[0],
            max_pixels=limits[1],
            allow_remote=allow_remote,
            allow_local_files=allow_local_files,
            **sizes,
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write tokenizer.json, tokenizer_config.json, chat_template.json and preprocessor_config.json, with this
        processor's limits, beside what `Qwen2VL.save_pretrained` writes; `from_pretrained` then reads the folder.

        The folder is made where missing, and may be the one that this processor was read from. The chat template is
        this package's own wording of the released one: it writes the same prompts.

        Returns:
            The folder.

        Raises:
            CheckpointError: the folder holds a processor_config.json that is no JSON.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_tokenizer_files(folder, self.tokenizer)
        write_image_settings(
            folder,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
            patch_size=self.patch_size,
            merge_size=self.merge_size,
            temporal_patch_size=self.temporal_patch_size,
        )
        return folder

    def __call__(
        self,
        messages: Messages | Sequence[Messages],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        add_vision_id: bool = False,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        fps: float = 2.0,
        num_frames: int | None = None,
        min_frames: int = 4,
        max_frames: int = 768,
        video_min_pixels: int | None = None,
        video_max_pixels: int | None = None,
        max_video_tokens: int = MAX_VIDEO_TOKENS,
        padding_side: Literal["left", "right"] = "left",
        progress: Callable[[int, int], None] | None = None,
    ) -> Inputs:
        """Inputs for one conversation, or for a list of conversations as one batch.

        An option of a media item wins over the same option given here, and this over the processor's own.
        Where only one of a pair of limits is given it moves the other out of its way.

        Args:
            messages: see `qwen2vl.prompt.chatml.render`.
            add_generation_prompt: end with the opening of an assistant turn.
            continue_final_message: leave the last message, an assistant's, open for the model to go on with.
            add_vision_id: number pictures and videos in the text.
            min_pixels, max_pixels: area of each image after resizing.
            fps: video frames taken per second. Ignored where a number of frames is given.
            num_frames: video frames taken.
            min_frames, max_frames: limits of the number of frames that `fps` leads to.
            video_min_pixels, video_max_pixels: area of each video frame after resizing.
            max_video_tokens: cap on the tokens of one video; its frames shrink to fit.
            padding_side: where shorter rows are filled with <|endoftext|>, with attention_mask 0 there.
            progress: called with (frames done, frames in all) while a video is read.

        Raises:
            PromptError: messages are malformed.
            MediaError: an image or video cannot be used, and the message begins with its place; or an option
                given here is out of range.
        """
        prompts = [
            render(
                chat,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                add_vision_id=add_vision_id,
                where=where,
            )
            for chat, where in _conversations(messages)
        ]
        return self._inputs(
            [[Span(tuple(segments), False)] for segments in prompts],
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            fps=fps,
            num_frames=num_frames,
            min_frames=min_frames,
            max_frames=max_frames,
            video_min_pixels=video_min_pixels,
            video_max_pixels=video_max_pixels,
            max_video_tokens=max_video_tokens,
            padding_side=padding_side,
            progress=progress,
        )

    def supervised(
        self,
        messages: Messages | Sequence[Messages],
        *,
        add_vision_id: bool = False,
        padding_side: Literal["left", "right"] = "right",
        **options: Any,
    ) -> Inputs:
        """Inputs to learn from: as calling the processor, without a generation prompt and with `labels` (B, L) int64.

        A label is the token's own id where it is taught, not shifted, and `IGNORED` elsewhere, placeholders and padding
        included. What is taught is said by `qwen2vl.prompt.chatml.render_spans`: an assistant's text and `<|im_end|>`.

        Args:
            messages, add_vision_id: see `__call__`.
            options: the options of `__call__` for images and videos.
        """
        spans = [
            render_spans(chat, add_vision_id=add_vision_id, where=where) for chat, where in _conversations(messages)
        ]
        return self._inputs(spans, padding_side=padding_side, labels=True, **options)

    def supervised_document(self, content: str | Sequence[Mapping[str, Any]], **options: Any) -> Inputs:
        """Inputs to learn one document from, all of its text and the `<|endoftext|>` behind it, as `supervised`.

        Args:
            content: text, or a list of text, image and video items; see `qwen2vl.prompt.chatml.render_document`.
            options: the options of `__call__` for images and videos.
        """
        return self._inputs([render_document(content)], labels=True, **options)

    def _inputs(
        self,
        prompts: Sequence[Sequence[Span]],
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        fps: float = 2.0,
        num_frames: int | None = None,
        min_frames: int = 4,
        max_frames: int = 768,
        video_min_pixels: int | None = None,
        video_max_pixels: int | None = None,
        max_video_tokens: int = MAX_VIDEO_TOKENS,
        padding_side: str = "right",
        progress: Callable[[int, int], None] | None = None,
        labels: bool = False,
    ) -> Inputs:
        if padding_side not in ("left", "right"):
            raise PromptError(f"padding_side: wants 'left' or 'right', got {padding_side!r}")
        image_limits = _pixel_limits((self.min_pixels, self.max_pixels), (min_pixels, max_pixels))
        frame_limits = _pixel_limits(_FRAME_PIXELS, (video_min_pixels, video_max_pixels), prefix="video_")
        video_options = {
            "fps": fps,
            "num_frames": num_frames,
            "min_frames": min_frames,
            "max_frames": max_frames,
            "max_tokens": max_video_tokens,
            "progress": progress,
        }
        media = [item for spans in prompts for span in spans for item in span.segments if isinstance(item, Media)]
        loaded = list(zip(media, self._load(media, image_limits, frame_limits, video_options), strict=True))
        pads = iter([patches.num_tokens for _, patches in loaded])
        rows = [self._encode(spans, pads) for spans in prompts]

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
        check_placeholders(
            tensors["input_ids"],
            tensors.get("image_grid_thw"),
            tensors.get("video_grid_thw"),
            image_token_id=self.tokenizer.id(IMAGE_PAD),
            video_token_id=self.tokenizer.id(VIDEO_PAD),
            merge_size=self.merge_size,
        )
        return Inputs(tensors, [describe_media(item, patches) for item, patches in loaded])

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of one sequence; see `Tokenizer.decode`."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(self, sequences: Iterable[Iterable[int]], *, skip_special_tokens: bool = True) -> list[str]:
        """Texts of several sequences."""
        return self.tokenizer.batch_decode(sequences, skip_special_tokens=skip_special_tokens)

    def _load(
        self,
        media: Sequence[Media],
        image_limits: tuple[int, int],
        frame_limits: tuple[int, int],
        video_options: Mapping[str, Any],
    ) -> list[ImagePatches | VideoPatches]:
        """All items in order. Several images are read side by side, the rest one after another.

        A file object or PIL image may stand in two places and must not be read from two threads at once.
        """
        aside = [item.kind == "image" and isinstance(item.source, (str, bytes, os.PathLike)) for item in media]
        cores = torch.get_num_threads()
        workers = max(1, min(cores, sum(aside)))

        def load(item: Media) -> ImagePatches | VideoPatches:
            try:
                if item.kind == "video":
                    return self._load_video(item, frame_limits, video_options)
                return self._load_image(item, image_limits, None if workers == 1 else cores // workers)
            except MediaError as error:
                raise MediaError(f"{item.where}: {error}") from error

        if workers == 1:
            return [load(item) for item in media]
        with ThreadPoolExecutor(workers) as pool:
            waiting = [pool.submit(load, item) if ahead else None for item, ahead in zip(media, aside, strict=True)]
            try:
                return [
                    load(i) if future is None else future.result() for i, future in zip(media, waiting, strict=True)
                ]
            finally:
                pool.shutdown(cancel_futures=True)  # after an error nobody waits for the rest

    def _load_image(self, item: Media, limits: tuple[int, int], threads: int | None) -> ImagePatches:
        options = dict(item.options)
        low, high = _item_limits(item, limits, options)
        return preprocess_image(
            item.source,
            min_pixels=low,
            max_pixels=high,
            num_threads=threads,
            patch_size=self.patch_size,
            merge_size=self.merge_size,
            **options,
            **self._access(),
        )

    def _load_video(self, item: Media, limits: tuple[int, int], call_options: Mapping[str, Any]) -> VideoPatches:
        own = dict(item.options)
        low, high = _item_limits(item, limits, own)
        options = dict(call_options)
        if "fps" in own:
            options["num_frames"] = None  # the item's rate wins over the call's number of frames
        if "total_pixels" in own:
            # As in qwen-vl-utils: the pixels of one frame of every time step, so that this many make a token.
            pixels, per_token = own.pop("total_pixels"), (self.patch_size * self.merge_size) ** 2
            if pixels < per_token:
                raise PromptError(f"{item.where}.total_pixels: wants at least {per_token}, got {pixels}")
            options["max_tokens"] = pixels // per_token
        options.update(own)
        return preprocess_video(
            item.source,
            min_pixels=low,
            max_pixels=high,
            patch_size=self.patch_size,
            merge_size=self.merge_size,
            temporal_patch_size=self.temporal_patch_size,
            **options,
            **self._access(),
        )

    def _access(self) -> dict[str, Any]:
        return {"allow_remote": self.allow_remote, "allow_local_files": self.allow_local_files}

    def _encode(self, spans: Sequence[Span], pads: Iterator[int]) -> tuple[list[int], list[int]]:
        """Ids and labels of one prompt."""
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


def _pixel_limits(limits: tuple[int, int], *scopes: tuple[int | None, int | None], prefix: str = "") -> tuple[int, int]:
    """(min, max) pixels after each narrower scope; a limit given alone moves the inherited other one."""
    low, high = limits
    for given_low, given_high in scopes:
        if given_low is not None:
            low = check_positive_int(f"{prefix}min_pixels", given_low)
            high = max(high, low)
        if given_high is not None:
            high = check_positive_int(f"{prefix}max_pixels", given_high)
            low = low if given_low is not None else min(low, high)
    return low, high


def _item_limits(item: Media, limits: tuple[int, int], options: dict[str, Any]) -> tuple[int, int]:
    """(min, max) pixels of one item, whose own limits are taken out of `options`."""
    low, high = _pixel_limits(limits, (options.pop("min_pixels", None), options.pop("max_pixels", None)))
    if item.detail == "low":
        low, high = min(low, LOW_DETAIL_PIXELS), min(high, LOW_DETAIL_PIXELS)
    return low, high
