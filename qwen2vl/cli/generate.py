"""``qwen2vl generate``: one prompt, one answer."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, Any

import typer

from ..assets import FOLDER
from ..media.options import MediaOptions
from .common import (
    AllowRemoteOption,
    DeviceOption,
    DTypeOption,
    FpsOption,
    MaxNewTokensOption,
    MaxPixelsOption,
    MaxVisionPatchesOption,
    MinPixelsOption,
    ModelOption,
    QuietOption,
    RepetitionPenaltyOption,
    SeedOption,
    StopOption,
    SystemOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    check_stdin,
    describe_media,
    generation_config,
    load,
    longest_answer,
    notes,
    printable,
    progress_bar,
    read_stdin,
    tell_who_answers,
    video_options,
)


def generate(
    ctx: typer.Context,
    model: ModelOption = None,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", metavar="TEXT", help="The question; - reads it from stdin.")
    ] = "",
    image: Annotated[
        list[str] | None, typer.Option("--image", "-i", metavar="FILE", help="May be repeated; - is stdin.")
    ] = None,
    video: Annotated[
        list[str] | None, typer.Option("--video", metavar="FILE", help="May be repeated; - is stdin.")
    ] = None,
    system: SystemOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: sizes are [height, width], times in seconds.")
    ] = False,
    max_new_tokens: MaxNewTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    stop: StopOption = None,
    min_pixels: MinPixelsOption = None,
    max_pixels: MaxPixelsOption = None,
    fps: FpsOption = MediaOptions.fps,
    allow_remote: AllowRemoteOption = False,
    device: DeviceOption = None,
    dtype: DTypeOption = None,
    max_vision_patches: MaxVisionPatchesOption = None,
    quiet: QuietOption = False,
) -> None:
    """Answer one prompt about images and videos.

    Media come before the prompt, in the order given. The answer streams to stdout.
    """
    notes.quiet = quiet
    max_new_tokens = longest_answer(model, max_new_tokens)
    sources = {"image": iter(image or ()), "video": iter(video or ())}
    media = [(kind, next(sources[kind])) for kind in ctx.meta["media_order"]]
    if not prompt and not media:
        raise typer.BadParameter("give a prompt, an image or a video", param_hint="--prompt")
    check_stdin([prompt, *(source for _, source in media)])
    if prompt == "-":
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise typer.BadParameter("stdin is empty", param_hint="--prompt")

    begin = time.perf_counter()
    loaded, processor = load(
        model,
        device=device,
        dtype=dtype,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        allow_remote=allow_remote,
        max_vision_patches=max_vision_patches,
    )
    load_seconds = time.perf_counter() - begin
    config = generation_config(
        loaded,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        repetition_penalty=repetition_penalty,
        stop=stop,
    )

    content: list[dict[str, Any]] = [
        {"type": kind, kind: read_stdin() if source == "-" else source} for kind, source in media
    ]
    if prompt:
        content.append({"type": "text", "text": prompt})
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    at = time.perf_counter()
    with progress_bar("reading video frames") as report:
        inputs = processor(messages, progress=report, **video_options(min_pixels, max_pixels, fps))
    prepare_seconds = time.perf_counter() - at

    from ..generation import generate as run

    def show(row: int, token: int, piece: str) -> None:
        print(printable(piece), end="", flush=True)

    tell_who_answers(model)
    result = run(
        loaded,
        inputs,
        tokenizer=processor.tokenizer,
        config=config,
        on_token=None if as_json else show,
    )
    if not as_json:
        print(flush=True)
        if result.finish_reasons[0] == "length" and notes.is_terminal:
            notes.print(f"[dim](stopped at --max-new-tokens {max_new_tokens})[/]")
        return

    counts = {"image": 0, "video": 0}
    for item in inputs.media:
        counts[item.kind] += item.num_tokens
    timings = {
        "load": load_seconds,
        "prepare": prepare_seconds,
        **{name: result.timings[name] for name in ("vision", "prefill", "decode")},
        "total": time.perf_counter() - begin,
    }
    answer = {
        "text": result.texts[0],
        "token_ids": result.sequences[0],
        "finish_reason": result.finish_reasons[0],
        "tokens": {
            "prompt": result.prompt_tokens[0],
            **counts,
            "generated": len(result.sequences[0]),
        },
        "media": [
            {"kind": item.kind, "source": source, **describe_media(item)}
            for item, (_, source) in zip(inputs.media, media, strict=True)
        ],
        "timings": timings,
        "model": str(FOLDER) if model is None else model,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
    }
    print(json.dumps(answer, ensure_ascii=False))
