"""The path from media files to answer tokens on a checkpoint with random weights, shown step by step.

The checkpoint has the released layout, so the answers are noise; the comparison shows that it is the right noise, by
running the same checkpoint in transformers.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Column, Table

from qwen2vl.errors import MediaError, Qwen2VLError, install_hint

from .media import draw_scene, write_video
from .steps import console, load, step

if TYPE_CHECKING:
    import torch

    from qwen2vl.model import Qwen2VL
    from qwen2vl.prompt.inputs import Inputs
    from qwen2vl.prompt.processor import Processor

_NEW_TOKENS = 64
_LOGIT_TOLERANCE = 1e-4  # of the largest logit, in float32


def walk(folder: Path, out: Path, *, check: bool) -> None:
    """Write a checkpoint into `folder` and media into `out`, and ask about them; `check`: compare instead.

    Raises:
        Qwen2VLError: the comparison finds a difference, or transformers is missing.
    """
    with step("A checkpoint in the released layout, with [bold red]random weights[/]"):
        _write_checkpoint(folder)
    media = _write_media(out)
    if check:
        compare_with_transformers(folder, media)
    else:
        _run(folder, media, out)


def _write_checkpoint(folder: Path) -> None:
    import torch

    from benchmarks.random_checkpoint import small_config, write_random_checkpoint

    # Untied and with large weights, so that the noise has some life.
    write_random_checkpoint(folder, small_config(tie_word_embeddings=False), std=0.1, dtype=torch.float32)
    for path in sorted(folder.iterdir()):
        console.print(f"  {escape(path.name)}: {path.stat().st_size / 1000:,.0f} kB")


def _write_media(out: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """Draw the media; returns the prompts as (title, content of a user's message)."""
    with step("Media, drawn on the spot"):
        pictures = {
            out / "day.png": draw_scene(672, 448),
            out / "night.png": draw_scene(308, 448, night=True),
            out / "exit.jpg": draw_scene(560, 210, text="EXIT 7"),
        }
        for file, picture in pictures.items():
            picture.save(file)
        files = list(pictures)
        prompts = [
            (
                "One photo",
                [{"type": "image", "image": files[0]}, {"type": "text", "text": "What does the sign say?"}],
            ),
            (
                "Several images",
                [
                    *({"type": "image", "image": file} for file in files),
                    {"type": "text", "text": "Which of the pictures was taken at night?"},
                ],
            ),
        ]
        try:
            write_video(out / "balloon.mp4")
        except MediaError as error:
            console.print(f"  [yellow]no video: {escape(str(error))}[/]")
        else:
            files.append(out / "balloon.mp4")
            question = {"type": "text", "text": "Which way does the balloon fly?"}
            prompts.append(("A video", [{"type": "video", "video": files[-1]}, question]))
        for file in files:
            console.print(f"  {escape(str(file))}: {file.stat().st_size / 1000:,.0f} kB")
    return prompts


def _run(folder: Path, prompts: list[tuple[str, list[dict[str, Any]]]], out: Path) -> None:
    from qwen2vl.generation import GenerationConfig, generate

    processor, model = load(folder, "cpu")
    config = GenerationConfig(max_new_tokens=_NEW_TOKENS, do_sample=True, seed=0)
    for title, content in prompts:
        with step(title):
            inputs, seconds = _prepare(processor, content)
            _print_media(content, inputs)
            result = generate(model, inputs, tokenizer=processor.tokenizer, config=config)
            at = result.timings
            steps = max(1, int(at["decode_steps"]))
            console.print(f"  asked: {content[-1]['text']}")
            console.print(
                f"  prompt {result.prompt_tokens[0]} tokens; answer {len(result.sequences[0])} tokens "
                f"({result.finish_reasons[0]})"
            )
            console.print(
                f"  [dim]read and cut {seconds:.3f} s, vision tower {at['vision']:.3f} s, prefill "
                f"{at['prefill']:.3f} s, decode {1000 * at['decode'] / steps:.1f} ms a token[/]"
            )
            ids = " ".join(map(str, result.sequences[0][:16]))
            console.print(f"  answer's ids: {ids} ...")
            console.print(f"  answer: [red]{escape(ascii(result.texts[0][:60]))} ...[/]")

    with step("Pictures of what the model sees"):
        from qwen2vl.cli.inspect import save_pictures

        saved, items = [], {"day": prompts[0][1][0]}
        if prompts[-1][1][0]["type"] == "video":
            items["balloon"] = prompts[-1][1][0]
        for name, item in items.items():
            inputs = processor([{"role": "user", "content": [item]}])
            saved += save_pictures(out, name, inputs, processor.shape)
        for path in saved:
            console.print(f"  {escape(str(path))}")
    console.print(
        "\n[bold]The weights are random, so the answers are noise.[/] Everything else is the real path: the same "
        "commands\nwith a trained checkpoint give real answers. `python -m examples.demo --check` compares every "
        "logit with transformers."
    )


def compare_with_transformers(folder: Path, prompts: list[tuple[str, list[dict[str, Any]]]]) -> None:
    """Run prompts through our model and transformers' from one checkpoint, in float32 on the CPU.

    Prints the largest difference of the logits at every position of the prompt, and whether the greedy tokens are
    the same. Position ids are part of the comparison, except those of prompts with a video, which transformers takes
    from us. Raises :class:`Qwen2VLError` where they differ, or transformers is missing.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise Qwen2VLError(f"the comparison needs transformers ({error}); {install_hint('transformers')}") from error
    import torch

    from qwen2vl.generation import GenerationConfig, generate

    processor, model = load(folder, "cpu")
    with step(f"The same checkpoint in transformers {transformers.__version__}"):
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        other = transformers.Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    config = GenerationConfig(max_new_tokens=_NEW_TOKENS)
    names = ("prompt", "tokens", "largest logit", "difference", "greedy tokens")
    table = Table(*(Column(name, no_wrap=True) for name in names), box=None, pad_edge=False)
    failed = []
    for title, content in prompts:
        inputs, _ = _prepare(processor, content)
        answer = generate(model, inputs, config=config).sequences[0]
        prompt = inputs["input_ids"].shape[1]
        # One pass of transformers over prompt and answer: its choice after every prefix of our answer.
        ids = torch.cat([inputs["input_ids"], torch.tensor([answer], dtype=torch.int64)], 1)
        with torch.inference_mode():
            ours = model(**inputs)[0]
            theirs = other(**_for_transformers(model, inputs, ids)).logits[0]
        scale = theirs[:prompt].abs().max().item()
        difference = (ours - theirs[:prompt]).abs().max().item()
        choices = theirs[prompt - 1 : -1].argmax(-1).tolist()
        table.add_row(
            title,
            str(prompt),
            f"{scale:.3f}",
            f"{difference:.1e}",
            f"{len(answer)} of {len(answer)} equal" if choices == answer else "[red]differ[/]",
        )
        if choices != answer or not difference <= _LOGIT_TOLERANCE * scale:
            failed.append(title)
    console.print("\n[bold]Ours against transformers[/], float32, every position of the prompt")
    console.print(table)
    console.print(
        "Position ids: transformers' own for text and images; ours for the prompt with a video, where transformers 5.3 "
        "and later\nplace the text after a long video wrongly."
    )
    if failed:
        raise Qwen2VLError(f"not equal to transformers: {', '.join(failed)}")


def _for_transformers(model: Qwen2VL, inputs: Inputs, ids: torch.Tensor) -> dict[str, Any]:
    """Our inputs with the sequence ``ids`` as transformers takes them: normalised floats, and types of tokens.

    From these types it makes position ids of its own, which a comparison is to check; only with a video it gets ours.
    """
    import torch

    from qwen2vl.config import IMAGE_MEAN, IMAGE_STD
    from qwen2vl_kernels import mrope_positions

    config = model.config
    types = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
    given: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": types,
    }
    for pixels, grid in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
        if pixels in inputs:
            vision = config.vision
            rows = inputs[pixels].unflatten(1, (3, -1, vision.patch_size**2)).float() / 255
            rows = rows.expand(-1, -1, vision.temporal_patch_size, -1).flatten(2)  # it shows a still image twice
            mean, std = (torch.tensor(values).view(3, 1) for values in (IMAGE_MEAN, IMAGE_STD))
            given[pixels] = ((rows - mean) / std).flatten(1)
            given[grid] = inputs[grid]
    if "video_grid_thw" in inputs:
        # transformers 5.3 and later place the text after a long video wrongly.
        given["position_ids"], _ = mrope_positions(
            ids,
            inputs.get("image_grid_thw"),
            inputs["video_grid_thw"],
            image_token_id=config.image_token_id,
            video_token_id=config.video_token_id,
            spatial_merge_size=config.vision.spatial_merge_size,
        )
    return given


def _prepare(processor: Processor, content: list[dict[str, Any]]) -> tuple[Inputs, float]:
    begin = time.perf_counter()
    inputs = processor([{"role": "user", "content": content}])
    return inputs, time.perf_counter() - begin


def _print_media(content: list[dict[str, Any]], inputs: Inputs) -> None:
    table = Table("  file", "size", "resized", "grid", "patches", "tokens", box=None, pad_edge=False, padding=(0, 2))
    for item, info in zip(content, inputs.media, strict=False):
        grid = " × ".join(map(str, info.grid_thw))
        sizes = [f"{width} × {height}" for height, width in (info.source_size, info.resized_size)]
        name = f"  {item[item['type']].name}"
        table.add_row(name, *sizes, grid, str(math.prod(info.grid_thw)), str(info.num_tokens))
    console.print(table)
    for info in inputs.media:
        if info.kind == "video":
            times = ", ".join(f"{seconds:.2f}" for seconds in info.frame_times)
            console.print(f"  {info.duration:.1f} s at {info.native_fps:g} frames per second; kept: {times} s")
