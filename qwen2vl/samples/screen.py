"""A game of small screens with buttons and fields: an environment for agents, and samples of it played well.

The model sees a screenshot and an instruction, taps and types by function calls in the paper's form, and gets a
screenshot back for each. The environment is a state and drawing alone: no window, no time, nothing random after it is
made.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw

from ..agents.actions import Action, declare_actions
from ..agents.function_calls import Call, Result, Step, check_call, render_turn
from ..agents.grounding import parse_point, to_pixels, to_thousandths
from ..errors import FunctionCallError, GroundingError
from .lettering import is_held_out, random_characters, random_word, text_mask, typefaces
from .sample import Draws, Sample, to_ppm
from .shapes import Colour
from .words import SCREEN

TAP = Action(
    "Tap",
    "Tap the screen at a point.",
    [{"name": "point", "description": "(x,y) in thousandths of the screen", "required": True}],
)
TYPE = Action(
    "Type",
    "Type a text into the field that was tapped.",
    [{"name": "text", "description": "what to type", "required": True}],
)
ACTIONS: tuple[Action, ...] = (TAP, TYPE)
#: The system prompt of an episode.
SYSTEM = declare_actions(ACTIONS, "paper")

#: None of them is held out, so that training and evaluation differ in layout, order and what is typed.
_LABELS = """
    OK Yes No Save Open Close Send Edit Back Next Help Play Stop Print Copy Paste Undo Redo Find New Add Start Home
    Share Mail Call Sign Exit Zoom Mute More Less Sort Cut
"""
_MENUS = "Menu File View Tools Setup Admin Extra Pages"
LABELS = tuple(label for label in _LABELS.split() if not is_held_out(label))
MENUS = tuple(label for label in _MENUS.split() if not is_held_out(label))
_PALE: tuple[Colour, ...] = ((238, 238, 240), (226, 232, 240), (240, 234, 222))
_BUTTONS: tuple[Colour, ...] = ((40, 84, 170), (36, 110, 70), (120, 50, 120), (150, 60, 30), (70, 74, 82))


@dataclass(frozen=True)
class Control:
    """What can be tapped: a button, or a field to type into.

    Attributes:
        label: on the button; a field has none.
        box: left, top, and behind the right and last pixel.
        opens: the screen that a tap leads to, or None.
    """

    kind: str
    label: str
    box: tuple[int, int, int, int]
    opens: int | None = None

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


@dataclass(frozen=True)
class Task:
    """One thing to do: tap the control of that label ("" is the field), or type that text."""

    kind: str
    text: str

    def words(self, language: str) -> str:
        name = "field" if self.kind == "tap" and not self.text else self.kind
        return SCREEN[language][name].replace("{}", self.text)


@dataclass
class ScreenGame:
    """One episode, an environment for :func:`~qwen2vl.agents.loop.run_agent`, made by :func:`make_game`; equal games go
    alike.

    `done` when everything was done in its order, or a control was tapped, or a text typed, that was not the next one:
    then `success` is False. A tap beside all controls changes nothing, as does typing where no field was tapped.

    Attributes:
        screens: the controls of every screen; the first one is shown first.
        tasks: what the instruction asks for, in order.
        actions: what `execute` takes.
    """

    screens: tuple[tuple[Control, ...], ...]
    tasks: tuple[Task, ...]
    size: tuple[int, int]
    language: str
    ground: Colour
    paint: Colour
    letters: tuple[int, int]  # which of the typefaces, and its size
    actions: tuple[Action, ...] = ACTIONS
    shown: int = 0
    step: int = 0
    done: bool = False
    success: bool = False
    focused: bool = False
    typed: str = ""
    pressed: list[tuple[int, str]] = field(default_factory=list)

    @property
    def instruction(self) -> str:
        """All sentences; the tap into a field goes without saying."""
        said = [task.words(self.language) for task in self.tasks if task.kind == "type" or task.text]
        return ("" if self.language == "zh" else " ").join(said)

    def reset(self) -> list[dict[str, Any]]:
        """Begin, or begin again. Returns the user's turn: the screenshot, and the instruction."""
        self.shown, self.step, self.done, self.success = 0, 0, False, False
        self.focused, self.typed, self.pressed = False, "", []
        return [{"type": "image", "image": self.draw()}, {"type": "text", "text": self.instruction}]

    def execute(self, call: Call) -> Result:
        """What the call leads to: the next screenshot.

        Raises:
            FunctionCallError: an action that is not declared, arguments that it does not take, or the game is over.
        """
        if self.done:
            raise FunctionCallError(f"{call.name}: the task is over, no more actions are taken")
        check_call(call, self.actions)
        if call.name == TAP.name:
            try:
                point = parse_point(call.arguments["point"])
            except GroundingError as error:
                raise FunctionCallError(f"{call.name}: {error}") from None
            self._tap(*to_pixels(point, *self.size))
        else:
            text = call.arguments["text"]
            if not isinstance(text, str):
                raise FunctionCallError(f"{call.name}: text wants a str, got {type(text).__name__}")
            if self.focused:
                self.typed += text
                self._did(Task("type", self.typed))
        return Result([{"type": "image", "image": self.draw()}])

    def _tap(self, x: float, y: float) -> None:
        hit = [c for c in self.screens[self.shown] if c.box[0] <= x < c.box[2] and c.box[1] <= y < c.box[3]]
        for control in hit:
            self.focused = control.kind == "field"
            self.pressed.append((self.shown, control.label))
            self._did(Task("tap", control.label))
            if control.opens is not None and not (self.done and not self.success):
                self.shown = control.opens

    def _did(self, task: Task) -> None:
        if task == self.tasks[self.step]:
            self.step += 1
            self.done = self.success = self.step == len(self.tasks)
        else:
            self.done = True

    def next_call(self) -> Call:
        """What a player who does everything right does next."""
        task = self.tasks[self.step]
        if task.kind == "type":
            return Call(TYPE.name, {"text": task.text})
        control = next(c for c in self.screens[self.shown] if c.label == task.text)
        return Call(TAP.name, {"point": to_thousandths(*control.centre, *self.size)})

    def draw(self) -> Image.Image:
        """The screen as it is now, RGB."""
        image = Image.new("RGB", self.size, self.ground)
        draw = ImageDraw.Draw(image)
        for control in self.screens[self.shown]:
            left, top, right, bottom = control.box
            inside = (left, top, right - 1, bottom - 1)
            if control.kind == "field":
                edge = self.paint if self.focused else (150, 150, 156)
                draw.rectangle(inside, fill=(255, 255, 255), outline=edge, width=2)
                if self.typed.strip():
                    mask = _letters(*self.letters, self.typed[:40])
                    image.paste((10, 10, 10), (left + 5, (top + bottom - mask.height) // 2), mask)
                continue
            # What was tapped stays light, with dark letters.
            tapped = (self.shown, control.label) in self.pressed
            fill, ink = ((255, 255, 255), self.paint) if tapped else (self.paint, (255, 255, 255))
            draw.rounded_rectangle(inside, radius=4, fill=fill, outline=self.paint)
            mask = _letters(*self.letters, control.label)
            image.paste(ink, ((left + right - mask.width) // 2, (top + bottom - mask.height) // 2), mask)
        return image


@lru_cache(maxsize=4096)
def _letters(face: int, size: int, text: str) -> Image.Image:
    return text_mask(typefaces()[face], text, size)


def make_game(draws: Draws, level: int, language: str) -> ScreenGame:
    """A game of a difficulty, see :func:`screen`."""
    count, columns, tasks = ((2, 1, 1), (draws.between(3, 4), 2, 1), (draws.between(3, 5), 2, 2))[min(level, 2)]
    if level <= 1:
        size = (84, 84) if level == 0 else (112, draws.pick((84, 112)))
    else:
        size = draws.size((3, 4), (4, 5)) if level < 4 else draws.size((4, 5), (4, 6))
    labels = draws.some(LABELS, count)
    todo = [Task("tap", label) for label in draws.some(labels, tasks)]
    if level < 3:
        screens = (_layout(draws, labels, size, columns),)
    elif level == 3:
        menu = draws.pick(MENUS)
        first = _layout(draws, [*labels[:2], menu], size, columns, opens=menu)
        screens = (first, _layout(draws, labels[2:] + draws.some(MENUS, 1), size, columns))
        todo = [Task("tap", menu), Task("tap", draws.pick(labels[2:]))]
    else:
        text = (
            random_word(draws, 6) if draws.chance(0.3) else random_characters(draws, string.digits, draws.between(1, 4))
        )
        todo = [Task("tap", ""), Task("type", text), Task("tap", draws.pick(labels))]
        screens = (_layout(draws, labels, size, columns, with_field=True),)
    faces = [n for n, face in enumerate(typefaces()) if face.path is None or face.vietnamese]
    return ScreenGame(
        screens,
        tuple(todo),
        size,
        language,
        draws.pick(_PALE),
        draws.pick(_BUTTONS),
        (draws.pick(faces), draws.between(12, 13)),
    )


def _layout(
    draws: Draws,
    labels: Sequence[str],
    size: tuple[int, int],
    columns: int,
    *,
    opens: str | None = None,
    with_field: bool = False,
) -> tuple[Control, ...]:
    """Controls in cells of equal size, in a random order, each anywhere inside of its own."""
    top = size[1] // 4 + 4 if with_field else 0
    rows = -(-len(labels) // columns)
    wide, high = size[0] // columns, (size[1] - top) // rows
    controls = []
    if with_field:
        controls.append(Control("field", "", (4, 4, size[0] - draws.between(4, 16), 4 + draws.between(20, 24))))
    cells = draws.some(range(rows * columns), len(labels))
    for label, cell in zip(labels, cells, strict=True):
        w, h = draws.between(max(46, wide * 3 // 4), wide - 4), draws.between(18, min(high - 4, 30))
        x = wide * (cell % columns) + draws.between(2, wide - w - 2)
        y = top + high * (cell // columns) + draws.between(2, high - h - 2)
        controls.append(Control("button", label, (x, y, x + w, y + h), 1 if label == opens else None))
    return tuple(controls)


def screen(draws: Draws, level: int) -> Sample:
    """Games of buttons, played to their end without a mistake, with a screenshot after every action.

    0 two buttons, one to tap, 84 x 84; 1 three or four; 2 two of three to five, in the order of the instruction; 3 a
    menu and then a button of the screen that it opens; 4 a text to type into a field, and a button.

    The assistant's one turn holds thoughts, calls and results in the paper's form; `answer` is all of it, with
    `<image>` for the screenshots. For an episode of a model's own play, `make_game` with the same draws.
    """
    language = draws.language()
    game = make_game(draws, level, language)
    start, _ = game.reset()
    pictures = [start["image"]]
    steps: list[Step] = []
    while not game.done:
        call = game.next_call()
        steps += [game.tasks[game.step].words(language), call]
        steps.append(result := game.execute(call))
        pictures += _images(result)
    steps.append(SCREEN[language]["done"])
    names = [f"{n}.ppm" for n in range(len(pictures))]
    turn = "".join(item.get("text", "<image>") for item in render_turn(steps, "paper"))
    record = {
        "messages": [
            {"role": "user", "content": f"<image>{game.instruction}"},
            {"role": "assistant", "content": turn},
        ],
        "system": SYSTEM,
        "agent": "paper",
        "images": names,
    }
    scene = {
        "controls": [[{"label": c.label, "kind": c.kind, "box": list(c.box)} for c in one] for one in game.screens],
        "tasks": [[task.kind, task.text] for task in game.tasks],
    }
    members = dict(zip(names, map(to_ppm, pictures), strict=True))
    return Sample(record, members, turn, language, game.size, scene=scene)


def _images(result: Result) -> list[Image.Image]:
    items: Sequence[Mapping[str, Any]] = () if isinstance(result.content, str) else result.content
    return [item["image"] for item in items if "image" in item]
