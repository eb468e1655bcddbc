"""--limit: every limit that refuses something names the flag, and the flag lifts it."""

import json

import pytest
from PIL import Image

from examples.demo.media import write_video

CASES = {
    "max_source_pixels": (4703, ("--image", "day.png")),  # one less than 84 x 56
    "max_item_tokens": (5, ("--image", "day.png")),
    "max_item_frames": (3, ("--video", "balloon.mp4")),
    "max_prompt_tokens": (11, ("--image", "day.png", "--image", "day.png")),
    "max_call_tokens": (11, ("--image", "day.png", "--image", "day.png")),
    "max_characters": (40, ("--prompt", "hello" * 20)),
    "max_decoded_pixels": (30_000, ("--image", "a night.jpg")),
}


@pytest.mark.parametrize("name", CASES)
def test_a_refusal_names_the_flag_that_lifts_it(name, run, place):
    """What is named, given with a number that is large enough, is what lets the same input through."""
    low, media = CASES[name]
    if name == "max_decoded_pixels":  # a JPEG of several scans
        Image.open(place / "a night.jpg").save(place / "scans.jpg", progressive=True)
        media = ("--image", "scans.jpg")
    ask = ("generate", "--model", "model", "-n", 1, *media)
    refused = run(*ask, "--limit", f"{name}={low}")
    assert refused.exit_code == 1 and f"{name} = {low}" in refused.stderr.replace(" is ", " = ")
    assert f"give --limit {name}=N" in refused.stderr and "raise" not in refused.stderr
    assert run(*ask, "--limit", f"{name}={100 * low}").exit_code == 0


def test_video_timeout(run, place):
    write_video(place / "long.mp4", width=640, height=480, seconds=4, fps=25)
    refused = run("inspect", "--model", "model", "long.mp4", "--limit", "video_timeout=0.01")
    assert refused.exit_code == 1 and "give --limit video_timeout=N" in refused.stderr
    (facts,) = json.loads(
        run("inspect", "--model", "model", "long.mp4", "--limit", "video_timeout=60", "--json").stdout
    )
    assert facts["tokens"] > 0


WRONG = ("pixels=3", "max_item_tokens", "max_item_tokens=many", "max_item_tokens=0", "video_timeout=nan", "9" * 5000)


@pytest.mark.parametrize(
    ("command", "wrong"), [*(("inspect", one) for one in WRONG), ("generate", "=1"), ("chat", "a=1"), ("eval", "a=1")]
)
def test_what_is_no_limit_is_a_usage_error(command, wrong, run):
    more = {"generate": ("--prompt", "hi"), "inspect": ("day.png",)}.get(command, ())
    result = run(command, "--model", "model", *more, "--limit", wrong)
    assert result.exit_code == 2 and "--limit" in result.stderr


def test_a_prompt_from_stdin_has_an_end(run, monkeypatch):
    monkeypatch.setattr("qwen2vl.cli.stdin._MAX_PROMPT", 10)
    result = run("generate", "--model", "model", "--prompt", "-", stdin="x" * 1000)
    assert result.exit_code == 2 and "more than 10 characters" in result.stderr
