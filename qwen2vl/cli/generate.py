"""``qwen2vl generate``: one prompt, one answer."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from ..assets import FOLDER
from ..media.options import MediaOptions
from .common import (
    BATCH_TOKENS,
    MANY_PROMPTS,
    AdapterOption,
    AllowRemoteOption,
    BatchTokensOption,
    DeviceOption,
    DTypeOption,
    FpsOption,
    LogprobsOption,
    MaxNewTokensOption,
    MaxPixelsOption,
    MaxVisionPatchesOption,
    MinPixelsOption,
    ModelOption,
    NumReturnSequencesOption,
    QuietOption,
    RepetitionPenaltyOption,
    SeedOption,
    StopOption,
    SystemOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
    corners,
    describe_media,
    describe_places,
    generation_config,
    load,
    longest_answer,
    notes,
    printable,
    progress_bar,
    tell_who_answers,
    video_options,
)
from .limits import LimitOption
from .stdin import check_stdin, read_prompt, read_stdin

if TYPE_CHECKING:
    from ..agents.answers import Located
    from ..generation import GenerationResult
    from ..prompt.processor import Processor


def generate(
    ctx: typer.Context,
    model: ModelOption = None,
    adapter: AdapterOption = None,
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
    jsonl: Annotated[
        Path | None,
        typer.Option(
            "--jsonl",
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="In place of a prompt: one a line, as JSON; relative paths begin at its folder.",
            rich_help_panel=MANY_PROMPTS,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="FILE",
            dir_okay=False,
            help="The answers, a line for a line; one that is there is gone on with.",
            rich_help_panel=MANY_PROMPTS,
        ),
    ] = None,
    batch_tokens: BatchTokensOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object: sizes are (height, width), times in seconds.")
    ] = False,
    boxes: Annotated[
        bool, typer.Option("--boxes", help="Print the boxes of the answer below it, in thousandths and in pixels.")
    ] = False,
    draw: Annotated[
        Path | None,
        typer.Option("--draw", metavar="FILE", help="Save the one --image with the boxes of the answer, as PNG, ..."),
    ] = None,
    max_new_tokens: MaxNewTokensOption = None,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    seed: SeedOption = None,
    repetition_penalty: RepetitionPenaltyOption = None,
    stop: StopOption = None,
    num_return_sequences: NumReturnSequencesOption = 1,
    logprobs: LogprobsOption = None,
    min_pixels: MinPixelsOption = None,
    max_pixels: MaxPixelsOption = None,
    fps: FpsOption = MediaOptions.fps,
    allow_remote: AllowRemoteOption = False,
    limit: LimitOption = None,
    device: DeviceOption = None,
    dtype: DTypeOption = None,
    max_vision_patches: MaxVisionPatchesOption = None,
    quiet: QuietOption = False,
) -> None:
    """Answer one prompt about images and videos, or every line of a file.

    Media come before the prompt, in the order given. The answer streams to stdout; several come when all are there,
    with a blank line between them.
    """
    if logprobs is not None and not as_json:
        raise typer.BadParameter("wants --json, which has a place for them", param_hint="--logprobs")
    notes.quiet = quiet
    max_new_tokens = longest_answer(model, max_new_tokens)
    sources = {"image": iter(image or ()), "video": iter(video or ())}
    media = [(kind, next(sources[kind])) for kind in ctx.meta["media_order"]]
    if jsonl is not None or out is not None or batch_tokens is not None:
        beside = {"--prompt": prompt, "--image or --video": media, "--json": as_json, "--boxes": boxes, "--draw": draw,
                  "--num-return-sequences": num_return_sequences > 1}  # fmt: skip
        _check_files(jsonl, out, [name for name, given in beside.items() if given])
    elif not prompt and not media:
        raise typer.BadParameter("give a prompt, an image or a video, or --jsonl", param_hint="--prompt")
    check_stdin([prompt, *(source for _, source in media)])
    if prompt == "-":
        prompt = read_prompt()
    if draw is not None:
        _check_drawing(draw, [kind for kind, _ in media], num_return_sequences)

    begin = time.perf_counter()
    loaded, processor = load(
        model,
        device=device,
        dtype=dtype,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        allow_remote=allow_remote,
        max_vision_patches=max_vision_patches,
        limit=limit,
        adapter=adapter,
        base=None if jsonl is None else jsonl.absolute().parent,
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
        num_return_sequences=num_return_sequences,
        logprobs=logprobs,
    )
    if jsonl is not None and out is not None:
        from .lines import answer_file

        tell_who_answers(model)
        with progress_bar("answering") as report:
            total, failed = answer_file(
                loaded,
                processor,
                jsonl,
                out,
                config=config,
                batch_tokens=batch_tokens or BATCH_TOKENS,
                progress=report,
                system=system,
                options=video_options(min_pixels, max_pixels, fps),
            )
        notes.print(f"{total - failed} of {total} lines answered" + (f", {failed} have an error" if failed else ""))
        print(out)
        if failed:
            raise typer.Exit(1)
        return

    content: list[dict[str, Any]] = [
        {"type": kind, kind: read_stdin() if source == "-" else source} for kind, source in media
    ]
    if draw is not None:
        from ..media.image import load_image

        # Read once: what is drawn on is what the model sees.
        content[0]["image"] = load_image(content[0]["image"], access=processor.access)
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
        on_token=None if as_json or num_return_sequences > 1 else show,
    )
    if not as_json:
        for index, text in enumerate(result.texts):
            if num_return_sequences > 1:
                print(("\n" if index else "") + printable(text), end="")
            print(flush=True)
            if boxes:
                _print_places(result.places(index), [source for _, source in media])
            elif draw is not None and not result.places(index):
                notes.print("[dim]the answer has no boxes[/]")
        ends = {"length": f"at --max-new-tokens {max_new_tokens}", "context": "where the model's context is full"}
        for reason in dict.fromkeys(result.finish_reasons):
            if reason in ends and notes.is_terminal:
                notes.print(f"[dim](stopped {ends[reason]})[/]")
    if draw is not None:
        _draw(draw, content[0]["image"], result.places())
    if not as_json:
        return

    from ..speed import decoding

    counts = {"image": 0, "video": 0}
    for item in inputs.media:
        counts[item.kind] += item.num_tokens
    timings = {
        "load": load_seconds,
        "prepare": prepare_seconds,
        **{name: result.timings[name] for name in ("vision", "prefill", "decode")},
        "first_token": prepare_seconds + result.timings["vision"] + result.timings["prefill"],
        "total": time.perf_counter() - begin,
    }
    answers = [_answer(processor, result, index) for index in range(num_return_sequences)]
    answer = {
        **(answers[0] if num_return_sequences == 1 else {"answers": answers}),
        "tokens": {
            "prompt": result.prompt_tokens[0],
            **counts,
            "generated": sum(map(len, result.sequences)),
        },
        "media": [
            {"kind": item.kind, "source": source, **describe_media(item)}
            for item, (_, source) in zip(inputs.media, media, strict=True)
        ],
        "timings": timings,
        "decoding": decoding(loaded, result),
        "model": str(FOLDER) if model is None else model,
        "device": str(loaded.device),
        "dtype": str(loaded.dtype).removeprefix("torch."),
    }
    print(json.dumps(answer, ensure_ascii=False))


def _check_files(jsonl: Path | None, out: Path | None, beside: list[str]) -> None:
    """A usage error where a file cannot be answered: half of the pair, or what belongs to one prompt beside it."""
    for name, path in (("--jsonl", jsonl), ("--out", out)):
        if path is None:
            raise typer.BadParameter("wants both --jsonl and --out", param_hint=name)
    assert jsonl is not None and out is not None
    if beside:
        raise typer.BadParameter(f"has every prompt in the file; take away {', '.join(beside)}", param_hint="--jsonl")
    if not out.absolute().parent.is_dir():
        raise typer.BadParameter(f"no folder {out.parent}", param_hint="--out")
    if out.exists() and out.samefile(jsonl):
        raise typer.BadParameter("is the file of the prompts", param_hint="--out")


def _check_drawing(path: Path, kinds: Sequence[str], answers: int) -> None:
    """A usage error where nothing could be drawn: not one image, or a file that cannot be a picture."""
    from PIL import Image

    if list(kinds) != ["image"]:
        given = ", ".join(kinds) or "neither"
        raise typer.BadParameter(
            f"wants one --image and no --video, as boxes do not say what they are in, got {given}", param_hint="--draw"
        )
    if answers > 1:
        raise typer.BadParameter(f"wants one answer, got --num-return-sequences {answers}", param_hint="--draw")
    Image.init()
    if Image.EXTENSION.get(path.suffix.lower()) not in Image.SAVE:
        raise typer.BadParameter(f"{str(path)!r} is no name of a picture, such as found.png", param_hint="--draw")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {str(path.parent)!r}", param_hint="--draw")


def _draw(path: Path, pixels: Any, found: Sequence[Located]) -> None:
    from ..agents.grounding import Grounded, draw_grounding

    draw_grounding(pixels, [Grounded(one.label, (one.place,)) for one in found]).save(path)
    if not found:
        notes.print(f"[dim]{escape(str(path))} shows no box[/]")


def _print_places(found: Sequence[Located], sources: Sequence[str]) -> None:
    """One line for every place, on stdout; on stderr why there are none, or none in pixels."""
    for one in found:
        label = "" if one.label is None else f"{one.label}: "
        line = f"{label}{type(one.place).__name__.lower()} {_written(one.place.points)}"
        if one.pixels is not None and one.media is not None:
            line += f", pixels {_written(corners(one.pixels))} of {sources[one.media]}"
        print(" ".join(printable(line).split("\n")), flush=True)
    if not found:
        notes.print("[dim]the answer has no boxes[/]")
    elif found[0].media is None and sources:
        notes.print(f"[dim]no pixels: the answer does not say which of the {len(sources)} files a box is in[/]")


def _written(points: Sequence[tuple[float, float]]) -> str:
    return ",".join(f"({x:g},{y:g})" for x, y in points)


def _answer(processor: Processor, result: GenerationResult, index: int) -> dict[str, Any]:
    """One answer as it stands in --json."""
    answer: dict[str, Any] = {
        "text": result.texts[index],
        "token_ids": result.sequences[index],
        "finish_reason": result.finish_reasons[index],
        "boxes": describe_places(result.places(index)),
    }
    if result.logprobs:
        answer["logprobs"] = [
            {
                "token": _token(processor, token),
                "logprob": told.logprob,
                "processed_logprob": told.processed_logprob,
                "top": [{"token": _token(processor, other), "logprob": value} for other, value in told.top.items()],
            }
            for token, told in zip(result.sequences[index], result.logprobs[index], strict=True)
        ]
    return answer


def _token(processor: Processor, token: int) -> dict[str, Any]:
    return {"id": token, "text": processor.tokenizer.decode([token], skip_special_tokens=False)}
