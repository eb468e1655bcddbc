"""``python -m tests.stacks.lmms_eval_tasks``: lmms-eval itself, on tasks that are made here, with this package's model.

Pictures, several pictures, clips and text with system turns; batches of 1 and of 8; a second run that finds the first
one's answers in lmms-eval's cache. Answers must be those of transformers' own ``generate`` with the same checkpoint
files, generation_config.json included. ``make test-stacks`` runs it in an environment with lmms-eval.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw
from transformers import RepetitionPenaltyLogitsProcessor

from benchmarks.random_checkpoint import write_random_checkpoint
from examples.demo.media import write_video
from qwen2vl import Processor, Qwen2VL
from tests.model import oracle

COUNT, NEW = 8, 6
LIMITS = {"min_pixels": 784, "max_pixels": 12544}
UTILS = """
from PIL import Image

KINDS = {".png": "image", ".mp4": "video"}


def messages(doc):
    content = []
    for path in doc["media"]:
        kind = KINDS[path[-4:]]
        content.append({"type": kind, "url": Image.open(path).convert("RGB") if kind == "image" else path})
    found = [{"role": "user", "content": [*content, {"type": "text", "text": doc["question"]}]}]
    if doc["system"]:
        found.insert(0, {"role": "system", "content": [{"type": "text", "text": doc["system"]}]})
    return found


def visuals(doc):
    return [Image.open(path) for path in doc["media"] if path.endswith(".png")]


def text(doc):
    return doc["question"]


def results(doc, found):
    return {"exact_match": float(found[0] == doc["answer"])}
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visuals
doc_to_text: !function utils.text
doc_to_messages: !function utils.messages
doc_to_target: answer
process_results: !function utils.results
generation_kwargs:
  max_new_tokens: {new}
  do_sample: false
  temperature: 0
  until: []
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def write_tasks(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Files of the tasks; the documents of each."""
    (folder / "utils.py").write_text(UTILS)
    tasks: dict[str, list[dict[str, Any]]] = {"image": [], "images": [], "video": [], "text": []}
    for n in range(COUNT):
        paths = [str(folder / f"{n}-{k}.png") for k in range(2)]
        for k, path in enumerate(paths):
            picture = Image.new("RGB", (40 + 30 * n, 150 - 12 * n), (30 * n, 200 - 20 * n, 90 * k))
            ImageDraw.Draw(picture).ellipse((5, 5, 20 + 5 * n, 40), fill=(255, 255 - 30 * n, 0))
            picture.save(path)
        clip = str(folder / f"{n}.mp4")
        write_video(clip, width=56, height=56 if n % 2 else 84, seconds=1 + n % 3, fps=4)
        for name, media in (("image", paths[:1]), ("images", paths), ("video", [clip]), ("text", [])):
            system = "Answer in a word." if n % 3 == 0 else ""
            tasks[name].append({"media": media, "question": f"What is it? {'Say. ' * (n % 4)}", "system": system,
                                "answer": "x"})  # fmt: skip
    for name, docs in tasks.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        (folder / f"made_{name}.yaml").write_text(TASK.format(name=f"made_{name}", path=path, new=NEW))
    return tasks


def run(folder: Path, tasks: list[str], out: str, batch: int, cache: Path | None = None) -> tuple[dict, str]:
    """Answers by task, in the order of the documents, and what lmms-eval logged."""
    arguments = ",".join(f"{k}={v}" for k, v in ({"pretrained": folder / "model", "device": "cpu"} | LIMITS).items())
    command = [sys.executable, "-m", "lmms_eval", "--model", "qwen2vl", "--model_args", arguments]
    command += ["--tasks", ",".join(f"made_{task}" for task in tasks), "--include_path", str(folder)]
    command += ["--batch_size", str(batch), "--log_samples", "--output_path", str(folder / out)]
    command += [] if cache is None else ["--use_cache", str(cache)]
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1",
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    said = ended.stdout + ended.stderr
    assert ended.returncode == 0, said[-6000:]
    answers = {}
    for task in tasks:
        (path,) = (folder / out).rglob(f"*_samples_made_{task}.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        answers[task] = [one["filtered_resps"] for one in sorted(lines, key=lambda one: one["doc_id"])]
    return answers, said


def expected(folder: Path, tasks: dict[str, list[dict[str, Any]]]) -> dict[str, list[str]]:
    """What transformers' generate answers, with the checkpoint's own generation_config.json."""
    processor = Processor.from_pretrained(folder / "model", **LIMITS, **{f"video_{k}": v for k, v in LIMITS.items()})
    config = Qwen2VL.from_pretrained(folder / "model", device="cpu").config
    stock = oracle.load(folder / "model")
    banned = [config.image_token_id, config.video_token_id, config.vision_token_id]
    answers = {}
    for name, docs in tasks.items():
        answers[name] = []
        for doc in docs:
            kinds = {".png": "image", ".mp4": "video"}
            content = [{"type": kinds[path[-4:]], kinds[path[-4:]]: path} for path in doc["media"]]
            messages = [{"role": "user", "content": [*content, {"type": "text", "text": doc["question"]}]}]
            if doc["system"]:
                messages.insert(0, {"role": "system", "content": doc["system"]})
            inputs = processor(messages)
            ids = step_by_step(stock, config, inputs, banned) if name == "video" else own(stock, config, inputs, banned)
            text = processor.decode(ids)
            answers[name].append(text.strip())  # as lmms-eval does with every answer
    return answers


def own(stock: Any, config: Any, inputs: Any, banned: list[int]) -> list[int]:
    """transformers' generate, with positions of its own."""
    given = oracle.oracle_inputs(config, inputs)
    del given["position_ids"]
    given["mm_token_type_ids"] = (inputs["input_ids"] == config.image_token_id).int()
    with torch.no_grad():
        ids = stock.generate(**given, max_new_tokens=NEW, do_sample=False, suppress_tokens=banned)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


def step_by_step(stock: Any, config: Any, inputs: Any, banned: list[int]) -> list[int]:
    """What generate would do with the positions of the paper: transformers 5.23 goes on behind a clip that has more
    frames than rows of tokens from its largest row, not from its last frame."""
    stated = stock.generation_config
    penalty = RepetitionPenaltyLogitsProcessor(stated.repetition_penalty)
    tokens: list[int] = []
    while len(tokens) < NEW and not (tokens and tokens[-1] in stated.eos_token_id):
        given = oracle.oracle_inputs(config, inputs, tokens)
        with torch.no_grad():
            scores = penalty(given["input_ids"], stock(**given, use_cache=False).logits[:, -1])[0]
        scores[banned] = float("-inf")
        tokens.append(int(scores.argmax()))
    return tokens


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        model = write_random_checkpoint(folder / "model", std=0.1, dtype=torch.float32)
        path = model / "generation_config.json"
        stated = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(stated | {"repetition_penalty": 1.05}))
        tasks = write_tasks(folder)
        wanted = expected(folder, tasks)
        for batch in (1, 8):
            found, _ = run(folder, list(tasks), f"batch-{batch}", batch)
            for name, answers in wanted.items():
                assert found[name] == answers, (batch, name, found[name], answers)
                assert len(set(answers)) > COUNT // 2, "answers that are all alike would show nothing"
            print(f"batch {batch}: {COUNT * len(tasks)} answers are those of transformers", flush=True)
        cache = folder / "cache"
        run(folder, ["image"], "first", 8, cache)
        found, said = run(folder, ["image", "text"], "second", 8, cache)
        assert f"{COUNT}/{2 * COUNT} cache hits" in said, said[-6000:]
        assert found == {name: wanted[name] for name in ("image", "text")}
        print(f"a second run took {COUNT} answers of the first from lmms-eval's cache")


if __name__ == "__main__":
    main()
