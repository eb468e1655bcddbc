"""The dialogues that the small model learns from, and where it is taught to look."""

from functools import partial

import numpy as np
import pytest
import torch

from examples.small import dialogues, scenes
from examples.small.dialogues import Look, dialogue
from examples.small.lessons import Lessons, example_of, in_hundredths, texts_of
from examples.small.looking import COUNTS, LOOKS, NAMED, Gaze, Looking, gazes
from qwen2vl import text
from qwen2vl.agents.function_calls import Call, render_call
from qwen2vl.agents.grounding import parse_grounding
from qwen2vl.model import Qwen2VL
from qwen2vl.samples.draws import Draws
from qwen2vl.samples.words import COLOURS, SHAPES, YES_NO, thing_name
from qwen2vl.training.example import Example
from qwen2vl.training.packing import collate

EN = ("en",)


@pytest.fixture(scope="module")
def model(beginning):
    return Qwen2VL.from_pretrained(beginning, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def texts(processor):
    return texts_of(processor.tokenizer)


def some(kind, count, seed=4, language="en"):
    """Dialogues of one kind, or of all of them."""
    return [kind(Draws(np.random.default_rng([seed, n]), languages=(language,))) for n in range(count)]


# -------------------------------------------------------------------------------------------------------- dialogues


def turns(messages):
    asked = [one["content"][-1]["text"] for one in messages[::2]]
    return list(zip(asked, [one["content"] for one in messages[1::2]], strict=True))


def colour_in(pixels, box):
    """That of a pixel a little below the middle of a box, which all shapes cover."""
    height, width = pixels.shape[:2]
    x, y = (box.x1 + box.x2) / 2000 * width, (0.45 * box.y1 + 0.55 * box.y2) / 1000 * height
    return pixels[int(y), int(x)].astype(int)


def test_dialogues_about_things_are_right(monkeypatch):
    """Counts, names and boxes are held against the marks, and colours against the pixels under the boxes."""
    drawn = []

    def remember(*given):
        drawn.append(draw(*given))
        return drawn[-1]

    draw = scenes.draw_some_things
    monkeypatch.setattr(dialogues, "draw_some_things", remember)
    asked = dict.fromkeys(("count", "colour of", "shape of", "find"), 0)
    for n in range(60):
        messages, looks = dialogues._things(Draws(np.random.default_rng([4, n]), languages=EN))
        assert [one["role"] for one in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert {part["type"] for one in messages[2::2] for part in one["content"]} <= {"text"}
        pixels, marks = messages[0]["content"][0]["image"], drawn[-1][1]
        for (question, answer), look in zip(turns(messages), looks, strict=True):
            words = question.rstrip("?.").split()
            if words[0] in ("How", "Count"):
                kinds = [mark.names for mark in marks]
                colour = next((w for w in words if w in COLOURS), None)
                shape = next((s for s in SHAPES for w in words if w in (s + "s", s + "es")), None)
                fits = [k for k in kinds if colour in (None, k[0]) and shape in (None, k[1])]
                assert int(answer) == len(fits) == len(look.places), (question, kinds)
                assert look.how == "counted"
                asked["count"] += 1
            elif answer in COLOURS:
                assert [m.names[0] for m in marks if m.names[1] in words] == [answer]
                asked["colour of"] += 1
            elif answer in SHAPES:
                assert [m.names[1] for m in marks if m.names[0] in words] == [answer]
                asked["shape of"] += 1
            elif found := parse_grounding(answer):
                (box,) = found[0].places
                name = found[0].phrase
                if name in {thing_name(c, s, "en") for c in COLOURS for s in SHAPES}:
                    assert np.abs(colour_in(pixels, box) - COLOURS[name.split()[0]]).max() <= 2
                    asked["find"] += 1
    assert min(asked.values()) > 10, asked


def test_texts_are_looked_for_where_they_are_written():
    """The box of the answer is where the ink is, and there the model is told to look."""
    seen = 0
    for messages, looks in [*some(dialogues._texts, 20), *some(dialogues._text, 20)]:
        pixels = messages[0]["content"][0]["image"].astype(int)
        for (_, answer), look in zip(turns(messages), looks, strict=True):
            if look.how == "spelled":
                assert len(look.places) == len(answer)
                lefts = [box.x1 for _, box in look.places]
                assert lefts == sorted(lefts)
                continue
            ((_, box),) = look.places
            assert parse_grounding(answer)[0].places == (box,)
            left, top, right, bottom = box.to_pixels(width=pixels.shape[1], height=pixels.shape[0])
            inside = pixels[int(top) : int(bottom) + 1, int(left) : int(right) + 1]
            assert np.abs(inside - pixels[0, 0]).max() > 60
            seen += 1
    assert seen > 30


def test_every_button_of_a_screen_is_tapped_once(processor, texts):
    for messages, looks in some(dialogues._screen, 10):
        _, user, assistant = messages
        written = "".join(item["text"] for item in assistant["content"])
        asked = [part.split('"')[0] for part in user["content"][1]["text"].split('Tap "')[1:]]
        assert [part.split('"')[0] for part in written.split('Tap "')[1:]] == asked
        points = [tuple(map(int, part.split(")")[0].split(","))) for part in written.split('"point": (')[1:]]
        for (x, y), look in zip(points, looks[:-1], strict=True):
            ((_, box),) = look.places
            assert box.x1 < x < box.x2 and box.y1 < y < box.y2
        assert len(set(points)) == len(asked) >= 2 and looks[-1] == Look() and written.endswith("Done.")


def test_pairs_are_compared_as_their_pixels_are():
    seen = set()
    for messages, looks in some(dialogues._pair, 30):
        colours = [colour_in(messages[0]["content"][n]["image"], box) for n, box in looks[0].places]
        same = np.abs(colours[0] - colours[1]).max() <= 2
        for question, answer in turns(messages):
            if "colour" in question and answer in YES_NO["en"]:
                assert answer == YES_NO["en"][not same]
                seen.add(answer)
    assert len(seen) == 2


def test_every_kind_is_counted():
    """Each question's number is that of the places, no two of which are one; several of a kind are frequent."""
    answers = []
    for messages, looks in some(dialogues._kinds, 30):
        for (question, answer), look in zip(turns(messages), looks, strict=True):
            assert question.startswith(("How many", "Count")) and look.how == "counted"
            assert int(answer) == len(look.places) == len(set(look.places))
            answers.append(int(answer))
    assert max(answers) >= 5 and sum(one >= 3 for one in answers) > len(answers) / 8


def test_the_picture_with_more_things_is_named(processor, texts):
    seen = set()
    for messages, looks in some(dialogues._more, 30):
        ((_, answer),) = turns(messages)
        first, second = ([place for place in looks[0].places if place[0] == n] for n in (0, 1))
        more = "the first" if len(first) > len(second) else "the second" if len(second) > len(first) else "equal"
        assert answer == more and looks[0].how == "compared"
        seen.add(more)
        found = gazes(example_of(processor, messages), looks, texts)
        assert [one.head for one in found] == [LOOKS, COUNTS] * (len(found) // 2)
        for gaze, places in zip(found, (first, second), strict=False):
            assert sum(share for keys, share in gaze.places if keys != (0,)) == pytest.approx(
                len(places) / (2 + len(places))
            )
    assert len(seen) == 3


@pytest.mark.parametrize("language", ["en", "zh"])
def test_dialogues_are_examples_with_every_answer_taught(processor, texts, language):
    """A look for every taught stretch, and what is looked at are the tokens of the pictures that it names."""
    kinds = set()
    for messages, looks in some(dialogue, 60, language=language):
        example = example_of(processor, messages)
        kinds.add(messages[-1]["content"][0]["text"][:3] if messages[0]["role"] == "system" else len(looks))
        taught = processor.decode(example.labels[example.labels >= 0], skip_special_tokens=False)
        assert taught.count("<|im_end|>") == len(messages) // 2
        images = set((example.input_ids == texts.index("<|image_pad|>")).nonzero().flatten().tolist())
        for gaze in gazes(example, looks, texts):
            assert example.labels[gaze.row + (gaze.head != NAMED)] >= 0
            assert sum(share for _, share in gaze.places) == pytest.approx(1)
            things = [one for one in gaze.places if one[0] != (0,)]
            assert all(keys and images.issuperset(keys) for keys, _ in things)
            said = texts[int(example.labels[gaze.row + 1])]
            if gaze.head == COUNTS and said.isdigit():
                number = int(said)
                assert gaze.places[-1] == ((0,), pytest.approx(1 / (1 + number / 2))) and len(things) <= number
    assert len(kinds) >= 4


# ---------------------------------------------------------------------------------------------------------- looking


def test_looks_lie_on_the_tokens_under_their_places(processor, texts):
    """Pictures of 3 x 4 and 4 x 4 tokens, none of which is enlarged."""
    pictures = [np.zeros((high, 112, 3), np.uint8) for high in (84, 112)]
    upper = dialogues._box((28, 0, 84, 28), (112, 84))  # the first row's middle two
    last = dialogues._box((84, 84, 112, 112), (112, 112))
    items = [{"type": "image", "image": one} for one in pictures]
    messages = [
        {"role": "user", "content": [*items, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "No"},
    ]
    example = example_of(processor, messages)
    assert (example.image_grid_thw == torch.tensor([[1, 6, 8], [1, 8, 8]])).all()
    begin, end = (example.input_ids == texts.index("<|image_pad|>")).nonzero().flatten()[[0, -1]].tolist()
    places = ((begin + 1, begin + 2), (end,))
    answer = int((example.labels >= 0).nonzero()[0])
    found = gazes(example, [Look(((0, upper), (1, last)))], texts)
    assert found == [Gaze(answer + n - 1, LOOKS, tuple((one, 0.5) for one in places)) for n in (0, 1)]
    found = gazes(example, [Look(((0, upper), (1, last)), "spelled")], texts)
    assert found == [Gaze(answer + n - 1, LOOKS, ((places[n], 1.0),)) for n in (0, 1)]
    found = gazes(example, [Look(((0, upper), (1, last)), "counted")], texts)
    middles = ((begin + 2,), places[1])  # the first one's lies on the edge between two tokens
    assert found == [Gaze(answer - 1, COUNTS, ((middles[0], 0.25), (middles[1], 0.25), ((0,), 0.5)))]
    found = gazes(example, [Look(((1, last), (1, last)), "counted")], texts)
    assert found == [Gaze(answer - 1, COUNTS, ((places[1], 0.5), ((0,), 0.5)))]
    named = gazes(example, [Look(((0, upper),), name="o")], texts)
    assert [one for one in named if one.head == NAMED] == [Gaze(answer + 1, NAMED, ((places[0], 1.0),))]
    with pytest.raises(ValueError, match="looks: wants one for each of 1 taught stretches, got 2"):
        gazes(example, [Look(), Look()], texts)


def test_losses_are_divergences_of_the_layers_own_attention(processor, texts, model, monkeypatch):
    """Against attention weights that are computed one row at a time, from what the layer's own kernel was given."""
    examples, looked = [], {}
    for n, (messages, looks) in enumerate(some(dialogue, 6, seed=11)):
        examples.append(example_of(processor, messages, f"d{n}"))
        looked[f"d{n}"] = gazes(examples[-1], looks, texts)
    batch, watch, given = collate(examples, model.config), Looking(model), []
    kernel = text.varlen_attention

    def remember(*inputs, **options):
        given.append(inputs)
        return kernel(*inputs, **options)

    monkeypatch.setattr(text, "varlen_attention", remember)
    with watch.watching():
        model.hidden_states(
            batch.input_ids,
            batch.positions,
            batch.cu_seqlens,
            model.encode_media(batch.pixel_values, batch.image_grid_thw),
        )
    assert len(given) == len(model.model.layers)
    losses = watch.losses(batch, looked)
    wanted = {NAMED: [], LOOKS: [], COUNTS: []}
    for n, source in enumerate(batch.sources):
        begin = int(batch.cu_seqlens[n])
        for gaze in looked[source]:
            layer, head = gaze.head
            q, k, row = *(one.detach() for one in given[layer][:2]), begin + gaze.row
            weights = (k[begin : row + 1, 0] @ q[row, head] / 8).softmax(0)
            kl = 0.0
            for keys, share in gaze.places:
                kl += share * float((share / weights[list(keys)].sum()).log()) if share else 0.0
            wanted[gaze.head].append(kl)
    assert {name: one.item() for name, one in losses.items()} == {
        name: pytest.approx(np.mean(wanted[head]), rel=1e-4)
        for name, head in (("named", NAMED), ("looks", LOOKS), ("counts", COUNTS))
    }
    assert not any(one._forward_pre_hooks for one in watch.attentions.values())


def test_attention_learns_to_look(processor, texts, beginning):
    """The losses fall where queries and keys alone learn, and what nothing asks for has none."""
    model = Qwen2VL.from_pretrained(beginning, device="cpu", dtype="float32")
    examples, looked = [], {}
    for n, (messages, looks) in enumerate(some(dialogues._pair, 3)):
        examples.append(example_of(processor, messages, f"d{n}"))
        looked[f"d{n}"] = gazes(examples[-1], looks, texts)
    batch, watch = collate(examples, model.config), Looking(model)
    attention = watch.attentions[LOOKS[0]]
    optimizer = torch.optim.Adam([*attention.q_proj.parameters(), *attention.k_proj.parameters()], lr=1e-2)
    seen = []
    for _ in range(30):
        with watch.watching():
            features = model.encode_media(batch.pixel_values, batch.image_grid_thw)
            model.hidden_states(batch.input_ids, batch.positions, batch.cu_seqlens, features)
        losses = watch.losses(batch, looked)
        assert list(losses) == ["looks"]
        seen.append(losses["looks"].item())
        optimizer.zero_grad()
        losses["looks"].backward()
        optimizer.step()
    assert seen[-1] < 0.5 * seen[0]
    assert watch.losses(batch, {}) == {}
    assert watch.losses(batch, {"d0": [Gaze(1, COUNTS, (((0,), 1.0),))]})["counts"] >= 0


def test_lessons_say_where_their_dialogues_look(processor):
    lessons = Lessons(processor, [(0, {("read", 0): 1.0})], seed=3, max_tokens=999, dialogues=0.5)
    examples = [example for _, example in zip(range(12), lessons, strict=False)]
    said = {example.source for example in examples if example.source.startswith("dialogue")}
    assert said == set(lessons.looked) and 0 < len(said) < 12


# ---------------------------------------------------------------------------------------------------------- lessons


def test_coordinates_are_taught_in_hundredths(processor):
    """Boxes and taps; what was asked, counts, typed numbers and 1000 stay as they are."""
    box = "<|object_ref_start|>12<|object_ref_end|><|box_start|>(7,46),(911,1000)<|box_end|>"
    call = render_call(Call("Tap", {"point": (506, 798)}), "paper") + render_call(Call("Type", {"text": "49"}), "paper")
    for answer, wanted in ((box, box.replace("7,46", "5,45").replace("911", "915")), ("3", "3"), (call, None)):
        messages = [{"role": "user", "content": "Where is (123,456)?"}, {"role": "assistant", "content": answer}]
        inputs = processor.supervised(messages)
        before = Example(inputs["input_ids"][0], inputs["labels"][0])
        after = in_hundredths(before, texts_of(processor.tokenizer))
        decode = partial(processor.decode, skip_special_tokens=False)
        wanted = wanted or call.replace("506", "505").replace("798", "795")
        assert decode(after.input_ids) == decode(before.input_ids).replace(answer, wanted)
        assert decode(after.labels[after.labels >= 0]) == f"{wanted}<|im_end|>\n".removesuffix("\n")
