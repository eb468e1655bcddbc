"""Random texts to be read, of the split that a sample is in, and colours to write them in."""

from __future__ import annotations

from .draws import Draws
from .fonts import vietnamese_faces
from .shapes import Colour
from .vocabulary import ALPHABET, ENGLISH, VIETNAMESE, is_held_out


def random_characters(draws: Draws, alphabet: str, count: int) -> str:
    """A string of `count` characters that is held out exactly where the draws are for evaluation."""
    while True:
        text = "".join(draws.pick(alphabet) for _ in range(count))
        if count == 1 or is_held_out(text) == draws.held_out:
            return text


def random_word(draws: Draws, longest: int) -> str:
    """A word of at most `longest` characters that is held out exactly where the draws are for evaluation.

    A third of the words are Vietnamese where that is one of the languages and a font has its letters. Words are in
    small letters, capitals, or small letters behind one capital.
    """
    vietnamese = "vi" in draws.languages and bool(vietnamese_faces()) and draws.chance(1 / 3)
    while True:
        word = draws.pick(VIETNAMESE if vietnamese else ENGLISH)
        word = (word, word.capitalize(), word.upper())[draws.between(0, 2)]
        if len(word) <= longest and is_held_out(word) == draws.held_out:
            return word


def random_text(draws: Draws, longest: int) -> str:
    """Characters or, where `longest` is at least 3, a word, of at most `longest` characters."""
    if longest >= 3 and draws.chance(0.5):
        return random_word(draws, longest)
    return random_characters(draws, ALPHABET, draws.between(1, longest))


def ink_and_ground(draws: Draws, *, dark_ink: bool = False) -> tuple[Colour, Colour]:
    """(ink, ground): one dark and one light colour, mostly dark on light, or always with `dark_ink`."""
    red, green, blue, *light = draws.rng.integers(0, 100, 6).tolist()
    dark, pale = (red, green, blue), (255 - light[0] // 2, 255 - light[1] // 2, 255 - light[2] // 2)
    return (dark, pale) if dark_ink or draws.chance(0.7) else (pale, dark)
