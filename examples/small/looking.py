"""Where the decoder looks: attention that is taught, beside the answers.

To answer "Which shape is green?" a layer's attention must find, among the picture's tokens, the one that the question
is about. While it looks elsewhere, or everywhere, an answer's gradient hardly says where it should have looked, so each
kind of looking up is learned late, and at once. But a dialogue knows what its answers are about. So some heads are
told: `LOOKS` puts its weight on the thing that is asked about, on several in equal parts, or, as a text is read, on the
next character; `COUNTS` puts half as much on the middle of each thing that is counted as on the first token, so that
their number is how much of it is in the pictures, and where two pictures are compared, each of the two counts one. Text
is harder: what is to be found has several characters, which stand away from the coordinates. So `NAMED`, of the layer
before, looks from each token of a name that the answer has to what is called so, and the coordinates find it there.
Nothing of this is there when the model is used.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, product
from typing import Any, cast

import torch
from torch import nn

from qwen2vl.agents.grounding import Box
from qwen2vl.model import Qwen2VL
from qwen2vl.text import Layer, Pack
from qwen2vl.training.example import Example
from qwen2vl.training.packing import Batch
from qwen2vl_kernels import mrope

from .dialogues import Look

#: What is taught: (layer of four, head). The first layer gathers what is asked, the last one what is found.
NAMED, LOOKS, COUNTS = (1, 0), (2, 0), (2, 1)
#: The weight of a counted thing in that of the first token: scores that do not depend on how many others there are.
EACH = 0.5


@dataclass(frozen=True)
class Gaze:
    """What one token of an example is to look at.

    Attributes:
        row: the token's number in the example.
        head: one of the above.
        places: the numbers of the tokens of each thing, and the share of the weight that they are to have together.
    """

    row: int
    head: tuple[int, int]
    places: tuple[tuple[tuple[int, ...], float], ...]


def gazes(example: Example, looks: Sequence[Look], texts: Sequence[str]) -> list[Gaze]:
    """What the tokens of an example look at as they write.

    Args:
        example: of a dialogue about pictures.
        looks: those of its taught stretches, in order.
        texts: what :func:`examples.small.lessons.texts_of` says of the tokenizer.

    Raises:
        ValueError: there are not as many looks as stretches.
    """
    taught = (example.labels >= 0).tolist()
    stretches = _stretches(taught)
    if len(stretches) != len(looks):
        raise ValueError(f"looks: wants one for each of {len(stretches)} taught stretches, got {len(looks)}")
    assert example.image_grid_thw is not None
    tokens = (example.input_ids == texts.index("<|image_pad|>")).nonzero().flatten().tolist()
    grids, begins = [], []
    for _, rows, columns in example.image_grid_thw.tolist():
        begins.append(tokens[sum(high * wide for high, wide in grids)])
        grids.append((rows // 2, columns // 2))

    def under(place: tuple[int, Box]) -> tuple[int, ...]:
        picture, box = place
        return tuple(begins[picture] + n for n in _covered(box, *grids[picture]))

    def middle(place: tuple[int, Box]) -> int:
        picture, box = place
        rows, columns = grids[picture]
        return begins[picture] + (box.y1 + box.y2) * rows // 2000 * columns + (box.x1 + box.x2) * columns // 2000

    def amounts(places: Sequence[tuple[int, Box]]) -> tuple[tuple[tuple[int, ...], float], ...]:
        first = 1 / (1 + EACH * len(places))
        middles = Counter(middle(place) for place in places)
        return *(((token,), EACH * number * first) for token, number in middles.items()), ((0,), first)

    found = []
    for (begin, end), look in zip(stretches, looks, strict=True):
        written = [texts[int(token)] for token in example.input_ids[begin:end]]
        if look.how == "counted":
            found.append(Gaze(begin - 1, COUNTS, amounts(look.places)))
        elif look.how == "compared":
            for n, (picture, head) in product(_said(written), enumerate((LOOKS, COUNTS))):
                found.append(Gaze(begin + n - 1, head, amounts([one for one in look.places if one[0] == picture])))
        elif look.how == "spelled":
            at = 0
            for n, text in enumerate(written):
                if at < len(look.places):
                    found.append(Gaze(begin + n - 1, LOOKS, ((under(look.places[at]), 1.0),)))
                at += len(text)
        elif look.places:
            things = tuple((under(place), 1 / len(look.places)) for place in look.places)
            found += [Gaze(begin + n - 1, LOOKS, things) for n in _said(written)]
            found += [Gaze(begin + n, NAMED, things) for n in _called(written, look.name)]
    return found


def _stretches(taught: Sequence[bool]) -> list[tuple[int, int]]:
    edges = [n for n, one in enumerate(taught) if n and one != taught[n - 1]] + [len(taught)]
    return [(begin, end) for begin, end in zip(edges[::2], edges[1::2], strict=False) if begin < end]


def _said(written: Sequence[str]) -> list[int]:
    """Which of an answer's tokens say what was found: those of its coordinates, or all but its end."""
    inside, numbers = False, []
    for n, text in enumerate(written):
        if inside and text.isdigit():
            numbers.append(n)
        inside = text.endswith("(") or (inside and not text.startswith(")"))
    return numbers or list(range(len(written) - 1))


def _called(written: Sequence[str], name: str) -> list[int]:
    """Which of an answer's tokens hold the name, where it stands first."""
    begin = "".join(written).index(name)
    ends = list(accumulate(map(len, written)))
    return [n for n, end in enumerate(ends) if end > begin and end - len(written[n]) < begin + len(name)]


def _covered(box: Box, rows: int, columns: int) -> list[int]:
    """The tokens of a picture of which a box covers three tenths each way, or that hold about half of a small box."""
    left, right = box.x1 * columns / 1000, (box.x2 + 1) * columns / 1000
    top, bottom = box.y1 * rows / 1000, (box.y2 + 1) * rows / 1000
    wide, high = min(0.3, 0.49 * (right - left)), min(0.3, 0.49 * (bottom - top))
    return [
        row * columns + column
        for row in range(rows)
        for column in range(columns)
        if min(right, column + 1) - max(left, column) >= wide and min(bottom, row + 1) - max(top, row) >= high
    ]


class Looking:
    """Asks the attention of a model's layers where it looks."""

    def __init__(self, model: Qwen2VL) -> None:
        taught = {layer for layer, _ in (NAMED, LOOKS, COUNTS)}
        self.attentions = {layer: cast(Layer, model.model.layers[layer]).self_attn for layer in sorted(taught)}
        self._kept: dict[int, tuple[torch.Tensor, Pack]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep what the layers are given by the next forward call of the model."""

        def kept(layer: int) -> Callable[[nn.Module, Any], None]:
            return lambda _, given: self._kept.update({layer: given})

        hooks = [one.register_forward_pre_hook(kept(layer)) for layer, one in self.attentions.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def losses(self, batch: Batch, looked: Mapping[str, Sequence[Gaze]]) -> dict[str, torch.Tensor]:
        """How far the weights are from those that are wanted, as means of divergences in nats, by name; what nothing in
        the batch asks for is left out.

        Args:
            batch: what the model was given last, :meth:`watching`.
            looked: source of an example -> what its tokens look at.
        """
        starts = batch.cu_seqlens.tolist()
        rotated: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer, attention in self.attentions.items():
            x, pack = self._kept[layer]
            heads = (-1, attention.head_dim)
            q, k = (proj(x).unflatten(-1, heads) for proj in (attention.q_proj, attention.k_proj))
            rotated[layer] = mrope(q, k, pack.positions, pack.inv_freq, attention.section)
        found = [(starts[n], one) for n, source in enumerate(batch.sources) for one in looked.get(source or "", ())]
        losses = {}
        for name, head in (("named", NAMED), ("looks", LOOKS), ("counts", COUNTS)):
            if asked := [(start, one) for start, one in found if one.head == head]:
                q, k = rotated[head[0]]
                losses[name] = _divergence(_weights(q, k, head[1], asked), asked)
        return losses


def _weights(q: torch.Tensor, k: torch.Tensor, head: int, asked: Sequence[tuple[int, Gaze]]) -> torch.Tensor:
    """The logarithms of the weights `(N, T)` of one head's keys for the rows that are asked for, each of which sees
    those of its own example that do not come behind it."""
    begins = torch.tensor([start for start, _ in asked])
    rows = torch.tensor([start + one.row for start, one in asked])
    scores = (q[rows, head] @ k[:, head * k.shape[1] // q.shape[1]].T).float() / math.sqrt(q.shape[2])
    keys = torch.arange(k.shape[0])
    seen = (keys >= begins[:, None]) & (keys <= rows[:, None])
    return scores.masked_fill(~seen, -math.inf).log_softmax(1)


def _divergence(weights: torch.Tensor, asked: Sequence[tuple[int, Gaze]]) -> torch.Tensor:
    """The mean over rows `weights (N, T)`, logarithms, of how far they are from what each row's places want."""
    sets = [
        (n, [start + key for key in tokens], share)
        for n, (start, one) in enumerate(asked)
        for tokens, share in one.places
        if share > 0
    ]
    longest = max(len(keys) for _, keys, _ in sets)
    rows = torch.tensor([n for n, _, _ in sets])
    keys = torch.tensor([keys + keys[:1] * (longest - len(keys)) for _, keys, _ in sets])
    there = torch.tensor([[n < len(keys) for n in range(longest)] for _, keys, _ in sets])
    shares = torch.tensor([share for _, _, share in sets])
    masses = weights[rows[:, None], keys].masked_fill(~there, -math.inf).logsumexp(1)
    return (shares * (shares.log() - masses)).sum() / len(asked)
