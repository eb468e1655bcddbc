"""torchrun's processes under one command line: rank 0 runs the command, the others compute its answers with it.

Only rank 0 reads media and standard input, writes files and speaks; another rank says what fails on it alone. Whichever
fails first ends with an error, and torchrun ends the rest.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

import typer

from .. import interrupts
from ..errors import Qwen2VLError

if TYPE_CHECKING:
    from ..model import Qwen2VL
    from ..parallel import TensorParallel

_leads: TensorParallel | None = None  # rank 0's, where others wait for its answers


def rank() -> int:
    """Of this process among all of a job."""
    return int(os.environ.get("RANK", 0))


def launched() -> bool:
    """Whether torchrun started several processes. A pod may have RANK and WORLD_SIZE in its environment for a training
    job; a command that is typed there is one process."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def follows() -> bool:
    """Whether this process computes for a command that another one runs."""
    return launched() and rank() > 0


def join(device: str | None) -> TensorParallel | None:
    """The processes that hold the model together; None where there is one. Refuses a --device that is not there."""
    import torch

    if device is not None:
        try:
            if torch.empty(0, device=device).is_meta:
                raise RuntimeError("it computes nothing")
        except (RuntimeError, AssertionError) as error:  # torch's ways of saying that it has no such device
            raise Qwen2VLError(f"--device {device}: {str(error).splitlines()[0]}") from error
    if not launched():
        return None
    from ..parallel import TensorParallel

    if device not in (None, "cpu", "cuda"):
        raise Qwen2VLError(f"--device {device}: each of torchrun's processes has its own; wants cpu or cuda")
    return TensorParallel.start("cpu" if device == "cpu" else None)


def lead(parallel: TensorParallel) -> None:
    """On rank 0: the model is loaded, and the others wait."""
    global _leads
    _leads = parallel


def release() -> None:
    """On rank 0: let the others go, as the command is over. After an error in the middle of an answer they cannot hear
    it, and end with their connections."""
    if _leads is not None and not _leads.busy:
        with suppress(RuntimeError):  # one is gone
            _leads.end()


def follow(parallel: TensorParallel, load: Callable[[], Qwen2VL]) -> NoReturn:
    """On another rank: load its part of the model and compute with rank 0 until that has ended its command."""
    interrupts.leave_word_to_another()
    from ..conversation import Conversation
    from ..generation import generate

    try:
        try:
            model = load()
        except Qwen2VLError:  # rank 0 raises it too, and says so before it ends
            parallel.share(None)
            raise typer.Exit(1) from None
        conversation = Conversation()  # rank 0 may have several; what is not kept on all ranks is read again
        for inputs, config, keeps in parallel.asked():
            settings = replace(config, stop=(), logprobs=None)
            generate(model, inputs, config=settings, conversation=conversation if keeps else None)
    except RuntimeError as error:
        if not tells_of_another(error):
            raise
        raise typer.Exit(1) from None
    raise typer.Exit


def tells_of_another(error: Exception) -> bool:
    """Whether an error says that another rank has ended."""
    torch = sys.modules.get("torch")
    if not isinstance(error, RuntimeError) or torch is None or not torch.distributed.is_initialized():
        return False
    return isinstance(error, torch.distributed.DistError) or "peer" in str(error) or "gloo" in str(error)
