"""Calls of agents and actions on screens, against other writings of the rules on 500 random cases each."""

import functools
import json
import random

import pytest

from qwen2vl.agents.function_calls import Call, render_call
from qwen2vl.errors import Qwen2VLError
from qwen2vl.evaluation.calls import Matched, match_aitz, match_calls, read_calls


def test_calls_match_by_function_and_by_argument():
    """Equal arguments are equal JSON with sorted keys and all numbers as floats."""
    rng, seen = random.Random(0), []
    values = [
        1,
        1.0,
        True,
        False,
        None,
        "1",
        "a",
        [1, 2],
        (1, 2),
        [1.0, 2],
        {"x": 1},
        {"x": 1.0},
        {"x": True},
        [],
        {},
        0,
    ]

    def canonical(value):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, (list, tuple)):
            return [canonical(one) for one in value]
        return {key: canonical(one) for key, one in value.items()} if isinstance(value, dict) else value

    def drawn():
        keys = rng.sample(("city", "day"), rng.randint(0, 2))
        return Call(rng.choice(("go", "stop")), {key: rng.choice(values) for key in keys})

    for _ in range(2000):
        wanted = [drawn() for _ in range(rng.randint(0, 2))]
        found = [rng.choice((call, call, call, drawn())) for call in wanted] + [drawn()] * (rng.random() < 0.1)
        found = [Call(call.name, {k: rng.choice((v, v, v, 1)) for k, v in call.arguments.items()}) for call in found]
        kinds = [call.name for call in found] == [call.name for call in wanted]
        texts = [json.dumps([canonical(call.arguments) for call in calls], sort_keys=True) for calls in (found, wanted)]
        got = match_calls(found, wanted)
        assert got == Matched(kinds, kinds and texts[0] == texts[1]), (found, wanted)
        seen.append((got.type_match, got.exact_match))
    assert min(map(seen.count, ((0, 0), (1, 0), (1, 1)))) > 200 and (0, 1) not in seen
    assert match_calls([], []) == Matched(1, 1) and match_calls([], [Call("go")]) == Matched(0, 0)
    with pytest.raises(Qwen2VLError, match="found: wants calls"):
        match_calls(["go"], [])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("style", ["qwen", "paper"])
def test_calls_of_an_answer_end_where_results_begin(style):
    call, other = Call("go", {"city": "Oslo"}), Call("stop", {})
    result = {"qwen": "✿RESULT✿", "paper": "*RESULT*"}[style]
    text = "I go. " + render_call(call, style)
    assert read_calls(text, style) == [call] and read_calls("I stay.", style) == []
    assert read_calls(f"{text}\n{result}: invented\n{render_call(other, style)}", style) == [call]
    assert read_calls(text[:-3], style) == []
    with pytest.raises(Qwen2VLError, match="answer: wants a text"):
        read_calls(None, style)  # pyright: ignore[reportArgumentType]


WIDTH, HEIGHT = 260, 580


def alike(a, b):
    @functools.cache
    def common(i, j):
        if not i or not j:
            return 0
        if a[i - 1] == b[j - 1]:
            return common(i - 1, j - 1) + 1
        return max(common(i - 1, j), common(i, j - 1))

    return 2 * common(len(a), len(b)) / (len(a) + len(b)) if a + b else 1


def cells(x1, y1, x2, y2):
    """Where a box lies on a grid of twentieths of a pixel: a side is a range of cells, and areas are counted."""
    return range(round(20 * x1), round(20 * x2)), range(round(20 * y1), round(20 * y2))


def about(x, y, w, h, scale):
    return x - w * scale / 2, y - h * scale / 2, x + w * scale / 2, y + h * scale / 2


def other_box_click(box, touch, elements):
    x1, x2, y1, y2 = (round(v * side / 1000) for v, side in zip(
        (box[0], box[2], box[1], box[3]), (WIDTH, WIDTH, HEIGHT, HEIGHT), strict=True))  # fmt: skip
    grown = about((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, 1.2)
    x, y = int(touch[1] * WIDTH), int(touch[0] * HEIGHT)

    def inside(b):
        return sorted((b[0], x, b[2]))[1] == x and sorted((b[1], y, b[3]))[1] == y

    if inside(grown):
        return True
    for top, left, h, w in elements:
        element = about(left + w / 2, top + h / 2, w, h, 1.2)
        if inside(element):
            (ax, ay), (bx, by) = cells(*grown), cells(*element)
            shared = [len(range(max(a[0], b[0]), min(a[-1], b[-1]) + 1)) if len(a) and len(b) else 0
                      for a, b in ((ax, bx), (ay, by))]  # fmt: skip
            both = shared[0] * shared[1]
            either = max(400, len(ax) * len(ay)) + max(400, len(bx) * len(by)) - both
            if both / either > 0.5:
                return True
    return False


def other_point_click(point, touch, elements):
    px, py, tx, ty = point[0] / 1000, point[1] / 1000, touch[1], touch[0]
    if (px - tx) ** 2 + (py - ty) ** 2 <= 0.14**2:
        return True
    for top, left, h, w in elements:
        low_x, low_y = max(0, (left - 0.7 * w) / WIDTH), max(0, (top - 0.7 * h) / HEIGHT)
        high_x, high_y = low_x + min(1, 2.4 * w / WIDTH), low_y + min(1, 2.4 * h / HEIGHT)
        if low_x <= min(px, tx) and max(px, tx) <= high_x and low_y <= min(py, ty) and max(py, ty) <= high_y:
            return True
    return False


def test_aitz_clicks():
    rng, seen = random.Random(1), []
    for n in range(1500):
        elements = []
        for _ in range(rng.randint(0, 4)):
            wide, tall = 5 * rng.randint(0, 24), 5 * rng.randint(0, 24)
            elements.append([rng.randint(0, HEIGHT - tall), rng.randint(0, WIDTH - wide), tall, wide])
        if elements and rng.random() < 0.8:
            top, left, tall, wide = rng.choice(elements)
            touch = [(top + rng.random() * tall) / HEIGHT, (left + rng.random() * wide) / WIDTH]
            where = (left + rng.gauss(0, wide / 8)) / WIDTH, (top + rng.gauss(0, tall / 8)) / HEIGHT
            size = (wide * rng.uniform(0.2, 1.2) / WIDTH, tall * rng.uniform(0.2, 1.2) / HEIGHT)
        else:
            touch, where, size = [rng.random(), rng.random()], (rng.random(), rng.random()), (0.2, 0.1)
        x, y = (min(max(int(1000 * v), 0), 900) for v in where)
        step = {"coat_action_desc": "click on it", "result_touch_yx": touch, "ui_positions": elements}
        if n % 2:
            step = {**step, "result_touch_yx": json.dumps(touch), "ui_positions": json.dumps(elements)}
            call = Call("Tap", {"point": (x, y)})
            wanted = other_point_click((x, y), touch, elements)
        else:
            box = [x, y, x + int(1000 * size[0]), y + int(1000 * size[1])]
            call, wanted = Call("CLICK", {"bbox": box}), other_box_click([*box], touch, elements)
        assert match_aitz(call, step, width=WIDTH, height=HEIGHT) == Matched(1, wanted), (call, step)
        seen.append((n % 2, wanted))
    assert min(map(seen.count, ((0, False), (0, True), (1, False), (1, True)))) > 100


def test_aitz_compares_a_click_with_its_touch_and_not_with_a_corner():
    step = {"coat_action_desc": "click on it", "result_touch_yx": [0.5, 0.5], "ui_positions": []}
    for box, wanted in (([450, 450, 550, 550], 1), ([0, 0, 60, 60], 0), (None, 0), ([1, 2, 3], 0), ("x", 0)):
        arguments = {} if box is None else {"bbox": box}
        assert match_aitz(Call("click", arguments), step, width=WIDTH, height=HEIGHT) == Matched(1, wanted)
    assert match_aitz(Call("tap", {"point": "(520,500)"}), step, width=WIDTH, height=HEIGHT) == Matched(1, 1)
    assert match_aitz(Call("tap", {"point": (0, 0)}), step, width=WIDTH, height=HEIGHT) == Matched(1, 0)


def test_aitz_texts():
    rng, seen = random.Random(2), []
    for _ in range(500):
        wanted = "".join(rng.choices("abc ", k=rng.randint(0, 12)))
        text = "".join(rng.choice((c, c, c, c, c, "", "x")) for c in wanted) + rng.choice(("", "", "b"))
        right = text in wanted or wanted in text or alike(text, wanted) > 0.8
        step = {"coat_action_desc": 'input text "..."', "result_action_text": wanted}
        assert match_aitz(Call("input", {"text": text}), step, width=9, height=9) == Matched(1, right), (text, wanted)
        seen.append((right, text in wanted or wanted in text))
    assert min(map(seen.count, ((False, False), (True, False), (True, True)))) > 50


@pytest.mark.parametrize(
    ("step", "call", "wanted"),
    [
        ("scroll up", Call("scroll", {"direction": "up"}), (1, 1)),
        ("scroll up", Call("SCROLL", {"direction": "down"}), (1, 0)),
        ("scroll up", Call("scroll_up"), (1, 0)),
        ("scroll up", Call("click", {"bbox": [0, 0, 9, 9]}), (0, 0)),
        ("press the home button", Call("press_home"), (1, 1)),
        ("press the back button", Call("PRESS", {"button": "BACK"}), (1, 1)),
        ("press enter", Call("press_back"), (1, 0)),
        ("press enter", Call("press", {}), (1, 0)),
        ("stop and set the query as completed", Call("STOP"), (1, 1)),
        ("stop and set the query as completed", Call("finish"), (0, 0)),
        ("stop and set the query as completed", None, (0, 0)),
        ("input text", Call("type", {"text": 5}), (1, 0)),
        ("input text", Call("type"), (1, 1)),  # the published script takes an empty text for any
        ("click it", Call("type", {"text": "x"}), (0, 0)),
    ],
)
def test_aitz_kinds(step, call, wanted):
    given = {"coat_action_desc": step, "result_action_text": "hello", "result_touch_yx": [0.5, 0.5], "ui_positions": []}
    assert match_aitz(call, given, width=WIDTH, height=HEIGHT) == Matched(*wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"coat_action_desc": "wave at it"}, "coat_action_desc: wants a first word"),
        ({"coat_action_desc": None}, "coat_action_desc: wants a text"),
        ({"coat_action_desc": "scroll"}, "wants a direction"),
        ({"coat_action_desc": "press it"}, "wants enter, back or home"),
        ({"result_touch_yx": "[0.5]"}, "result_touch_yx: wants 2 numbers"),
        ({"result_touch_yx": None}, "result_touch_yx: wants a list"),
        ({"ui_positions": "[[1, 2, 3]]"}, r"ui_positions\[0\]: wants 4 numbers"),
        ({"coat_action_desc": "input text"}, "result_action_text: wants a text"),
    ],
)
def test_a_step_that_lacks_something_is_named_whatever_was_answered(change, message):
    step = {"coat_action_desc": "click it", "result_touch_yx": [0.5, 0.5], "ui_positions": []} | change
    for call in (None, Call("stop"), Call("click", {"bbox": [0, 0, 999, 999]})):
        with pytest.raises(Qwen2VLError, match=message):
            match_aitz(call, step, width=WIDTH, height=HEIGHT)
    with pytest.raises(Qwen2VLError, match="height: wants a finite number"):
        match_aitz(None, step, width=WIDTH, height=0)
