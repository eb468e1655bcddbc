"""lmms-eval's benchmarks (DocVQA, InfoVQA, RealWorldQA, MTVQA, the video sets) on this package's model.

    pip install ".[eval]"        # lmms-eval 0.7.3, which finds this package by its entry point
    python -m lmms_eval --model qwen2vl --model_args pretrained=Qwen/Qwen2-VL-2B-Instruct \
        --tasks docvqa_val,infovqa_val,realworldqa,mtvqa,mvbench,egoschema,videomme

Prompts are the tasks' own for any model (their "default"), so the version of lmms-eval pins them; the limits of pixels
and frames are the arguments of :class:`ChatModel`. Answers are greedy unless a task says otherwise, and as long as it
says, or as fits the context; the checkpoint's generation_config.json stands behind what the task says, as in
transformers. They are not cut at their first blank line: lmms-eval writes that stop ("until") into every task that
states none, so that one cannot tell who wants it, and its own adapters for Qwen's later models pass it by.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from tqdm import tqdm

from ..agents.grounding import SCALE, Box
from ..errors import Qwen2VLError
from ..generation import GenerationConfig, generate
from ..hub import Checkpoint
from ..media.options import DEFAULTS, OPTION_NAMES
from ..model import Qwen2VL
from ..prompt.processor import Processor

_log = logging.getLogger(__name__)


def manifest() -> Any:
    """The entry point of lmms-eval's group "lmms_eval.models": the name of the model and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest("qwen2vl", chat_class_path=f"{__name__}.LmmsEvalModel")


def __getattr__(name: str) -> Any:
    """``LmmsEvalModel``, the class that lmms-eval asks for: :class:`ChatModel` on the base class that it demands."""
    if name != "LmmsEvalModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]

    made = type(name, (ChatModel, lmms), {"__doc__": ChatModel.__doc__, "__module__": __name__})
    globals()[name] = made  # one class, which pickle finds here
    return made


#: The generation_kwargs that are honoured.
_HONOURED = frozenset((
    "max_new_tokens", "until", "stop_sequences", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty",
    "seed", "num_beams",
))  # fmt: skip
#: Those that tasks write for the preprocessing or the loop of other models, and that change no answer of this one.
_OF_OTHERS = frozenset(("image_aspect_ratio", "visual_cot", "max_agentic_steps"))


class ChatModel:
    """A checkpoint with the methods of lmms-eval's interface for chat models.

    Args:
        pretrained: folder or hub id.
        batch_size: conversations answered at once.
        device, dtype: where and as what; by default a GPU if there is one (of several processes, each takes that of
            its LOCAL_RANK), and the checkpoint's.
        max_new_tokens: where a task does not say.
        boxes: "unit" writes an answer that has boxes as these alone, ``[left, top, right, bottom]`` in shares of width
            and height, which the tasks of RefCOCO and ScreenSpot look for; by default answers are the model's words,
            whose boxes stand between control tokens that a text does not show.
        options: how images and videos are taken, under the names of ``qwen2vl.media.options.MediaOptions``
            (``max_pixels``, ``fps``, ``max_frames``, ``max_video_tokens`` ...); what is left out is as the checkpoint's
            preprocessor_config.json says. ``min_pixels`` and ``max_pixels`` bound the frames of videos, too, as in
            lmms-eval's own classes, unless ``video_min_pixels`` and ``video_max_pixels`` stand beside them.

    A prompt that leaves no room for an answer gets an empty one; a line of the log names each.

    Raises:
        CheckpointError: there is no such checkpoint. Qwen2VLError: an argument is unknown or out of range.
    """

    is_simple = False  # chat messages, not a text beside a list of pictures
    rank: int  # what the base class has
    task_dict: dict[str, Any]
    cache_hook: Any

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        max_new_tokens: int = 128,
        boxes: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        options.pop("max_batch_size", None)
        if unknown := [name for name in options if name not in OPTION_NAMES]:
            raise Qwen2VLError(f"model_args: unknown {', '.join(map(repr, unknown))}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:  # lmms-eval's "auto" too: nothing is tried out
            raise Qwen2VLError(f"batch_size: wants at least 1, got {batch_size!r}")
        if boxes not in (None, "unit"):
            raise Qwen2VLError(f"boxes: wants 'unit' or nothing, got {boxes!r}")
        self.batch_size, self.boxes = int(batch_size), boxes
        if device is None and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        for name in ("min_pixels", "max_pixels"):
            if name in options:
                options.setdefault(f"video_{name}", options[name])
        DEFAULTS.updated(options)  # refuses what is out of range before a checkpoint is read
        checkpoint = Checkpoint.find(pretrained)
        self.model = Qwen2VL.from_pretrained(checkpoint, device=device, dtype=dtype)
        self.processor = Processor.from_pretrained(checkpoint, **options)
        self.max_new_tokens = max_new_tokens

    @property
    def device(self) -> torch.device:
        """Where the results of several processes are gathered."""
        return self.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """An answer for each request, in their order."""
        for request in requests:  # before the first answer is worked out
            self._config(request.args[2])
        answers: list[Any] = [None] * len(requests)
        # Requests with equal settings stand together, and among these long questions beside long ones.
        settings = [repr(sorted(request.args[2].items())) for request in requests]
        order = sorted(range(len(requests)), key=lambda n: (settings[n], len(requests[n].args[0]), n))
        with tqdm(total=len(requests), desc="qwen2vl", disable=self.rank != 0) as bar:
            for _, group in groupby(order, key=lambda n: settings[n]):
                alike = list(group)
                for begin in range(0, len(alike), self.batch_size):
                    batch = alike[begin : begin + self.batch_size]
                    for n, answer in zip(batch, self._answer([requests[n] for n in batch]), strict=True):
                        answers[n] = answer
                    bar.update(len(batch))
        return answers

    def _answer(self, requests: Sequence[Any]) -> list[Any]:
        from lmms_eval.api.instance import GenerationResult, TokenCounts  # pyright: ignore[reportMissingImports]

        arguments = requests[0].args[2]
        chats = []
        for request in requests:
            _, doc_to_messages, _, doc_id, task, split = request.args
            chats.append(to_messages(doc_to_messages(self.task_dict[task][split][doc_id])))
        texts, lengths = [""] * len(requests), [0] * len(requests)
        fits, inputs = self._fitting(requests, chats)
        if fits:
            config = self._config(arguments)
            if isinstance(config.seed, int):  # of every document, so that none depends on its place in a batch
                config = replace(config, seed=[config.seed] * len(fits))
            result = generate(self.model, inputs, tokenizer=self.processor.tokenizer, config=config)
            for row, n in enumerate(fits):
                texts[n], lengths[n] = result.texts[row], len(result.sequences[row])
                if self.boxes and (found := [p.place for p in result.places(row) if isinstance(p.place, Box)]):
                    texts[n] = " ".join(map(_unit, found))
        given = []
        for request, text, length in zip(requests, texts, lengths, strict=True):
            self.cache_hook.add_partial("generate_until", (request.args[0], arguments), text)
            given.append(GenerationResult(text=text, token_counts=TokenCounts(output_tokens=length)))
        return given

    def _fitting(self, requests: Sequence[Any], chats: list[Any]) -> tuple[list[int], Any]:
        """Which conversations leave room for an answer, and the model's inputs for these."""
        inputs = self.processor(chats)
        limit = self.model.config.text.max_position_embeddings
        counts = inputs["attention_mask"].sum(1).tolist()
        fits = [n for n, count in enumerate(counts) if count < limit]
        if len(fits) == len(chats):
            return fits, inputs
        for n, count in enumerate(counts):
            if count >= limit:
                _, _, _, doc_id, task, split = requests[n].args
                _log.warning(
                    "%s, %s, document %s: the prompt has %d tokens and the model's context %d: its answer is empty",
                    task, split, doc_id, count, limit,
                )  # fmt: skip
        return fits, self.processor([chats[n] for n in fits]) if fits else None

    def _config(self, arguments: Mapping[str, Any]) -> GenerationConfig:
        """A task's generation_kwargs over the checkpoint's generation_config.json. Greedy unless the task samples, also
        where the file samples, as in lmms-eval's own classes. Raises Qwen2VLError for what is not honoured: a name that
        is not known, beams, for which there is no search, and values out of range."""
        if unknown := sorted(arguments.keys() - _HONOURED - _OF_OTHERS):
            raise Qwen2VLError(
                f"generation_kwargs: wants {', '.join(sorted(_HONOURED))}, got {', '.join(map(repr, unknown))}"
            )
        if arguments.get("num_beams") not in (None, 1):
            raise Qwen2VLError(f"num_beams: wants 1, got {arguments['num_beams']!r}")
        stop = [text for text in _strings(arguments, "until") if text and text != "\n\n"]
        stop += _strings(arguments, "stop_sequences")
        given = {name: arguments.get(name) for name in ("repetition_penalty", "seed", "max_new_tokens")}
        if given["max_new_tokens"] is None:
            given["max_new_tokens"] = self.max_new_tokens
        temperature = arguments.get("temperature")
        samples = arguments.get("do_sample")
        if (bool(temperature) if samples is None else samples) and temperature != 0:
            given |= {name: arguments.get(name) for name in ("temperature", "top_p", "top_k")}
            given["do_sample"] = True
        else:
            given["do_sample"] = False
        try:
            return GenerationConfig.from_model(self.model, **given, stop=tuple(stop))
        except ValueError as error:
            raise Qwen2VLError(f"generation_kwargs: {error}") from error

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise Qwen2VLError(
            "loglikelihood: is not offered, as lmms-eval scores choices with it and the published numbers of these "
            "models come from their answers; choose a task that generates"
        )

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        raise Qwen2VLError("generate_until_multi_round: wants a task of one round")


def _unit(box: Box) -> str:
    return "[" + ", ".join(f"{x / SCALE:g}" for x in (box.x1, box.y1, box.x2, box.y2)) + "]"


def _strings(arguments: Mapping[str, Any], name: str) -> list[str]:
    """A string or several, as a list."""
    given = arguments.get(name) or ()
    texts: list[Any] = [given] if isinstance(given, str) else list(given)
    if not all(isinstance(text, str) for text in texts):
        raise Qwen2VLError(f"generation_kwargs: {name} wants strings, got {given!r}")
    return texts


def to_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """lmms-eval's messages as a processor takes them. Raises Qwen2VLError for audio, and for what is no message of its
    protocol."""
    found = []
    for m in messages:
        content = m.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        if not isinstance(content, Sequence) or not all(isinstance(item, Mapping) for item in content):
            raise Qwen2VLError(f"content: wants a text or a list of items, got {_brief(content)}")
        found.append({"role": m.get("role"), "content": [_item(item) for item in content]})
    return found


def _item(item: Mapping[str, Any]) -> dict[str, Any]:
    kind = item.get("type")
    if kind == "text":
        return {"type": "text", "text": item.get("text")}
    if kind not in ("image", "video"):
        raise Qwen2VLError(f"content: wants text, images and videos, got {kind!r}")
    source, times = item.get("url", item.get(kind)), {}  # their protocol has "url", their users write the other, too
    if source is None:
        raise Qwen2VLError(f"content: an item of type {kind!r} wants a key 'url' or {kind!r}, got {sorted(item)}")
    if kind == "video":
        times = {"video_start": item.get("start_time"), "video_end": item.get("end_time")}
        if isinstance(source, Mapping):  # a part of a video, as some tasks give it
            if "path" not in source:
                raise Qwen2VLError(f"content: a part of a video wants a key 'path', got {sorted(source)}")
            times = {"video_start": source.get("video_start"), "video_end": source.get("video_end")}
            source = source["path"]
    return {"type": kind, kind: source, **{key: value for key, value in times.items() if value is not None}}


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
