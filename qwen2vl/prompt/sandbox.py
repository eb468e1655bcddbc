"""Where chat templates run: Jinja's sandbox, with a bound on work and output, both of which are counted.

A checkpoint's chat template is a program of whoever made the checkpoint. Before it is compiled its loops and macros get
a step at the start of every round, and what can cost more than its own length in the source (operators, comparisons,
filters, tests, calls) is charged for what it is given before it runs. Attributes are those of messages and of Jinja's
own objects: no function, class or generator has any.
"""

import json
import re
import types
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes, pass_context
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 128 << 10  # characters of a template; released ones have a few thousand
STEPS, STEPS_PER_ITEM = 100_000, 500  # of one rendering; a step is some 2 us
#: That a rendering may write, and the most in a text of it: for each item, and for each character of the messages.
CHARACTERS, CHARACTERS_PER_ITEM, CHARACTERS_PER_GIVEN = 1 << 20, 1000, 8
PARTS, PARTS_PER_ITEM = 100_000, 20  # of one value that is written or compared
_MAX_SIZE = 1000  # widths, precisions and the like
_MAX_BITS = 4096  # of a product or power


class Exhausted(TemplateError):
    """A template does more than it may."""


class _Budget:
    """What is left of one rendering."""

    def __init__(self, items: int, characters: int):
        self.steps = STEPS + STEPS_PER_ITEM * items
        self.parts = PARTS + PARTS_PER_ITEM * items
        self.longest = self.left = CHARACTERS + CHARACTERS_PER_ITEM * items + CHARACTERS_PER_GIVEN * characters

    def spend(self, steps: int = 1, written: int = 0) -> None:
        self.steps -= steps + (written >> 10)
        self.left -= written
        if self.steps < 0:
            raise Exhausted("it takes more steps than it may")
        if self.left < 0:
            raise Exhausted("it writes more than it may")

    def check_length(self, length: int) -> None:
        if length > self.longest:
            raise Exhausted(f"it makes a text or list of {length}, more than it may")

    def touch(self, value: Any) -> Any:
        """Charge for the length of a value, and return it."""
        if isinstance(value, str):
            self.spend(1 + (len(value) >> 10))
        elif isinstance(value, (list, tuple, dict, range)):
            self.spend(1 + (len(value) >> 6))
        return value

    def walk(self, value: Any) -> int:
        """Charge for all that a value holds, and return how many characters that is."""
        if isinstance(value, str):
            self.touch(value)
            return len(value)
        waiting, found, characters = [value], 0, 0
        while waiting:
            one = waiting.pop()
            found += 1
            if isinstance(one, str):
                characters += len(one)
            elif isinstance(one, int):
                characters += one.bit_length() >> 1
            elif isinstance(one, Mapping):
                waiting += one.keys()
                waiting += one.values()
            elif isinstance(one, Namespace):  # shown with what it holds
                waiting += object.__getattribute__(one, "_Namespace__attrs").values()
            elif isinstance(one, (list, tuple, range, *_VIEWS)):
                if len(one) > self.parts:
                    raise Exhausted("it handles a value of more parts than it may")
                waiting += one
            if found + len(waiting) > self.parts:
                raise Exhausted("it handles a value of more parts than it may")
        self.check_length(characters)
        self.spend(1 + found // 8 + (characters >> 10))
        return characters


_VIEWS = tuple(type(view) for view in ({}.keys(), {}.values(), {}.items()))
_BUDGET: ContextVar[_Budget] = ContextVar("budget of a chat template")  # without one nothing can be rendered


@contextmanager
def _budget(given: Any):
    texts = [message["content"] if "role" in message else message.get("text", "") for message in given]
    items = [item.get("text", "") for text in texts if not isinstance(text, str) for item in text]
    count = sum(map(len, (text for text in (*texts, *items) if isinstance(text, str))))
    token = _BUDGET.set(_Budget(len(texts) + len(items), count))
    try:
        yield
    finally:
        _BUDGET.reset(token)


def render(template: Template, messages: Any, **variables: Any) -> str:
    """What a template of :func:`environment` writes. Raises :class:`Exhausted`, or whatever the template raises."""
    with _budget(messages):
        return template.render(messages=messages, **variables)


def compile_template(source: str, literal: Callable[[str], str]) -> Template:
    """The template of a source, with `literal` applied to every text in it.

    Raises:
        TemplateError, or for what Python cannot compile RecursionError, SyntaxError, ValueError or MemoryError.
    """
    if len(source) > MAX_SOURCE:
        raise TemplateError(f"wants at most {MAX_SOURCE} characters, got {len(source)}")
    environment = _Environment()
    tree = _Metered(literal).visit(environment.parse(source))
    return environment.from_string(tree)


#: Filters and tests that look at one value, or pass lists on. All others are charged for all that they are given.
_SHALLOW_FILTERS = {
    "attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map", "reject", "rejectattr",
    "reverse", "select", "selectattr", "slice",
}  # fmt: skip
_SHALLOW_TESTS = {
    "boolean", "callable", "defined", "divisibleby", "even", "false", "float", "integer", "iterable", "mapping", "none",
    "number", "odd", "sequence", "string", "true", "undefined",
}  # fmt: skip
_SIZED = ("batch", "slice", "round", "truncate", "indent")
#: Of prose and HTML, whose cost is hard to tell, and which no prompt is written with.
_WITHOUT = ("urlize", "xmlattr", "wordwrap", "center", "pprint", "filesizeformat", "striptags", "random")
_METHODS: dict[type, set[str]] = {
    str: {
        "capitalize", "casefold", "count", "endswith", "find", "format", "index", "isalnum", "isalpha", "isascii",
        "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip",
        "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip",
        "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper",
    },
    dict: {"copy", "get", "items", "keys", "values"},
    list: {"copy", "count", "index"},
    tuple: {"count", "index"},
    range: {"count", "index"},
}  # fmt: skip
_OPAQUE = (
    type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.GeneratorType, types.CodeType,
    types.FrameType, types.TracebackType, types.ModuleType,
)  # fmt: skip
#: Widths and precisions of formats that are of several digits, or are arguments themselves.
_WIDE = re.compile(r"[0-9]{4}|\*|\{[^}]*\{")


class _Environment(ImmutableSandboxedEnvironment):
    """What transformers gives to templates: https://huggingface.co/docs/transformers/chat_templating_writing."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self):
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation], optimized=False
        )
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _refuse, "strftime_now": _now}
        self.filters["tojson"] = _to_json
        self.filters["sum"] = _sum
        self.filters = {
            name: _charged(name, one, name in _SHALLOW_FILTERS)
            for name, one in self.filters.items()
            if name not in _WITHOUT
        }
        self.tests = {name: _charged(name, one, name in _SHALLOW_TESTS) for name, one in self.tests.items()}
        self.filters |= {_STEP: _step, _WALKED: _walked, _TOUCHED: _touched, _JOINED: _joined}
        self.finalize = _written

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        if not callable(value) or type(obj).__module__.startswith("jinja2."):
            return True
        return any(isinstance(obj, kind) and attr in allowed for kind, allowed in _METHODS.items())

    def getitem(self, obj: Any, argument: Any) -> Any:
        return self.undefined(obj=obj, name=argument) if isinstance(obj, _OPAQUE) else super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        return self.undefined(obj=obj, name=attribute) if isinstance(obj, _OPAQUE) else super().getattr(obj, attribute)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        found = super().wrap_str_format(value)
        if found is not None and (value.__name__ == "format_map" or _WIDE.search(value.__self__)):
            raise Exhausted("it formats with a width that it may not")
        return found

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_operands(_BUDGET.get(), operator, left, right)
        return _BUDGET.get().touch(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        budget.spend()
        for value in (*args, *kwargs.values()):
            budget.touch(value)
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            args = _check_method(budget, owner, name, args)
        elif isinstance(owner, (list, tuple, LoopContext)):
            budget.walk(args)
            budget.walk(owner)
        elif hasattr(__obj, "__wrapped__"):  # str.format
            budget.walk((args, kwargs))
        return budget.touch(super().call(__context, __obj, *args, **kwargs))


def _check_operands(budget: _Budget, sign: str, left: Any, right: Any) -> None:
    """Refuse a result that is too large before it is made."""
    budget.spend()
    if isinstance(left, int) and isinstance(right, int):
        bits = {"**": left.bit_length() * max(right, 0), "*": left.bit_length() + right.bit_length()}.get(sign, 0)
        if bits > _MAX_BITS:
            raise Exhausted("it makes a larger number than it may")
    elif sign == "*":
        for value, times in ((left, right), (right, left)):
            if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                budget.check_length(len(value) * times)
    elif sign == "+" and isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
        budget.check_length(len(left) + len(right))
    elif sign == "%" and isinstance(left, str):
        _check_format(budget, left, right)


def _check_format(budget: _Budget, form: str, values: Any) -> None:
    if _WIDE.search(form):
        raise Exhausted("it formats with a width that it may not")
    budget.check_length(len(form) + budget.walk(values) * form.count("%"))


def _check_method(budget: _Budget, owner: str, name: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    budget.touch(owner)
    if name == "replace":
        _check_replace(budget, owner, *args)
    elif name == "join" and args:
        args = (list(args[0]), *args[1:])
        budget.check_length(budget.walk(args[0]) + len(owner) * len(args[0]))
    return args


def _check_replace(budget: _Budget, text: str, old: Any = "", new: Any = "", *rest: Any) -> None:
    if isinstance(old, str) and isinstance(new, str):
        budget.check_length(len(text) + text.count(old) * len(new))


def _charged(name: str, function: Callable[..., Any], shallow: bool) -> Callable[..., Any]:
    """A filter or test that is paid for first. What it gives in pieces is made at once, so that each piece is paid."""

    @wraps(function)
    def charged(*args: Any, **kwargs: Any) -> Any:
        budget = _BUDGET.get()
        budget.spend()
        first = 1 if args and isinstance(args[0], (Context, Environment, nodes.EvalContext)) else 0
        head, rest = args[:first], list(args[first:])
        if name == "join":
            rest[0] = list(rest[0])
        values = [*rest, *kwargs.values()]
        if shallow:
            for one in values:
                budget.touch(one)
        sizes = [] if shallow else [budget.walk(one) for one in values]
        if name in _SIZED and any(isinstance(one, int) and abs(one) > _MAX_SIZE for one in values[1:]):
            raise Exhausted(f"it asks {name} for more than {_MAX_SIZE}")
        if name == "join":
            budget.check_length(sum(sizes) + sum(sizes[1:]) * len(rest[0]))
        elif name == "indent":
            wide = max((len(one) if isinstance(one, str) else int(one) for one in values[1:]), default=4)
            budget.check_length(sizes[0] + wide * (str(rest[0]).count("\n") + 1))
        elif name == "replace":
            _check_replace(budget, *map(str, rest))
        elif name == "format":
            _check_format(budget, str(rest[0]), values[1:])
        result = function(*head, *rest, **kwargs)
        return budget.touch(list(result) if isinstance(result, types.GeneratorType) else result)

    return charged


# Names of filters that no template can write.
_STEP, _WALKED, _TOUCHED, _JOINED = "a step", "all of it", "its length", "side by side"


def _step(cost: tuple[int, int]) -> None:
    steps, written = cost
    _BUDGET.get().spend(max(1, steps), max(0, written))


def _walked(value: Any) -> Any:
    _BUDGET.get().walk(value)
    return value


def _touched(value: Any) -> Any:
    return _BUDGET.get().touch(value)


def _joined(values: list[Any]) -> str:
    _BUDGET.get().walk(values)
    return "".join(map(str, values))


@pass_context  # so that nothing is written at the time of compiling, when there is no budget
def _written(context: Context, value: Any) -> Any:
    budget = _BUDGET.get()
    budget.spend(1, budget.walk(value))
    return value


class _Metered(NodeTransformer):
    """Puts steps into loops and macros, charges into expressions, and `literal` of it in the place of every text."""

    def __init__(self, literal: Callable[[str], str]):
        self._literal = literal

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:
        return nodes.TemplateData(self._literal(node.data), lineno=node.lineno)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        return nodes.Const(self._literal(node.value), lineno=node.lineno) if isinstance(node.value, str) else node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        if node.test is not None:
            node.test = nodes.And(nodes.Not(_filtered(_cost([node.test]), _STEP, node)), node.test, lineno=node.lineno)
        return self._stepped(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        return self._stepped(node)

    visit_CallBlock = visit_Macro  # its body is a macro

    @staticmethod
    def _stepped(node: Any) -> nodes.Node:
        step = nodes.ExprStmt(_filtered(_cost(node.body), _STEP, node), lineno=node.lineno)
        node.body = [step, *node.body]
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filtered(node.expr, _WALKED, node)
        for operand in node.ops:
            operand.expr = _filtered(operand.expr, _WALKED, node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), _JOINED, node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, _TOUCHED, node) if isinstance(node.arg, nodes.Slice) else node


def _filtered(value: nodes.Expr, name: str, place: nodes.Node) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=place.lineno)


def _cost(body: Iterable[nodes.Node]) -> nodes.Tuple:
    """Steps that a body's own length costs, and the characters of its literals."""
    inside = [one for node in body for one in (node, *node.find_all(nodes.Node))]
    literals = sum(len(one.data) for one in inside if isinstance(one, nodes.TemplateData))
    return nodes.Tuple([nodes.Const(1 + len(inside) // 16), nodes.Const(literals)], "load")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    texts = [one for one in (indent, *(separators or ())) if isinstance(one, str)]
    if any(len(text) > 32 for text in texts) or (isinstance(indent, int) and indent > 32):
        raise Exhausted("it indents JSON by more than it may")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=bool(sort_keys))


def _sum(values: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    """Jinja's, of numbers alone: lists would be copied once for each."""
    total = start
    for value in values:
        for key in str(attribute).split(".") if attribute is not None else ():
            value = value[int(key) if key.isdigit() else key]
        if not isinstance(value, (int, float)) or not isinstance(total, (int, float)):
            raise TemplateError(f"sum: wants numbers, got {type(value).__name__}")
        total += value
    return total


def _now(form: str) -> str:
    if len(form) > 256:
        raise Exhausted("it asks for a date in a longer form than it may")
    return datetime.now().strftime(form)


def _refuse(message: str) -> None:
    raise TemplateError(message)


class _Generation(Extension):
    """`{% generation %}`, by which templates say what is taught: its body is written as it stands."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own way)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
