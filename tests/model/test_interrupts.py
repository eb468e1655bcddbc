"""Ctrl-C in every phase of a command: one line, exit code 130, no child and no file left."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from qwen2vl import Qwen2VL, interrupts, weights
from qwen2vl.__main__ import main
from qwen2vl.adapter import LoraShape, adaptable, add_layers
from qwen2vl.interrupts import GRACE
from qwen2vl.media import process

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def forked(arguments: list[object], prepare: Callable[[], object], log: Path) -> tuple[int, str]:
    """Exit status and stderr of the command in a fork of this process, which has imported all that it needs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that threads of this process are not there
        pid = os.fork()
    if pid == 0:
        with log.open("wb") as file:
            os.dup2(file.fileno(), 2)
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
        try:
            prepare()
            sys.argv = ["qwen2vl", *map(str, arguments)]
            main()
        except BaseException as error:
            os.write(2, f"left: {error!r}\n".encode())
        finally:
            os._exit(99)
    end = time.monotonic() + 60
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            pytest.fail(f"Ctrl-C did not end the command: {log.read_text()}")
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1]), log.read_text()


def interrupting(place: str, name: str, work: Callable[..., object] | None = None) -> Callable[[], None]:
    """Puts in the place of ``name`` what does its work, or ``work``, again and again until Ctrl-C comes, soon."""

    def prepare() -> None:
        module, _, holder = place.partition(":")
        owner = importlib.import_module(module)
        owner = getattr(owner, holder) if holder else owner
        original = work or getattr(owner, name)

        def working(*args, **kwargs):
            threading.Timer(random.uniform(0, 0.05), os.kill, (os.getpid(), signal.SIGINT)).start()
            while True:
                original(*args, **kwargs)

        setattr(owner, name, working)

    return prepare


def without_end(*args, **kwargs) -> None:
    """One operation outside Python that takes minutes, as a product of large matrices does."""
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**30)


ASK = ("generate", "--model", "model", "--prompt", "hi")
PHASES = {
    "loading": (ASK, "qwen2vl.model:Qwen2VL", "from_pretrained"),
    "a picture": ((*ASK, "--image", "day.png"), "qwen2vl.prompt.processor", "preprocess_image"),
    "tokenizing": (ASK, "qwen2vl.prompt.tokenizer:Tokenizer", "encode_plain"),
    "the tower": ((*ASK, "--image", "day.png"), "qwen2vl.model:Qwen2VL", "encode_patches"),
    "the prefill": (
        ASK,
        "qwen2vl.model:Qwen2VL",
        "prefill",
        lambda *_, **__: time.sleep(0.01),
    ),  # a cache is filled once
    "a line of a file": (
        ("generate", "--model", "model", "--jsonl", "asked.jsonl", "--out", "interrupted.jsonl"),
        "qwen2vl.batching",
        "generate",
    ),
    "eval": (("eval", "--model", "model", "--quick"), "qwen2vl.samples.held_out", "generate"),
    "inspect": (("inspect", "--model", "model", "day.png"), "qwen2vl.prompt.processor", "preprocess_image"),
}


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)
    (place / "asked.jsonl").write_text(json.dumps({"prompt": "hi"}) + "\n")


@pytest.mark.parametrize("phase", PHASES)
def test_ctrl_c_ends_every_phase(phase, tmp_path):
    arguments, *where = PHASES[phase]
    status, said = forked([*arguments], interrupting(*where), tmp_path / "stderr")
    assert (status, said) == (130, "interrupted\n")


def test_an_operation_that_takes_minutes_is_not_waited_for(tmp_path):
    """Nor are threads of a pool, nor code that swallows KeyboardInterrupt: the thread that watches needs neither."""
    prepare = interrupting("qwen2vl.model:Qwen2VL", "encode_patches", without_end)
    status, said = forked([*ASK, "--image", "day.png"], prepare, tmp_path / "stderr")
    assert (status, said) == (130, "interrupted\n")


def test_code_that_swallows_ctrl_c_ends_as_well(tmp_path):
    def swallow(*args, **kwargs):
        with contextlib.suppress(BaseException):
            time.sleep(0.01)

    prepare = interrupting("qwen2vl.prompt.processor", "preprocess_image", swallow)
    status, said = forked([*ASK, "--image", "day.png"], prepare, tmp_path / "stderr")
    assert (status, said) == (130, "interrupted\n")


def test_tokens_of_an_answer(tmp_path):
    def show(*args) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def prepare() -> None:
        importlib.import_module("qwen2vl.cli.generate").printable = show

    status, said = forked([*ASK, "-n", "100"], prepare, tmp_path / "stderr")
    assert (status, said) == (130, "interrupted\n")


@pytest.mark.parametrize("work", [None, without_end], ids=["in good order", "at once"])
def test_a_video_leaves_no_process(work, tmp_path):
    """The child is in the middle of decoding, or has nobody any more who would end it."""
    started = tmp_path / "pids"

    class Noted(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            with started.open("a") as file:
                file.write(f"{self.pid}\n")

    def prepare() -> None:
        process.subprocess.Popen = Noted  # type: ignore[misc]
        interrupting("qwen2vl.media.process:Decoder", "timeline", work)()

    status, said = forked([*ASK, "--video", "balloon.mp4"], prepare, tmp_path / "stderr")
    assert (status, said) == (130, "interrupted\n")
    (pid,) = map(int, started.read_text().split())
    end = time.monotonic() + 30
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie":
        assert time.monotonic() < end, "the decoder is left"
        time.sleep(0.01)


@pytest.mark.parametrize("work", [None, without_end], ids=["in good order", "at once"])
def test_a_merge_leaves_no_file(work, place, model, tmp_path):
    adapted = Qwen2VL.from_pretrained(place / "model", device="cpu")
    add_layers(adapted, list(adaptable(adapted))[:1], LoraShape(rank=2, alpha=4.0))
    adapted.save_adapter(tmp_path / "adapter")

    def half(group, path, **kwargs):
        Path(path).write_bytes(b"half")
        without_end()

    prepare = interrupting("qwen2vl.weights", "save_file", None if work is None else half)
    arguments = ["merge", "--model", "model", "--adapter", tmp_path / "adapter", "--output", tmp_path / "merged"]
    status, said = forked(arguments, prepare, tmp_path / "stderr")
    assert (status, said) == (130, "interrupted\n")
    assert list((tmp_path / "merged").iterdir()) == []


TRAINING = """
[run]
output = {output!r}
steps = 3
save_every = 1
[model]
checkpoint = {model!r}
dtype = "float32"
[[data]]
path = {data!r}
format = "conversations"
"""


@pytest.mark.parametrize("phase", ["a step", "a save"])
def test_training_says_what_is_saved(phase, place, tmp_path):
    turns = [{"from": "human", "value": "Which colour?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"conversations": turns}) + "\n")
    paths = {"output": tmp_path / "run", "model": place / "model", "data": tmp_path / "data.jsonl"}
    config = tmp_path / "run.toml"
    config.write_text(TRAINING.format(**{name: str(path) for name, path in paths.items()}))
    arguments = ["train", "--stage", "instruct", "--config", config]
    if phase == "a step":
        prepare = interrupting("qwen2vl.training.trainer:Trainer", "train_step")
        status, said = forked(arguments, prepare, tmp_path / "stderr")
        assert status == 130 and said.endswith("\ninterrupted: no step was saved yet\n")
        return

    save = torch.save

    def interrupted(*args):
        torch.save = save
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(2 * GRACE)
        save(*args)

    def prepare() -> None:
        logging.getLogger().handlers.clear()  # pytest's
        torch.save = interrupted

    status, said = forked(arguments, prepare, tmp_path / "stderr")
    finished, told = said.splitlines()[-2:]
    assert status == 130 and told == "interrupted: step 1 is saved; --resume goes on from it"
    assert finished == "interrupted: the checkpoint that is being written is finished first"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]


def test_imports():
    """The first thing that a command does; what is executed there as a string leaves Python a mark of its own."""
    program = """
import os, runpy, signal, sys
from qwen2vl import interrupts
class Interrupt:
    def find_spec(self, name, *rest):
        if name == "qwen2vl.cli.app":
            exec("import os, signal; os.kill(os.getpid(), signal.SIGINT)")
sys.meta_path.insert(0, Interrupt())
sys.argv = ["qwen2vl", "info"]
runpy.run_module("qwen2vl", run_name="__main__", alter_sys=True)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


def test_what_catches_it_is_not_ended(tmp_path):
    """As chat does: the process goes on, and one Ctrl-C more ends it where the first cannot be raised."""
    program = """
import hashlib, os, signal, sys, threading, time
from qwen2vl import interrupts
def press(seconds):
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
with interrupts.command(), interrupts.caught_by_caller():
    for _ in range(2):
        try:
            press(0.05)
            time.sleep(60)
        except KeyboardInterrupt:
            print("caught", flush=True)
    time.sleep(1.0)  # nothing ends it
    print("goes on", flush=True)
    press(0.05)
    press(0.5)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**30)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stdout.split("\n") == ["caught", "caught", "goes on", ""]
    assert done.stderr == "interrupted\n"


def test_what_goes_with_the_process_is_in_no_index(place, tmp_path, monkeypatch):
    """Shards are thrown away by Ctrl-C until the index names them, and no moment longer."""
    seen = []
    write = weights.write_json
    monkeypatch.setattr(weights, "write_json", lambda *given: (seen.append(set(interrupts._scratch)), write(*given)))
    with_shards = Qwen2VL.from_pretrained(place / "model", device="cpu")
    monkeypatch.setattr(weights, "save_file", lambda *given, **more: seen.append(set(interrupts._scratch)))
    with_shards.save_pretrained(tmp_path, max_shard_bytes=8_000_000)
    *shards, index = seen
    assert len(shards) > 1 and index == set() == interrupts._scratch
    assert all({path.name for path in one if path.suffix == ".safetensors"} > set() for one in shards)
