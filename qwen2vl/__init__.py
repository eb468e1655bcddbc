"""Qwen2-VL in PyTorch on its own kernels: load a checkpoint, ask about images and videos, generate."""

from .config import Qwen2VLConfig, TextConfig, VisionConfig
from .errors import CheckpointError, ContextLengthError, MediaError, PromptError, Qwen2VLError
from .generate import GenerationConfig, GenerationResult, generate, stream
from .model import Qwen2VL
from .processor import Inputs, Processor

__all__ = [
    "CheckpointError",
    "ContextLengthError",
    "GenerationConfig",
    "GenerationResult",
    "Inputs",
    "MediaError",
    "Processor",
    "PromptError",
    "Qwen2VL",
    "Qwen2VLConfig",
    "Qwen2VLError",
    "TextConfig",
    "VisionConfig",
    "generate",
    "stream",
]
