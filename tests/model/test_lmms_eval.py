"""The adapter to lmms-eval, on the package itself where it is installed, else on stand-ins of what it touches."""

import abc
import importlib.util
from dataclasses import dataclass, replace
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks.random_checkpoint import write_random_checkpoint
from examples.demo.media import write_video
from qwen2vl import GenerationConfig, Processor, Qwen2VL, generate
from qwen2vl.errors import Qwen2VLError
from tests.integrations.fakes.modules import install


class _Base(abc.ABC):
    """Version 0.7.3's `lmms`, as far as a model has to do with it."""

    is_simple = True

    def __init__(self):
        self.cache_hook, self.task_dict = SimpleNamespace(add_partial=lambda *args: None), {}

    rank = property(lambda self: 0)

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        pairs = dict(pair.split("=") for pair in arg_string.split(","))
        given = {key: int(value) if value.isdigit() else value for key, value in pairs.items()}
        return cls(**given, **{k: v for k, v in (additional_config or {}).items() if v is not None})


@dataclass
class _TokenCounts:
    output_tokens: int | None = None


@dataclass
class _GenerationResult:
    text: str
    token_counts: _TokenCounts | None = None


@dataclass(frozen=True)
class _Manifest:
    model_id: str
    chat_class_path: str


@pytest.fixture
def adapter(monkeypatch):
    if importlib.util.find_spec("lmms_eval") is None:
        install(monkeypatch, {
            "lmms_eval.api.model": {"lmms": _Base},
            "lmms_eval.api.instance": {"GenerationResult": _GenerationResult, "TokenCounts": _TokenCounts},
            "lmms_eval.models.registry_v2": {"ModelManifest": _Manifest},
        })  # fmt: skip
    from qwen2vl.evaluation import lmms_eval

    return lmms_eval


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_random_checkpoint(tmp_path_factory.mktemp("lmms") / "model", std=0.1, dtype=torch.float32)
    write_video(folder.parent / "clip.mp4", width=56, height=56, seconds=3, fps=4)
    return folder


def ask(doc):
    return [{"role": "user", "content": doc}]


def requests(docs, settings, task="vqa"):
    return [SimpleNamespace(args=("x" * n, ask, settings[n], n, task, "test")) for n in range(len(docs))]


def test_the_entry_point_names_a_class_that_the_registry_takes(adapter):
    (point,) = metadata.entry_points(group="lmms_eval.models", name="qwen2vl")
    manifest = point.load()()
    module, _, name = manifest.chat_class_path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    from lmms_eval.api.model import lmms

    assert manifest.model_id == "qwen2vl" and issubclass(found, lmms) and not found.is_simple
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        _ = adapter.Other


def test_answers_are_those_of_generate_in_the_order_of_the_requests(adapter, folder):
    image = Image.linear_gradient("L").resize((84, 56)).convert("RGB")
    clip = str(folder.parent / "clip.mp4")
    docs = [
        [{"type": "image", "url": image}, {"type": "text", "text": "What?"}],
        [{"type": "text", "text": "Say."}],
        [{"type": "video", "url": clip, "start_time": 1.0, "end_time": None}, {"type": "text", "text": "What moves?"}],
        [{"type": "text", "text": "Say it."}],
    ]
    short, long = {"max_new_tokens": 4, "temperature": 0}, {"max_new_tokens": 7, "until": ["\n\n"], "num_beams": 1}
    settings = [short, long, short, long]
    additional = {"batch_size": 2, "max_batch_size": None, "device": "cpu"}
    model = adapter.LmmsEvalModel.create_from_arg_string(f"pretrained={folder},max_pixels=3136", additional)
    model.task_dict = {"vqa": {"test": docs}}
    kept = []
    model.cache_hook = SimpleNamespace(add_partial=lambda *args: kept.append(args))
    answers = model.generate_until(requests(docs, settings))
    plain = Qwen2VL.from_pretrained(folder, device="cpu")
    processor = Processor.from_pretrained(folder, max_pixels=3136)
    ours = [
        [{"type": "image", "image": image}, docs[0][1]],
        docs[1],
        [{"type": "video", "video": clip, "video_start": 1.0}, docs[2][1]],
        docs[3],
    ]
    for answer, content, given in zip(answers, ours, settings, strict=True):
        config = GenerationConfig(max_new_tokens=given["max_new_tokens"])
        inputs = processor([{"role": "user", "content": content}])
        expected = generate(plain, inputs, tokenizer=processor.tokenizer, config=config)
        assert answer.text == expected.texts[0]
        assert answer.token_counts.output_tokens == len(expected.sequences[0])
    assert sorted(text for _, _, text in kept) == sorted(answer.text for answer in answers)


def test_a_task_says_how_to_answer(adapter, folder):
    model = adapter.LmmsEvalModel(str(folder), device="cpu", max_new_tokens=9)
    assert model._config({}) == GenerationConfig(max_new_tokens=9, do_sample=False)
    assert model._config({"until": ["\n\n"]}).stop == ()
    assert model._config({"until": ["\n\n", "Q:"]}).stop == ("Q:",)
    assert model.device == torch.device("cpu")  # where lmms-eval gathers what several processes found
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "until": "\n"}
    expected = GenerationConfig(max_new_tokens=9, do_sample=True, temperature=0.7, top_p=0.9, top_k=0, stop=("\n",))
    assert model._config(sampled) == expected
    assert not model._config({"do_sample": True, "temperature": 0}).do_sample  # as tasks write greedy
    assert not model._config({"do_sample": False, "temperature": 0.7}).do_sample
    nucleus = {"do_sample": True, "temperature": 0.7}
    assert model._config({**nucleus, "top_p": 0}).top_p == 0, "nearly greedy, which is not all of it"
    assert model._config({**nucleus, "top_p": None}).top_p == 1
    assert model._config({"max_new_tokens": None}).max_new_tokens == 9
    for wrong in (0, -5, 2.5):
        with pytest.raises(Qwen2VLError, match=f"max_new_tokens must be an integer >= 1, got {wrong}"):
            model._config({"max_new_tokens": wrong})
    with pytest.raises(Qwen2VLError, match="num_beams: wants 1, got 4"):
        model._config({"num_beams": 4})


def test_the_room_for_an_answer_does_not_depend_on_the_batch(adapter, folder, monkeypatch):
    """Of a short question it is not what a long one leaves beside it."""
    docs = [[{"type": "text", "text": "Say it. " * n}] for n in (60, 1)]
    counts = {}
    for batch_size in (1, 2):
        model = adapter.LmmsEvalModel(str(folder), batch_size=batch_size, device="cpu")
        longest = model.processor(ask([{"type": "text", "text": docs[0][0]["text"]}]))["input_ids"].shape[1]
        config = model.model.config
        text = replace(config.text, max_position_embeddings=longest + 5)
        monkeypatch.setattr(model.model, "config", replace(config, text=text))
        monkeypatch.setattr(model.model, "generation_defaults", {"eos_token_id": 10**6})
        model.task_dict = {"vqa": {"test": docs}}
        answers = model.generate_until(requests(docs, [{"max_new_tokens": 40}] * 2))
        counts[batch_size] = [answer.token_counts.output_tokens for answer in answers]
    assert counts == {1: [5, 40], 2: [5, 40]}


def test_a_part_of_a_video():
    from qwen2vl.evaluation.lmms_eval import to_messages

    part = {"type": "video", "url": {"path": "a.mp4", "video_start": 2.0, "video_end": 5.0}}
    assert to_messages(ask([part]))[0]["content"] == [
        {"type": "video", "video": "a.mp4", "video_start": 2.0, "video_end": 5.0}
    ]


def test_refusals(adapter, folder):
    with pytest.raises(Qwen2VLError, match="model_args: unknown 'pretraned'"):
        adapter.LmmsEvalModel(str(folder), pretraned="x")
    for wrong in (0, "auto"):
        with pytest.raises(Qwen2VLError, match=f"batch_size: wants at least 1, got {wrong!r}"):
            adapter.LmmsEvalModel(str(folder), batch_size=wrong)
    with pytest.raises(Qwen2VLError, match="wants text, images and videos, got 'audio'"):
        adapter.to_messages(ask([{"type": "audio", "url": "a.wav"}]))
    model = adapter.LmmsEvalModel(str(folder), device="cpu")
    for method in ("loglikelihood", "generate_until_multi_round"):
        with pytest.raises(Qwen2VLError, match=f"^{method}: "):
            getattr(model, method)([])
