"""The command line from outside: what it prints, what it saves, and how it fails."""

from __future__ import annotations

import importlib
import json
import os
import pty
import re
import select
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import qwen2vl_kernels
from qwen2vl import Box, GenerationConfig, Grounded, Processor, Quad, Qwen2VL, draw_grounding, generate
from qwen2vl.choosing import Choice
from qwen2vl.cli import lines
from qwen2vl.cli.common import printable
from qwen2vl.errors import Qwen2VLError
from qwen2vl.media.image import load_image
from qwen2vl_kernels.core import attention_choice, backends
from qwen2vl_kernels.core.matmul import cpu_vendor, slow_on_cpu
from tests.training.samples import tiny_moe_config

ROOT = Path(__file__).resolve().parent.parent.parent


def answer(run, *args, **kwargs) -> dict:
    result = run("generate", "--model", "model", "--json", "--max-new-tokens", 12, *args, **kwargs)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


# ---------------------------------------------------------------------------------------------------- generate


def test_json_describes_the_answer(run):
    got = answer(run, "--video", "balloon.mp4", "--image", "day.png", "--prompt", "What?", "--max-pixels", 10_000)
    processor = Processor.from_pretrained("model")
    assert got["text"] == processor.decode(got["token_ids"])
    assert got["finish_reason"] == "length"
    video, image = got["media"]
    assert image == {
        "kind": "image",
        "source": "day.png",
        "source_size": [56, 84],
        "resized_size": [56, 84],
        "grid_thw": [1, 4, 6],
        "tokens": 6,
    }
    assert video["kind"] == "video" and video["source"] == "balloon.mp4" and video["source_size"] == [48, 64]
    height, width = video["resized_size"]
    assert video["grid_thw"] == [2, height // 14, width // 14]
    assert video["duration"] == pytest.approx(2) and video["fps"] == pytest.approx(10)
    assert len(video["frame_times"]) == 4
    text = len(processor([{"role": "user", "content": "What?"}])["input_ids"][0])
    counts = got["tokens"]
    assert counts["image"] == 6 and counts["video"] == video["tokens"] == height * width * 2 // 784
    assert counts["prompt"] == text + counts["image"] + counts["video"] + 4  # two marks around each
    assert counts["generated"] == len(got["token_ids"]) == 12
    timings = got["timings"]
    assert set(timings) == {"load", "prepare", "vision", "prefill", "decode", "first_token", "total"}
    assert timings["first_token"] == pytest.approx(timings["prepare"] + timings["vision"] + timings["prefill"])
    assert set(got["decoding"]) == {"tokens_per_s", "step_bytes", "copy_bytes_per_s", "share_of_copy"}
    parts = {name: seconds for name, seconds in timings.items() if name not in ("first_token", "total")}
    assert all(seconds > 0 for seconds in parts.values()) and sum(parts.values()) <= got["timings"]["total"]
    assert (got["model"], got["device"], got["dtype"]) == ("model", "cpu", "float32")
    assert got["quantization"] is None


ANSWER = (
    "Here: <|object_ref_start|>the sun<|object_ref_end|><|box_start|>(100,250),(500,750)<|box_end|> and "
    "<|quad_start|>(0,0),(500,0),(500,500),(0,500)<|quad_end|>"
)


@pytest.fixture
def grounded(monkeypatch):
    """Every answer is ANSWER."""
    tokenizer = Processor.from_pretrained("model").tokenizer
    pieces = [p for p in re.split(r"(<\|\w+\|>)", ANSWER) if p]
    ids = [i for p in pieces for i in ([tokenizer.id(p)] if p[0] == "<" else tokenizer.encode_plain(p))]

    class Fixed:
        def __init__(self, *_, **__):
            self.left = iter([*ids, 999])  # the id that ends an answer of this checkpoint

        def __call__(self, *_):
            return Choice(torch.tensor([next(self.left)]))

    monkeypatch.setattr("qwen2vl.generation.Chooser", Fixed)


def test_boxes_are_printed_and_drawn(run, grounded, place, tmp_path):
    args = ("generate", "-m", "model", "-i", "day.png", "-p", "Find the sun.")
    result = run(*args, "--boxes", "--draw", tmp_path / "found.png")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1:] == [  # 84 x 56 pixels
        "the sun: box (100,250),(500,750), pixels (8.4,14),(42,42) of day.png",
        "quad (0,0),(500,0),(500,500),(0,500), pixels (0,0),(42,0),(42,28),(0,28) of day.png",
    ]
    places = [
        Grounded("the sun", (Box(100, 250, 500, 750),)),
        Grounded(None, (Quad(((0, 0), (500, 0), (500, 500), (0, 500))),)),
    ]
    np.testing.assert_array_equal(Image.open(tmp_path / "found.png"), draw_grounding(place / "day.png", places))
    assert run(*args).stdout.count("\n") == 1  # the answer alone
    got = json.loads(run(*args, "--json").stdout)
    assert got["boxes"] == [
        {"label": "the sun", "points": [[100, 250], [500, 750]], "pixels": [[8.4, 14], [42, 42]], "media": 0},
        {
            "label": None,
            "points": [[0, 0], [500, 0], [500, 500], [0, 500]],
            "pixels": [[0, 0], [42, 0], [42, 28], [0, 28]],
            "media": 0,
        },
    ]


def test_boxes_beside_several_files_say_that_they_could_be_in_any(run, grounded):
    args = ("generate", "-m", "model", "-i", "day.png", "-i", "a night.jpg", "-p", "Find the sun.")
    result = run(*args, "--boxes")
    assert result.stdout.splitlines()[1] == "the sun: box (100,250),(500,750)"
    assert "no pixels: the answer does not say which of the 2 files a box is in" in result.stderr
    assert [(one["pixels"], one["media"]) for one in json.loads(run(*args, "--json").stdout)["boxes"]] == [
        (None, None)
    ] * 2
    frames = run("generate", "-m", "model", "--video", "balloon.mp4", "-p", "Find the sun.", "--boxes")
    assert "pixels (6.4,12),(32,36) of balloon.mp4" in frames.stdout  # 64 x 48 pixels


def test_an_answer_without_boxes_says_so(run, tmp_path):
    result = run("generate", "-m", "model", "-i", "day.png", "-n", 2, "--boxes", "--draw", tmp_path / "out.png")
    assert result.exit_code == 0 and result.stdout.count("\n") == 1
    assert "the answer has no boxes" in result.stderr and "out.png shows no box" in result.stderr
    assert result.stderr.count("the answer has no boxes") == 1
    np.testing.assert_array_equal(Image.open(tmp_path / "out.png"), load_image("day.png"))


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ("-i day.png -i day.png --draw out.png", "one --image and no --video"),
        ("-p hi --draw out.png", "one --image and no --video"),
        ("--video balloon.mp4 --draw out.png", "one --image and no --video"),
        ("-i day.png --draw out.txt", "is no name of a picture"),
        ("-i day.png --draw missing/out.png", "there is no folder 'missing'"),
    ],
)
def test_what_could_not_be_drawn_is_refused_at_the_start(run, args, named):
    result = run("generate", "--model", "nowhere", *args.split())
    assert result.exit_code == 2 and named in " ".join(result.stderr.replace("│", " ").split())


def test_several_answers_with_logprobs(run):
    drawn = ("--prompt", "hi", "--temperature", 1.5, "--seed", 1, "--num-return-sequences", 3)
    got = answer(run, *drawn, "--logprobs", 2)
    assert "text" not in got and got["tokens"]["generated"] == 36
    assert len({one["text"] for one in got["answers"]}) == 3
    for one in got["answers"]:
        assert [told["token"]["id"] for told in one["logprobs"]] == one["token_ids"]
        for told in one["logprobs"]:
            best, second = told["top"]
            assert 0 > best["logprob"] >= told["logprob"] and best["logprob"] >= second["logprob"]
    args = ("generate", "--model", "model", "--max-new-tokens", 12)
    assert run(*args, *drawn).stdout == "\n\n".join(one["text"] for one in got["answers"]) + "\n"
    first = answer(run, *drawn[:-2])
    assert first["text"] == got["answers"][0]["text"] and "logprobs" not in first
    refused = run(*args, "--prompt", "hi", "--num-return-sequences", 2)
    assert refused.exit_code == 1 and "error: num_return_sequences must be 1 where" in refused.stderr


def test_media_keep_their_order(run):
    got = answer(run, "--image=day.png", "--video=balloon.mp4", "--prompt=x", "-i", "a night.jpg", "--max-pixels=9000")
    assert [item["source"] for item in got["media"]] == ["day.png", "balloon.mp4", "a night.jpg"]
    assert [item["kind"] for item in got["media"]] == ["image", "video", "image"]


def test_text_streams(run, monkeypatch):
    whole = answer(run, "--image", "day.png", "--prompt", "hi")["text"]
    printed = []
    module = importlib.import_module("qwen2vl.cli.generate")
    monkeypatch.setattr(module, "print", lambda text="\n", **k: printed.append((text, k["flush"])), raising=False)
    args = ("generate", "--model", "model", "--image", "day.png", "--prompt", "hi", "--max-new-tokens", 12)
    assert run(*args).exit_code == 0
    pieces = [piece for piece, _ in printed]
    assert "".join(pieces) == whole + "\n" and len(pieces) == 13 and all(flushed for _, flushed in printed)


def test_system_and_stdin_reach_the_prompt(run):
    plain = answer(run, "--prompt", "hi")
    assert answer(run, "--prompt", "-", stdin="hi\n")["token_ids"] == plain["token_ids"]
    other = answer(run, "--prompt", "hi", "--system", "You are a helpful assistant who says nothing at all.")
    assert other["tokens"]["prompt"] > plain["tokens"]["prompt"]


@pytest.mark.parametrize(("option", "file"), [("--image", "a night.jpg"), ("--video", "balloon.mp4")])
def test_media_come_through_a_pipe(run, option, file):
    data = Path(file).read_bytes()
    named = answer(run, "--image", "day.png", option, file, "-p", "hi", "--max-pixels", 9000)
    piped = answer(run, "--image", "day.png", option, "-", "-p", "hi", "--max-pixels", 9000, stdin=data)
    assert piped["token_ids"] == named["token_ids"] and piped["media"][1] == {**named["media"][1], "source": "-"}
    (shown,) = json.loads(run("inspect", "-", "--as", option[2:], "--json", "--model", "model", stdin=data).stdout)
    (wanted,) = json.loads(run("inspect", file, "--json", "--model", "model").stdout)
    assert shown == {**wanted, "file": "-", "file_bytes": None}


@pytest.mark.parametrize(
    ("args", "code", "named"),
    [
        (("generate", "--image", "-", "--video", "-"), 2, "once"),
        (("generate", "--image", "-", "--prompt", "-"), 2, "once"),
        (("inspect", "-", "-"), 2, "once"),
        (("generate", "--image", "-"), 1, "stdin is empty\n"),
        (("inspect", "-"), 1, "stdin is empty\n"),
    ],
)
def test_what_a_pipe_cannot_give(run, args, code, named):
    result = run(*args, "--model", "model", stdin="")
    assert result.exit_code == code and named in result.stderr and result.stdout == ""


def test_the_toy_does_not_go_on_and_on(run):
    """What does not end by itself is cut short where the toy answers, unless somebody says how long."""
    endless = ("-i", "day.png", "-p", "x", "--temperature", 9, "--seed", 1, "--json")
    for args, wanted in (((), 96), (("-n", 120), 120), (("--model", "model"), 512)):
        got = json.loads(run("generate", *endless, *args).stdout)
        assert (got["tokens"]["generated"], got["finish_reason"]) == (wanted, "length")


def test_quiet_leaves_errors(run):
    """What is said beside an answer goes, on a terminal, too; and comes back where nobody asked for quiet."""
    asked = ("generate", "-i", "day.png", "-p", "hi", "-n", 1)
    assert "toy" in run(*asked).stderr
    for quiet in (
        (*asked, "--quiet"),
        ("inspect", "day.png", "-q"),
        ("eval", "--quick", "--skill", "count", "--difficulty", 0, "-q"),
    ):
        result = run(*quiet)
        assert result.exit_code == 0 and result.stderr == "" and result.stdout
    result = run("chat", "-q", "-n", 1, stdin="/image day.png\nhi\n")
    assert result.exit_code == 0 and result.stderr == ""
    assert run("generate", "-q", "-i", "missing.png").stderr.startswith("error: ")
    assert "attached" in run("chat", "-n", 1, stdin="/image day.png\n").stderr


def test_stop_string_ends_the_answer(run):
    whole = answer(run, "--prompt", "hi")["text"]
    stop = next(c for c in whole[3:] if whole.index(c) >= 3 and c.isprintable() and not c.isspace())
    got = answer(run, "--prompt", "hi", "--stop", stop, "--stop", "never this")
    assert got["finish_reason"] == "stop_string" and got["text"] == whole[: whole.index(stop)]


def test_sampling_options(run):
    greedy = answer(run, "--prompt", "hi")["token_ids"]
    drawn = [answer(run, "--prompt", "hi", "--temperature", 2, "--seed", seed)["token_ids"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] and drawn[0] != drawn[2] and drawn[0] != greedy
    for same in (("--temperature", 0), ("--top-k", 1), ("--top-p", 0)):
        assert answer(run, "--prompt", "hi", *same)["token_ids"] == greedy
    punished = answer(run, "--prompt", "hi", "--repetition-penalty", 1e6)["token_ids"]
    assert len(set(punished)) == len(punished)


def test_sampling_options_replace_a_checkpoints_own(run, place):
    """Released checkpoints say top_k 1: a temperature must not be lost to that."""
    path = place / "model" / "generation_config.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps({**json.loads(before), "do_sample": True, "top_k": 1, "temperature": 0.01}))
        as_stated = answer(run, "--prompt", "hi", "--seed", 1)["token_ids"]
        drawn = answer(run, "--prompt", "hi", "--seed", 1, "--temperature", 2)["token_ids"]
    finally:
        path.write_text(before)
    assert as_stated == answer(run, "--prompt", "hi")["token_ids"]
    assert drawn == answer(run, "--prompt", "hi", "--seed", 1, "--temperature", 2)["token_ids"] != as_stated


# ------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--image", "missing.png"), "missing.png"),
        (("--image", "text.png"), "text.png"),
        (("--video", "day.png"), "day.png"),
        (("--video", "text.png"), "text.png"),
        (("--image", "http://localhost:1/a.png"), "give --allow-remote"),
        (("--device", "nowhere"), "--device nowhere"),
        (("--device", "meta"), "--device meta: it computes nothing"),
        (("--prompt", "to and fro " * 9000), "context of 32768 tokens"),
    ],
)
def test_what_cannot_be_used_is_one_line(run, args, named):
    result = run("generate", "--model", "model", "--prompt", "hi", *args)
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert named in result.stderr and "messages[" not in result.stderr


def test_what_is_read_in_part_is_one_line(place):
    """As a user sees it: no place in the code, and no second line."""
    pages = [Image.new("RGB", (56, 56), colour) for colour in ("red", "blue")]
    pages[0].save(place / "[b]ook.tiff", save_all=True, append_images=pages[1:])
    args = ["generate", "-m", "model", "-i", "[b]ook.tiff", "-n", "1"]
    result = subprocess.run(
        [sys.executable, "-m", "qwen2vl", *args],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0
    assert result.stderr == (
        "warning: '[b]ook.tiff' holds several frames or pages, of which the first is read: "
        "give it as a video for all of them\n"
    )


def test_other_warnings_stay_as_they_are(run, monkeypatch):
    def warn(*_, **__):
        warnings.warn("of another kind", UserWarning, stacklevel=1)

    monkeypatch.setattr("qwen2vl.cli.generate.tell_who_answers", warn)
    with pytest.warns(UserWarning, match="of another kind"):
        assert run("generate", "-m", "model", "-p", "hi", "-n", 1).exit_code == 0


def test_bad_checkpoints(run, place, tmp_path):
    for model in ("no-such-folder", place / "day.png", tmp_path):
        result = run("generate", "--model", model, "--prompt", "hi")
        assert result.exit_code == 1 and str(model) in result.stderr.replace("\n", "")
    (tmp_path / "config.json").write_bytes((place / "model" / "config.json").read_bytes())
    result = run("generate", "--model", tmp_path, "--prompt", "hi")
    assert result.exit_code == 1 and "tokenizer.json" in result.stderr


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("generate", "--model", "model"), "--prompt"),
        (("generate",), "--prompt"),
        (("generate", "--model", "model", "--prompt", "x", "--what"), "--what"),
        (("generate", "--model", "model", "--prompt", "x", "--top-p", "2"), "--top-p"),
        (("generate", "--model", "model", "--prompt", "x", "--num-return-sequences", "0"), "--num-return-sequences"),
        (("generate", "--model", "model", "--prompt", "x", "--logprobs", "2"), "--logprobs"),
        (("generate", "--model", "model", "--prompt", "x", "--dtype", "int8"), "--dtype"),
        (("generate", "--model", "model", "--prompt", "x", "--stop", ""), "--stop"),
        (("generate", "--model", "model", "--prompt", "x", "--min-pixels", "9", "--max-pixels", "4"), "--min-pixels"),
        (("inspect",), "FILE"),
        (("inspect", "day.png", "--as", "sound"), "--as"),
        (("paint",), "paint"),
    ],
)
def test_usage_errors(run, args, named):
    result = run(*args)
    assert result.exit_code == 2 and named in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, TypeError])
def test_an_error_of_ours_is_not_hidden(run, monkeypatch, kind):
    def broken(*args, **kwargs):
        raise kind("a bug")

    monkeypatch.setattr(Processor, "__call__", broken)
    result = run("generate", "--model", "model", "--prompt", "hi")
    assert type(result.exception) is kind


@pytest.mark.parametrize("wrong", [3, torch.zeros(2, 5)])
def test_what_the_kernels_refuse_is_one_line(run, monkeypatch, wrong):
    """Their checks raise TypeError and ValueError, which elsewhere would be bugs of ours."""
    monkeypatch.setattr(Processor, "__call__", lambda *a, **k: qwen2vl_kernels.rms_norm(wrong, torch.ones(4)))
    result = run("generate", "--model", "model", "--prompt", "hi")
    assert result.exit_code == 1 and result.stderr.startswith("error: rms_norm: ") and result.stderr.count("\n") == 1


def test_max_vision_patches_reaches_the_tower(run, monkeypatch):
    seen = []
    tower = type(Qwen2VL.from_pretrained("model").visual)
    forward = tower.forward
    monkeypatch.setattr(tower, "forward", lambda self, *a, **k: seen.append(k["max_patches"]) or forward(self, *a, **k))
    args = ("--image", "day.png", "--image", "a night.jpg", "--prompt", "hi")
    assert answer(run, *args)["token_ids"] == answer(run, *args, "--max-vision-patches", 24)["token_ids"]
    lines = "/image day.png\nhi\n"
    assert run("chat", "--model", "model", "-n", 2, "--max-vision-patches", 30, stdin=lines).exit_code == 0
    assert seen == [None, 24, 30]


def test_version_and_help(run):
    assert run("--version").stdout.startswith("qwen2vl ")
    for command in ("generate", "chat", "info", "inspect"):
        assert command in run("--help").stdout
        assert run(command, "--help").exit_code == 0


def test_flags_have_no_type_in_the_help(run):
    """Of all commands, and of those that typer adds by itself."""
    for command in ((), *((name,) for name in ("generate", "chat", "info", "inspect", "eval", "train"))):
        text = run(*command, "--help").stdout
        lines = [line for line in text.splitlines() if any(f in line for f in ("--json", "--help ", "--version"))]
        assert lines and "bool" not in text.lower(), text


def test_control_characters_do_not_reach_a_terminal():
    assert printable("a\x1b[2Jb\n\tc\x7f\x9b", True) == "a␛[2Jb\n\tc␡\ufffd"
    assert printable("a\x1b", False) == "a\x1b"


# -------------------------------------------------------------------------------------------------------- chat


def test_chat_is_a_conversation(run, monkeypatch):
    """Two turns with media equal the same messages through the API, and no file is decoded twice."""
    opened = []
    module = importlib.import_module("qwen2vl.prompt.processor")
    read_image, read_video = module.preprocess_image, module.preprocess_video
    monkeypatch.setattr(module, "preprocess_image", lambda s, *a, **k: opened.append(s) or read_image(s, *a, **k))
    monkeypatch.setattr(module, "preprocess_video", lambda s, *a, **k: opened.append(s) or read_video(s, *a, **k))
    lines = [
        "/image 'a night.jpg'",
        "/video balloon.mp4",
        "What is it?",
        "And now?",
        "/reset",
        "What is it?",
        "/quit",
        "x",
    ]
    args = ("chat", "--model", "model", "--max-new-tokens", 6, "--max-pixels", 9000, "--repetition-penalty", 1e6)
    result = run(*args, stdin="\n".join(lines))
    assert result.exit_code == 0, result.stderr
    assert [source for source in opened if isinstance(source, str)] == ["balloon.mp4"]
    assert "a night.jpg" in result.stderr and "4 frames of 2.0 s, 64 × 48" in result.stderr

    processor, model = Processor.from_pretrained("model", max_pixels=9000), Qwen2VL.from_pretrained("model")
    config = GenerationConfig(max_new_tokens=6, repetition_penalty=1e6)

    def ask(messages):
        inputs = processor(messages, video_max_pixels=9000)
        return generate(model, inputs, tokenizer=processor.tokenizer, config=config).texts[0]

    media = [{"type": "image", "image": "a night.jpg"}, {"type": "video", "video": "balloon.mp4"}]
    first = [{"role": "user", "content": [*media, {"type": "text", "text": "What is it?"}]}]
    one = ask(first)
    two = ask([*first, {"role": "assistant", "content": one}, {"role": "user", "content": "And now?"}])
    alone = ask([{"role": "user", "content": "What is it?"}])
    assert len({one, two, alone}) == 3
    assert result.stdout == f"{one}\n{two}\n{alone}\n"


def test_chat_system_prompt(run):
    args = ("chat", "--model", "model", "--max-new-tokens", 6)
    by_option = run(*args, "--system", "Be brief.", stdin="hi\n")
    by_command = run(*args, stdin="/system Be brief.\nhi\n")
    back = run(*args, "--system", "Be brief.", stdin="/system\nhi\n")
    assert by_option.stdout == by_command.stdout != back.stdout == run(*args, stdin="hi\n").stdout


@pytest.mark.parametrize("line", ["/image missing.png", "/image", "/picture day.png"])
def test_a_piped_chat_ends_at_an_error(run, line):
    result = run("chat", "--model", "model", stdin=f"{line}\nhi\n")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_chat_on_a_terminal(place):
    """An error does not end it, nor does Ctrl-C, which stops the answer; the conversation goes on."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "qwen2vl", "chat", "--model", str(place / "model"), "--max-new-tokens", "30000"]
    environment = {**os.environ, "TERM": "dumb", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=place,
        env=environment,
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(theirs)
    try:
        size = sum(p.numel() for p in Qwen2VL.from_pretrained(place / "model").parameters()) / 1e6
        banner = _read_until(ours, "> ")
        assert "/help" in banner and f"{place / 'model'}: {size:.1f}M parameters, float32, on cpu" in banner
        os.write(ours, b"/image missing.png\n")
        assert "error: no such file" in _read_until(ours, "png'\r\n> ")
        os.write(ours, b"hello\n")
        _read_until(ours, "hello\r\n")
        assert os.read(ours, 1)  # the answer has begun
        os.write(ours, b"\x03")
        _read_until(ours, "\r\n(stopped)\r\n> ")
        os.write(ours, b"/quit\n")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _take_terminal() -> None:
    import fcntl
    import signal
    import termios

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's job in the background is started deaf to Ctrl-C
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _read_until(terminal: int, wanted: str, seconds: float = 60) -> str:
    seen, end = b"", time.monotonic() + seconds
    while wanted.encode() not in seen:
        ready, _, _ = select.select([terminal], [], [], max(0, end - time.monotonic()))
        assert ready, f"no {wanted!r} in {seen[-2000:]!r}"
        seen += os.read(terminal, 65536)
    return seen.decode(errors="replace")


# --------------------------------------------------------------------------------------------------------- info


def test_info(run):
    facts = json.loads(run("info", "--json").stdout)
    assert facts["versions"]["torch"] and facts["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    for device in ("cpu", "cuda"):
        rows = facts["backends"][device]
        assert [tuple(r.values()) for r in rows] == backends.table(device) and all(r["why"] for r in rows)
        served = [row[kind] for row in facts["attention"][device] for kind in attention_choice.KINDS]
        assert all(of["why"] for of in served)
        for measured in [of["measured"] for of in rows + served if of["measured"]]:
            assert (ROOT / "benchmarks" / "results" / measured).is_file()
    assert facts["threads"]["torch"] == torch.get_num_threads()
    assert len(facts["gpus"]) == torch.cuda.device_count()
    for extension in facts["extensions"].values():
        assert extension["available"] == (extension["reason"] is None)
    attention = {(row["dtype"], row["head_dim"]): row for row in facts["attention"]["cpu"]}
    in_blocks = cpu_vendor() == "AuthenticAMD" and not slow_on_cpu(torch.bfloat16)
    assert attention["bfloat16", 80]["inference"]["backend"] == ("blocked" if in_blocks else "sdpa")
    assert attention["bfloat16", 80]["training"]["backend"] == "sdpa"
    text = run("info").stdout
    assert "varlen_attention on cpu, by rows of the longest segment" in text and "64, 72, 80, 128" in text
    assert all(words in text for words in ("causal, grouped heads", "gradients", "1024 rows on", "sdpa ("))
    for row in facts["supported"]:
        assert row["what"] in text and row["forms"].split()[0] in text
    for row in facts["backends"]["cpu"]:
        assert row["op"] in text and (row["measured"] or "not measured") in text
    for reason in facts["unavailable"].values():
        assert reason in text.replace("\n", " ")


def test_info_of_a_checkpoint(run, model, tmp_path):
    facts = json.loads(run("info", "--model", "model", "--json").stdout)
    assert facts["parameters"] == sum(p.numel() for p in model.parameters())
    assert (facts["dtype"], facts["experts"], facts["layers"]) == ("float32", None, model.config.text.num_hidden_layers)
    (tmp_path / "config.json").write_text(json.dumps(tiny_moe_config().to_dict()))
    text = run("info", "--model", tmp_path).stdout
    assert "5 in a layer, 2 for a token, and a shared one" in text
    both = run("info", "--model", "model", "--stack", "vllm")
    assert both.exit_code == 2 and "--stack" in both.stderr


def test_a_file_of_answers_with_a_line_without_bound_is_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE", 1000)
    out = tmp_path / "answers.jsonl"
    out.write_bytes(b"x" * 100_000)
    with pytest.raises(Qwen2VLError, match="line 1 is no answer"):
        lines._take_up(out, iter([b'{"prompt": "a"}']))
    assert out.stat().st_size == 100_000
