"""The action space of an agent: what may be called, and the system prompt that says so, in the paper's form and in
Qwen-Agent's. `function_calls.py` has the calls themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from ..errors import FunctionCallError
from ..prompt.chatml import DEFAULT_SYSTEM_PROMPT

Style = Literal["paper", "qwen"]
STYLES: tuple[Style, ...] = ("paper", "qwen")


@dataclass(frozen=True)
class Keywords:
    """The words that mark calls and results, and what stands before the second one."""

    function: str
    args: str
    result: str
    back: str
    before_args: str

    @property
    def all(self) -> tuple[str, str, str, str]:
        return self.function, self.args, self.result, self.back

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Any of them."""
        return re.compile("(" + "|".join(map(re.escape, self.all)) + ")")


_KEYWORDS = {
    "paper": Keywords("*FUNCTION*", "*ARGS*", "*RESULT*", "*RETURN*", " "),
    "qwen": Keywords("✿FUNCTION✿", "✿ARGS✿", "✿RESULT✿", "✿RETURN✿", "\n"),
}


def keywords(style: str) -> Keywords:
    """The words of one form. Raises FunctionCallError for an unknown one."""
    if not isinstance(style, str) or style not in _KEYWORDS:
        raise FunctionCallError(f"style: wants one of {list(_KEYWORDS)}, got {style!r}")
    return _KEYWORDS[style]


@dataclass(frozen=True)
class Action:
    """An action that a model may take.

    Attributes:
        name: what the model calls it.
        description: what it does.
        parameters: the paper's list `[{"name": ..., "description": ..., "required": bool}, ...]`, or a JSON schema
            `{"type": "object", "properties": {...}, "required": [...]}`; anything JSON can hold is written as it is.
        title: its name for people, by default `name`.

    Raises:
        FunctionCallError: the name is empty, spans lines, begins or ends with a space, or holds a keyword.
    """

    name: str
    description: str
    parameters: Any = field(default_factory=list)
    title: str | None = None

    def __post_init__(self):
        check_name(self.name)

    @classmethod
    def from_dict(cls, data: Any) -> Action:
        """From `{"name", "description", "parameters"}`, Qwen-Agent's `name_for_model` and `name_for_human` and OpenAI's
        `{"type": "function", "function": {...}}` included. Raises FunctionCallError."""
        if isinstance(data, Mapping) and isinstance(data.get("function"), Mapping):
            data = data["function"]
        if not isinstance(data, Mapping):
            raise FunctionCallError(f"action: wants an object, got {type(data).__name__}")
        name = data.get("name_for_model", data.get("name"))
        description = data.get("description", "")
        title = data.get("name_for_human")
        for key, value in (("name", name), ("description", description), ("name_for_human", title or "")):
            if not isinstance(value, str):
                raise FunctionCallError(f"action.{key}: wants a str, got {type(value).__name__}")
        return cls(str(name), description, data.get("parameters", []), title)


def stop_words(style: Style) -> tuple[str, str]:
    """The words at which generation stops for the runtime to take over: RESULT and RETURN."""
    words = keywords(style)
    return words.result, words.back


# What the models were trained with, word for word: it is part of the format. Order: function, args, result, return.
_QWEN_TOOLS = {
    "en": "# Tools\n\n## You have access to the following tools:\n\n{tools}\n\n",
    "zh": "# 工具\n\n## 你拥有如下工具：\n\n{tools}\n\n",
}
_QWEN_TOOL = {
    "en": "### {title}\n\n{name}: {description} Parameters: {parameters} Format the arguments as a JSON object.",
    "zh": "### {title}\n\n{name}: {description} 输入参数：{parameters} 此工具的输入应为JSON对象。",
}
_QWEN_ONE = {
    "en": (
        "## When you need to call a tool, please insert the following command in your reply, "
        "which can be called zero or multiple times according to your needs:\n\n",
        "The tool to use, should be one of [{names}]",
        "The input of the tool",
        "Tool results",
        "Reply based on tool results. Images need to be rendered as ![](url)",
    ),
    "zh": (
        "## 你可以在回复中插入零次、一次或多次以下命令以调用工具：\n\n",
        "工具名称，必须是[{names}]之一。",
        "工具输入",
        "工具结果",
        "根据工具结果进行回复，需将图片用![](url)渲染出来",
    ),
}
_QWEN_MANY = {
    "en": (
        "## Insert the following command in your reply when you need to call N tools in parallel:\n\n",
        "The name of tool {n}",
        ", should be one of [{names}]",
        "The input of tool {n}",
        "The result of tool {n}",
        "Reply based on tool results. Images need to be rendered as ![](url)",
    ),
    "zh": (
        "## 你可以在回复中插入以下命令以并行调用N个工具：\n\n",
        "工具{n}的名称",
        "，必须是[{names}]之一",
        "工具{n}的输入",
        "工具{n}的结果",
        "根据工具结果进行回复，需将图片用![](url)渲染出来",
    ),
}


def declare_actions(
    actions: Sequence[Action],
    style: Style = "qwen",
    *,
    language: Literal["en", "zh"] = "en",
    parallel: bool = False,
    system: str = DEFAULT_SYSTEM_PROMPT,
) -> str:
    """The system prompt that says which actions there are and how to take them.

    Args:
        actions: at least one.
        language, parallel: of Qwen-Agent's text; the paper shows one in English, for one call at a time. Its
            placeholder for the names is filled with `[Tap, Home]`.
        system: what stands before it, "" for nothing.

    Raises:
        FunctionCallError: no action, two of one name, parameters that JSON cannot hold, an unknown style or language.
    """
    words = keywords(style)
    names = [action.name for action in actions]
    if not names or len(set(names)) < len(names):
        raise FunctionCallError(f"actions: wants at least one and every name once, got {names}")
    if language not in _QWEN_TOOLS or (style == "paper" and (language != "en" or parallel)):
        raise FunctionCallError(f"language, parallel: the {style} form has no {language!r}, parallel={parallel}")
    if style == "paper":
        lines = [*([system] if system else []), "# Actions", "## You have the following actions."]
        for action in actions:
            lines.append(f"### {action.title or action.name}")
            lines.append(f"{action.name}: {action.description} Parameters: {to_json(action.parameters)}")
        lines += [
            "## Continuously take action until the task is completed.",
            f"{words.function}: The action to take, should be one of [{', '.join(names)}].",
            f"{words.args}: The input of the action.",
            f"{words.result}: Action results.",
            f"{words.back}: Reply based on action results.",
        ]
        return "\n".join(lines)

    tools = "\n\n".join(
        _QWEN_TOOL[language].format(
            title=action.title or action.name,
            name=action.name,
            description=action.description,
            parameters=to_json(action.parameters),
        )
        for action in actions
    )
    listed = ",".join(names)
    if parallel:
        head, name, one_of, args, result, back = _QWEN_MANY[language]
        numbers = ("1", "2", "N")
        calls = []
        for n in numbers:
            choice = one_of.format(names=listed) if n == "1" else ""
            calls.append(f"{words.function}: {name.format(n=n)}{choice}\n{words.args}: {args.format(n=n)}\n")
        results = [f"{words.result}: {result.format(n=n)}\n" for n in numbers]
        body = "".join([*calls[:2], "...\n", calls[2], *results[:2], "...\n", results[2]]) + f"{words.back}: {back}"
    else:
        head, name, args, result, back = _QWEN_ONE[language]
        texts = zip((words.function, words.args, words.result, words.back), (name, args, result, back), strict=True)
        body = "\n".join(f"{word}: {text}" for word, text in texts).format(names=listed)
    before = f"{system}\n\n" if system else ""
    return before + _QWEN_TOOLS[language].format(tools=tools) + head + body


def check_name(name: object) -> None:
    """Raise FunctionCallError for what cannot be the name of an action."""
    good = isinstance(name, str) and name and name == name.strip() and len(name.splitlines()) == 1
    if not good or any(words.pattern.search(str(name)) for words in _KEYWORDS.values()):
        raise FunctionCallError(f"name: wants one line without keywords or spaces around it, got {name!r}")


def to_json(value: Any) -> str:
    """JSON on one line. Raises FunctionCallError for what JSON cannot hold."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise FunctionCallError(f"JSON cannot hold {value!r}: {error}") from None
