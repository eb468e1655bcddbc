"""The small model's tokenizer: one token for a word that is asked with, one for every character that is read.

A byte-level BPE whose merges are chosen, not counted. A model that reads has to spell, and a vocabulary that merges
letters gives one string many spellings: "eat" would be one token in "meat" and three in "EAT". So nothing is merged
that begins with a letter or digit, as what is read from a picture does. A word inside of a question begins with its
space: `Ġ t`, `Ġt e`, `Ġte x`, `Ġtex t` make it one token, and the same word alone is letters. Signs are merged too, and
the bytes of Chinese characters, which no picture shows. The names of the roles, with which every turn begins, are the
one exception; the pairs that theirs begin with, ss, sy and us, are in no random string.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import pre_tokenizers

from benchmarks.byte_tokenizer import PRE_TOKENIZATION_PATTERN, write_bpe_tokenizer
from qwen2vl.agents.function_calls import Call, render_call
from qwen2vl.agents.grounding import Box, Grounded, render_grounding
from qwen2vl.prompt.chatml import DEFAULT_SYSTEM_PROMPT
from qwen2vl.prompt.tokenizer import GROUNDING_TOKENS
from qwen2vl.samples.questions import QUESTIONS, SCREEN
from qwen2vl.samples.screen_game import SYSTEM
from qwen2vl.samples.words import (
    COLOURS,
    DIFFERENCES,
    DIRECTION_NAMES,
    EVENTS,
    SEPARATOR,
    SHAPES,
    WHICH_PICTURE,
    YES_NO,
    event_sentence,
    kind_name,
    thing_name,
)

_ROLES = "s s|a ss|ass i|assi s|assis t|assist a|assista n|assistan t|s y|sy s|sys t|syst e|syste m|u s|us e|use r"
#: The languages that the model is asked in.
LANGUAGES = ("en", "zh")


def write_tokenizer(folder: str | os.PathLike[str]) -> dict[str, int]:
    """Write the tokenizer's three files into `folder`; equal calls write equal bytes.

    Returns:
        Name -> id of the special tokens, which are the last ids.
    """
    return write_bpe_tokenizer(folder, [*chosen_merges(texts()), *_ROLES.split("|")])


def texts() -> Iterator[str]:
    """What is asked and answered, all forms, with a space in the place of what is read from a picture."""
    point = render_call(Call("Tap", {"point": (0, 0)}), "paper")
    box = render_grounding(Grounded(" ", (Box(0, 0, 1, 1), Box(0, 0, 1, 1))))
    for token in GROUNDING_TOKENS:
        box = box.replace(token, " ")
    yield from (DEFAULT_SYSTEM_PROMPT, SYSTEM, point + "\n", box, "*RESULT*: \n*RETURN*: ")
    for language in LANGUAGES:
        for wordings in QUESTIONS.values():
            yield from (form.replace("{}", " ") for form in wordings[language])
        yield from (text.replace("{}", " ") for text in SCREEN[language].values())
        yield from (*YES_NO[language], *DIFFERENCES[language], *WHICH_PICTURE[language], SEPARATOR[language])
        yield from DIRECTION_NAMES[language].values()
        for shape in SHAPES:
            for colour in COLOURS:
                yield f" {kind_name(colour, shape, language)} {thing_name(colour, shape, language)}"
                yield f" {kind_name(colour, None, language)}"
            yield f" {kind_name(None, shape, language)}"
            yield from (event_sentence(event, "red", shape, language) for event in EVENTS)


def chosen_merges(lines: Iterable[str]) -> list[str]:
    """Merges, each as `"a b"`, that make one token of every piece of the text that begins with no letter or digit.

    The pieces are what the tokenizer splits text into, so that no other piece meets these merges; Chinese characters
    are such pieces one by one.
    """
    split = pre_tokenizers.Split(tokenizers.Regex(PRE_TOKENIZATION_PATTERN), "isolated")
    pieces: set[str] = set()
    for line in lines:
        for piece, _ in split.pre_tokenize_str(line):
            if piece.isascii():
                pieces |= set() if piece[0].isalnum() else {piece}
            else:
                pieces |= {character for character in piece if not character.isascii()}
    to_symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merges: dict[str, None] = {}
    for piece in sorted(pieces):
        ((symbols, _),) = to_symbols.pre_tokenize_str(piece)
        merges |= {f"{symbols[:n]} {symbols[n]}": None for n in range(1, len(symbols))}
    return list(merges)
