"""The phases that train the small model, in order: a beginning, and then the three stages of the paper.

The paper begins with a language model that can already write and a vision tower that can already see; a model that is
trained from nothing has neither. While both learn what answers look like at all, the gradient that reaches the tower
says nothing about the picture and moves the features of all pictures alike. With several skills at once this lasts so
long that the features of all pictures end up equal, and nothing can be learned from any of them. With one skill, whose
answers are single letters, it is over within 50 steps. So the whole model first learns to name single letters
("letters"). Then the tower is trained alone ("vision"), the whole model on more and more skills ("multimodal", three
times), and the language model alone on all skills ("instruct").
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

#: The seed of the weights and the samples.
SEED = 1


@dataclass(frozen=True)
class Phase:
    """One run of ``qwen2vl train``.

    Attributes:
        stage: one of `qwen2vl.training.stages.STAGES`.
        steps: how many steps it has at a budget of 1.
        tokens: how many tokens a step has on all processes together.
        lr, end: the highest learning rate, and the share of it that a cosine ends at.
        mix: skill -> (difficulties, each as often as it is named, and the weight of the skill).
    """

    name: str
    stage: str
    steps: int
    tokens: int
    lr: float
    end: float
    mix: dict[str, tuple[str, float]]


_LETTERS = {"read": ("0", 1.0)}
_CHARACTERS = {"read": ("01", 1.0)}
_GROWING = {
    "read": ("01123", 4),
    "colour_shape": ("01223", 2),
    "count": ("01", 1.2),
    "compare": ("01", 1.2),
    "point": ("01", 1.5),
    "video": ("01", 1.2),
}
_ALL = {
    "read": ("0122334", 4),
    "colour_shape": ("0122334", 2),
    "count": ("0122334", 1.2),
    "compare": ("0122334", 1.5),
    "point": ("0122334", 1.5),
    "video": ("0122334", 1.5),
    "screen": ("01234", 0.7),
}

#: More samples of what the model still got wrong most often after `_ALL`.
_MOST = {
    **_ALL,
    "read": ("01223334", 4),
    "compare": ("0012234", 2),
    "point": ("0011234", 2.5),
    "screen": ("0011234", 1),
}

PHASES = (
    Phase("1-letters", "multimodal", 500, 1024, 5e-4, 0.6, _LETTERS),
    Phase("2-vision", "vision", 300, 1024, 5e-4, 0.6, _CHARACTERS),
    Phase("3-multimodal", "multimodal", 1900, 2048, 6e-4, 0.5, _GROWING),
    Phase("4-multimodal", "multimodal", 5200, 1024, 5e-4, 0.1, _ALL),
    Phase("5-multimodal", "multimodal", 10500, 1024, 5e-4, 0.05, _MOST),
    Phase("6-instruct", "instruct", 900, 2048, 3e-4, 0.05, _MOST),
)


def configuration(phase: Phase, *, number: int, checkpoint: str, budget: float, processes: int) -> str:
    """The file that ``qwen2vl train`` reads, to lie in the folder that the phase's output goes to.

    Args:
        number: the number of the phase; no two phases draw the same samples.
        checkpoint: the folder of the checkpoint that the phase begins from.
        budget: a factor on the number of steps.
        processes: how many processes share the tokens of a step.
    """
    steps = max(1, round(budget * phase.steps))
    tables: list[tuple[str, dict[str, Any]]] = [
        ("[model]", {"checkpoint": checkpoint, "dtype": "float32"}),
        (
            "[run]",
            {
                "output": ".",
                "steps": steps,
                "max_tokens": phase.tokens // processes,
                "seed": 100 * SEED + number,
                "data_threads": 1,
                "save_every": 250,
                "keep": 1,
                "loss": "full",  # a vocabulary of 2048 needs no chunks
                "checkpoint_activations": False,
            },
        ),
        (
            "[optimizer]",
            {
                "lr": phase.lr,
                "warmup_steps": min(50, steps),
                "min_lr_ratio": phase.end,
                "weight_decay": 0.05,
            },
        ),
    ]
    if processes > 1:
        tables.append(("[parallel]", {"mode": "ddp"}))
    for skill, (difficulties, weight) in phase.mix.items():
        levels = [int(level) for level in difficulties]
        tables.append(
            ("[[data]]", {"format": "generated", "path": skill, "difficulty": levels, "weight": float(weight)})
        )
    # JSON of strings, numbers, booleans and lists of numbers is TOML.
    return "\n".join(
        line for head, table in tables for line in (head, *(f"{k} = {json.dumps(v)}" for k, v in table.items()), "")
    )
