"""Ranks that hold a small model together, for test_parallel.py; ``python -m tests.model.ranks FOLDER`` forks them.

A rank is forked from a process that has imported what ranks import, which takes several times as long as their work.
Each leaves what it found in ``FOLDER/found-RANKS-RANK.pt``; the command line what it said in files beside.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from qwen2vl import (
    Conversation,
    GenerationConfig,
    Processor,
    Qwen2VL,
    TensorParallel,
    generate,
    stream,
    weights,
)
from qwen2vl.cache import KVCache
from qwen2vl.cli.app import main
from qwen2vl_kernels import use_backend

PATIENCE = 100  # seconds after which ranks that wait for each other have failed
ENDLESS = (10**6,)
FUSED = ("decode_attention", "rms_norm_linear", "linear_add", "rms_norm_swiglu")


def messages(picture: torch.Tensor) -> list[dict[str, Any]]:
    """Two images of different sizes and a question."""
    images = [{"type": "image", "image": one.numpy()} for one in (picture, picture[:56, :56])]
    return [{"role": "user", "content": [*images, {"type": "text", "text": "Which?"}]}]


def answers(model: Qwen2VL, inputs: dict[str, Any], processor: Processor) -> dict[str, Any]:
    """What one process must find as well: logits, a step behind a cache, greedy and drawn answers, stop strings."""
    found: dict[str, Any] = {}
    with torch.no_grad():
        found["logits"] = model(**inputs)
        cache = KVCache(model.model.cache_config, 1, 256, device=model.device, dtype=model.dtype)
        model(**inputs, cache=cache)
        found["step"] = model.step(torch.tensor([[65]]), cache)
        found["heads"] = cache.k.shape[3]
    config = GenerationConfig(max_new_tokens=24, eos_token_ids=ENDLESS)
    one = generate(model, inputs, tokenizer=processor.tokenizer, config=config)
    found["greedy"] = one.sequences
    stop = replace(config, stop=(one.texts[0][6:9],))
    found["stopped"] = generate(model, inputs, tokenizer=processor.tokenizer, config=stop).texts
    # The second turn departs from the first one's answer.
    conversation = Conversation()
    for turn in (inputs, {**inputs, "input_ids": torch.cat([inputs["input_ids"], torch.tensor([[66, 67]])], 1)}):
        turn = {**turn, "attention_mask": torch.ones_like(turn["input_ids"])}
        last = generate(model, turn, config=config, conversation=conversation)
        found["turns"] = [*found.get("turns", []), last.sequences, last.cached_tokens]
    drawn = replace(config, temperature=1.0, num_return_sequences=3, repetition_penalty=1.2, logprobs=2)
    several = generate(model, inputs, config=drawn)
    found["drawn"], found["logprobs"] = several.sequences, [t.logprob for row in several.logprobs for t in row]
    return found


def fuses(model: Qwen2VL) -> bool:
    """Whether a step would go by the kernels that know nothing of ranks, where they come first."""
    with torch.no_grad(), use_backend(**dict.fromkeys(FUSED, "triton")):
        return model.model.steps(torch.zeros(1, 256, dtype=torch.bfloat16))


class _Counted:
    """safe_open that counts the bytes of what it gives."""

    bytes = 0

    def __init__(self, *args: Any) -> None:
        self.file = _open(*args)

    def __enter__(self) -> _Counted:
        self.file.__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        self.file.__exit__(*args)

    def keys(self) -> list[str]:
        return self.file.keys()

    def get_tensor(self, name: str) -> torch.Tensor:
        tensor = self.file.get_tensor(name)
        _Counted.bytes += tensor.nbytes
        return tensor

    def get_slice(self, name: str) -> Any:
        return _CountedSlice(self.file.get_slice(name))


class _CountedSlice:
    def __init__(self, view: Any) -> None:
        self.view = view
        self.get_shape, self.get_dtype = view.get_shape, view.get_dtype

    def __getitem__(self, which: Any) -> torch.Tensor:
        tensor = self.view[which]
        _Counted.bytes += tensor.nbytes
        return tensor


_open = weights.safe_open


def _refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def _rank(folder: Path, rank: int, ranks: int) -> None:
    parallel = TensorParallel.start("cpu")
    given = torch.load(folder / "given.pt", weights_only=False)
    inputs, processor = given["inputs"], Processor.from_pretrained(folder / "untied")
    weights.safe_open = _Counted  # type: ignore[assignment,misc]
    # Two ranks hold a model with a head of its own, four one that is tied, and a key-value head in two of them.
    model = Qwen2VL.from_pretrained(folder / given["of"][ranks], parallel=parallel)
    torch.manual_seed(5 + rank)  # of rank 0 alone it counts
    found = {"bytes": _Counted.bytes, "held": sum(p.nbytes for p in model.parameters()),
             **answers(model, inputs, processor)}  # fmt: skip

    with torch.no_grad():
        found["bfloat16"] = model.bfloat16()(**inputs)
    model.float()  # rounded, on all ranks alike
    found["experts"] = {form: _of_experts(folder / form, inputs, parallel) for form in given["experts"]}
    # What follows needs ranks, not their number.
    if ranks == 2:
        found |= _together(model, folder, inputs, processor)
        for form in given["quantised"]:
            split = Qwen2VL.from_pretrained(folder / form, parallel=parallel)
            with torch.no_grad():
                found[form] = split(**inputs)
    torch.save(found, folder / f"found-{ranks}-{rank}.pt")
    dist.barrier()


def _of_experts(folder: Path, inputs: dict[str, Any], parallel: TensorParallel) -> dict[str, Any]:
    _Counted.bytes = 0
    model = Qwen2VL.from_pretrained(folder, parallel=parallel)
    return {"bytes": _Counted.bytes, "held": sum(p.nbytes for p in model.parameters()), **few_answers(model, inputs)}


def few_answers(model: Qwen2VL, inputs: dict[str, Any]) -> dict[str, Any]:
    """Logits, and greedy tokens behind a cache."""
    config = GenerationConfig(max_new_tokens=12, eos_token_ids=ENDLESS)
    with torch.no_grad():
        return {"logits": model(**inputs), "greedy": generate(model, inputs, config=config).sequences}


def _together(model: Qwen2VL, folder: Path, inputs: dict[str, Any], processor: Processor) -> dict[str, Any]:
    parallel = model.parallel
    assert parallel is not None
    found: dict[str, Any] = {"fused": fuses(model)}
    config = GenerationConfig(max_new_tokens=24, eos_token_ids=ENDLESS)
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, -1 - parallel.rank] = 66
    found["differing"] = _refusal(lambda: generate(model, other, config=config))
    found["saved"] = _refusal(lambda: model.save_pretrained(folder / "saved"))
    found["adapter"] = _refusal(lambda: Qwen2VL.from_pretrained(folder / "tied", parallel=parallel, adapter="x"))
    found["graphs"] = _refusal(lambda: generate(model, inputs, config=config, graphs=True))
    whole = KVCache(model.config.text, 1, 256, device=model.device, dtype=model.dtype)
    with torch.no_grad():
        found["cache"] = _refusal(lambda: model(**inputs, cache=whole))
    # A file that one rank alone cannot read.
    place = folder / ("tied" if parallel.rank else "nowhere")
    found["unread"] = _refusal(lambda: Qwen2VL.from_pretrained(place, parallel=parallel))

    pixels = torch.zeros(inputs["pixel_values"].shape[0], 1176, requires_grad=True)
    pieces = stream(model, inputs, tokenizer=processor.tokenizer, config=config)
    found["piece"] = next(pieces)
    del pieces  # nobody wants the rest
    found["gradients"] = _refusal(lambda: model(**{**inputs, "pixel_values": pixels}))

    # Rank 0 leads: it alone has a tokenizer, stop strings and a prompt.
    if parallel.rank:
        taken = [generate(model, asked, config=replace(config, stop=())) for asked, config, _ in parallel.asked()]
        found["followed"] = len(taken)
    else:
        stop = replace(config, stop=(processor.decode(generate(model, inputs, config=config).sequences[0])[6:9],))
        led = generate(model, inputs, tokenizer=processor.tokenizer, config=stop)
        found["stopped"] = led.texts
        parallel.end()
    return found


def _command(folder: Path, rank: int, name: str, arguments: list[str]) -> None:
    """``qwen2vl`` as one of torchrun's processes, which share their standard input."""
    for number, kind in ((1, "out"), (2, "err")):
        with open(folder / f"{name}-{rank}.{kind}", "w") as file:
            os.dup2(file.fileno(), number)
    with open(folder / "stdin") as file:
        os.dup2(file.fileno(), 0)
    if name == "alone":
        _fail_alone(rank)
    os.chdir(folder)
    sys.argv = ["qwen2vl", *arguments]
    main()


def _fail_alone(rank: int) -> None:
    """The second rank, and no other, runs out of memory at its third token."""
    from qwen2vl.choosing import Chooser

    calls, choose = iter(range(100)), Chooser.__call__

    def fail(*given: Any) -> Any:
        if rank == 1 and next(calls) == 2:
            raise MemoryError
        return choose(*given)

    Chooser.__call__ = fail  # type: ignore[method-assign]


def _fork(ranks: int, work: Callable[[int], None]) -> list[int]:
    """The exit codes of processes that do ``work(rank)``."""
    assert len(os.listdir("/proc/self/task")) == 1, "a lock that another thread holds would stay locked in a fork"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "1"}
    pids = []
    for rank in range(ranks):
        if pid := os.fork():
            pids.append(pid)
            continue
        status = 1
        try:
            signal.alarm(PATIENCE)
            torch.set_num_threads(1)
            os.environ.update({**place, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            work(rank)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def serve(folder: Path) -> None:
    """All of it; ``codes.json`` has the exit codes."""
    codes = {str(ranks): _fork(ranks, lambda rank, ranks=ranks: _rank(folder, rank, ranks)) for ranks in (2, 4)}
    for name, arguments in json.loads((folder / "commands.json").read_text()).items():
        codes[name] = _fork(2, lambda rank, one=(name, arguments): _command(folder, rank, *one))
    (folder / "codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
