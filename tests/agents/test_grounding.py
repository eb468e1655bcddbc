"""Grounding markup: exact writing, reading of what models write, scales, the other model's pixels, drawing."""

import io
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from qwen2vl.agents.grounding import (
    Box,
    Grounded,
    Quad,
    draw_grounding,
    from_absolute,
    from_qwen25,
    from_qwen_vl,
    parse_grounding,
    parse_point,
    render_grounding,
    strip_grounding,
    to_absolute,
    to_pixels,
    to_qwen25,
    to_thousandths,
)
from qwen2vl.errors import GroundingError, MediaError
from qwen2vl.media.image import load_image, preprocess_image, smart_resize
from qwen2vl.prompt.tokenizer import GROUNDING_TOKENS
from tests.media.media_fixtures import encode_image, noise

CAT = "<|object_ref_start|>the cat<|object_ref_end|>"
BOX = "<|box_start|>(1,2),(30,40)<|box_end|>"
QUAD = "<|quad_start|>(1,2),(30,4),(31,40),(0,41)<|quad_end|>"

coordinates = st.integers(0, 999)
points = st.tuples(coordinates, coordinates)
boxes = st.builds(lambda a, b: Box.from_points([a, b]), points, points)
quads = st.lists(points, min_size=4, max_size=4).map(lambda corners: Quad(tuple(corners)))
phrases = st.text(max_size=8).filter(lambda text: not any(marker in text for marker in GROUNDING_TOKENS))
grounded = st.builds(Grounded, phrases, st.lists(boxes | quads, max_size=3).map(tuple))
sides = st.integers(1, 5000)


def test_the_papers_form():
    assert render_grounding(Grounded("the cat", (Box(1, 2, 30, 40),))) == CAT + BOX
    assert render_grounding([Grounded("the cat"), Grounded(None, (Quad(((1, 2), (30, 4), (31, 40), (0, 41))),))]) == (
        CAT + QUAD
    )
    # The paper's example, with its space before the last marker.
    eyes = "<|object_ref_start|>the eyes on a giraffe<|object_ref_end|><|box_start|>(176,106),(232,160) <|box_end|>"
    assert parse_grounding(eyes) == parse_grounding(eyes, strict=True)
    assert parse_grounding(eyes) == [Grounded("the eyes on a giraffe", (Box(176, 106, 232, 160),))]


@settings(max_examples=200, deadline=None)
@given(st.lists(grounded, max_size=4))
def test_written_and_read_back(items):
    assert parse_grounding(render_grounding(items)) == items
    assert parse_grounding(render_grounding(items), strict=True) == items


@settings(max_examples=100, deadline=None)
@given(st.lists(grounded, min_size=1, max_size=3), st.sampled_from(["", " ", "\n"]), st.sampled_from([" and ", "."]))
def test_spaces_inside_and_prose_between(items, space, prose):
    def loosen(text):
        head, *places = text.split("<|object_ref_end|>")
        spaced = "".join(places).replace("(", f"({space}").replace(",", f"{space},{space}").replace(")", f"{space})")
        return f"{head}<|object_ref_end|>{space}" + spaced.replace("_end|>", f"_end|>{space}")

    text = prose.join(loosen(render_grounding(item)) for item in items)
    assert parse_grounding(text) == items
    assert parse_grounding(text, strict=True) == items


def test_places_without_a_phrase_stand_alone():
    box = Box(1, 2, 30, 40)
    assert parse_grounding(f"It is at {BOX}{BOX}, or {BOX}") == [Grounded(None, (box, box)), Grounded(None, (box,))]
    assert parse_grounding(f"{CAT} is at {BOX}") == [Grounded("the cat"), Grounded(None, (box,))]
    assert strip_grounding(f"See {CAT}{BOX} there{QUAD}.") == "See the cat there."


@pytest.mark.parametrize(
    ("text", "found", "refused"),
    [
        ("<|box_start|>(30,40),(1,2)<|box_end|>", [Grounded(None, (Box(1, 2, 30, 40),))], "x1 <= x2"),
        (
            "<|box_start|>(1,2),(1000,2040)<|box_end|>",
            [Grounded(None, (Box(1, 2, 999, 999),))],
            r"\[0, 1000\), got 1000",
        ),
        ("<|box_start|>(-5,1.6),(30,39.5)<|box_end|>", [Grounded(None, (Box(0, 2, 30, 40),))], "wants 2 points"),
        ("<|box_start|>(1,2),(30,40),(1,2),(30,40)<|box_end|>", [Grounded(None, (Box(1, 2, 30, 40),) * 2)], "2 points"),
        ("<|box_start|>(1,2)<|box_end|>", [], "wants 2 points"),
        ("<|box_start|>(1,2),(30,40)", [], r"<\|box_start\|> at character 0 wants a <\|box_end\|> next"),
        ("x<|box_end|>", [], "at character 1 wants its opening marker before it"),
        ("<|quad_start|>(1,2),(3,4)<|quad_end|>", [], "wants 4 points"),
        (f"{CAT}<|box_start|>(1,<|box_start|>(1,2),(30,40)<|box_end|>", None, "at character 45"),
        ("<|object_ref_start|>a", [], "wants a <"),
        (f"<|box_start|>(1,2),({'9' * 9000},4)<|box_end|>", [], "wants 2 points"),
    ],
)
def test_slips_are_mended_or_left_out_and_strict_refuses_them(text, found, refused):
    if found is not None:
        assert parse_grounding(text) == found
    with pytest.raises(GroundingError, match=refused):
        parse_grounding(text, strict=True)


def test_a_cut_group_does_not_take_its_neighbour_along():
    text = f"{CAT}<|box_start|>(1,<|box_start|>(1,2),(30,40)<|box_end|>"
    assert parse_grounding(text) == [Grounded("the cat"), Grounded(None, (Box(1, 2, 30, 40),))]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([*GROUNDING_TOKENS, "(1,2)", ",", "(3,4)", "(9e9,1)", "cat", " ", "("]), max_size=12))
def test_any_text_is_read_and_read_again(pieces):
    """What was found, written and read back, is the same."""
    found = parse_grounding("".join(pieces))
    assert parse_grounding("".join(render_grounding(item) + "." for item in found)) == found


def exact_thousandth(pixels, size):
    """Half up, by exact fractions."""
    value = Fraction(pixels) * 1000 / size + Fraction(1, 2)
    return max(0, min(999, value.numerator // value.denominator))


@settings(max_examples=200, deadline=None)
@given(st.integers(-50, 5100), st.integers(-50, 5100), sides, sides)
def test_pixels_to_thousandths(x, y, width, height):
    got = to_thousandths(x, y, width, height)
    assert got == (exact_thousandth(x, width), exact_thousandth(y, height))
    if 0 <= x <= width and got[0] < 999:
        assert abs(to_pixels(got, width, height)[0] - x) <= width / 2000 + 1e-9


@settings(max_examples=200, deadline=None)
@given(boxes, quads, sides, sides)
def test_pixels_give_the_thousandths_back(box, quad, width, height):
    size = {"width": width, "height": height}
    assert Box.from_pixels(*box.to_pixels(**size), **size) == box
    assert Quad.from_pixels(quad.to_pixels(**size), **size) == quad


def test_what_lies_outside_is_drawn_to_the_edge():
    assert Box.from_pixels(-10, -1, 700, 480, width=640, height=480) == Box(0, 0, 999, 999)
    assert Box.from_pixels(64, 240, 32, 48, width=640, height=480) == Box(50, 100, 100, 500)


@settings(max_examples=150, deadline=None)
@given(boxes, quads, st.integers(28, 3000), st.integers(28, 3000), st.sampled_from([12_845_056, 1280 * 784]))
def test_absolute_pixels_come_back(box, quad, height, width, most):
    assume(max(height, width) <= 200 * min(height, width))
    high, wide = smart_resize(height, width, max_pixels=most)
    for place in (box, quad):
        there = to_absolute(place, height, width, max_pixels=most)
        exact = [(Fraction(x * wide, 1000), Fraction(y * high, 1000)) for x, y in place.points]
        assert all(
            abs(a - b) <= Fraction(1, 2) for p, q in zip(there, exact, strict=True) for a, b in zip(p, q, strict=True)
        )
        back = from_absolute(there, height, width, max_pixels=most)
        for (x, y), (u, v) in zip(place.points, back.points, strict=True):
            assert abs(x - u) <= 0.5 + 500 / wide and abs(y - v) <= 0.5 + 500 / high
        if min(high, wide) > 1000:
            assert back == place


def test_qwen25_objects_are_about_the_resized_image():
    """1000 x 500 becomes 1008 x 504."""
    items = [Grounded("cat", (Box(100, 200, 500, 999), Box(0, 0, 10, 10))), Grounded(None, (Box(1, 1, 2, 2),))]
    entries = to_qwen25(items, 500, 1000)
    assert entries[0] == {"bbox_2d": [101, 101, 504, 503], "label": "cat"}
    assert entries[2] == {"bbox_2d": [1, 1, 2, 1]}
    again = from_qwen25(entries, 500, 1000)
    assert [item.phrase for item in again] == ["cat", None]
    assert again[0].places[0] == Box(100, 200, 500, 998)  # 504 pixels tell 1000 heights apart no more
    with pytest.raises(GroundingError, match="bbox_2d holds boxes only"):
        to_qwen25([Grounded(None, (Quad(((0, 0),) * 4),))], 500, 1000)
    with pytest.raises(GroundingError, match=r"entries\[0\].bbox_2d: wants four numbers, got \[1\]"):
        from_qwen25([{"bbox_2d": [1]}], 500, 1000)
    with pytest.raises(GroundingError, match=r"entries\[0\].label: wants a str, got int"):
        from_qwen25([{"bbox_2d": [1, 2, 3, 4], "label": 3}], 500, 1000)
    with pytest.raises(MediaError):
        to_absolute(Box(0, 0, 1, 1), 1, 1000)


def test_qwen_vl_markup():
    old = "<ref>the cat</ref><box>(1,2),(30,40)</box><quad>(1,2),(30,4),(31,40),(0,41)</quad>"
    assert from_qwen_vl(old) == CAT + BOX + QUAD
    assert from_qwen_vl("a < b <bo> <refs>") == "a < b <bo> <refs>"


@pytest.mark.parametrize(
    ("value", "point"),
    [
        ("(348,291)", (348, 291)),
        ("tap ( 3 , 4.6 )!", (3, 5)),
        ((10**400, -(10**400)), (999, 0)),
        ([1, 2], (1, 2)),
        ((1000, -3.0), (999, 0)),
    ],
)
def test_points_of_actions(value, point):
    assert parse_point(value) == point


@pytest.mark.parametrize("value", ["", "(1,2),(3,4)", "1,2", [1], [1, "2"], None, [True, 1], [float("nan"), 1]])
def test_no_point(value):
    with pytest.raises(GroundingError):
        parse_point(value)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Box(0, 0, 1000, 1), "int in"),
        (lambda: Box(0, 0, 1.0, 1), "int in"),
        (lambda: Box(2, 0, 1, 1), "x1 <= x2"),
        (lambda: Quad(((0, 0),) * 3), "4 corners, got 3"),
        (lambda: Quad(((0, -1),) * 4), "got -1"),
        (lambda: render_grounding(Grounded(None)), "neither"),
        (lambda: render_grounding(Grounded("a<|box_end|>")), "must not hold the marker"),
        (lambda: to_thousandths(1, 1, 0, 5), "positive width"),
        (lambda: to_thousandths(float("inf"), 1, 5, 5), "finite"),
        (lambda: from_absolute([(1, 2)], 100, 100), "2 or 4, got 1"),
    ],
)
def test_refusals(make, match):
    with pytest.raises(GroundingError, match=match):
        make()


def test_drawn_places():
    image = Image.new("L", (400, 200))
    items = [
        Grounded("cat", (Box(250, 500, 500, 750),)),
        Grounded(None, (Quad(((0, 0), (990, 0), (990, 980), (0, 980))),)),
    ]
    drawn = draw_grounding(image, items)
    pixels = np.asarray(drawn)
    assert np.asarray(image).max() == 0 and drawn.mode == "RGB"
    assert tuple(pixels[120, 100]) == tuple(pixels[150, 200]) == (0xE6, 0x19, 0x4B)  # left and lower side
    assert tuple(pixels[125, 150]) == (0, 0, 0)  # inside
    assert (pixels[85:100, 100:130] == (0xE6, 0x19, 0x4B)).all(-1).any()  # its label, above
    wide = np.asarray(draw_grounding(image, items, width=7))
    assert tuple(wide[125, 105]) == (0xE6, 0x19, 0x4B) != tuple(pixels[125, 105])
    assert tuple(pixels[100, 0]) == tuple(pixels[196, 200]) == (0x3C, 0xB4, 0x4B)


def _oriented(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return encode_image(noise(80, 120), "JPEG", exif=exif)


FILES = {
    **{f"orientation {number}": _oriented(number) for number in range(1, 9)},
    "transparent": encode_image(noise(80, 120, channels=4)),
    "grey and transparent": encode_image(Image.fromarray(noise(80, 120, channels=4)).convert("LA")),
    "a transparent colour": encode_image(Image.fromarray(noise(80, 120)).quantize(8), transparency=0),
    "16 bits": encode_image(Image.fromarray(noise(80, 120)[..., 0].astype(np.uint16) * 257)),
    "CMYK": encode_image(Image.fromarray(noise(80, 120)).convert("CMYK"), "JPEG"),
}


@pytest.mark.parametrize("name", FILES)
def test_places_are_drawn_on_the_pixels_that_the_model_sees(name, tmp_path):
    data = FILES[name]
    (tmp_path / "picture").write_bytes(data)
    seen = preprocess_image(data)
    height, width = seen.source_size
    box = Box(200, 300, 700, 800)
    left, top, right, bottom = box.to_pixels(width=width, height=height)
    outside, inside = (
        np.s_[: int(top) - 2],
        np.s_[int(top) + 4 : int(bottom) - 4, int(left) + 4 : int(right) - 4],
    )
    for source in (data, tmp_path / "picture", Image.open(io.BytesIO(data))):
        drawn = np.asarray(draw_grounding(source, [Grounded(None, (box,))]))
        assert drawn.shape == (height, width, 3)
        assert tuple(drawn[int(top), int(width * 0.45)]) == (0xE6, 0x19, 0x4B)
        for part in (outside, inside):
            np.testing.assert_array_equal(drawn[part], load_image(data)[part])
    with pytest.raises(MediaError, match="not an image"):
        draw_grounding(b"text, not a picture", [])
