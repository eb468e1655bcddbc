"""Memory of one rank at a time, beside the calculation in docs/model.md: ``python -m tests.model.rank_memory FOLDER``.

A checkpoint of the 72B's shapes with some of its layers and random weights, in the released layout, is written into
FOLDER (13 GB in 16 bits, 8 GB in Int4, removed at the end). A process for each number of ranks loads what one rank
holds of it, without the others, and reads a prompt; what a layer adds, between two numbers of layers, is what 80 are
reckoned by. Files are in float16 and loaded in bfloat16, which makes memory of the rank's own, as on a GPU: on a CPU in
the dtype of the files it would be maps of these, whose pages come and go. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qwen2vl import Qwen2VL, Qwen2VLConfig, TensorParallel
from qwen2vl.cache import KVCache
from qwen2vl.files import write_json
from qwen2vl.quantising import stated
from qwen2vl.quantization import Quantization
from qwen2vl.weights import INDEX_NAME

PROMPT = 256  # tokens


class OneOfRanks(TensorParallel):
    """A rank whose sums and gathered tensors have the others' sizes, and nothing of theirs."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.ranks, self.group, self.device = rank, ranks, None, torch.device("cpu")

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor, counts: Sequence[int], dim: int) -> torch.Tensor:
        return torch.cat([x.narrow(dim, 0, min(count, x.shape[dim])) for count in counts], dim)

    def together(self) -> Any:
        return threading.Lock()  # held by nobody else


def write(folder: Path, config: Qwen2VLConfig, form: str, group: int = 128) -> None:
    """Random weights in shards of a layer each; ``form``: "bf16" or one of :func:`qwen2vl.quantising.stated`."""
    folder.mkdir(parents=True)
    how = None if form == "bf16" else Quantization.from_dict(stated(form, group))
    model = Qwen2VL.from_config(config, device="meta")
    noise = torch.randn(1 << 20).mul_(0.02).half()
    places: dict[str, str] = {}
    named = [(name, parameter.shape) for name, parameter in model.named_parameters()]
    for place, of_place in groupby(named, lambda one: _place(one[0])):
        tensors = dict(pair for name, shape in of_place for pair in _stored(name, shape, how, noise))
        save_file(tensors, folder / f"{place}.safetensors")
        places |= dict.fromkeys(tensors, f"{place}.safetensors")
    write_json(folder / INDEX_NAME, {"weight_map": places})
    write_json(folder / "config.json", replace(config, quantization=how).to_dict())


def _place(name: str) -> str:
    """What goes into one file."""
    parts = name.split(".")
    return parts[0] if parts[0] == "visual" else ".".join(parts[:3])


def _stored(
    name: str, shape: torch.Size, how: Quantization | None, noise: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    if how is None or not name.startswith("model.layers.") or not name.endswith("proj.weight"):
        yield name, noise.repeat(-(-shape.numel() // noise.numel()))[: shape.numel()].view(shape)
        return
    for suffix, ((stored, *_), (dtype, *_)) in how.stored(*shape).items():
        tensor = (
            torch.full(stored, 0x77777777, dtype=torch.int32) if dtype == "I32" else torch.full(stored, 0.01).half()
        )
        if suffix == "g_idx":
            tensor = torch.arange(stored[0], dtype=torch.int32) // how.group
        yield f"{name.removesuffix('.weight')}.{suffix}", tensor


def fewer(whole: Path, folder: Path, layers: int) -> None:
    """The same checkpoint with the first layers alone, by links."""
    folder.mkdir()
    places = json.loads((whole / INDEX_NAME).read_text())["weight_map"]
    kept = {name: place for name, place in places.items()
            if not name.startswith("model.layers.") or int(name.split(".")[2]) < layers}  # fmt: skip
    for place in set(kept.values()):
        (folder / place).symlink_to(whole / place)
    write_json(folder / INDEX_NAME, {"weight_map": kept})
    config = json.loads((whole / "config.json").read_text())
    write_json(folder / "config.json", {**config, "num_hidden_layers": layers})


class _Peak(threading.Thread):
    """The most memory of its own that this process has had since :meth:`start`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.005):
            self.bytes = max(self.bytes, resident())

    def end(self) -> int:
        self.over.set()
        self.join()
        return max(self.bytes, resident())


def resident() -> int:
    """Bytes of this process that are in memory, without those of files that it maps."""
    found = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(found["RssAnon"].split()[0]) << 10


def measure(folder: Path, rank: int, ranks: int) -> dict[str, int]:
    """Bytes that a rank takes: those of its parameters, and beside what its process took before at most while it loads,
    then, and at most while it reads a prompt."""
    torch.set_num_threads(1)
    before, peak = resident(), _Peak()
    peak.start()
    model = Qwen2VL.from_pretrained(folder, parallel=OneOfRanks(rank, ranks), dtype="bfloat16")
    found = {"parameters": sum(p.nbytes for p in model.parameters()), "loading": peak.end() - before}
    found["loaded"], peak = resident() - before, _Peak()
    peak.start()
    with torch.no_grad():
        cache = KVCache(model.model.cache_config, 1, PROMPT, device=model.device, dtype=model.dtype)
        model(torch.arange(PROMPT).unsqueeze(0) % 500, cache=cache, last_only=True)
    return found | {"prompt": peak.end() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--form", default="bf16")
    parser.add_argument("--measured", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measured:
        print(json.dumps(measure(given.folder, given.measured - 1, given.measured)))
        return
    config = Qwen2VLConfig.preset("72b")
    # Quantised releases have zeros behind its columns, so that groups of 128 can be cut for 8 ranks.
    inner = config.text.intermediate_size if given.form == "bf16" else 29696
    config = replace(config, text=replace(config.text, num_hidden_layers=given.layers, intermediate_size=inner))
    try:
        write(given.folder / "all", config, given.form)
        fewer(given.folder / "all", given.folder / "half", given.layers // 2)
        # Else glibc comes to keep blocks of up to 32 MB that have been freed, a quarter of what many small ones take.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        for ranks in given.ranks:
            command = [sys.executable, "-m", "tests.model.rank_memory", "--measured", str(ranks)]
            half, found = (
                json.loads(subprocess.check_output([*command, str(given.folder / name)], env=environment))
                for name in ("half", "all")
            )
            reckoned = {key: found[key] + (found[key] - half[key]) * (80 - given.layers) / (given.layers // 2)
                        for key in found}  # fmt: skip
            for name, values in ((f"{given.layers} layers", found), ("80 layers", reckoned)):
                told = ", ".join(f"{key} {value / 1e9:.2f}" for key, value in values.items())
                print(f"{given.form}, {ranks} ranks, {name}, GB: {told}", flush=True)
    finally:
        shutil.rmtree(given.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
