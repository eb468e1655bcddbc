"""lmms-eval's benchmarks (DocVQA, InfoVQA, RealWorldQA, MTVQA, the video sets) on this package's model.

    pip install "lmms-eval==0.7.3"        # finds this package by its entry point
    python -m lmms_eval --model qwen2vl --model_args pretrained=Qwen/Qwen2-VL-2B-Instruct \
        --tasks docvqa_val,infovqa_val,realworldqa,mtvqa,mvbench,egoschema,videomme

Prompts are the tasks' own for any model (their "default"), so the version of lmms-eval pins them; the limits of pixels
and frames are the arguments of :class:`ChatModel`. Answers are greedy unless a task says otherwise, and as long as it
says, or as fits the context. They are not cut at their first blank line: lmms-eval writes that stop ("until") into
every task that states none, so that one cannot tell who wants it, and its own adapters for Qwen's later models pass it
by.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from tqdm import tqdm

from ..errors import Qwen2VLError
from ..generation import GenerationConfig, generate
from ..hub import Checkpoint
from ..media.options import DEFAULTS, OPTION_NAMES
from ..model import Qwen2VL
from ..prompt.processor import Processor


def manifest() -> Any:
    """The entry point of lmms-eval's group "lmms_eval.models": the name of the model and where its class is."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    return ModelManifest("qwen2vl", chat_class_path=f"{__name__}.LmmsEvalModel")


def __getattr__(name: str) -> Any:
    """``LmmsEvalModel``, the class that lmms-eval asks for: :class:`ChatModel` on the base class that it demands."""
    if name != "LmmsEvalModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]

    return type(name, (ChatModel, lmms), {"__doc__": ChatModel.__doc__})


class ChatModel:
    """A checkpoint with the methods of lmms-eval's interface for chat models.

    Args:
        pretrained: folder or hub id.
        batch_size: conversations answered at once.
        device, dtype: where and as what; by default a GPU if there is one (of several processes, each takes that of
            its LOCAL_RANK), and the checkpoint's.
        max_new_tokens: where a task does not say.
        options: how images and videos are taken, under the names of ``qwen2vl.media.options.MediaOptions``
            (``max_pixels``, ``fps``, ``max_frames``, ``max_video_tokens`` ...); by default as released.

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
        **options: Any,
    ) -> None:
        super().__init__()
        options.pop("max_batch_size", None)
        if unknown := [name for name in options if name not in OPTION_NAMES]:
            raise Qwen2VLError(f"model_args: unknown {', '.join(map(repr, unknown))}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:  # lmms-eval's "auto" too: nothing is tried out
            raise Qwen2VLError(f"batch_size: wants at least 1, got {batch_size!r}")
        self.batch_size = int(batch_size)
        if device is None and torch.cuda.is_available():
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        stated = DEFAULTS.updated(options)  # the defaults, too, win over the checkpoint's own limits
        checkpoint = Checkpoint.find(pretrained)
        self.model = Qwen2VL.from_pretrained(checkpoint, device=device, dtype=dtype)
        self.processor = Processor.from_pretrained(checkpoint, **vars(stated))
        self.max_new_tokens = max_new_tokens

    @property
    def device(self) -> torch.device:
        """Where the results of several processes are gathered."""
        return self.model.device

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        """An answer for each request, in their order."""
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

        chats = []
        for request in requests:
            _, doc_to_messages, _, doc_id, task, split = request.args
            chats.append(to_messages(doc_to_messages(self.task_dict[task][split][doc_id])))
        arguments = requests[0].args[2]
        inputs = self.processor(chats)
        config = self._config(arguments)
        result = generate(self.model, inputs, tokenizer=self.processor.tokenizer, config=config)
        found = []
        for request, text, ids in zip(requests, result.texts, result.sequences, strict=True):
            self.cache_hook.add_partial("generate_until", (request.args[0], arguments), text)
            found.append(GenerationResult(text=text, token_counts=TokenCounts(output_tokens=len(ids))))
        return found

    def _config(self, arguments: Mapping[str, Any]) -> GenerationConfig:
        """A task's generation_kwargs. Greedy unless it samples; beams, for which there is no search, are refused."""
        if arguments.get("num_beams") not in (None, 1):
            raise Qwen2VLError(f"num_beams: wants 1, got {arguments['num_beams']!r}")
        until = arguments.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        most, top_p = arguments.get("max_new_tokens"), arguments.get("top_p")
        temperature = arguments.get("temperature") or 0.0
        samples = bool(arguments.get("do_sample", temperature > 0)) and temperature > 0
        settings = {
            "temperature": float(temperature),
            "top_p": 1.0 if top_p is None else top_p,
            "top_k": int(arguments.get("top_k") or 0),
        }
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens if most is None else most,
            do_sample=samples,
            **(settings if samples else {}),
            stop=tuple(text for text in until if text and text != "\n\n"),
        )

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise Qwen2VLError("loglikelihood: this model answers; choose a task that generates")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[Any]:
        raise Qwen2VLError("generate_until_multi_round: wants a task of one round")


def to_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """lmms-eval's messages as a processor takes them. Raises Qwen2VLError for audio."""
    return [{"role": m["role"], "content": [_item(item) for item in m["content"]]} for m in messages]


def _item(item: Mapping[str, Any]) -> dict[str, Any]:
    kind = item["type"]
    if kind == "text":
        return {"type": "text", "text": item["text"]}
    if kind not in ("image", "video"):
        raise Qwen2VLError(f"content: wants text, images and videos, got {kind!r}")
    source, times = item["url"], {}
    if kind == "video":
        times = {"video_start": item.get("start_time"), "video_end": item.get("end_time")}
        if isinstance(source, Mapping):  # a part of a video, as some tasks give it
            times = {"video_start": source.get("video_start"), "video_end": source.get("video_end")}
            source = source["path"]
    return {"type": kind, kind: source, **{key: value for key, value in times.items() if value is not None}}
