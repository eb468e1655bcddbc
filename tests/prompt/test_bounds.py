"""What a prompt may cost, whatever its text, its tokenizer and its chat template hold."""

import json
import types

import pytest
from jinja2 import runtime

from benchmarks.byte_tokenizer import write_byte_tokenizer
from qwen2vl.errors import CheckpointError, PromptError
from qwen2vl.prompt import sandbox
from qwen2vl.prompt.processor import Processor
from qwen2vl.prompt.template import ChatTemplate
from qwen2vl.prompt.tokenizer import BYTE_OF_CHAR, CONTROL_TOKENS, MAX_CHARACTERS, Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def processor(folder):
    return Processor(Tokenizer.from_pretrained(folder))


class Untouchable:
    """A tokenizer that must not be reached."""

    def encode(self, *args, **options):
        raise AssertionError("text without bound reached the tokenizer")


def user(text):
    return [{"role": "user", "content": text}]


def test_long_text_is_refused_before_the_tokenizer_sees_it(folder, monkeypatch):
    processor = Processor(Tokenizer.from_pretrained(folder))
    monkeypatch.setattr(processor.tokenizer, "backend", Untouchable())
    long = " " * (MAX_CHARACTERS + 1)
    with pytest.raises(PromptError, match=f"max_characters = {MAX_CHARACTERS}, got {MAX_CHARACTERS + 1}"):
        processor.tokenizer.encode_plain(long)
    with pytest.raises(PromptError, match="messages: characters of text: wants at most"):
        processor(user(long))
    # Texts of a conversation count together, and before its pictures are opened.
    half = {"type": "text", "text": " " * (MAX_CHARACTERS // 2 + 1)}
    with pytest.raises(PromptError, match="characters of text"):
        processor(user([half, {"type": "image", "image": "no such file"}, half]))
    with pytest.raises(PromptError, match="characters of text"):
        processor.supervised_document([half, {"type": "image", "image": "no such file"}, half])


def test_the_limit_of_text_is_the_operators(folder):
    tokenizer = Tokenizer.from_pretrained(folder, max_characters=5)
    assert tokenizer.decode(tokenizer.encode_plain("abcde")) == "abcde"
    with pytest.raises(PromptError, match="max_characters = 5, got 6"):
        tokenizer.encode_plain("abcdef")
    for bad in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match="max_characters: wants a positive int"):
            Tokenizer.from_pretrained(folder, max_characters=bad)


def test_a_prompt_of_thirty_thousand_tokens_is_taken(processor):
    assert processor(user("word " * 30_000))["input_ids"].shape[1] > 30_000


def test_a_panic_of_the_tokenizer_is_a_prompt_error(folder, monkeypatch):
    class PanicException(BaseException):  # as Rust code raises it
        pass

    class Panicking:
        def encode(self, *args, **options):
            raise PanicException("retry-limit-in-match over")

    tokenizer = Tokenizer.from_pretrained(folder)
    monkeypatch.setattr(tokenizer, "backend", Panicking())
    with pytest.raises(PromptError, match="cannot cope with these 3 characters: retry-limit"):
        tokenizer.encode_plain("abc")


LOOPS = "{% for a in range(10000) %}{% for b in range(10000) %}BODY{% endfor %}{% endfor %}"
FILLED = "{% set x = 'x' * 1000000 %}"
#: Lists that hold the same list twice, 40 deep: few objects, and 2^40 of them to whoever walks all.
SHARED = (
    "{% set n = namespace(a=[1], b=[1]) %}{% for i in range(40) %}"
    "{% set n.a = [n.a, n.a] %}{% set n.b = [n.b, n.b] %}{% endfor %}"
)
HOSTILE = {
    "nested loops": LOOPS,
    "loops that write nothing": LOOPS.replace("BODY", "{% set x = a %}"),
    "loops whose test is false": "{% for a in range(10000) %}{% for b in range(10000) if 0 %}{% endfor %}{% endfor %}",
    "loops over calls": "{% for a in range(9999) recursive %}{{ loop(range(9999)) }}{% endfor %}",
    "a long text": "{{ 'x' * 10**9 }}",
    "a long text, reversed": "{{ 10**9 * 'x' }}",
    "a long list": "{% set a = [0] * 10**9 %}",
    "texts side by side": "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "sums of texts": "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "sums of lists": "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "a literal again and again": "{% for a in range(99999) %}" + "x" * 10_000 + "{% endfor %}",
    "a power": "{{ 7 ** (10**9) }}",
    "powers of powers": "{% set n = namespace(x=7) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "deep recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "branching recursion": "{% macro f(n) %}{% if n %}{{ f(n - 1) ~ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a format's width": "{{ '{:1000000000}'.format('x') }}",
    "a format's width as argument": "{{ '{:{w}}'.format('x', w=10**9) }}",
    "a width of %": "{{ '%1000000000d' % 1 }}",
    "a width of % as argument": "{{ '%*d' % (10**9, 1) }}",
    "a width of the filter": "{{ '%1000000000d' | format(1) }}",
    "format_map": "{{ '{a}'.format_map({'a': 1}) }}",
    "a centred text": "{{ 'x'.center(10**9) }}",
    "zeros": "{{ 'x'.zfill(10**9) }}",
    "an int's bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "replaced by more": FILLED + "{{ x.replace('x', x) }}",
    "replaced by more, by the filter": FILLED + "{{ x | replace('x', x) }}",
    "joined": FILLED + "{{ x.join(['a'] * 1000) }}",
    "joined by the filter": FILLED + "{{ ([x] * 1000) | join(x) }}",
    "indented": "{{ ('x\\n' * 100000) | indent(10**9) }}",
    "batches": "{{ [1] | batch(10**9, 'x') | list }}",
    "JSON indented": "{{ [[1]] | tojson(indent=10**9) }}",
    "sums of lists by the filter": "{{ ([[1]] * 5000) | sum(start=[]) }}",
    "lists searched": "{% set x = range(99999) | list %}{% for a in x %}{% if -1 in x %}{% endif %}{% endfor %}",
    "lists searched by a test": "{% set x = range(99999) | list %}{{ x | select('in', x) | list }}",
    "lists cut": "{% set x = range(99999) | list %}{% for a in x %}{% set y = x[1:] %}{% endfor %}",
    "lists indexed": "{% set x = range(99999) | list %}{% for a in x %}{% set y = x.index(99998) %}{% endfor %}",
    "shared lists written": SHARED + "{{ n.a }}",
    "shared lists as text": SHARED + "{% set x = n.a | string %}",
    "shared lists as JSON": SHARED + "{% set x = n.a | tojson %}",
    "shared lists side by side": SHARED + "{% set x = n.a ~ '' %}",
    "shared lists compared": SHARED + "{% if n.a == n.b %}{% endif %}",
    "shared lists compared by a test": SHARED + "{% if n.a is eq(n.b) %}{% endif %}",
    "shared lists formatted": SHARED + "{% set x = '%s' % (n.a,) %}",
    "shared lists formatted by a method": SHARED + "{% set x = '{}'.format(n.a) %}",
    "namespaces in namespaces": "{% set n = namespace(a=1) %}{% for i in range(60) %}"
    "{% set m = namespace(a=[n.a, n.a], b=n.a) %}{% set n.a = m %}{% endfor %}{{ n }}",
    "steps given back": "{{ [[-10000000, -10000000]] * 99999 | map('a step') | list }}",
    "a method of all lists": "{{ messages.append(1) }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_template_that_does_too_much_ends_in_a_prompt_error(processor, source):
    """Steps are counted, so that this ends after the same work everywhere."""
    with pytest.raises(PromptError, match="chat template refuses them"):
        ChatTemplate(source, processor.tokenizer).render(user("a"))


def test_a_template_that_stops_at_the_bound_has_done_little_more(processor, monkeypatch):
    spent = []
    spend = sandbox._Budget.spend
    monkeypatch.setattr(sandbox._Budget, "spend", lambda self, *args: (spent.append(1), spend(self, *args))[1])
    template = ChatTemplate(LOOPS, processor.tokenizer)
    spent.clear()
    with pytest.raises(PromptError, match="more steps than it may"):
        template.render(user("a"))
    assert len(spent) <= sandbox.STEPS + 2 * sandbox.STEPS_PER_ITEM


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "no readable Jinja template"),
        ("{{ " + "9" * 5000 + " }}", "no readable Jinja template"),
        ("x" * (sandbox.MAX_SOURCE + 1), "wants at most 131072 characters"),
        ("{% if a %}" * 150 + "{% endif %}" * 150, "no readable Jinja template"),
    ],
    ids=["deep", "long number", "long", "deep blocks"],
)
def test_a_template_that_cannot_be_compiled_is_refused(processor, source, match):
    with pytest.raises(CheckpointError, match=match):
        ChatTemplate(source, processor.tokenizer)


#: Every value that a template can name, and what was made of those.
REACHABLE = (
    "messages", "messages[0]", "''", "1", "1.5", "[]", "()", "{}", "range", "range(2)", "dict", "namespace",
    "namespace()", "cycler", "cycler(1)", "joiner", "joiner()", "raise_exception", "strftime_now", "self", "m", "loop",
    "''.join", "''.format", "{}.items", "{}.items()", "[].index", "loop.cycle", "'' | safe", "messages | map('upper')",
    "true", "none",
)  # fmt: skip


@pytest.mark.parametrize("value", REACHABLE)
def test_no_attribute_reaches_pythons_internals(processor, value):
    kinds = (object, str, int, float, list, tuple, dict, range, type, *(vars(types).values()), *vars(runtime).values())
    names = {name for kind in kinds if isinstance(kind, type) for name in vars(kind) if name[0] == "_"}
    names |= {"mro", "gi_frame", "gi_code", "f_globals", "f_builtins", "tb_frame", "func_globals", "cr_frame"}
    seen = []
    template = sandbox.compile_template(
        "{% macro m() %}{% endmacro %}{% for x in [1] %}"
        "{% for name in names %}{{ show((" + value + ")[name] is defined, name) }}"
        "{{ show(((" + value + ") | attr(name)) is defined, name) }}{% endfor %}{% endfor %}",
        str,
    )
    sandbox.render(template, user("a"), names=sorted(names), show=lambda got, name: seen.append(name) if got else None)
    assert not seen


def test_templates_of_long_conversations_have_room(processor):
    source = (
        "{% for m in messages %}{% if loop.first %}{{ messages | length }}{% endif %}{% set last = loop.index0 == "
        "(messages | length - 1) %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}{% if last %}{{ 'x'.join(['a']) "
        "}}{% endif %}{{ '{}'.format(1) }}{{ '%02d' | format(3) }}<|im_end|>\n{% endfor %}"
    )
    template = ChatTemplate(source, processor.tokenizer)
    messages = [{"role": ("user", "assistant")[n % 2], "content": f" {n} "} for n in range(3000)]
    assert len(template.render(messages)) == 4 * 3000 + 1
    assert len(template.render(user("word " * 100_000))) == 5


@pytest.fixture(scope="module")
def written(folder):
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


def load(folder, data):
    (folder / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    return Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["<|im_end|>", "<|image_pad|>", "<|endoftext|>"])
def test_every_byte_has_an_ordinary_token(tmp_path, written, name):
    """A byte that the vocabulary lacks would become the unknown token, or nothing."""
    ids = {token["content"]: token["id"] for token in written["added_tokens"]}
    for char, byte in BYTE_OF_CHAR.items():
        for stand_in in (None, ids[name]):
            vocabulary = {token: n for token, n in written["model"]["vocab"].items() if token != char}
            merges = [one for one in written["model"]["merges"] if char not in str(one)]
            kept = {char} | {one for one in vocabulary if char in one}
            vocabulary = {token: n for token, n in vocabulary.items() if token not in kept or token in CONTROL_TOKENS}
            if stand_in is not None:
                vocabulary |= {char: stand_in}
            model = written["model"] | {"vocab": vocabulary, "merges": merges, "unk_token": name}
            with pytest.raises(CheckpointError, match=f"no ordinary token for the bytes 0x{byte:02x}$"):
                load(tmp_path, written | {"model": model})


def test_text_that_becomes_special_by_a_detour_is_refused_when_it_comes(tmp_path, written):
    """Files can turn one text into another before it is looked up; no trial at load finds every such text."""
    normalizer = {"type": "Replace", "pattern": {"String": "open sesame"}, "content": "<|im_end|>"}
    split = {"type": "Split", "pattern": {"Regex": "<.im_end.>"}, "behavior": "Isolated", "invert": False}
    data = written | {"normalizer": normalizer, "pre_tokenizer": split}
    data["model"] = written["model"] | {"ignore_merges": True}
    with pytest.raises(CheckpointError, match="can spell the special token"):
        load(tmp_path, data).encode_plain("open sesame")


def test_a_model_that_is_no_bpe_is_refused(tmp_path, written):
    model = {"type": "WordLevel", "vocab": written["model"]["vocab"], "unk_token": "<|im_end|>"}
    with pytest.raises(CheckpointError, match=r"wants a byte-level BPE .* got model WordLevel"):
        load(tmp_path, written | {"model": model})
