"""Qwen2-VL in PyTorch on its own kernels: load a checkpoint, ask about images and videos, generate.

Names are imported when they are first used, so that ``qwen2vl --help`` does not wait for PyTorch. ``__version__`` is
the version of the distribution, which holds ``qwen2vl_kernels`` too.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .agents.answers import Located
    from .agents.function_calls import Action, Call, Result
    from .agents.grounding import Box, Grounded, Quad, draw_grounding, parse_grounding, render_grounding
    from .agents.loop import run_agent
    from .choosing import TokenLogprobs
    from .config import Qwen2VLConfig, TextConfig, VisionConfig
    from .conversation import Conversation
    from .errors import (
        CheckpointError,
        ContextLengthError,
        DataError,
        FunctionCallError,
        GroundingError,
        MediaError,
        MediaWarning,
        PromptError,
        Qwen2VLError,
    )
    from .generation import GenerationConfig, GenerationResult, generate, stream
    from .media.options import Limits
    from .model import Qwen2VL
    from .moe_config import MoEConfig
    from .parallel import TensorParallel
    from .prompt.inputs import Inputs
    from .prompt.processor import Processor

__all__ = [
    "Action",
    "Box",
    "Call",
    "CheckpointError",
    "ContextLengthError",
    "Conversation",
    "DataError",
    "FunctionCallError",
    "GenerationConfig",
    "GenerationResult",
    "Grounded",
    "GroundingError",
    "Inputs",
    "Limits",
    "Located",
    "MediaError",
    "MediaWarning",
    "MoEConfig",
    "Processor",
    "PromptError",
    "Quad",
    "Qwen2VL",
    "Qwen2VLConfig",
    "Qwen2VLError",
    "Result",
    "TensorParallel",
    "TextConfig",
    "TokenLogprobs",
    "VisionConfig",
    "draw_grounding",
    "generate",
    "parse_grounding",
    "render_grounding",
    "run_agent",
    "stream",
]

_MODULES = {
    "choosing": ("TokenLogprobs",),
    "conversation": ("Conversation",),
    "config": ("Qwen2VLConfig", "TextConfig", "VisionConfig"),
    "errors": (
        "CheckpointError",
        "ContextLengthError",
        "DataError",
        "FunctionCallError",
        "GroundingError",
        "MediaError",
        "MediaWarning",
        "PromptError",
        "Qwen2VLError",
    ),
    "agents.answers": ("Located",),
    "agents.function_calls": ("Action", "Call", "Result"),
    "generation": ("GenerationConfig", "GenerationResult", "generate", "stream"),
    "agents.grounding": ("Box", "Grounded", "Quad", "draw_grounding", "parse_grounding", "render_grounding"),
    "agents.loop": ("run_agent",),
    "media.options": ("Limits",),
    "model": ("Qwen2VL",),
    "moe_config": ("MoEConfig",),
    "parallel": ("TensorParallel",),
    "prompt.inputs": ("Inputs",),
    "prompt.processor": ("Processor",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("qwen2vl_kernels").__version__
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
