"""A small byte-level BPE tokenizer, trained on what generated samples say, with Qwen2-VL's special tokens.

It is small because a small model needs a small embedding. Texts that are to be read from pictures are left out of its
training text: most of their characters stay single tokens, so that a model that reads cannot guess whole words.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from benchmarks.byte_tokenizer import PRE_TOKENIZATION_PATTERN, write_bpe_tokenizer
from qwen2vl.prompt.tokenizer import BYTE_OF_CHAR, CONTROL_TOKENS, GROUNDING_TOKENS
from qwen2vl.samples.questions import QUESTIONS, SCREEN
from qwen2vl.samples.sample import Sample
from qwen2vl.samples.skills import LEVELS, SKILLS, generate
from qwen2vl.samples.words import (
    COLOURS,
    DIFFERENCES,
    DIRECTION_NAMES,
    EVENTS,
    LANGUAGES,
    SHAPES,
    WHICH_PICTURE,
    YES_NO,
    colour_name,
    event_sentence,
    kind_name,
    shape_name,
)

#: How many tokens there are: 256 bytes, merges and special tokens. At this size most frequent words are one token.
VOCABULARY = 2048


def write_tokenizer(folder: str | os.PathLike[str], *, size: int = VOCABULARY) -> dict[str, int]:
    """Train the tokenizer and write its three files into `folder`; equal calls write equal bytes.

    Args:
        size: the number of tokens, special ones included. There are fewer where the text has too few merges.

    Returns:
        Name -> id of the special tokens.
    """
    return write_bpe_tokenizer(folder, train_merges(texts(), size - len(BYTE_OF_CHAR) - len(CONTROL_TOKENS)))


def texts() -> Iterator[str]:
    """The training text: all questions and answers with few forms, and some samples of every skill but reading."""
    # So frequent that each becomes one token, as in the released vocabulary: every turn begins with one of them.
    yield from ["system", "user", "assistant"] * 500
    for wordings in QUESTIONS.values():
        for language, forms in wordings.items():
            for form in forms:
                # Roughly as often as samples ask it, because the shares of the languages decide what is merged first.
                yield from [form.replace("{}", " ")] * LANGUAGES[language]
    for language, share in LANGUAGES.items():
        names = [colour_name(colour, language) for colour in COLOURS] + [shape_name(s, language) for s in SHAPES]
        spaced = [f" {name}" for name in names]  # as they stand inside a sentence
        answers = (*YES_NO[language], *DIFFERENCES[language], *WHICH_PICTURE[language])
        moves = (*DIRECTION_NAMES[language].values(), *SCREEN[language].values())
        yield from [text.replace("{}", " ") for text in (*names * 2, *spaced * 2, *answers, *moves)] * share
        for n, shape in enumerate(SHAPES):
            for colour in COLOURS:
                yield from [kind_name(colour, shape, language), kind_name(colour, None, language)]
            # Not every colour with every shape: whole phrases would be merged before the names in them.
            yield from [event_sentence(e, list(COLOURS)[n + i], shape, language) for i, e in enumerate(EVENTS[:4])]
            yield from [event_sentence(e, list(COLOURS)[n], shape, language) for e in EVENTS[4:]]
            yield kind_name(None, shape, language)
    for skill in SKILLS:
        if skill != "read":
            for level in LEVELS:
                for index in range(40):
                    yield from _said(skill, level, index)


def _said(skill: str, level: int, index: int) -> Iterator[str]:
    sample = generate(skill, level, seed=0, index=index)
    if "text" in sample.scene or "texts" in sample.scene or any(kind == "type" for kind, _ in _tasks(sample)):
        return
    for turn in sample.record["messages"]:
        text = turn["content"]
        for marker in ("<image>", "<video>", *GROUNDING_TOKENS):
            text = text.replace(marker, "\n")
        yield text
    yield sample.record.get("system", "You are a helpful assistant.")


def _tasks(sample: Sample) -> list[list[str]]:
    return sample.scene.get("tasks", [])


def train_merges(lines: Iterable[str], count: int) -> list[str]:
    """At most `count` merges of a byte-level BPE of the text, each as `"a b"`; pairs that occur once are not merged."""
    backend = tokenizers.Tokenizer(models.BPE())
    pieces = [
        pre_tokenizers.Split(tokenizers.Regex(PRE_TOKENIZATION_PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    backend.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = pre_tokenizers.Sequence(pieces)  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=len(BYTE_OF_CHAR) + count,
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(lines, trainer)
    merges = json.loads(backend.to_str())["model"]["merges"]
    # Each merge is a string or a pair of strings, by the version of tokenizers.
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
