"""The tower's own training, before the model is asked anything: it learns to see, as the paper's has learned before.

The paper begins with a tower that was trained on pictures by itself. Here every token that the merger makes of a
picture is asked what lies under it. What is named is compared with the embeddings of its names in the language model's
own vocabulary: a token of the picture and the word for what it shows come to lie close to each other, so that a layer
finds the "red circle" of a question among the picture's tokens by likeness, and writes a letter that it looks at by
copying it. Linear heads, which are dropped afterwards, ask for the rest:

    names      which of all characters, colours and shapes are in the token's square, several at once
    letters    for each of the token's four patches the character whose middle lies in it, or none
    places     which place that character has in its text, up to `PLACES`
    where      how far from the left and from the top of the picture the token's middle lies
    boxes      where the shape or text that covers the token begins and ends, from left and top, in the picture
    edges      the same in tokens, from the token's middle
    middles    how many shapes have their middle in the token, up to two: what is to be counted counts once
    kinds      colour and shape of the one that has
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from qwen2vl.media.image import preprocess_image
from qwen2vl.model import Qwen2VL
from qwen2vl.prompt.processor import Processor
from qwen2vl.prompt.tokenizer import Tokenizer
from qwen2vl.samples.draws import Draws
from qwen2vl.samples.vocabulary import ALPHABET, ENGLISH
from qwen2vl.samples.words import COLOURS, SHAPES, colour_name, kind_name, shape_name

from .scenes import Mark, scene
from .tokenizer import LANGUAGES

#: The places in a text that are told apart.
PLACES = 8
#: Every character that a picture may show.
CHARACTERS = "".join(sorted({*ALPHABET, *"".join(ENGLISH), *"".join(ENGLISH).upper()}))
_NONE = len(CHARACTERS)
_COLOURS = tuple(COLOURS)
#: Into how many classes the sides of a picture are divided, and so many tokens away an edge is merely far.
_PARTS, _FAR = 40, 4.0


#: What each of the losses counts beside that of the questions.
LOSSES = {
    "names": 1.0,
    "letters": 1.0,
    "places": 0.5,
    "where": 0.2,
    "boxes": 0.5,
    "edges": 1.0,
    "middles": 0.5,
    "kinds": 0.5,
}


@dataclass(frozen=True)
class Seen:
    """Pictures packed for the tower, and what lies under each of its N tokens.

    Attributes:
        rows, grids: the patches `(4 N, 588)` uint8, and `(pictures, 3)`.
        names: `(N, names)` float32, one where the name is in the token's square.
        letters, places: `(N, 4)` int64, the character in each patch, and its place; -100 where there is none to ask.
        where: `(N, 2)` int64: which part of the picture's width and height the token's middle lies in.
        boxes: `(N, 4)` int64: which parts of them left, top, right and bottom lie in; -100 where nothing is.
        edges: `(N, 4)` float32: how many tokens these are from the token's middle, at most `_FAR`; 0 where nothing is.
        middles: `(N,)` int64, how many shapes have their middle in the token's square, at most 2.
        kinds: `(N, 2)` int64, the numbers of colour and shape where that is one, else -100.
    """

    rows: torch.Tensor
    grids: torch.Tensor
    names: torch.Tensor
    letters: torch.Tensor
    places: torch.Tensor
    where: torch.Tensor
    boxes: torch.Tensor
    edges: torch.Tensor
    middles: torch.Tensor
    kinds: torch.Tensor


class Names:
    """The tokens of the vocabulary that name a character, colour or shape."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.ids: list[int] = []
        self.of: dict[str, list[int]] = {}

        def add(name: str, texts: Sequence[str]) -> None:
            found = {ids[0] for ids in map(tokenizer.encode_plain, texts) if len(ids) == 1}
            self.of[name] = [self._column(token) for token in sorted(found)]

        for character in CHARACTERS:
            add(character, [character])
        for colour in COLOURS:
            add(colour, [f" {colour}", colour_name(colour, "zh")[0]])
        for shape in SHAPES:
            plural = kind_name(None, shape, "en")
            add(shape, [f" {shape}", f" {plural}", shape_name(shape, "zh")[0]])

    def _column(self, token: int) -> int:
        if token not in self.ids:
            self.ids.append(token)
        return self.ids.index(token)


class Heads(nn.Module):
    """What asks the tokens; see the module."""

    named: torch.Tensor

    def __init__(self, width: int, names: Names, embedding: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("named", F.normalize(embedding[names.ids].float(), dim=-1))
        self.scale = nn.Parameter(torch.tensor(12.0))
        self.bias = nn.Parameter(torch.full((len(names.ids),), -5.0))
        self.letters = nn.Linear(width, 4 * (_NONE + 1))
        self.places = nn.Linear(width, 4 * PLACES)
        self.where = nn.Linear(width, 2 * _PARTS)
        self.boxes = nn.Linear(width, 4 * _PARTS)
        self.edges = nn.Linear(width, 4)
        self.middles = nn.Linear(width, 3)
        self.kinds = nn.Linear(width, 2 * len(COLOURS))

    def forward(self, tokens: torch.Tensor, seen: Seen) -> dict[str, torch.Tensor]:
        """The losses by name, each a mean over what is there to ask."""
        x = tokens.float()
        x = F.normalize(x, dim=-1)
        names = self.scale * (x @ self.named.T) + self.bias
        x = x * math.sqrt(x.shape[1])
        letters = self.letters(x).unflatten(1, (4, -1))
        covered = seen.boxes[:, 0] >= 0
        return {
            "names": F.binary_cross_entropy_with_logits(names, seen.names, reduction="sum") / seen.names.sum().clamp(1),
            "letters": _balanced(letters.flatten(0, 1), seen.letters.flatten(), _NONE),
            "places": _asked(self.places(x).unflatten(1, (4, -1)), seen.places),
            "where": _asked(self.where(x).unflatten(1, (2, -1)), seen.where),
            "boxes": _asked(self.boxes(x).unflatten(1, (4, -1)), seen.boxes),
            "edges": F.smooth_l1_loss(self.edges(x)[covered], seen.edges[covered], beta=0.1, reduction="sum")
            / (4 * covered.sum()).clamp(1),
            "middles": _balanced(self.middles(x), seen.middles, 0),
            "kinds": _asked(self.kinds(x).unflatten(1, (2, -1)), seen.kinds),
        }

    @torch.no_grad()
    def right(self, tokens: torch.Tensor, seen: Seen) -> dict[str, float]:
        """The shares of letters and places that are right, of names that are found, and of a box's and a token's sides
        that lie in the right class or one beside it; and of edges that are right to a quarter of a token."""
        x = F.normalize(tokens.float(), dim=-1)
        names = self.scale * (x @ self.named.T) + self.bias > 0
        x = x * math.sqrt(x.shape[1])
        letters, where = self.letters(x).unflatten(1, (4, -1)).argmax(-1), seen.letters != _NONE
        wanted = seen.names > 0
        hits = {
            "names": (names & wanted).sum() / (names | wanted).sum(),
            "letters": (letters == seen.letters)[where].float().mean(),
            "none": (letters == seen.letters)[~where].float().mean(),
        }
        for name, off in (("places", 0), ("kinds", 0), ("where", 1), ("boxes", 1)):
            target = getattr(seen, name)
            found = getattr(self, name)(x).unflatten(1, (target.shape[1], -1)).argmax(-1)
            hits[name] = ((found - target).abs() <= off)[target >= 0].float().mean()
        there = seen.middles > 0
        hits["middles"] = (self.middles(x).argmax(-1) == seen.middles)[there].float().mean()
        covered = seen.boxes[:, 0] >= 0
        hits["edges"] = ((self.edges(x) - seen.edges).abs() < 0.25)[covered].float().mean()
        return {name: float(value) for name, value in hits.items()}


def tokens_of(model: Qwen2VL, seen: Seen) -> torch.Tensor:
    """The tower's `(N, width)` tokens of the pictures."""
    tokens, _ = model.encode_media(seen.rows, seen.grids)
    assert tokens is not None
    return tokens


def _asked(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The mean over what there is to ask, 0 where nothing is."""
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return total / (targets >= 0).sum().clamp(1)


def _balanced(logits: torch.Tensor, targets: torch.Tensor, none: int) -> torch.Tensor:
    """The mean over what has something and half of that over what has `none`: most have, and it says little."""
    each, empty = F.cross_entropy(logits, targets, reduction="none"), targets == none
    return each[~empty].sum() / (~empty).sum().clamp(1) + 0.5 * each[empty].sum() / empty.sum().clamp(1)


def pictures(
    processor: Processor, names: Names, rng: np.random.Generator, tokens: int, *, held_out: bool = False
) -> Seen:
    """Scenes of `tokens` tokens at least, neighbours of equal size, which are one call of the attention."""
    found, have = [], 0
    while have < tokens:
        draws = Draws(rng, held_out=held_out, languages=LANGUAGES)
        image, marks = scene(draws)
        patches = preprocess_image(np.asarray(image), processor.options)
        found.append((patches.grid_thw, patches.patches, _targets(patches.grid_thw, image.size, marks, names)))
        have += patches.num_tokens
    found.sort(key=lambda one: one[0][1] * one[0][2])
    parts = [np.concatenate([one[2][n] for one in found]) for n in range(8)]
    return Seen(
        torch.from_numpy(np.concatenate([one[1] for one in found])),
        torch.tensor([one[0] for one in found]),
        *map(torch.from_numpy, parts),
    )


def _targets(grid: tuple[int, int, int], size: tuple[int, int], marks: Sequence[Mark], names: Names):
    rows, columns = grid[1] // 2, grid[2] // 2
    across, down = columns / size[0], rows / size[1]  # tokens a pixel
    named = np.zeros((rows, columns, len(names.ids)), np.float32)
    letters = np.full((2 * rows, 2 * columns), _NONE, np.int64)
    places = np.full((2 * rows, 2 * columns), -100, np.int64)
    middles = np.stack(np.meshgrid((np.arange(columns) + 0.5), (np.arange(rows) + 0.5)), -1)
    where = (middles * _PARTS / (columns, rows)).astype(np.int64)
    boxes = np.full((rows, columns, 4), -100, np.int64)
    edges = np.zeros((rows, columns, 4), np.float32)
    counts = np.zeros((rows, columns), np.int64)
    kinds = np.full((rows, columns, 2), -100, np.int64)
    near = np.full(letters.shape, np.inf)
    for mark in marks:
        left, top, right, bottom = (
            value * scale for value, scale in zip(mark.box, (across, down, across, down), strict=True)
        )
        whole = np.array(mark.whole) * (across, down, across, down)
        parts = (whole * _PARTS / (columns, rows, columns, rows)).clip(0, _PARTS - 1)
        wanted = [column for name in mark.names for column in names.of.get(name, ())]
        for row in range(int(top), min(rows, math.ceil(bottom))):
            for column in range(int(left), min(columns, math.ceil(right))):
                wide = min(right, column + 1) - max(left, column)
                high = min(bottom, row + 1) - max(top, row)
                if wide >= min(0.3, 0.5 * (right - left)) and high >= min(0.3, 0.5 * (bottom - top)):
                    named[row, column, wanted] = 1
                    boxes[row, column] = parts
                    edges[row, column] = (whole - np.tile(middles[row, column], 2)).clip(-_FAR, _FAR)
        if mark.place is None:
            at = min(int((top + bottom) / 2), rows - 1), min(int((left + right) / 2), columns - 1)
            counts[at] = min(counts[at] + 1, 2)
            kinds[at] = (_COLOURS.index(mark.names[0]), SHAPES.index(mark.names[1])) if counts[at] == 1 else -100
        elif (number := CHARACTERS.find(mark.names[0])) >= 0:
            x, y = (left + right), (top + bottom)  # twice the middle in tokens: in patches
            row, column = min(int(y), 2 * rows - 1), min(int(x), 2 * columns - 1)
            away = abs(x - column - 0.5)
            if away < near[row, column]:
                near[row, column], letters[row, column] = away, number
                places[row, column] = min(mark.place, PLACES - 1)

    def by_token(x: np.ndarray) -> np.ndarray:
        return x.reshape(rows, 2, columns, 2).transpose(0, 2, 1, 3).reshape(rows * columns, 4)

    flat = rows * columns
    flattened = [x.reshape(flat, -1) for x in (where, boxes, edges)]
    return (
        named.reshape(flat, -1),
        by_token(letters),
        by_token(places),
        *flattened,
        counts.reshape(-1),
        kinds.reshape(flat, 2),
    )
