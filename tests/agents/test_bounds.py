"""What pages and models write is read in one pass, however it is nested or left open."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2vl.agents import function_calls
from qwen2vl.agents.actions import keywords
from qwen2vl.agents.function_calls import Call, Result, defuse, mark_results, parse_turn, render_turn
from qwen2vl.agents.grounding import BOX_END, BOX_START, QUAD_END, QUAD_START, REF_START, strip_grounding
from tests.steps import assert_linear, count_lines

STYLES = ("paper", "qwen")
quick = settings(max_examples=200, deadline=None)


class Counting:
    """A pattern that counts the characters it is given."""

    def __init__(self, pattern):
        self.pattern, self.characters = pattern, 0

    def __getattr__(self, name):
        def counted(*args):
            self.characters += len(args[-1])
            return getattr(self.pattern, name)(*args)

        return counted


@pytest.mark.parametrize("style", STYLES)
def test_defusing_is_one_pass(style, monkeypatch):
    words = keywords(style)
    mark, inner = words.result[0], words.result[1:-1]
    pattern = Counting(words.pattern)
    monkeypatch.setitem(words.__dict__, "pattern", pattern)
    for text in (mark + inner, mark * 2 + inner + mark):
        for before, after in (("", ""), (mark, mark), (mark, inner + mark)):

            def hostile(n, text=text, before=before, after=after):
                return before * n + text + after * n

            lines = [count_lines(lambda n=n: defuse(hostile(n), style)) for n in (500, 2000)]
            assert lines[1] <= 4.2 * lines[0] + 200
            assert pattern.characters <= 8 * 2000 * 10
            pattern.characters = 0


@pytest.mark.parametrize("style", STYLES)
@quick
@given(data=st.data())
def test_what_was_defused_holds_no_keyword_and_all_else(style, data):
    words = keywords(style)
    mark = words.result[0]
    pieces = st.sampled_from([mark, "FUNCTION", "ARGS", "RESULT", "RETURN", "FUN", "CTION", " x", *words.all])
    text = "".join(data.draw(st.lists(pieces, max_size=30)))
    got = defuse(text, style)
    assert not words.pattern.search(got)
    assert got.replace(mark, "") == text.replace(mark, "")
    if not words.pattern.search(text):
        assert got == text


@quick
@given(st.text(alphabet='"\\(), 1.-e\n', max_size=60))
def test_every_quote_is_passed_over_once(text):
    """No quote is left from which the expression of points would look for the end of a string in vain."""
    passed = [match.span() for match in function_calls._POINT.finditer(text)]
    quotes = [n for n, character in enumerate(text) if character == '"']
    assert all(any(begin <= n < end for begin, end in passed) for n in quotes)


def test_arguments_that_end_nowhere_are_refused():
    text = '*FUNCTION*: Tap *ARGS*: {"a": ' + '"\\' * 100_000
    with pytest.raises(ValueError, match="arguments are no JSON object"):
        parse_turn(text, "paper")
    call = Call("Tap", {"point": (1, 2), "text": '(3,4) "\\'})
    assert parse_turn(render_turn([call], "paper")[0]["text"], "paper") == [call]


@pytest.mark.parametrize("style", STYLES)
def test_turns_of_many_results_are_one_pass(style):
    def turn(n):
        steps = [step for k in range(n) for step in (Call("Tap", {"n": k}), Result("r"))]
        return render_turn([*steps, "end"], style)

    assert_linear(turn, 50)
    text = "".join(item["text"] for item in turn(20))
    marked = mark_results([{"type": "text", "text": text}], style)
    assert "".join(item["text"] for item in marked) == text
    assert [item["text"] for item in marked] == [item["text"] for item in turn(20)]
    assert_linear(lambda n: mark_results([{"type": "text", "text": text * n}], style), 2)


def test_stripping_places_is_one_pass():
    for text in (BOX_START, BOX_START + QUAD_START, BOX_START + QUAD_END, BOX_START + "(1,2)" + BOX_END):
        assert_linear(lambda n, text=text: strip_grounding(text * n), 100)


@quick
@given(
    st.lists(st.sampled_from([BOX_START, BOX_END, QUAD_START, QUAD_END, REF_START, "a", "\n", "(1,2)"]), max_size=25)
)
def test_stripping_takes_places_and_markers(pieces):
    text = "".join(pieces)
    places = "|".join(re.escape(a) + ".*?" + re.escape(b) for a, b in ((BOX_START, BOX_END), (QUAD_START, QUAD_END)))
    want = re.sub(r"<\|\w+\|>", "", re.sub(places, "", text, flags=re.DOTALL))
    assert strip_grounding(text) == want
