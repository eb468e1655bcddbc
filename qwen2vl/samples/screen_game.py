"""A game of small screens with buttons and fields: an environment for agents.

The model sees a screenshot and an instruction, taps and types by function calls in the paper's form, and gets a
screenshot back for each call. The environment is a state and a way to draw it: it opens no window, knows no time, and
draws nothing at random once it is made.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw

from ..agents.actions import Action, declare_actions
from ..agents.function_calls import Call, Result, check_call
from ..agents.grounding import parse_point, to_pixels, to_thousandths
from ..errors import FunctionCallError, GroundingError
from .draws import Draws
from .fonts import text_mask, typefaces
from .questions import SCREEN
from .shapes import Colour
from .texts import random_characters, random_word
from .vocabulary import is_held_out

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

# Labels that are held out are left out, so that training and evaluation have the same buttons, and differ in layout,
# order and what is typed.
_LABELS = """
    OK Yes No Save Open Close Send Edit Back Next Help Play Stop Print Copy Paste Undo Redo Find New Add Start Home
    Share Mail Call Sign Exit Zoom Mute More Less Sort Cut
"""
_MENUS = "Menu File View Tools Setup Admin Extra Pages"
LABELS = tuple(label for label in _LABELS.split() if not is_held_out(label))
MENUS = tuple(label for label in _MENUS.split() if not is_held_out(label))
#: Colours of a screen's ground, and of its buttons.
PALE: tuple[Colour, ...] = ((238, 238, 240), (226, 232, 240), (240, 234, 222))
PAINTS: tuple[Colour, ...] = ((40, 84, 170), (36, 110, 70), (120, 50, 120), (150, 60, 30), (70, 74, 82))


@dataclass(frozen=True)
class Control:
    """What can be tapped: a button, or a field to type into.

    Attributes:
        kind: "button" or "field".
        label: what is written on the button; "" for a field.
        box: (left, top, right, bottom) in pixels; right and bottom lie behind the last pixel.
        opens: the number of the screen that a tap leads to, or None.
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
    """One thing to do: `kind` "tap" on the control whose label is `text` ("" is the field), or `kind` "type"."""

    kind: str
    text: str

    def words(self, language: str) -> str:
        """The sentence that asks for it."""
        name = "field" if self.kind == "tap" and not self.text else self.kind
        return SCREEN[language][name].replace("{}", self.text)


@dataclass
class ScreenGame:
    """One episode, an environment for :func:`~qwen2vl.agents.loop.run_agent`, made by :func:`make_game`.

    The game is `done` with `success` when all tasks were done in their order, and `done` without it as soon as a
    control is tapped, or a text is typed, that is not the next one. A tap beside all controls changes nothing, nor does
    typing while no field is focused. Equal games go alike.

    Attributes:
        screens: the controls of every screen; the first screen is shown first.
        tasks: what the instruction asks for, in order.
        size: (width, height) of a screenshot in pixels.
        ground, paint: the colours of the background and of the controls.
        letters: which of the typefaces labels are written in, and its size in pixels.
        actions: what `execute` takes.
        shown, step: the number of the screen that is shown, and of the next task.
        focused, typed: whether the field was tapped, and what was typed into it so far.
        pressed: (screen, label) of every control that was tapped.
    """

    screens: tuple[tuple[Control, ...], ...]
    tasks: tuple[Task, ...]
    size: tuple[int, int]
    language: str
    ground: Colour
    paint: Colour
    letters: tuple[int, int]
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
        """The sentences of all tasks, but for the tap into a field, which typing a text implies."""
        said = [task.words(self.language) for task in self.tasks if task.kind == "type" or task.text]
        return ("" if self.language == "zh" else " ").join(said)

    def reset(self) -> list[dict[str, Any]]:
        """Begin, or begin again. Returns the content of the user's turn: the screenshot and the instruction."""
        self.shown, self.step, self.done, self.success = 0, 0, False, False
        self.focused, self.typed, self.pressed = False, "", []
        return [{"type": "image", "image": self.draw()}, {"type": "text", "text": self.instruction}]

    def execute(self, call: Call) -> Result:
        """Carry out a call. Returns the next screenshot.

        Raises:
            FunctionCallError: the action is not declared, does not take these arguments, or the game is over.
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
        """The call that a player without mistakes makes next."""
        task = self.tasks[self.step]
        if task.kind == "type":
            return Call(TYPE.name, {"text": task.text})
        control = next(c for c in self.screens[self.shown] if c.label == task.text)
        return Call(TAP.name, {"point": to_thousandths(*control.centre, *self.size)})

    def draw(self) -> Image.Image:
        """The screen as it is now, an RGB image of `size`."""
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
            # A button that was tapped stays light, with dark letters.
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
    """A game of a difficulty; :func:`qwen2vl.samples.playing.screen` says what each level holds."""
    count, columns, tasks = ((2, 1, 1), (draws.between(3, 4), 2, 1), (draws.between(3, 5), 2, 2))[min(level, 2)]
    if level <= 1:
        size = (84, 84) if level == 0 else (112, draws.pick((84, 112)))
    else:
        size = draws.size((3, 4), (4, 5)) if level < 4 else draws.size((4, 5), (4, 6))
    labels = draws.some(LABELS, count)
    todo = [Task("tap", label) for label in draws.some(labels, tasks)]
    if level < 3:
        screens = (layout(draws, labels, size, columns),)
    elif level == 3:
        menu = draws.pick(MENUS)
        first = layout(draws, [*labels[:2], menu], size, columns, opens=menu)
        screens = (first, layout(draws, labels[2:] + draws.some(MENUS, 1), size, columns))
        todo = [Task("tap", menu), Task("tap", draws.pick(labels[2:]))]
    else:
        text = (
            random_word(draws, 6) if draws.chance(0.3) else random_characters(draws, string.digits, draws.between(1, 4))
        )
        todo = [Task("tap", ""), Task("type", text), Task("tap", draws.pick(labels))]
        screens = (layout(draws, labels, size, columns, with_field=True),)
    faces = [n for n, face in enumerate(typefaces()) if face.path is None or face.vietnamese]
    return ScreenGame(
        screens,
        tuple(todo),
        size,
        language,
        draws.pick(PALE),
        draws.pick(PAINTS),
        (draws.pick(faces), draws.between(12, 13)),
    )


def layout(
    draws: Draws,
    labels: Sequence[str],
    size: tuple[int, int],
    columns: int,
    *,
    opens: str | None = None,
    with_field: bool = False,
) -> tuple[Control, ...]:
    """The controls of a screen, each at a random place in a cell of its own; the cells are of equal size."""
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
