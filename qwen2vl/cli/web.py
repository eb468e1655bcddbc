"""``qwen2vl web``: a page in the browser to try a checkpoint on."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from ..assets import NOTICE
from ..media.options import MediaOptions
from . import ranks
from .chat import name_model
from .common import (
    AdapterOption,
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
    explain,
    generation_config,
    load,
    longest_answer,
    notes,
    printable,
    stderr,
    tell_who_answers,
    video_options,
)
from .limits import LimitOption

_SERVER = "Server"


def web(
    model: ModelOption = None,
    adapter: AdapterOption = None,
    host: Annotated[
        str,
        typer.Option(
            "--host",
            help="Address to listen on; others than this machine's own let anybody in.",
            rich_help_panel=_SERVER,
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="0 takes any that is free.", rich_help_panel=_SERVER)
    ] = 7860,
    max_upload: Annotated[
        int,
        typer.Option(
            "--max-upload", metavar="MIB", min=1, help="Largest file that is taken, in MiB.", rich_help_panel=_SERVER
        ),
    ] = 256,
    allow_files: Annotated[
        list[Path] | None,
        typer.Option(
            "--allow-files",
            metavar="FOLDER",
            help="Let the page name files of this machine below FOLDER; may be repeated.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    allow_remote: AllowRemoteOption = False,
    system: SystemOption = None,
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
    limit: LimitOption = None,
    device: DeviceOption = None,
    dtype: DTypeOption = None,
    max_vision_patches: MaxVisionPatchesOption = None,
    quiet: QuietOption = False,
) -> None:
    """Serve a page to try the model on: pictures and clips, answers as they are written, boxes, the screen game.

    It listens on this machine alone. Options for answers are what the page's settings begin with. Uploads are kept in
    memory as the model sees them, and go with their page. Ctrl-C ends it.
    """
    from ..web.server import listen, require_web, serving

    require_web()
    notes.quiet = quiet
    try:
        sock = socket.socket() if ranks.follows() else listen(host, port)  # nobody asks who computes for another
    except (OSError, UnicodeError) as error:  # the latter for what cannot be a name
        reason = getattr(error, "strerror", None) or error
        raise typer.BadParameter(f"{host}:{port}: {reason}", param_hint="--host or --port") from None
    with sock:
        from ..features import KeptFeatures
        from ..web.attachments import keep_notes
        from ..web.engine import Engine
        from ..web.server import Site

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
        )
        processor.access = replace(processor.access, local_files=bool(allow_files), roots=tuple(allow_files or ()))
        loaded.kept_features = KeptFeatures()  # every turn shows the pictures of those before it
        engine = Engine(
            loaded,
            processor,
            configure=generation_config,
            defaults={
                "max_new_tokens": longest_answer(model, max_new_tokens),
                "temperature": temperature,
                "top_p": top_p,
                "top_k": top_k,
                "seed": seed,
                "repetition_penalty": repetition_penalty,
                "stop": stop,
            },
            explain=explain,
            options=video_options(min_pixels, max_pixels, fps),
            system=system,
        )
        engine.settings({})  # what cannot be is refused before anybody asks
        name = name_model(model, loaded)
        site = Site(
            engine,
            about={"model": name, "notice": "" if model is not None else NOTICE},
            max_upload=max_upload << 20,
            hosts=frozenset({"localhost", "127.0.0.1", "::1", host}) if _is_own(host) else None,
            named=("remote",) * allow_remote + ("local",) * bool(allow_files),
        )
        tell_who_answers(model)
        if not _is_own(host):
            stderr.print(
                f"[bold yellow]warning:[/] --host {escape(host)}: whoever reaches this port may ask the model, upload "
                "files and see what --allow-files and --allow-remote let through; there is no password, and nothing is "
                "encrypted"
            )
        notes.print(f"[dim]{escape(printable(name, True))}; Ctrl-C ends it[/]")
        with keep_notes(), serving(site, sock):
            print(_address(host, sock.getsockname()[1]), flush=True)
            engine.line.serve(engine.end_idle)


def _is_own(host: str) -> bool:
    """Whether it is an address that other machines do not reach."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def _address(host: str, port: int) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
