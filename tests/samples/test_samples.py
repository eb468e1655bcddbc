"""Samples of every skill and difficulty: repeatable, readable, apart from held-out ones, true to their pictures."""

import hashlib
import io
import itertools
import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwen2vl.agents.grounding import Box, Quad, parse_grounding
from qwen2vl.errors import DataError
from qwen2vl.samples import LEVELS, SKILLS, generate, play
from qwen2vl.samples.draws import is_held_out_size
from qwen2vl.samples.fonts import faces_for, typefaces
from qwen2vl.samples.questions import QUESTIONS
from qwen2vl.samples.skills import DATA_VERSION
from qwen2vl.samples.source import read_sample
from qwen2vl.samples.vocabulary import ENGLISH, VIETNAMESE, is_held_out
from qwen2vl.samples.words import COLOURS, DIRECTIONS, EVENTS, LANGUAGES, SHAPES, event_sentence, thing_name

ROOT = Path(__file__).parents[2]
EVERY = [(skill, level) for skill in SKILLS for level in LEVELS]


def pictures(sample):
    return [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int) for data in sample.members.values()]


def many(skill, level, count=60, **options):
    return [generate(skill, level, index=n, **options) for n in range(count)]


def likely_things(pixels):
    """(H, W) bool: what differs from the ground, which is what is commonest along the edge, by more than noise."""
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.abs(pixels - np.median(edge, 0)).max(-1) > 24


def components(mask):
    """Boxes (left, top, right, bottom) of the connected parts of a mask; a part of under 12 pixels is noise."""
    left, found = {tuple(place) for place in np.argwhere(mask).tolist()}, []
    while left:
        todo = [left.pop()]
        part = list(todo)
        while todo:
            y, x = todo.pop()
            for near in itertools.product((y - 1, y, y + 1), (x - 1, x, x + 1)):
                if near in left:
                    left.remove(near)
                    todo.append(near)
                    part.append(near)
        if len(part) >= 12:
            ys, xs = [y for y, _ in part], [x for _, x in part]
            found.append((min(xs), min(ys), max(xs) + 1, max(ys) + 1))
    return found


def object_pixels(pixels, colour, share=0.5):
    """Those with more than such a share of the colour and the rest of the ground's."""
    ground = np.median(np.concatenate([pixels[0], pixels[-1]]), 0)
    way = np.array(COLOURS[colour]) - ground
    return (pixels - ground) @ way / (way @ way) > share


def holds_exactly(box, pixels, colour, near=0):
    """Whether the box holds all pixels of the colour within so many of it, and each side has one; half a share is both
    or neither."""
    left, top, right, bottom = box
    window = np.zeros(pixels.shape[:2], bool)
    window[max(0, top - near) : bottom + near, max(0, left - near) : right + near] = True
    surely, perhaps = (box_of(window & object_pixels(pixels, colour, share)) for share in (0.52, 0.48))
    return all(
        a >= b >= c if n < 2 else a <= b <= c for n, (a, b, c) in enumerate(zip(surely, box, perhaps, strict=True))
    )


def box_of(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


# ---- repeatable, and apart ----


@pytest.mark.parametrize(("skill", "level"), EVERY)
def test_equal_numbers_give_equal_samples_and_others_differ(skill, level):
    first, again = generate(skill, level, seed=[3, 1], index=7), generate(skill, level, seed=[3, 1], index=7)
    assert first == again and (first.skill, first.difficulty, first.index) == (skill, level, 7)
    for other in ({"seed": [3, 2]}, {"index": 8}, {"split": "held-out"}):
        assert generate(skill, level, **{"seed": [3, 1], "index": 7, **other}).members != first.members


def test_samples_are_the_same_in_another_process():
    code = (
        "import hashlib, json\nfrom qwen2vl.samples import SKILLS, generate\n"
        "for skill in SKILLS:\n"
        "    s = generate(skill, 3, seed=4, index=5)\n"
        "    print(hashlib.sha256(json.dumps(s.record).encode() + b''.join(s.members.values())).hexdigest())\n"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
                       env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert runs[0] == runs[1] and len(set(runs[0].split())) == len(SKILLS)


def test_without_matplotlib_pillows_font_does_and_says_so():
    code = (
        "import sys\nsys.modules['matplotlib'] = None\n"
        "from qwen2vl.samples import LEVELS, SKILLS, generate, play\n"
        "samples = [generate(s, n, index=i) for s in SKILLS for n in LEVELS for i in range(15)]\n"
        "assert all(s.answer.isascii() and s.scene['font'] == 'Aileron' for s in samples if s.skill == 'read')\n"
        "assert play(4, split='train').reset()[0]['image'].size[0] > 56\n"
    )
    environment = {"PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("matplotlib's fonts are not there") == 1


def test_what_numbers_lead_to_stays_what_this_version_says():
    """Whoever changes it changes DATA_VERSION, and this, too. Of pictures, whose pixels are Pillow's, only the plan."""
    digest = hashlib.sha256()
    for skill in SKILLS:
        for sample in [generate(skill, level, seed=2, index=n) for level in LEVELS for n in range(5)]:
            plan = {key: value for key, value in sample.scene.items() if key not in ("box", "boxes", "font", "corners")}
            # Where letters are is the fonts' doing, and so is the answer that says it.
            by_font = bool({"boxes", "corners"} & sample.scene.keys())
            said = {**sample.record, "messages": sample.record["messages"][: 1 if by_font else None]}
            digest.update(json.dumps([said, sample.size, plan]).encode())
    assert (DATA_VERSION, digest.hexdigest()[:16]) == (3, "b3cac5d60df8acb9")


def texts_of(sample):
    """What is to be read, compared, found or typed, line by line."""
    scene = sample.scene
    typed = [text for kind, text in scene.get("tasks", []) if kind == "type"]
    texts = [*scene.get("texts", []), *([scene["text"]] if "text" in scene else []), *typed]
    return [line for text in texts for line in text.split("\n")]


def test_training_never_shows_what_is_held_out():
    sides = {}
    for split in ("train", "held-out"):
        samples = [s for skill, level in EVERY for s in many(skill, level, 60, split=split)]
        texts = {text for sample in samples for text in texts_of(sample) if len(text) > 1}
        assert {is_held_out(text) for text in texts} == {split == "held-out"}
        sides[split] = (texts, {data for sample in samples for data in sample.members.values()})
    assert len(sides["train"][0]) > 200 and len(sides["held-out"][0]) > 100
    assert not sides["train"][0] & sides["held-out"][0]
    shared = sides["train"][1] & sides["held-out"][1]  # pictures of nothing at all, where the count is 0
    assert all(len(set(data.split(b"255\n", 1)[1][n::3])) == 1 for data in shared for n in range(3))
    held = sum(map(is_held_out, (*ENGLISH, *VIETNAMESE))) / len((*ENGLISH, *VIETNAMESE))
    assert 0.06 < held < 0.2


@pytest.mark.parametrize("skill", ["read", "colour_shape", "count", "compare", "point"])
def test_some_sizes_are_for_evaluation_alone(skill):
    for split in ("train", "held-out"):
        sizes = {sample.size for sample in many(skill, 4, split=split)}
        units = {(height // 28, width // 28) for width, height in sizes}
        assert {is_held_out_size(*unit) for unit in units} == {split == "held-out"}
        assert len(units) > 1


@pytest.mark.parametrize(("skill", "level"), [("read", 2), ("read", 3), ("colour_shape", 3)])
def test_training_has_sizes_around_those_of_evaluation(skill, level):
    """Of one or two sizes a model learns by heart where things are."""
    units = {}
    for split in ("train", "held-out"):
        units[split] = {(s.size[1] // 28, s.size[0] // 28) for s in many(skill, level, 60, split=split)}
    assert units["held-out"] == {(2, 4)} and len(units["train"]) >= 5
    assert {(2, 3), (2, 5), (3, 4)} <= units["train"] and all(rows * columns <= 32 for rows, columns in units["train"])


def test_training_has_smaller_letters_than_evaluation():
    height = {}
    for split in ("train", "held-out"):
        boxes = [sample.scene["box"] for sample in many("read", 2, 60, split=split)]
        height[split] = np.quantile([box[3] - box[1] for box in boxes], 0.1)
    assert height["train"] < 0.8 * height["held-out"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"skill": "sing"}, r"skill: wants one of 'read', .* got 'sing'"),
        ({"difficulty": 5}, r"difficulty: wants one of 0, 1, 2, 3, 4, got 5"),
        ({"difficulty": True}, r"difficulty: "),
        ({"split": "test"}, r"split: wants one of 'train', 'held-out'"),
        ({"seed": -1}, r"seed, index: want whole numbers"),
        ({"index": -3}, r"seed, index: want whole numbers"),
        ({"index": "3"}, r"seed, index: want whole numbers"),
        ({"seed": "12"}, r"seed, index: want whole numbers"),
        ({"seed": 1.5}, r"seed, index: want whole numbers"),
        ({"languages": "en"}, r"languages: wants a list of some of 'en', .*, got 'en'"),
        ({"languages": []}, r"languages: wants a list"),
        ({"languages": ["en", "fr"]}, r"languages: wants a list"),
        ({"languages": ["en", "en"]}, r"languages: wants a list"),
        ({"difficulty": 1.0}, r"difficulty: wants one of"),
    ],
)
def test_arguments_that_name_no_sample(change, match):
    with pytest.raises(DataError, match=match):
        generate(**{"skill": "read", "difficulty": 0, **change})


# ---- languages ----


def test_all_languages_come_in_their_proportions():
    counts = Counter(sample.language for skill in SKILLS for sample in many(skill, 0, 300))
    for language, share in LANGUAGES.items():
        assert abs(100 * counts[language] / counts.total() - share) < 4, (language, counts)


def test_languages_of_choice():
    samples = [s for skill in SKILLS for s in many(skill, 3, 40, languages=("zh", "en"))]
    assert {sample.language for sample in samples} == {"en", "zh"}
    assert all(text.isascii() for sample in samples for text in texts_of(sample))  # no Vietnamese word
    games = {play(1, index=n, languages=["ko"]).language for n in range(5)}
    assert games == {"ko"}
    again = generate("read", 3, index=5, languages=tuple(LANGUAGES))
    assert again == generate("read", 3, index=5)


def test_every_name_and_question_is_there_in_every_language():
    for wordings in QUESTIONS.values():
        assert set(wordings) == set(LANGUAGES)
        holes = {form.count("{}") for forms in wordings.values() for form in forms}
        assert len(holes) == 1, wordings  # asked about something in all languages or in none
    for language in LANGUAGES:
        things = {thing_name(colour, shape, language) for colour in COLOURS for shape in SHAPES}
        assert len(things) == len(COLOURS) * len(SHAPES)
        sentences = {event_sentence(e, "red", shape, language) for e in EVENTS for shape in SHAPES}
        assert len(sentences) == len(EVENTS) * len(SHAPES)


def test_grammar_that_depends_on_the_noun():
    assert event_sentence("left", "orange", "circle", "en").startswith("An orange circle ")
    assert "별이" in event_sentence("up", "red", "star", "ko") and "하트가" in event_sentence(
        "up", "red", "heart", "ko"
    )
    assert event_sentence("up", "red", "star", "ar").startswith("تتحرك نجمة حمراء")
    assert event_sentence("up", "red", "square", "ar").startswith("يتحرك مربع أحمر")


# ---- true to the pictures ----


@pytest.mark.parametrize("level", LEVELS)
def test_text_is_ink_inside_of_the_picture(level):
    for sample in many("read", level):
        assert sample.answer == sample.scene["text"]
        (pixels,) = pictures(sample)
        left, top, right, bottom = sample.scene["box"]
        assert 1 <= left < right < sample.size[0] and 1 <= top < bottom < sample.size[1]
        noise = 2 * 14 if level == 4 else 0
        ground = np.median(pixels.reshape(-1, 3), 0) if level else np.median(pixels[[0, -1]].reshape(-1, 3), 0)
        edges = np.concatenate([pixels[[0, -1]].reshape(-1, 3), pixels[:, [0, -1]].reshape(-1, 3)])
        assert np.abs(edges - ground).max() <= noise + 1, "ink at the edge"
        ink = np.abs(pixels - ground).max(-1) > 60
        assert ink[top:bottom, left:right].mean() > 0.04 and not np.delete(ink, range(top, bottom), 0).any()
        assert bottom - top >= 5 and right - left >= len(max(sample.answer.split("\n"), key=len)) * 3


def test_texts_differ_and_come_in_many_fonts():
    samples = many("read", 4, 200)
    assert len({sample.answer for sample in samples}) > 150
    assert {sample.scene["font"] for sample in samples} == {face.name for face in typefaces()}
    assert any(not sample.answer.isascii() for sample in samples) == any(face.vietnamese for face in typefaces())
    assert all(face.vietnamese for face in faces_for("phở"))


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_counts_are_those_of_connected_parts(level):
    numbers = set()
    for sample in many("count", level):
        (pixels,) = pictures(sample)
        found = components(likely_things(pixels))
        assert len(found) == len(sample.scene["things"])
        assert sample.answer == str(sample.scene["number"])
        if level < 3:
            assert len(found) == int(sample.answer)
        numbers.add(int(sample.answer))
    assert numbers == (set(range(6)) if level else {1, 2, 3})


@pytest.mark.parametrize("level", [3, 4])
def test_what_is_asked_for_is_counted_and_nothing_else(level):
    for sample in many("count", level, 100):
        if sample.language != "en":
            continue
        asked = sample.record["messages"][0]["content"].replace("<image>", "")
        words = {colour for colour in COLOURS if colour in asked} | {s for s in SHAPES if s in asked}
        fit = [t for t in sample.scene["things"] if words <= {t["colour"], t["shape"]} and words]
        assert len(fit) == int(sample.answer), (asked, sample.scene)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_colours_named_are_those_painted(level):
    for sample in many("colour_shape", level):
        (pixels,) = pictures(sample)
        (thing,) = sample.scene["things"]
        centre = pixels[int((thing["box"][1] + thing["box"][3]) / 2), int((thing["box"][0] + thing["box"][2]) / 2)]
        assert tuple(centre) == COLOURS[thing["colour"]]
        if sample.language == "en":
            wanted = (thing["colour"], thing["shape"], f"{thing['colour']} {thing['shape']}")[level]
            assert sample.answer == wanted


def test_descriptions_go_from_left_to_right():
    for sample in many("colour_shape", 3):
        things = sorted(sample.scene["things"], key=lambda t: t["box"][0])
        names = [thing_name(t["colour"], t["shape"], sample.language) for t in things]
        places = [sample.answer.index(name) for name in names]
        assert places == sorted(places) and 2 <= len(names) <= 3


@pytest.mark.parametrize("level", [0, 1, 2])
def test_boxes_hold_exactly_the_pixels_of_their_things(level):
    for sample in many("point", level):
        (pixels,) = pictures(sample)
        (place,) = sample.places
        assert parse_grounding(sample.answer, strict=True) == [place]
        assert len(place.places) == len(sample.scene["found"])
        for box, thing in zip(place.places, sample.scene["found"], strict=True):
            assert holds_exactly(thing["box"], pixels, thing["colour"], near=1)
            assert box == Box.from_pixels(*thing["box"], width=sample.size[0], height=sample.size[1])


def test_boxes_of_texts_hold_their_ink_and_no_other():
    numbers = set()
    for sample in many("point", 3, 120):
        (pixels,) = pictures(sample)
        boxes = sample.scene["boxes"]
        at = sample.scene["texts"].index(sample.scene["text"])
        ((box,),) = [place.places for place in sample.places]
        assert box == Box.from_pixels(*boxes[at], width=sample.size[0], height=sample.size[1])
        assert parse_grounding(sample.answer, strict=True) == list(sample.places)
        ink = np.abs(pixels - np.median(pixels.reshape(-1, 3), 0)).max(-1) > 70
        for left, top, right, bottom in boxes:
            inside = ink[top:bottom, left:right]
            assert all(edge.any() for edge in (inside[:2], inside[-2:], inside[:, :2], inside[:, -2:]))
            ink[top:bottom, left:right] = False
        assert not ink.any()  # of nothing that has no box
        numbers.add(len(boxes))
    assert numbers == {1, 2, 3}


def test_texts_have_at_most_six_characters():
    lengths = {len(text) for skill in ("read", "point") for s in many(skill, 3, 200) for text in texts_of(s)}
    assert lengths == {1, 2, 3, 4, 5, 6}


def test_quads_hold_the_ink_of_slanted_text():
    found = [sample for sample in many("point", 4, 120) if "corners" in sample.scene]
    assert len(found) > 20
    for sample in found:
        (pixels,) = pictures(sample)
        ((quad,),) = [place.places for place in sample.places]
        assert isinstance(quad, Quad) and parse_grounding(sample.answer, strict=True) == list(sample.places)
        corners = np.array(quad.to_pixels(width=sample.size[0], height=sample.size[1]))
        ink = np.argwhere(np.abs(pixels - np.median(pixels.reshape(-1, 3), 0)).max(-1) > 70)[:, ::-1] + 0.5
        assert len(ink)
        for a, b in zip(corners, np.roll(corners, -1, 0), strict=True):  # inside of all four sides, to 1.5 pixels
            side = (b - a) / math.dist(a, b)
            away = side[0] * (ink - a)[:, 1] - side[1] * (ink - a)[:, 0]
            assert away.min() > -1.5 and away.min() < 3


def test_compared_pictures_are_as_the_answer_says():
    for level in (0, 1, 2, 4):
        answers = Counter()
        for sample in many("compare", level, 300 if level == 4 else 150):
            if sample.language != "en":
                continue
            asked, scene = sample.scene["asked"], sample.scene
            if asked in ("colour", "shape"):
                a, b = scene["things"]
                assert sample.answer == ("yes" if a[asked] == b[asked] else "no")
            elif asked == "difference":
                a, b = scene["things"]
                differ = [key for key in ("colour", "shape") if a[key] != b[key]]
                assert sample.answer == (" and ".join(differ) or "nothing")
            elif asked == "text":
                assert sample.answer == ("yes" if scene["texts"][0] == scene["texts"][1] else "no")
            if "things" in scene:
                for pixels, thing in zip(pictures(sample), scene["things"], strict=True):
                    assert holds_exactly(thing["box"], pixels, thing["colour"], near=99)
            answers[sample.answer] += 1
        assert len(answers) == (2, 2, 4, 0, 9)[level] and (level == 4 or min(answers.values()) >= 5)


def test_the_picture_with_more_has_more():
    answers = Counter()
    for sample in many("compare", 3, 100):
        first, second = (len(components(likely_things(pixels))) for pixels in pictures(sample))
        assert [first, second] == sample.scene["numbers"]
        if sample.language == "en":
            assert sample.answer == ("the first" if first > second else "the second" if second > first else "equal")
            answers[sample.answer] += 1
    assert len(answers) == 3


@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_events_are_what_the_frames_show(level):
    """From the frames alone: where the thing's centre goes, how large it is, when it is there."""
    events = Counter()
    for sample in many("video", level, 120):
        frames = [object_pixels(p, next(t for t in sample.scene["things"] if t)["colour"]) for p in pictures(sample)]
        assert len(frames) % 2 == 0 and len({frame.shape for frame in frames}) == 1
        sizes = [int(frame.sum()) for frame in frames]
        there = [size > 20 for size in sizes]
        if not all(there):
            event = "appear" if there[-1] else "disappear"
            assert len(list(itertools.groupby(there))) == 2
        else:
            centres = np.array([np.argwhere(frame).mean(0)[::-1] for frame in frames])
            (dx, dy), ratio = centres[-1] - centres[0], sizes[-1] / sizes[0]
            if ratio > 2 or ratio < 0.5:
                event = "grow" if ratio > 1 else "shrink"
            elif max(abs(dx), abs(dy)) < 0.5:
                event = "still"
            else:
                event = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
                assert min(abs(dx), abs(dy)) < 0.5
        assert event == sample.scene["event"]
        events[event] += 1
    wanted = ("left", "right") if level == 0 else tuple(DIRECTIONS) if level < 3 else EVENTS
    assert set(events) == set(wanted)


def test_others_in_a_clip_stand_still():
    seen = 0
    for sample in many("video", 4, 30):
        for other in sample.scene["others"]:
            seen += 1
            left, top, right, bottom = other["box"]
            parts = np.stack([p[top:bottom, left:right] for p in pictures(sample)])
            assert np.ptp(parts, 0).max() <= 12  # noise of 6 each way
    assert seen > 10


# ---- as training reads them ----


@pytest.mark.parametrize(("skill", "level"), EVERY)
def test_the_reader_takes_every_sample(skill, level):
    for sample in many(skill, level, 12):
        json.dumps(sample.scene)
        messages = read_sample(sample)
        assert messages[-1]["role"] == "assistant"
        media = [item for message in messages for item in message["content"] if "text" not in item]
        given = [item.get("image", item.get("video")) for item in media if isinstance(item, dict)]
        flat = [data for source in given for data in (source if isinstance(source, list) else [source])]
        assert [pixels.tolist() for pixels in flat] == [pixels.tolist() for pixels in pictures(sample)]
        taught = "".join(i["text"] for i in messages[-1]["content"] if "text" in i and i.get("loss", True))
        if skill != "screen":
            assert taught == sample.answer
