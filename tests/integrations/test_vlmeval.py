"""The lines of docs/evaluation.md that make a model of VLMEvalKit, run as they stand there on a stand-in of it."""

import re
from pathlib import Path

import pytest
import torch

from benchmarks.random_checkpoint import write_random_checkpoint
from examples.demo.media import draw_scene, write_video
from qwen2vl import GenerationConfig, Processor, Qwen2VL, generate
from tests.integrations.fakes.vlmeval import install_vlmeval

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
CHECKPOINT = "Qwen/Qwen2-VL-2B-Instruct"


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A folder with a checkpoint and media, and the registered model on it."""
    folder = write_random_checkpoint(tmp_path / "model", std=0.1, dtype=torch.float32)
    draw_scene(84, 56).save(tmp_path / "day.png")
    write_video(tmp_path / "clip.mp4", width=56, height=56, seconds=2, fps=4)
    fake = install_vlmeval(monkeypatch)
    (code,) = re.findall(r"^```python\n(from functools.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert CHECKPOINT in code
    exec(compile(code.replace(CHECKPOINT, str(folder)), PAGE.name, "exec"), {"__name__": "plug"})
    (name,) = fake.supported
    assert "Qwen2-VL" not in name  # such names get arguments of VLMEvalKit's own class
    return tmp_path, fake, fake.supported[name]


def test_it_answers_what_the_model_answers(made):
    folder, fake, register = made
    assert register.keywords == {"min_pixels": 1280 * 784, "max_pixels": 16384 * 784}
    vlm = register(max_new_tokens=6, min_pixels=None, max_pixels=None)
    assert isinstance(vlm, fake.BaseModel)
    model, processor = Qwen2VL.from_pretrained(folder / "model"), Processor.from_pretrained(folder / "model")
    config = GenerationConfig(max_new_tokens=6)
    image, clip = (
        {"type": kind, "value": str(folder / name)} for kind, name in (("image", "day.png"), ("video", "clip.mp4"))
    )

    def answer(items, **options):
        content = [{"type": item["type"], item["type"]: item["value"]} for item in items]
        inputs = processor([{"role": "user", "content": content}], **options)
        return generate(model, inputs, tokenizer=processor.tokenizer, config=config).texts[0]

    what = {"type": "text", "value": "What?"}
    for items in ([what], [image, what], [image, what, image, clip, what]):
        assert vlm.generate(items, dataset="MMStar") == answer(items)
    assert vlm.generate("What?") == answer([what])
    small = answer([image, what], min_pixels=100 * 784)
    assert vlm.generate([image, what], dataset="OCRBench") == small
    counts = []
    inner = vlm.processor
    vlm.processor = lambda *a, **k: counts.append(inner(*a, **k)) or counts[-1]
    vlm.processor.tokenizer = inner.tokenizer
    for dataset in ("MMStar", "OCRBench"):
        vlm.generate([image, what], dataset=dataset)
    assert counts[0].media[0].num_tokens == 6 and counts[1].media[0].num_tokens >= 100
    counts.clear()
    for vlm.fps, vlm.nframe in ((2.0, 128), (4.0, None), (None, 6), (None, 64)):  # a clip of 2 s at 4 frames a second
        vlm.generate([clip, what], dataset="Video-MME")
    assert [len(inputs.media[0].frame_times) for inputs in counts] == [4, 8, 6, 8]


def test_its_prompts_are_those_of_the_mixin(made):
    folder, _, register = made
    vlm = register(max_new_tokens=2, min_pixels=None, max_pixels=None)
    vlm.set_dump_image(lambda line: [str(folder / line["image"])])
    assert vlm.use_custom_prompt("MMStar") and not vlm.use_custom_prompt("MME")
    built = vlm.build_prompt({"image": "day.png", "question": "Why?"}, "MMStar")
    assert vlm.generate(built, dataset="MMStar") == vlm.generate([
        {"type": "image", "value": str(folder / "day.png")}, {"type": "text", "value": "Question: Why?"},
    ])  # fmt: skip
    assert not register(min_pixels=None, max_pixels=None, use_custom_prompt=False).use_custom_prompt("MMStar")
