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


def peak_bytes(device: str) -> float:
    """The most memory this process has held: of the GPU's allocator, or resident (mapped weights included).

    On Linux this is VmHWM: ``ru_maxrss`` survives exec, so that a child begins with what its parent held.
    """
    if device.startswith("cuda"):
        import torch

        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024.0 * int(line.split()[1])
    maxrss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(maxrss if sys.platform == "darwin" else 1024 * maxrss)


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    run = {"load": load, "peak": peak}[request.pop("task")]
    print(json.dumps(run(**{**request, "folder": Path(request["folder"])})))
