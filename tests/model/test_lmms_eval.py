"""The adapter to lmms-eval, on the package itself where it is installed, else on stand-ins of what it touches."""

import abc
import importlib.util
import json
import pickle
import re
import shutil
from dataclasses import dataclass, replace
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks.random_checkpoint import write_random_checkpoint
from examples.demo.media import write_video
from qwen2vl import GenerationConfig, Processor, Qwen2VL, generate
from qwen2vl.choosing import Choice, Chooser
from qwen2vl.errors import Qwen2VLError
from tests.integrations.fakes.modules import install


class _Base(abc.ABC):
    """Version 0.7.3's `lmms`, as far as a model has to do with it."""

    is_simple = True

    def __init__(self):
        self.cache_hook, self.task_dict = SimpleNamespace(add_partial=print), {}

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
    processor = Processor.from_pretrained(folder, max_pixels=3136, video_max_pixels=3136)
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
    greedy = GenerationConfig(max_new_tokens=9, do_sample=False)
    assert model._config({}) == model._config({"temperature": None, "top_p": None, "top_k": None}) == greedy
    assert model._config({"max_new_tokens": 49152}) == GenerationConfig(max_new_tokens=49152, do_sample=False)
    assert model._config({"until": ["\n\n"]}).stop == ()
    both = {"until": ["\n\n", "Q:"], "stop_sequences": ["END"]}
    assert model._config(both).stop == ("Q:", "END")
    assert model.device == torch.device("cpu")  # where lmms-eval gathers what several processes found
    sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "until": "\n", "seed": 3}
    expected = GenerationConfig(max_new_tokens=9, do_sample=True, temperature=0.7, top_p=0.9, stop=("\n",), seed=3)
    assert model._config(sampled) == expected
    assert model._config({"temperature": 0.2}).samples  # as lmms-eval's own classes take it
    assert not model._config({"do_sample": True, "temperature": 0}).samples  # as tasks write greedy
    assert model._config({"do_sample": False, "temperature": 0.7, "top_p": 0.5}) == greedy
    assert model._config({"repetition_penalty": 1.2, "image_aspect_ratio": "pad"}).repetition_penalty == 1.2


@pytest.mark.parametrize(("settings", "message"), [
    ({"num_beams": 4}, "num_beams: wants 1, got 4"),
    ({"max_tokens": 4, "n": 2}, "generation_kwargs: wants .*, got 'max_tokens', 'n'$"),
    ({"max_new_tokens": 0}, "max_new_tokens must be an integer >= 1, got 0"),
    ({"max_new_tokens": -5}, "max_new_tokens must be an integer >= 1, got -5"),
    ({"temperature": -1, "do_sample": True}, "temperature must be > 0"),
    ({"repetition_penalty": 0}, "repetition_penalty must be > 0"),
    ({"stop_sequences": [3]}, "stop_sequences wants strings, got"),
])  # fmt: skip
def test_what_a_task_says_is_honoured_or_refused_before_the_first_answer(adapter, folder, settings, message):
    model = adapter.LmmsEvalModel(str(folder), device="cpu")
    model.task_dict = {"vqa": {"test": [[{"type": "text", "text": "Say."}]] * 2}}
    answered = []
    model.cache_hook = SimpleNamespace(add_partial=lambda *args: answered.append(args))
    with pytest.raises(Qwen2VLError, match=message):
        model.generate_until(requests([0, 0], [{"max_new_tokens": 2}, settings]))
    assert not answered


def test_the_checkpoint_s_own_files_are_read(adapter, folder, tmp_path):
    """Limits of pixels of preprocessor_config.json, and what generation_config.json says beside a task."""
    own = shutil.copytree(folder, tmp_path / "own")
    files = {
        "preprocessor_config.json": {"min_pixels": 784, "max_pixels": 1568},
        "generation_config.json": {"repetition_penalty": 1.5, "do_sample": True, "top_k": 5},
    }
    for name, stated in files.items():
        path = own / name
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(found | stated))
    model = adapter.LmmsEvalModel(str(own), device="cpu")
    assert model._config({"max_new_tokens": 5}) == GenerationConfig(
        max_new_tokens=5, do_sample=False, repetition_penalty=1.5
    )
    assert model._config({"do_sample": True}).top_k == 5
    image = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (280, 280))}]}]
    assert model.processor(image)["pixel_values"].shape[0] == 4  # a token: 28 x 28 pixels
    stated = adapter.LmmsEvalModel(str(own), device="cpu", max_pixels=3136)
    assert stated.processor(image)["pixel_values"].shape[0] == 16


def test_the_limits_of_pixels_reach_the_frames_of_videos(adapter, folder):
    clip = [{"role": "user", "content": [{"type": "video", "video": str(folder.parent / "clip.mp4")}]}]
    released = adapter.LmmsEvalModel(str(folder), device="cpu").processor(clip)["video_grid_thw"].tolist()
    limits = {"min_pixels": 784, "max_pixels": 3136}
    bounded = adapter.LmmsEvalModel(str(folder), device="cpu", **limits).processor(clip)["video_grid_thw"].tolist()
    assert released[0][1:] != [4, 4] and bounded[0][1:] == [4, 4]  # 56 x 56, as the clip is
    apart = adapter.LmmsEvalModel(str(folder), device="cpu", **limits, video_min_pixels=12544, video_max_pixels=12544)
    assert apart.processor(clip)["video_grid_thw"].tolist()[0][1:] == [8, 8]


def test_answers_do_not_depend_on_the_rest_of_their_batch_and_what_is_too_long_has_none(adapter, folder, caplog):
    """The context is 256: a prompt that leaves room for few tokens, one for none, and short ones."""
    docs = [[{"type": "text", "text": "a b " * n}] for n in (1, 70, 400, 3)]
    settings = [{"max_new_tokens": 40, "until": []}] * 3 + [{"max_new_tokens": 40, "temperature": 2.0, "seed": 3}]
    docs, settings = docs + docs[3:], settings + settings[3:]
    found = []
    for size in (1, 4):
        model = adapter.LmmsEvalModel(str(folder), device="cpu", batch_size=size)
        model.model.config = replace(
            model.model.config, text=replace(model.model.config.text, max_position_embeddings=256)
        )
        model.task_dict = {"vqa": {"test": docs}}
        caplog.clear()
        answers = model.generate_until(requests(docs, settings))
        found.append([(answer.text, answer.token_counts.output_tokens) for answer in answers])
        (line,) = [record.getMessage() for record in caplog.records if record.name == adapter.__name__]
        assert line.startswith("vqa, test, document 2: the prompt has ") and "context 256" in line
    assert found[0] == found[1]
    assert found[0][3] == found[0][4] != found[0][0]
    assert found[0][2] == ("", 0) and 0 < found[0][1][1] < 40 == found[0][0][1]


def test_boxes_in_the_form_that_tasks_parse(adapter, folder, monkeypatch):
    """lmms-eval's tasks of RefCOCO look for the first four numbers in brackets, in shares of the picture."""
    box = "<|object_ref_start|>the cat<|object_ref_end|><|box_start|>(100,250),(500,999)<|box_end|>"
    for given, wanted in (
        ({}, ["the cat(100,250),(500,999)", "no box"]),
        ({"boxes": "unit"}, ["[0.1, 0.25, 0.5, 0.999]", "no box"]),
    ):
        model = adapter.LmmsEvalModel(str(folder), device="cpu", batch_size=2, **given)
        tokenizer = model.processor.tokenizer
        rows = []
        for text in (box, "no box"):
            pieces = [piece for piece in re.split(r"(<\|\w+\|>)", text) if piece]
            rows.append([i for p in pieces for i in ([tokenizer.id(p)] if p[0] == "<" else tokenizer.encode_plain(p))])
        end = tokenizer.id("<|im_end|>")
        steps = zip(*[row + [end] * (len(rows[0]) + 1 - len(row)) for row in rows], strict=True)
        monkeypatch.setattr(Chooser, "__call__", lambda *_, steps=steps: Choice(torch.tensor(next(steps))))
        model.task_dict = {"vqa": {"test": [[{"type": "image", "url": Image.new("RGB", (56, 56))}]] * 2}}
        answers = model.generate_until(requests([0, 0], [{"max_new_tokens": 90, "until": []}] * 2))
        assert [answer.text for answer in answers] == wanted
    with pytest.raises(Qwen2VLError, match="boxes: wants 'unit' or nothing, got 'pixels'"):
        adapter.LmmsEvalModel(str(folder), boxes="pixels")


def test_the_class_has_a_name_and_can_be_pickled(adapter, folder):
    found = adapter.LmmsEvalModel
    assert (found.__module__, found.__qualname__) == ("qwen2vl.evaluation.lmms_eval", "LmmsEvalModel")
    assert pickle.loads(pickle.dumps(found)) is found is adapter.LmmsEvalModel
    model = pickle.loads(pickle.dumps(found(str(folder), device="cpu")))
    model.task_dict = {"vqa": {"test": [[{"type": "text", "text": "Say."}]]}}
    assert model.generate_until(requests([0], [{"max_new_tokens": 2}]))[0].token_counts.output_tokens == 2


def test_a_part_of_a_video():
    from qwen2vl.evaluation.lmms_eval import to_messages

    part = {"type": "video", "url": {"path": "a.mp4", "video_start": 2.0, "video_end": 5.0}}
    assert to_messages(ask([part]))[0]["content"] == [
        {"type": "video", "video": "a.mp4", "video_start": 2.0, "video_end": 5.0}
    ]


def test_messages_of_other_shapes():
    from qwen2vl.evaluation.lmms_eval import to_messages

    text = [{"role": "user", "content": [{"type": "text", "text": "Say."}]}]
    assert to_messages([{"role": "user", "content": "Say."}]) == text
    assert to_messages(ask([{"type": "video", "video": "a.mp4"}]))[0]["content"] == [
        {"type": "video", "video": "a.mp4"}
    ]
    for content, message in (
        (None, "wants a text or a list of items, got None"),
        (["a.png"], r"wants a text or a list of items, got \['a.png'\]"),
        ([{"type": "image", "path": "a.png"}], "an item of type 'image' wants a key 'url' or 'image', got"),
        ([{"type": "video", "url": {"video_start": 1.0}}], "a part of a video wants a key 'path'"),
    ):
        with pytest.raises(Qwen2VLError, match=f"^content: {message}"):
            to_messages(ask(content))


def test_refusals(adapter, folder):
    with pytest.raises(Qwen2VLError, match="fps must be a finite number > 0, got 0"):
        adapter.LmmsEvalModel("no such folder", fps=0)
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
