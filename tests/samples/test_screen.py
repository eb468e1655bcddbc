"""The screen game: played well, badly and by calls that say nothing; and its samples as agents' turns."""

import io

import numpy as np
import pytest
from PIL import Image

from qwen2vl.agents.function_calls import Call, Result, parse_turn, render_turn
from qwen2vl.agents.grounding import to_thousandths
from qwen2vl.errors import DataError, FunctionCallError
from qwen2vl.samples import LEVELS, generate, play
from qwen2vl.samples.screen_game import ACTIONS, LABELS, MENUS
from qwen2vl.samples.source import read_sample


def tap(game, label):
    control = next(c for c in game.screens[game.shown] if c.label == label)
    return Call("Tap", {"point": to_thousandths(*control.centre, *game.size)})


def image_of(result):
    (item,) = result.content
    assert item["type"] == "image"
    return item["image"]


@pytest.mark.parametrize("level", LEVELS)
def test_a_player_who_does_all_right_succeeds(level):
    steps = {0: 1, 1: 1, 2: 2, 3: 2, 4: 3}[level]
    for index in range(40):
        game = play(level, index=index)
        start, said = game.reset()
        assert isinstance(start["image"], Image.Image) and start["image"].size == game.size
        shown = [start["image"]]
        for _ in range(steps):
            assert not game.done and not game.success
            shown.append(image_of(game.execute(game.next_call())))
        assert game.done and game.success
        assert all(np.any(np.asarray(a) != np.asarray(b)) for a, b in zip(shown, shown[1:], strict=False))
        assert all(text in said["text"] for _, text in [(t.kind, t.text) for t in game.tasks])


def test_games_are_equal_from_equal_numbers_and_after_reset():
    first, again, other = play(3, seed=1, index=4), play(3, seed=1, index=4), play(3, seed=1, index=5)
    assert first == again and first != other
    before, said = first.reset()
    while not first.done:
        first.execute(first.next_call())
    after, repeated = first.reset()
    assert repeated == said and np.array_equal(after["image"], before["image"])
    assert first == again


def test_controls_lie_inside_apart_and_hold_their_labels():
    for level in LEVELS:
        for index in range(40):
            game = play(level, index=index)
            for controls in game.screens:
                labels = [c.label for c in controls]
                assert len(set(labels)) == len(labels)
                for n, control in enumerate(controls):
                    left, top, right, bottom = control.box
                    assert 0 <= left < right <= game.size[0] and 0 <= top < bottom <= game.size[1]
                    for other in controls[n + 1 :]:
                        a, b, c, d = other.box
                        assert c <= left or right <= a or d <= top or bottom <= b


def test_labels_are_wholly_drawn_on_their_buttons():
    """No letter's ink within two pixels of a button's left and right end."""
    for index in range(60):
        game = play(1, index=index)
        pixels = np.asarray(game.reset()[0]["image"]).astype(int)
        for left, top, right, bottom in (c.box for c in game.screens[0]):
            inside = np.abs(pixels[top + 4 : bottom - 4, left + 1 : right - 1] - np.array(game.paint)).max(-1) > 40
            assert inside.any() and not inside[:, :2].any() and not inside[:, -2:].any()


def test_a_wrong_button_ends_the_game_without_success():
    game = play(1, index=2)
    game.reset()
    wrong = next(c.label for c in game.screens[0] if c.label != game.tasks[0].text)
    game.execute(tap(game, wrong))
    assert game.done and not game.success
    with pytest.raises(FunctionCallError, match="the task is over"):
        game.execute(tap(game, wrong))


def test_the_order_matters():
    game = play(2, index=3)
    game.reset()
    game.execute(tap(game, game.tasks[1].text))
    assert game.done and not game.success


def test_a_tap_beside_everything_changes_nothing():
    game = play(0, index=1)
    start = game.reset()[0]["image"]
    free = next(
        (x, y)
        for y in range(1, 1000, 7)
        for x in range(1, 1000, 7)
        if not any(
            c.box[0] - 1 <= x * game.size[0] / 1000 <= c.box[2] and c.box[1] - 1 <= y * game.size[1] / 1000 <= c.box[3]
            for c in game.screens[0]
        )
    )
    assert np.array_equal(image_of(game.execute(Call("Tap", {"point": free}))), start)
    assert not game.done


def test_typing():
    game = play(4, index=5)
    start = game.reset()[0]["image"]
    assert np.array_equal(image_of(game.execute(Call("Type", {"text": "7"}))), start), "no field was tapped"
    game.execute(tap(game, ""))
    game.execute(Call("Type", {"text": "   \u4e2d nothing like it"}))
    assert game.done and not game.success


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (Call("Swipe", {}), "no action 'Swipe'"),
        (Call("Tap", {}), "lacks the arguments"),
        (Call("Tap", {"point": (1, 2), "force": 3}), "has no arguments"),
        (Call("Tap", {"point": "here"}), "point: wants one"),
        (Call("Tap", {"point": [1, 2, 3]}), "point: wants one"),
        (Call("Type", {"text": 3}), "text wants a str, got int"),
    ],
)
def test_calls_that_are_refused_change_nothing(call, match):
    game = play(4, index=0)
    game.reset()
    with pytest.raises(FunctionCallError, match=match):
        game.execute(call)
    assert game == play(4, index=0)


def test_a_game_of_no_level():
    with pytest.raises(DataError, match="difficulty: wants one of"):
        play(9)


def test_no_label_is_a_held_out_text_and_there_are_many():
    assert len(LABELS) > 25 and len(MENUS) > 4 and not set(LABELS) & set(MENUS)


@pytest.mark.parametrize("level", LEVELS)
def test_samples_are_turns_that_parse_back_and_replay(level):
    for index in range(20):
        sample = generate("screen", level, index=index, split="held-out")
        game = play(level, index=index)
        said = game.reset()[1]["text"]
        assert sample.record["messages"][0]["content"] == f"<image>{said}"
        steps = parse_turn(sample.answer, "paper", ACTIONS)
        calls = [step for step in steps if isinstance(step, Call)]
        for call in calls:
            game.execute(call)
        assert game.success
        assert [type(step) for step in steps] == [*[str, Call, Result] * len(calls), str]
        assert len(sample.members) == len(calls) + 1


def test_screenshots_are_in_the_turn_and_nothing_of_the_runtime_is_taught():
    sample = generate("screen", 4, index=3)
    system, user, assistant = read_sample(sample)
    assert "*FUNCTION*" in system["content"] and user["role"] == "user"
    taught = "".join(i["text"] for i in assistant["content"] if "text" in i and i.get("loss", True))
    shown = [item for item in assistant["content"] if "image" in item]
    screenshots = [Image.open(io.BytesIO(data)) for data in sample.members.values()]
    assert all(np.array_equal(item["image"], one) for item, one in zip(shown, screenshots[1:], strict=True))
    assert all(item["loss"] is False for item in shown)
    assert taught.count("*RESULT*") == len(shown) and "*RETURN*" not in taught and taught.count("*ARGS*") == len(shown)
    steps = [s if not isinstance(s, Result) else Result() for s in parse_turn(sample.answer, "paper")]
    again = "".join(i["text"] for i in render_turn(steps, "paper") if i.get("loss", True))
    assert taught.replace(": ", "").split() == again.replace(": ", "").split()
