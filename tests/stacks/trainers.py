"""``python -m tests.stacks.trainers TOOL``: a few steps of a trainer that people use, stock and switched on.

TOOL is trl-sft, trl-grpo, swift or llamafactory; ``make test-stacks`` runs each in an environment with the versions
that it wants. Its code is not touched: the second run differs from the first in ``QWEN2VL_KERNELS=transformers`` alone,
which Python finds as it starts. Both train the small model of this package in float32 on generated pictures, on the
CPU; their losses and norms of gradients are equal up to rounding.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

STEPS = 3
TOLERANCE = 1e-5  # relative, as for whole models in tests/integrations


def write_data(folder: Path) -> None:
    """Pictures with a question and an answer, in the files that each trainer reads, and the model."""
    from PIL import Image

    from qwen2vl import assets
    from qwen2vl.samples import generate
    from qwen2vl.samples.sample import from_ppm

    rows = []
    for index in range(2 * STEPS):
        sample = generate("colour_shape", 0, index=index, split="train")
        picture = folder / f"{index}.png"
        Image.fromarray(from_ppm(sample.members["0.ppm"])).save(picture)
        rows.append({"messages": sample.record["messages"], "images": [str(picture)]})
    (folder / "data.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "data.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    columns = {"messages": "messages", "images": "images"}
    info = {"data": {"file_name": "data.json", "formatting": "sharegpt", "columns": columns, "tags": tags}}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    (folder / "model").symlink_to(assets.FOLDER)


def settings(folder: Path) -> dict[str, Any]:
    """What all of them call alike, as they are transformers' own settings."""
    return {
        "output_dir": str(folder / "out"), "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-3,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": 1, "use_cpu": True,
    }  # fmt: skip


def losses(log: list[dict[str, Any]]) -> list[float]:
    """Of the steps; of GRPO, whose loss is about zero at its first step, the norm of the gradient too."""
    return [float(row[name]) for row in log for name in ("loss", "grad_norm") if "loss" in row]


def trl(folder: Path, algorithm: str) -> list[float]:
    import torch
    from datasets import Dataset
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    def parts(message: dict[str, str]) -> dict[str, Any]:
        text = {"type": "text", "text": message["content"].removeprefix("<image>")}
        return {"role": message["role"], "content": [{"type": "image"}, text] if message["role"] == "user" else [text]}

    rows = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    talks = [[parts(message) for message in row["messages"]] for row in rows]
    images = [[Image.open(path).convert("RGB") for path in row["images"]] for row in rows]
    made = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    common = settings(folder) | {"bf16": False}
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", **made)
    processor = AutoProcessor.from_pretrained(folder / "model")
    if algorithm == "sft":
        data = Dataset.from_dict({"messages": talks, "images": images})
        trainer = SFTTrainer(model, args=SFTConfig(**common), train_dataset=data, processing_class=processor)
    else:
        data = Dataset.from_dict({"prompt": [talk[:1] for talk in talks], "images": images})
        config = GRPOConfig(**common, num_generations=2, max_completion_length=8)
        trainer = GRPOTrainer(
            model, args=config, train_dataset=data, processing_class=processor,
            reward_funcs=lambda completions, **_: [float(len(set(str(text)))) for text in completions],
        )  # fmt: skip
    trainer.train()
    return losses(trainer.state.log_history)


def llamafactory(folder: Path) -> list[float]:
    from llamafactory.train.tuner import run_exp

    run_exp(
        settings(folder)
        | {"model_name_or_path": str(folder / "model"), "stage": "sft", "do_train": True, "finetuning_type": "full"}
        | {"dataset": "data", "dataset_dir": str(folder), "template": "qwen2_vl", "cutoff_len": 512}
        | {"overwrite_output_dir": True, "freeze_vision_tower": False, "freeze_multi_modal_projector": False}
    )
    state = json.loads((folder / "out" / "trainer_state.json").read_text(encoding="utf-8"))
    return losses(state["log_history"])


def swift(folder: Path) -> list[float]:
    from swift import sft_main
    from swift.template.templates.qwen import Qwen2VLTemplate
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder / "model")  # its constants are the ids of the released tokenizer
    Qwen2VLTemplate.image_token_id, Qwen2VLTemplate.video_token_id = config.image_token_id, config.video_token_id
    arguments = settings(folder) | {"model": folder / "model", "dataset": folder / "data.jsonl"}
    arguments |= {"model_type": "qwen2_vl", "template": "qwen2_vl"}
    arguments |= {"torch_dtype": "float32", "tuner_type": "full", "freeze_vit": False, "freeze_aligner": False}
    arguments |= {"attn_impl": "sdpa", "add_version": False, "split_dataset_ratio": 0, "dataset_num_proc": 1}
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    sft_main(words)
    (log,) = (folder / "out").rglob("logging.jsonl")
    return losses([json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()])


TOOLS = {
    "trl-sft": lambda folder: trl(folder, "sft"),
    "trl-grpo": lambda folder: trl(folder, "grpo"),
    "swift": swift,
    "llamafactory": llamafactory,
}


def stand_in_for_cuda() -> None:
    """Their wheels for CUDA cannot load their libraries beside PyTorch for the CPU, and nothing here calls them.

    torchvision's operators are declared, as its modules ask for them; torchaudio is an empty module.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        stand_in_for_cuda.library = library  # as long as it lives, so do they
    try:
        import torchaudio  # noqa: F401
    except OSError:
        sys.modules["torchaudio"] = module_from_spec(ModuleSpec("torchaudio", None))
    except ImportError:
        pass


def child(tool: str, folder: Path) -> None:
    """One run: its losses, and how many functions were replaced, into ``result.json``."""
    stand_in_for_cuda()
    found = TOOLS[tool](folder)
    adapter = sys.modules.get("qwen2vl_kernels.integrations.transformers")
    applied = 0 if adapter is None else sum(row.state == "applied" for row in adapter.status())
    (folder / "result.json").write_text(json.dumps({"losses": found, "applied": applied}), encoding="utf-8")


def main(tool: str) -> None:
    results = []
    for value in ("", "transformers"):
        with tempfile.TemporaryDirectory(prefix="qwen2vl-trainers-") as temporary:
            folder = Path(temporary).resolve()
            write_data(folder)
            environment = os.environ | {"QWEN2VL_KERNELS": value, "HF_HUB_OFFLINE": "1", "WANDB_DISABLED": "true"}
            environment |= {"HF_HOME": str(folder / "home"), "MODELSCOPE_CACHE": str(folder / "home")}
            command = [sys.executable, "-m", "tests.stacks.trainers", tool, str(folder)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode != 0:
                raise SystemExit(
                    f"{tool} with QWEN2VL_KERNELS={value!r}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
                )
            results.append(json.loads((folder / "result.json").read_text(encoding="utf-8")))
    stock, switched = results
    for name, result in (("stock", stock), ("switched", switched)):
        print(f"{tool} {name}: {result['applied']} functions replaced, losses and norms {result['losses']}")
    assert stock["applied"] == 0 and switched["applied"] > 0
    assert len(stock["losses"]) == len(switched["losses"]) == 2 * STEPS
    for got, want in zip(switched["losses"], stock["losses"], strict=True):
        assert abs(got - want) <= TOLERANCE * max(map(abs, stock["losses"])), (got, want)


if __name__ == "__main__":
    if len(sys.argv) == 2 and sys.argv[1] in TOOLS:
        main(sys.argv[1])
    elif len(sys.argv) == 3:
        child(sys.argv[1], Path(sys.argv[2]))
    else:
        sys.exit(__doc__)
