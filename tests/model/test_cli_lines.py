"""Files of prompts, a JSON value a line, into files of answers: every form, bad lines, kills and resumes."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from qwen2vl.cli import lines
from qwen2vl.errors import PromptError

ROOT = Path(__file__).parents[2]


def user(content):
    return [{"role": "user", "content": content}]


def picture(colour):
    file = io.BytesIO()
    Image.new("RGB", (40, 40), colour).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.fixture
def asked(place, tmp_path):
    """A folder with a file of prompts in every form, pictures beside it, and bad lines among them."""
    folder = tmp_path / "asked"
    folder.mkdir()
    Image.new("RGB", (56, 56), "red").save(folder / "red.png")
    values = [
        {"prompt": "Say."},
        {"id": "a", "image": "red.png", "prompt": "Which colour?"},
        {"images": ["red.png", picture("blue")], "prompt": "And now?", "system": "Be brief."},
        user("Say it."),
        {"messages": user([{"type": "image", "image": "red.png"}]), "id": 7},
        {"video": str(place / "balloon.mp4"), "prompt": "What moves?"},
        "{broken",
        {"id": "gone", "image": "gone.png", "prompt": "What?"},
        {"id": "odd", "question": "What?"},
        {"prompt": "Last."},
    ]
    written = [value if isinstance(value, str) else json.dumps(value) for value in values]
    (folder / "asked.jsonl").write_text("\n\n".join(written))  # blank lines are none, the last ends without its end
    return folder / "asked.jsonl"


def answers(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_form_and_what_is_wrong_with_the_rest(run, asked, tmp_path):
    out = tmp_path / "out.jsonl"
    result = run("generate", "-m", "model", "--jsonl", asked, "--out", out, "-n", 5)
    assert result.exit_code == 1 and result.stdout == f"{out}\n"
    assert "7 of 10 lines answered, 3 have an error" in result.stderr
    found = answers(out)
    assert [one["index"] for one in found] == list(range(10))
    assert [one.get("id") for one in found] == [None, "a", None, None, 7, None, None, "gone", "odd", None]
    errors = {n: one["error"] for n, one in enumerate(found) if "error" in one}
    assert sorted(errors) == [6, 7, 8]
    assert errors[6].startswith("asked.jsonl:7: is no JSON")
    assert "no such file: 'gone.png'" in errors[7]
    assert errors[8] == (
        "asked.jsonl:9: wants messages, prompt, image, images, video, videos, system, id, got 'question'"
    )
    alone = json.loads(run("generate", "-m", "model", "-i", asked.parent / "red.png", "-p", "Which colour?", "-n", 5,
                           "--json").stdout)  # fmt: skip
    assert (found[1]["text"], found[1]["finish_reason"]) == (alone["text"], alone["finish_reason"])
    assert found[1]["tokens"] == {"prompt": alone["tokens"]["prompt"], "generated": alone["tokens"]["generated"]}
    with_system = run("generate", "-m", "model", "--system", "Be brief.", "-p", "Say.", "-n", 5).stdout
    again = tmp_path / "again.jsonl"
    run("generate", "-m", "model", "--jsonl", asked, "--out", again, "-n", 5, "--system", "Be brief.")
    assert answers(again)[0]["text"] + "\n" == with_system
    assert answers(again)[2] == found[2]


def test_a_run_that_was_cut_off_goes_on_and_asks_nothing_twice(run, asked, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    drawn = ("-n", 5, "--temperature", 1.5, "--seed", 3)
    command = ("generate", "-m", "model", "--jsonl", asked, "--out", out, *drawn)
    run(*command)
    whole = out.read_bytes()
    kept_lines = whole.splitlines(keepends=True)
    from qwen2vl import batching

    seen = []
    prepared = batching._prepared
    monkeypatch.setattr(batching, "_prepared", lambda *args: seen.append(1) or prepared(*args))
    for kept in (0, 4, 7, 10):
        out.write_bytes(
            b"".join(kept_lines[:kept]) + kept_lines[min(kept, 9)][:9] * (kept < 10)
        )  # a line that was cut off
        seen.clear()
        again = run(*command, "--batch-tokens", 300)
        assert out.read_bytes() == whole and len(seen) == 10 - kept
        assert again.exit_code == 1 and "7 of 10 lines answered, 3 have an error" in again.stderr
    others = [
        b"text\n",
        b'{"index": 1, "text": ""}\n',
        b'{"index": 0}\n',
        kept_lines[0] + kept_lines[1].replace(b'"a"', b'"b"'),
        whole + b'{"index": 10, "text": ""}\n',
    ]
    for wrong in others:
        out.write_bytes(wrong)
        refused = run("generate", "-m", "model", "--jsonl", asked, "--out", out)
        assert refused.exit_code == 1 and "is no answer to that line of the questions" in refused.stderr
        assert out.read_bytes() == wrong


def test_two_hundred_lines_with_five_bad_ones_through_a_kill(place, tmp_path):
    bad = {3, 50, 51, 120, 199}
    lines = [
        json.dumps({"id": n, "prompt": f"Say {n}. " * (n % 5 + 1)} if n not in bad else {"id": n}) for n in range(200)
    ]
    (tmp_path / "asked.jsonl").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "qwen2vl", "generate", "--model", str(place / "model"), "-n", "8",
               "--jsonl", str(tmp_path / "asked.jsonl"), "--batch-tokens", "300", "--out"]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    out = tmp_path / "out.jsonl"
    process = subprocess.Popen([*command, str(out)], env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not out.exists() or out.read_bytes().count(b"\n") < 20:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = out.read_bytes()
    assert 20 <= kept.count(b"\n") < 200
    whole = tmp_path / "whole.jsonl"
    for path in (out, whole):
        ended = subprocess.run([*command, str(path)], env=environment, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 1 and "195 of 200 lines answered, 5 have an error" in ended.stderr, ended.stderr
    assert out.read_bytes() == whole.read_bytes() and out.read_bytes().startswith(kept[: kept.rindex(b"\n") + 1])
    found = answers(out)
    assert [one["id"] for one in found] == list(range(200)) and {n for n in range(200) if "error" in found[n]} == bad


@pytest.mark.parametrize(("line", "message"), [
    (b"3", "wants a list of messages or an object, got int"),
    (b"\xff", "is no JSON"),
    (b"[" * 100000, "is no JSON"),
    (b"{}", "wants messages or a prompt"),
    (b'{"prompt": null}', "wants messages or a prompt"),
    (b'{"messages": "x"}', "messages: wants a list, got str"),
    (b'{"messages": [], "prompt": "x"}', "has messages, and prompt beside them"),
    (b" " * (lines.MAX_LINE + 1), "wants a line of at most 64 MB"),
])  # fmt: skip
def test_lines_that_are_none(line, message):
    with pytest.raises(PromptError, match=f"^f:3: {message}"):
        lines.read_line(line, "f:3")


def test_of_a_line_that_is_too_long_a_part_comes_that_is_too_long(monkeypatch):
    monkeypatch.setattr(lines, "MAX_LINE", 100)
    whole = b"y" * 99 + b"\n"
    file = io.BytesIO(b"x" * 1000 + b"\n" + whole + b"z" * 100 + b"\n" + b" \n{}\n" + b"x" * 303)
    assert list(lines._lines(file)) == [b"x" * 101, whole, b"z" * 100 + b"\n", b"{}\n", b"x" * 101]


@pytest.mark.parametrize(("args", "named"), [
    ("--jsonl asked.jsonl", "wants both --jsonl and --out"),
    ("--out out.jsonl", "wants both --jsonl and --out"),
    ("--batch-tokens 9 -p hi", "wants both --jsonl and --out"),
    ("--jsonl asked.jsonl --out out.jsonl -p hi --json", "take away --prompt, --json"),
    ("--jsonl asked.jsonl --out asked.jsonl", "is the file of the prompts"),
    ("--jsonl asked.jsonl --out missing/out.jsonl", "no folder missing"),
    ("--jsonl gone.jsonl --out out.jsonl", "does not exist"),
])  # fmt: skip
def test_half_a_pair_and_what_stands_beside_it(run, asked, monkeypatch, args, named):
    monkeypatch.chdir(asked.parent)
    result = run("generate", "--model", "nowhere", *args.split())
    assert result.exit_code == 2 and named in " ".join(result.stderr.replace("│", " ").split())
