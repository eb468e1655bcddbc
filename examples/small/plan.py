"""What the small model is trained for, and the order in which it meets it: by what it gets wrong, not by steps.

The beginning decides. The paper begins with a language model that can already write and a vision tower that can already
see; a model that is trained from nothing has neither. While both learn what answers look like at all, the gradient that
reaches the tower says nothing about the picture and moves the features of all pictures alike. With several skills at
once this lasts so long that the features of all pictures end up equal, and nothing can be learned from any of them.
With large single letters it is over within some hundred steps. So a model of random weights sees these alone until its
held-out error on them is below `OPENING`; then every skill begins with its easiest level, and each level that is below
`OPENING` opens the next one. What is wrong more often is drawn more often, and what is mastered is drawn now and then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from .tokenizer import LANGUAGES

#: The seed of the weights and the samples.
SEED = 1
#: Skill -> the levels that it is trained and measured on, in the order in which they open: the easiest first, as small
#: models learn them. It is shown with no others.
SCOPE: dict[str, tuple[int, ...]] = {
    "read": (0, 1, 2, 3),
    "colour_shape": (0, 1, 2, 3),
    "count": (0, 1, 2, 3),
    "compare": (0, 1, 3, 2),
    "point": (0, 1, 3, 2),
    "video": (0, 1, 2, 3),
    "screen": (0, 1),
}
#: Skill -> how often it is drawn where all are equally often wrong. A sample of the screen game has four to six times
#: as many tokens as one of the others, and one of pointing nearly twice as many.
WEIGHTS = {"read": 4.0, "colour_shape": 1.5, "count": 1.5, "compare": 2.0, "point": 1.5, "video": 1.5, "screen": 0.8}
#: The share of wrong answers below which a level opens the next one.
OPENING = 0.3
#: Added to every level's share of wrong answers, so that what is mastered is not forgotten.
REHEARSAL = 0.04

#: A skill and one of its levels.
Level = tuple[str, int]
_FIRST: Level = ("read", 0)


def open_levels(opened: Iterable[Level], error: Callable[[Level], float]) -> dict[Level, float]:
    """The levels that are open from now on, and the share of wrong answers at each.

    Args:
        opened: those that were open before; none at the beginning. A level never closes again, while it is in `SCOPE`.
        error: measures a level; called once for each that is open or opens now.
    """
    trained = [level for level in opened if level[1] in SCOPE.get(level[0], ())]
    known = {level: error(level) for level in sorted({_FIRST, *trained})}
    waiting = list(known)
    while waiting:
        level = waiting.pop()
        if known[level] >= OPENING:
            continue
        skill, difficulty = level
        levels = SCOPE[skill]
        behind = [(skill, n) for n in levels[levels.index(difficulty) + 1 :][:1]]
        if level == _FIRST:
            behind += [(other, easy[0]) for other, easy in SCOPE.items()]
        for one in behind:
            if one not in known:
                known[one] = error(one)
                waiting.append(one)
    return {(skill, n): known[skill, n] for skill, levels in SCOPE.items() for n in levels if (skill, n) in known}


def shares(errors: Mapping[Level, float]) -> dict[Level, float]:
    """How often each open level is drawn, of one in all, from the share of wrong answers at each."""
    wanted = {level: WEIGHTS[level[0]] * (REHEARSAL + error) for level, error in errors.items()}
    total = sum(wanted.values())
    return {level: weight / total for level, weight in wanted.items()}


def entries(drawn: Mapping[Level, float]) -> list[dict[str, object]]:
    """The data tables of a training run that draws each level so often."""
    return [
        {
            "format": "generated",
            "path": skill,
            "difficulty": difficulty,
            "languages": list(LANGUAGES),
            "weight": share,
        }
        for (skill, difficulty), share in drawn.items()
    ]
