"""The ablations: what differs between the models of one and what does not, how answers are scored, and the command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.plot import wilson
from examples.ablation import ABLATIONS
from examples.ablation.__main__ import app
from examples.ablation.model import Batches, Examples, Job, Outcome, Scores, one_dimensional, prepare, right_tokens
from examples.ablation.plan import POSITIONS, RESOLUTION, Arm, Part, repeated
from examples.ablation.run import LIMITS, _equal
from examples.small.shape import write_beginning
from qwen2vl.errors import DataError
from qwen2vl.generation import GenerationConfig, generate
from qwen2vl.model import Qwen2VL
from qwen2vl.prompt.processor import Processor
from qwen2vl.samples import generate as make_sample
from qwen2vl.samples.sample import from_ppm
from qwen2vl.samples.source import read_sample
from qwen2vl.training.example import Example
from qwen2vl.training.packing import IGNORE, Packer, collate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def beginning(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("beginning")
    write_beginning(folder, seed=1, depth=1, layers=1, limits=LIMITS)
    return folder


@pytest.fixture(scope="module")
def processor(beginning) -> Processor:
    return Processor.from_pretrained(beginning)


@pytest.fixture(scope="module")
def model(beginning) -> Qwen2VL:
    return Qwen2VL.from_pretrained(beginning, device="cpu")


# -------------------------------------------------------------------------------------------------- what differs


def test_one_dimensional_positions_count_all_tokens_of_a_sample(model):
    config = model.config
    image = Example(
        input_ids=torch.tensor([5, config.vision_start_token_id, *[config.image_token_id] * 6, 7]),
        labels=torch.tensor([IGNORE] * 8 + [7]),
        pixel_values=torch.zeros(24, 588, dtype=torch.uint8),
        image_grid_thw=torch.tensor([[1, 4, 6]]),
    )
    text = Example(input_ids=torch.tensor([1, 2, 3]), labels=torch.tensor([1, 2, 3]))
    batch = collate([image, text], config)
    assert batch.positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 0, 1, 2],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 0, 1, 2],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 0, 1, 2],
    ]
    flat = one_dimensional(batch)
    assert flat.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 2]] * 3
    assert replace(flat, positions=batch.positions) == batch


def test_arms_see_the_same_samples_and_differ_in_what_they_say(model, processor):
    """Whatever the number of tokens, a step has the same samples: else fixed pictures would buy more of them."""
    seen = {}
    course = (Part("read", (0,), 0.5), Part("read", (3,), 0.5))
    for arm in (*POSITIONS.arms, *RESOLUTION.arms):
        data = Examples(course, seed=4, samples=12, example=lambda s, arm=arm: prepare(s, processor, arm.size))
        packer = Batches(Packer(data, model.config, max_tokens=1 << 20, lookahead=6), arm)
        batches = [next(packer) for _ in range(2)]
        seen[arm.name] = packer.checksum
        first, second = ({str(s).split(":")[1] for s in batch.sources} for batch in batches)
        assert (first, second) == ({"read-0"}, {"read-3"})
        for batch in batches:
            assert len(batch.sources) == 6
            assert torch.equal(batch.positions, one_dimensional(batch).positions) == arm.one_dimensional
            assert batch.image_grid_thw is not None
            if arm.size is not None:
                grid = [1, arm.size[0] // 14, arm.size[1] // 14]
                assert batch.image_grid_thw.tolist() == [grid] * 6
    assert len(set(seen.values())) == 1


def test_a_course_has_its_parts_in_their_shares():
    data = Examples(POSITIONS.course, seed=1, samples=40, example=lambda sample: sample)  # type: ignore
    assert [data.sample(n).skill for n in range(50)] == ["read"] * 12 + ["video"] * 38
    for ablation in ABLATIONS:
        assert sum(part.share for part in ablation.course) == pytest.approx(1)


def test_the_larger_fixed_size_costs_what_pictures_as_they_are_do():
    data = Examples(RESOLUTION.course[-1:], seed=1, samples=1, example=lambda sample: sample)  # type: ignore
    sizes = [data.sample(n).size for n in range(400)]
    mean = sum(width * height for width, height in sizes) / len(sizes) / 28**2
    _, small, large = (arm.size for arm in RESOLUTION.arms)
    assert small is not None and large is not None
    assert mean == pytest.approx(6.3, abs=0.1)
    assert abs(large[0] * large[1] / 28**2 - mean) <= 0.5 and small[0] * small[1] / 28**2 == 4


# ---------------------------------------------------------------------------------------------------------- clips


def centres(sample) -> np.ndarray:
    """(frames, 2): x, y of what differs from the ground."""
    frames = [from_ppm(data).astype(int) for data in sample.members.values()]
    return np.array([np.argwhere(np.abs(f - f[0, 0]).max(-1) > 24).mean(0)[::-1] for f in frames])


@pytest.mark.parametrize("frames", [4, 6, 8, 12, 16, 24, 32])
def test_clips_of_any_length_show_the_direction(frames):
    for index in range(12):
        sample = make_sample("video", 1, index=index, split="held-out", frames=frames)
        assert len(sample.members) == frames
        at = centres(sample)
        dx, dy = at[-1] - at[0]
        found = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
        way = max(abs(dx), abs(dy))
        assert found == sample.scene["event"] and way >= 14
        along = np.diff(at[:, 0 if abs(dx) > abs(dy) else 1]) * (1 if found in ("right", "down") else -1)
        assert along.min() > -0.1 and along.max() <= way / (frames - 1) + 1


def test_a_clip_of_the_drawn_length_is_the_same_and_others_are_refused():
    for level in (0, 1, 4):
        drawn = make_sample("video", level, index=3)
        assert make_sample("video", level, index=3, frames=len(drawn.members)) == drawn
    for frames in (2, 5, 4.0):
        with pytest.raises(DataError, match="frames: wants an even number of at least 4"):
            make_sample("video", 1, frames=frames)


def test_a_repeated_clip_begins_anew_after_its_end(processor):
    sample = make_sample("video", 1, frames=4)
    clip = repeated(sample, 12)
    assert list(clip.members.values()) == 3 * list(sample.members.values())
    example = prepare(clip, processor)
    assert example.video_grid_thw is not None and example.pixel_values_videos is not None
    assert example.video_grid_thw.tolist() == [[6, 4, 4]]
    steps = example.pixel_values_videos.unflatten(0, (3, 2, 16))
    assert torch.equal(steps[0], steps[1]) and torch.equal(steps[0], steps[2]) and not torch.equal(*steps[0])
    names = [POSITIONS.group(c)[0] for c in (sample, clip, make_sample("video", 1, frames=12))]
    assert names == ["direction, 4 frames", "direction, 12 frames, repeated", "direction, 12 frames, slower"]


# -------------------------------------------------------------------------------------------------------- scoring


def test_what_teacher_forcing_calls_right_is_what_greedy_decoding_writes(model, processor):
    examples, lengths = [], []
    for sample in (make_sample("read", 3, index=1), make_sample("video", 1, frames=8), make_sample("read", 0, index=2)):
        inputs = processor(read_sample(sample)[:-1])
        written = generate(model, inputs, config=GenerationConfig(max_new_tokens=5, do_sample=False)).sequences[0]
        media = {k: v for k, v in inputs.items() if k.startswith(("pixel_values", "image_", "video_"))}
        for answer in (written, [*written[:-1], (written[-1] + 1) % 500]):
            prompt = inputs["input_ids"][0]
            ids = torch.cat([prompt, torch.tensor(answer)])
            labels = torch.cat([torch.full_like(prompt, IGNORE), torch.tensor(answer)])
            examples.append(Example(ids, labels, **media))
            lengths.append(len(answer))
    found = right_tokens(model, collate(examples, model.config))
    assert found == [(n - i % 2, n) for i, n in enumerate(lengths)]


def test_true_answers_are_what_is_supervised(model, processor):
    example = prepare(make_sample("read", 0, index=5), processor)
    taught = example.labels[example.labels != IGNORE].tolist()
    assert processor.decode(taught, skip_special_tokens=True).strip() == make_sample("read", 0, index=5).answer
    ((_, asked),) = right_tokens(model, collate([example], model.config))
    assert asked == len(taught)


def test_models_that_did_not_begin_alike_are_no_comparison():
    scores = {"x": Scores({}, 1, 1.0, 1.0, 1.0)}
    jobs = [Job(0, arm, 1, "", 1, 1) for arm in range(2)]
    alike = [Outcome(scores, [1.0], seen=3, begun=4, parameters=1, seconds=1.0)] * 2
    assert all(check.passed for check in _equal(0, dict(zip(jobs, alike, strict=True))))
    for change in ({"seen": 5}, {"begun": 5}):
        other = dict(zip(jobs, (alike[0], replace(alike[0], **change)), strict=True))
        assert sum(not check.passed for check in _equal(0, other)) == 1


def test_interval_of_a_share():
    assert wilson(0.5, 100) == pytest.approx((0.404, 0.596), abs=1e-3)
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.278), abs=1e-3) and wilson(1.0, 10)[1] == 1.0


# -------------------------------------------------------------------------------------------------------- command


def test_the_command_writes_json_and_figures(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "examples.ablation", "--quick", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    result = json.loads((tmp_path / "ablation.json").read_text())
    assert result["quick"] is True and result["command"] == "python -m examples.ablation --quick"
    assert {(m["ablation"], m["provider"]) for m in result["models"]} == {
        (ablation.title, arm.name) for ablation in ABLATIONS for arm in ablation.arms
    }
    assert all(len(m["losses"]) == m["steps"] == 3 for m in result["models"])
    assert len(result["gate"]) == 4 and all(check["error"] == 0 for check in result["gate"])
    rows = {(r["workload"], r["provider"], r["metric"]): r for r in result["rows"]}
    assert len(rows) == len(result["rows"])
    for frames in (4, 6, 8, 12, 16, 24, 32):
        for kind in ("",) if frames < 8 else (", slower", ", repeated"):
            row = rows[f"direction, {frames} frames{kind}", "1-D RoPE", "accuracy"]
            assert row["questions"] == 4 and row["vision_tokens"] == 2 * frames
    costs = {arm: rows["counting, 112x56 pixels", arm, "accuracy"]["vision_tokens"] for arm in _names(RESOLUTION.arms)}
    assert costs == {"dynamic": 8, "fixed, 4 tokens": 4, "fixed, 6 tokens": 6}
    assert rows["counting, all sizes", "dynamic", "tokens right"]["questions"] == 3 * 4
    assert {p.name for p in tmp_path.glob("*.svg")} == {"ablation-frames.svg", "ablation-resolution.svg"}
    sizes = {name for name, *_ in rows if name.endswith(" pixels")}
    labels = re.findall(r"<!-- (\d+x\d+) -->", (tmp_path / "ablation-resolution.svg").read_text())
    assert len(sizes) > 4 and sorted(labels) == sorted(name.split()[1] for name in sizes)  # a tick each
    assert "M-RoPE against 1-D RoPE" in done.stdout and "written to" in done.stdout


def test_quick_numbers_do_not_go_among_the_results():
    quick = CliRunner().invoke(app, ["--quick"])
    assert quick.exit_code == 2 and "--out" in quick.output


def _names(arms: tuple[Arm, ...]) -> list[str]:
    return [arm.name for arm in arms]
