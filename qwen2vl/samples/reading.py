"""The skill of reading what is written in a picture."""

from __future__ import annotations

from PIL import Image

from .draws import Draws
from .fonts import LEAST_SIZE, faces_for, fitting_size, text_mask
from .sample import Sample, question
from .shapes import add_noise
from .texts import ink_and_ground, random_characters, random_text, random_word
from .vocabulary import ALPHABET, CLEAR


def read(draws: Draws, level: int) -> Sample:
    """Asks for a text in one of many fonts, sizes and colours. The levels:

    0   one digit or capital letter that fills 56 x 56 pixels, dark on light
    1   one character of any kind, size and colour
    2   two or three characters, in pictures of 84 x 56 or 112 x 56 pixels
    3   up to six characters, or an English or Vietnamese word of at most six
    4   up to eight characters, a word, or two lines, some slightly slanted, in noisy pictures of many sizes

    At levels 2 and 3 training has pictures of more sizes, and smaller letters in them, than evaluation.
    """
    language = draws.language()
    if level == 0:
        text, size = random_characters(draws, CLEAR, 1), (56, 56)
    elif level == 1:
        text, size = random_characters(draws, ALPHABET, 1), (56, 56)
    elif level == 2:
        text = random_characters(draws, ALPHABET, draws.between(2, 3))
        size = draws.size((2, 2), (3, 4), more=(1, 2))
    elif level == 3:
        text = random_text(draws, 6)
        size = draws.size((2, 2), (3, 6) if len(text) < 5 else (4, 7), more=(1, 1))
    else:
        text = random_text(draws, 8)
        if len(text) > 2 and draws.chance(0.25):
            text += "\n" + random_word(draws, 8)
        size = draws.size((2, 4) if "\n" not in text else (3, 5), (4, 8), loose=True)
    picture, box, face = draw_text(draws, text, size, level)
    scene = {"text": text, "box": box, "font": face}
    return question([picture], draws.question("read", language), text, language, scene=scene)


def draw_text(draws: Draws, text: str, size: tuple[int, int], level: int) -> tuple[Image.Image, list[int], str]:
    """(picture, [left, top, right, bottom] of its ink in pixels, name of the font), as a level of `read` draws it."""
    lines = text.split("\n")
    face = draws.pick(faces_for(text.replace("\n", "")))
    wide, high = size[0] - 6, int((size[1] - 6) / (1 if len(lines) == 1 else 2.4))
    slanted = level == 4 and draws.chance(0.5)
    if slanted:
        wide, high = int(0.9 * wide), int(0.75 * high)
    largest = min(fitting_size(face, line, wide, high) for line in lines)
    # The pictures of evaluation are among the narrow ones: what fills them is small in most of those of training.
    smaller = level in (2, 3) and not draws.held_out and draws.chance(0.5)
    smallest = int(0.8 * largest) if level == 0 else max(LEAST_SIZE, int((0.25 if smaller else 0.5) * largest))
    points = draws.between(min(smallest, largest), largest)
    masks = [text_mask(face, line, points) for line in lines]
    gap = max(3, points // 3)
    mask = masks[0]
    if len(masks) > 1:
        mask = Image.new("L", (max(m.width for m in masks), sum(m.height for m in masks) + gap * (len(masks) - 1)))
        top = 0
        for one in masks:
            mask.paste(one, (0, top))
            top += one.height + gap
    if slanted:
        mask = mask.rotate(draws.between(-6, 6), Image.Resampling.BICUBIC, expand=True)
        mask = mask.crop(mask.getbbox())
    mask = mask.crop((0, 0, min(mask.width, size[0] - 2), min(mask.height, size[1] - 2)))
    x, y = draws.between(1, size[0] - mask.width - 1), draws.between(1, size[1] - mask.height - 1)
    ink, ground = ink_and_ground(draws, dark_ink=level == 0)
    picture = Image.new("RGB", size, ground)
    picture.paste(ink, (x, y), mask)
    if level == 4:
        picture = add_noise(draws, picture, 14)
    return picture, [x, y, x + mask.width, y + mask.height], face.name
