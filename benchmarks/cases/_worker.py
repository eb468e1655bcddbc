"""Measurements that need a process of their own: ``python -m benchmarks.cases._worker '<json>'`` prints JSON."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def in_subprocess(task: str, who: str, **arguments: Any) -> dict[str, float]:
    """Run a task of this module for ``who`` in a fresh process with this one's import path."""
    import torch  # not at the top, which the processes that time their imports run through

    request = json.dumps({"task": task, "who": who, **{k: str(v) for k, v in arguments.items()}})
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    done = subprocess.run([sys.executable, "-m", __name__, request], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{task} of {who} failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def load(who: str, folder: Path, device: str) -> dict[str, float]:
    """Seconds to import, to ``from_pretrained``, and from its start until every weight was read once; peak memory.

    ``checksum`` is the sum of all weights' bits.
    """
    begin = time.perf_counter()
    import torch

    if who == "ours":
        from qwen2vl import Qwen2VL as Model

        arguments: dict[str, Any] = {"device": device}
    else:
        import transformers
        from transformers import Qwen2VLForConditionalGeneration as Model

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        arguments = {"attn_implementation": "sdpa"}
    imported = time.perf_counter()
    model: Any = Model.from_pretrained(folder, dtype=torch.bfloat16, **arguments)
    model = model.to(device)
    _synchronize(device)
    loaded = time.perf_counter()
    with torch.inference_mode():
        bits = [p.flatten().view(torch.int16 if p.numel() % 4 else torch.int64).sum() for p in model.parameters()]
        checksum = sum(int(x) for x in bits) % 2**53  # what a JSON number holds exactly
    touched = time.perf_counter()
    return {
        "import": imported - begin,
        "load": loaded - imported,
        "load and read every weight": touched - imported,
        "peak memory": peak_bytes(device),
        "checksum": float(checksum),
    }


def peak(who: str, folder: Path, device: str, side: str, text: str, steps: str) -> dict[str, float]:
    """Peak memory of loading, one image, its prompt and some decoding steps, as a user of the model would run them."""
    import torch

    from . import _qwen2vl as shared

    where = torch.device(device)
    model = shared.MODELS[who](folder, where)
    prompt = shared.make_prompt(shared.Qwen2VLConfig.from_pretrained(folder), int(side), int(text), int(steps), where)
    with torch.inference_mode():
        # Each model is given what its own processor makes.
        features = model.vision(prompt.pixels if who == "ours" else prompt.rows, prompt.grid)
        model.prefill(prompt, features)
        model.decode(prompt)
    most, weights = peak_bytes(device), shared.weight_bytes(model.model)
    return {"peak": most, "weights": weights, "peak - weights": most - weights}


def train(
    who: str, folder: Path, device: str, dtype: str, count: str, batch: str, checkpointing: str
) -> dict[str, float]:
    """Peak memory of the training case's longest step.

    ``over the state``: above what the process held after a step on one short sample, when weights, gradients and the
    optimizer's state were all there once: activations, logits and what the allocator kept.
    """
    import torch

    from . import _training as shared

    side = shared.SIDES[who](folder, torch.device(device), getattr(torch, dtype), checkpointing=checkpointing == "True")
    samples = shared.make_samples(side.config, int(count))
    longest = max(shared.steps_of(samples, int(batch)), key=lambda step: shared.padded_tokens([step]))
    prepared = side.prepare(longest)
    shared.train(side, [side.prepare([min(samples, key=lambda e: e.tokens)])])
    held = held_bytes(device)
    shared.train(side, [prepared])
    most = peak_bytes(device)
    return {"peak": most, "peak over the state": most - held}


def loss(who: str, folder: Path, device: str, dtype: str, tokens: str, width: str, vocabulary: str) -> dict[str, float]:
    """Seconds of one forward and backward of the loss, and its peak memory above inputs and imports.

    On a CPU the memory is touched for the first time within the time, as in every step that allocates anew.
    """
    import torch

    from . import _loss as shared

    inputs = shared.inputs(int(tokens), int(width), int(vocabulary), torch.device(device), getattr(torch, dtype))
    held = held_bytes(device)
    if device.startswith("cuda"):  # where a first call compiles kernels
        shared.loss_and_gradients(who, *inputs)
    _synchronize(device)
    begin = time.perf_counter()
    shared.loss_and_gradients(who, *inputs)
    _synchronize(device)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "peak over the inputs": peak_bytes(device) - held}


def peak_bytes(device: str) -> float:
    """The most memory this process has held: of the GPU's allocator, or resident (mapped weights included).

    On Linux this is VmHWM: ``ru_maxrss`` survives exec, so that a child begins with what its parent held.
    """
    if device.startswith("cuda"):
        import torch

        return float(torch.cuda.max_memory_allocated())
    if (resident := _status("VmHWM")) is not None:
        return resident
    maxrss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(maxrss if sys.platform == "darwin" else 1024 * maxrss)


def held_bytes(device: str) -> float:
    """What this process holds now; where the system does not say, the most so far."""
    if device.startswith("cuda"):
        import torch

        return float(torch.cuda.memory_allocated())
    resident = _status("VmRSS")
    return peak_bytes(device) if resident is None else resident


def _status(key: str) -> float | None:
    """Bytes that Linux counts for this process under ``key``."""
    path = Path("/proc/self/status")
    if not path.is_file():
        return None
    line = next(line for line in path.read_text().splitlines() if line.startswith(key))
    return 1024.0 * int(line.split()[1])


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    run = {"load": load, "peak": peak, "train": train, "loss": loss}[request.pop("task")]
    print(json.dumps(run(**{**request, "folder": Path(request["folder"])})))
