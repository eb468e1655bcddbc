"""``QWEN2VL_KERNELS``: the environment variable that switches these kernels on inside other stacks.

Servers load every plugin that is installed beside them, and Python runs a line of ours as it starts. Both ask here
first, so that nobody's program changes because this package was installed. The value names stacks and, behind a colon,
features of one::

    QWEN2VL_KERNELS=vllm                               vLLM with its default features
    QWEN2VL_KERNELS=vllm,sglang                        both stacks with their default features
    QWEN2VL_KERNELS=vllm:vision_rope,mrope             vLLM with these two features and no other
    QWEN2VL_KERNELS=vllm:default,mrope,sglang          vLLM with its default features and one more, and SGLang
    QWEN2VL_KERNELS=vllm:all                           vLLM with every feature
    QWEN2VL_KERNELS=transformers                       transformers, in any program that imports its Qwen2-VL

The grammar: words between commas. A word that names a stack begins that stack; ``stack:feature`` begins it with a
feature; every other word is one more feature of the stack that such a colon began. Capitals, spaces and empty words
do not matter. A word that means nothing is a :class:`PatchWarning` that names what there is; the other words count.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ._patches import PatchWarning, disabled

VARIABLE = "QWEN2VL_KERNELS"


@dataclass(frozen=True)
class Stack:
    """Names of the features of one stack: those that it has by default, and all."""

    default: tuple[str, ...]
    features: tuple[str, ...]

    def meant(self, word: str) -> tuple[str, ...]:
        """The features that a word stands for, none if it means nothing."""
        several = {"default": self.default, "all": self.features}
        return several.get(word) or tuple(feature for feature in self.features if feature == word)


_TRANSFORMERS = (
    "mrope", "vision_rope", "vision_attention", "patch_embed", "norm", "activation", "merger", "positions",
    "image_processor",
)  # fmt: skip

#: What the variable can switch on, features in the order in which they are applied. Each stack has an adapter of its
#: name in this folder.
STACKS = {
    "vllm": Stack(
        default=("vision_rope", "quick_gelu"),
        features=("vision_rope", "quick_gelu", "vision_attention", "mrope"),
    ),
    "sglang": Stack(
        default=("vision_rope", "quick_gelu", "vision_attention"),
        features=("vision_rope", "quick_gelu", "vision_attention"),
    ),
    # Without logits, which ``loss`` does not return, trainers that read them fail where they worked before: TRL's
    # SFTTrainer took accuracy and entropy from them in training, up to 1.8 at least.
    "transformers": Stack(default=_TRANSFORMERS, features=(*_TRANSFORMERS, "loss")),
}


def parse(text: str) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """``(features, faults)`` of a value of the variable: the features of each stack that it names, and its errors."""
    asked: dict[str, set[str]] = {}
    faults: list[str] = []
    stacks = f"the stacks are {', '.join(STACKS)}"
    for stack, feature in _words(text):
        if stack is None:
            example = f"{next(iter(STACKS))}:default,mrope"
            faults.append(f"there is no stack {feature!r}; {stacks}, and features follow a colon, as in {example}")
        elif stack not in STACKS:
            faults.append(f"there is no stack {stack!r}; {stacks}")
        elif not (meant := STACKS[stack].meant(feature)):
            features = ", ".join((*STACKS[stack].features, "default", "all"))
            faults.append(f"{stack} has no feature {feature!r}; its features are {features}, and {stacks}")
        else:
            asked.setdefault(stack, set()).update(meant)
    ordered = {name: tuple(f for f in STACKS[name].features if f in found) for name, found in asked.items()}
    return ordered, list(dict.fromkeys(faults))


def _words(text: str) -> Iterator[tuple[str | None, str]]:
    """``(stack, feature)`` of each word; the stack is ``None`` where no colon came before."""
    listing: str | None = None  # the stack whose list of features goes on
    for word in text.lower().split(","):
        name, colon, feature = (part.strip() for part in word.partition(":"))
        if colon:
            listing = name
            yield name, feature
        elif name in STACKS:
            listing = None
            yield name, "default"
        elif name:
            yield listing, name


def requested(stack: str) -> tuple[str, ...]:
    """The features of ``stack`` that the environment asks for: none by default, or with ``QWEN2VL_KERNELS_DISABLE=1``.

    What the value says wrongly is a :class:`PatchWarning` and no error, as no program may die of it.
    """
    text = os.environ.get(VARIABLE, "")
    if disabled():
        return ()
    asked, faults = parse(text)
    for fault in faults:
        warnings.warn(f"{VARIABLE}={text}: {fault}; this word is ignored", PatchWarning, stacklevel=3)
    return asked.get(stack, ())


def setting(stack: str, features: Iterable[str]) -> str:
    """``VARIABLE=value`` that switches on these features of a stack, as short as it can be."""
    wanted = set(features)
    if wanted == set(STACKS[stack].default):
        return f"{VARIABLE}={stack}"
    words = (feature for feature in STACKS[stack].features if feature in wanted)
    return f"{VARIABLE}={stack}:{'all' if wanted == set(STACKS[stack].features) else ','.join(words)}"
