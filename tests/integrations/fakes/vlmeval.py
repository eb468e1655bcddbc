"""What a model of VLMEvalKit touches of it, with its names: the base class, the prompts for Qwen2-VL, the registry."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from .modules import install


def install_vlmeval(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Put the fake into ``sys.modules``; returns its registry."""
    registry: dict[str, Any] = {}

    class BaseModel:
        """Its ``generate`` makes items of every form of message, and checks their types."""

        INTERLEAVE = False
        allowed_types = ("text", "image")

        def use_custom_prompt(self, dataset: str) -> bool:
            return False

        def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
            raise NotImplementedError

        def generate(self, message: Any, dataset: str | None = None) -> str:
            items = [{"type": "text", "value": message}] if isinstance(message, str) else message
            assert all(item["type"] in self.allowed_types for item in items), "Invalid input type"
            return self.generate_inner(items, dataset)

    class Qwen2VLPromptMixin:
        """Wants a method that writes a line's pictures; has prompts for some data sets."""

        def __init__(self, *args: Any, use_custom_prompt: bool = True, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._use_custom_prompt = use_custom_prompt

        def set_dump_image(self, function: Any) -> None:
            self.dump_image_func = function

        def use_custom_prompt(self, dataset: str) -> bool:
            return self._use_custom_prompt and dataset == "MMStar"

        def build_prompt(self, line: dict[str, Any], dataset: str) -> list[dict[str, Any]]:
            pictures = [{"type": "image", "value": path} for path in self.dump_image_func(line)]
            return [*pictures, {"type": "text", "value": f"Question: {line['question']}"}]

    install(
        monkeypatch,
        {
            "vlmeval.config": {"supported_VLM": registry},
            "vlmeval.vlm.base": {"BaseModel": BaseModel},
            "vlmeval.vlm.qwen2_vl.prompt": {"Qwen2VLPromptMixin": Qwen2VLPromptMixin},
        },
    )
    return SimpleNamespace(supported=registry, BaseModel=BaseModel)
