"""What the tower of the small model learns to see from."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from examples.small import scenes, seeing, sitting
from examples.small.scenes import Mark, picture_size, scene
from examples.small.seeing import CHARACTERS, Heads, Names, Seen, pictures
from examples.small.sitting import HEADS, Sitting, sittings_of, train
from qwen2vl.errors import Qwen2VLError
from qwen2vl.media.image import preprocess_image
from qwen2vl.model import Qwen2VL
from qwen2vl.samples.draws import Draws, is_held_out_size
from qwen2vl.samples.vocabulary import is_held_out
from qwen2vl.samples.words import COLOURS, SHAPES
from tests.examples.cut import Killed, killed_at

EN = ("en",)


def some_scenes(count, seed=0):
    rng = np.random.default_rng(seed)
    return [scene(Draws(rng, languages=EN)) for _ in range(count)]


def written(marks):
    """The texts of a scene: characters that follow one another."""
    found = []
    for mark in marks:
        if mark.place == 0:
            found.append("")
        if mark.place is not None:
            found[-1] += mark.names[0]
    return found


def test_all_that_is_drawn_is_marked_where_it_stands():
    """Shapes have their colour in the middle of their box; ink of texts lies in the boxes of their characters."""
    kinds = {"page": 0, "things": 0}
    for image, marks in some_scenes(200):
        pixels = np.asarray(image).astype(int)
        things = [mark for mark in marks if mark.place is None]
        for mark in things:
            left, top, right, bottom = mark.box
            colour = pixels[int(top + 0.55 * (bottom - top)), int((left + right) / 2)]
            assert np.abs(colour - COLOURS[mark.names[0]]).max() <= 2, mark
            kinds["things"] += 1
        on_buttons = any(mark.whole[1] < mark.box[1] for mark in marks)
        if len(marks) < 12 or things or on_buttons:
            continue
        ground = np.array(max((n, colour) for n, colour in image.getcolors(1 << 16))[1])
        ink = np.abs(pixels - ground).max(-1) > 60
        marked = np.zeros_like(ink)
        for mark in marks:
            left, top, right, bottom = mark.box
            marked[int(top) : int(bottom) + 1, max(0, int(left) - 1) : int(right) + 2] = True
        assert ink.sum() and (ink & marked).sum() >= 0.97 * ink.sum()
        kinds["page"] += 1
    assert min(kinds.values()) > 20, kinds


def test_characters_stand_in_order_inside_of_their_text():
    for _, marks in some_scenes(60):
        for one, other in zip(marks, marks[1:], strict=False):
            if other.place:
                assert other.place == one.place + 1 and other.whole == one.whole and other.box[0] >= one.box[0]


def test_training_shows_nothing_that_is_held_out():
    """Neither texts, but for labels of buttons, which are none of these, nor sizes, but for the smallest."""
    shown = 0
    for image, marks in some_scenes(200, seed=3):
        size = image.height // 28, image.width // 28
        assert (image.width % 28, image.height % 28) == (0, 0) and size[0] * size[1] <= scenes.MOST
        assert size == (2, 2) or not is_held_out_size(*size)
        for text in written(marks):
            assert not is_held_out(text), text
            shown += 1
    assert shown > 200
    sizes = {picture_size(Draws(np.random.default_rng(n)), (2, 5), (2, 5)) for n in range(200)}
    assert len(sizes) > 8


def test_targets_lie_in_the_order_of_the_patches(processor):
    """A square of one white patch is where the target says that a letter is, whatever the grid."""
    names = Names(processor.tokenizer)
    for rows, columns in ((3, 4), (4, 3), (3, 5)):
        for number in range(0, 4 * rows * columns, 7):
            row, column = divmod(number, 2 * columns)
            image = Image.new("RGB", (28 * columns, 28 * rows))
            box = (14 * column, 14 * row, 14 * column + 14, 14 * row + 14)
            image.paste((255, 255, 255), box)
            patches = preprocess_image(np.asarray(image), processor.options)
            marks = [Mark(("A",), box, box, 2)]
            named, letters, places, where, boxes, edges, middles, _ = seeing._targets(
                patches.grid_thw, image.size, marks, names
            )
            white = patches.patches.mean(1) > 254
            assert white.sum() == 1
            assert ((letters.reshape(-1) != len(CHARACTERS)) == white).all()
            assert ((places.reshape(-1) == 2) == white).all()
            token = int(white.argmax()) // 4
            assert (named.sum(1) > 0).nonzero()[0].tolist() == [token] == (boxes[:, 0] >= 0).nonzero()[0].tolist()
            assert named[token].nonzero()[0].tolist() == names.of["A"]
            assert boxes[token].tolist() == [int(40 * v / side) for v, side in zip(box, image.size * 2, strict=True)][
                :2
            ] + [min(39, int(40 * v / side)) for v, side in zip(box[2:], image.size, strict=True)]
            offsets = np.array([0, 0, 0.5, 0.5]) + np.tile([0.5 * (column % 2), 0.5 * (row % 2)], 2) - 0.5
            assert edges[token].tolist() == pytest.approx(offsets.tolist())
            across = [(n % columns + 0.5) / columns for n in range(rows * columns)]
            assert where[:, 0].tolist() == [int(40 * x) for x in across] and not middles.any()


def test_targets_follow_a_picture_that_is_enlarged(processor):
    names = Names(processor.tokenizer)
    image, box = Image.new("RGB", (56, 56)), (28, 0, 56, 28)
    grid = preprocess_image(np.asarray(image), processor.options).grid_thw
    assert grid == (1, 8, 8)
    named, letters, _, where, boxes, edges, middles, kinds = seeing._targets(
        grid, image.size, [Mark(("red", "star"), box, box)], names
    )
    there = [2, 3, 6, 7]  # the upper right quarter of 4 x 4 tokens
    assert (named.sum(1) > 0).nonzero()[0].tolist() == there
    assert boxes[2].tolist() == [20, 0, 39, 20] and (letters == len(CHARACTERS)).all()
    assert edges[2].tolist() == [-0.5, -0.5, 1.5, 1.5] and where[2].tolist() == [25, 5]
    assert middles.nonzero()[0].tolist() == [7] and middles[7] == 1  # its middle is the corner of the four
    assert kinds[7].tolist() == [list(COLOURS).index("red"), SHAPES.index("star")] and kinds.max(1).argmax() == 7
    two = [Mark(("red", "star"), box, box), Mark(("blue", "heart"), box, box), Mark(("blue", "heart"), box, box)]
    *_, middles, kinds = seeing._targets(grid, image.size, two, names)
    assert middles[7] == 2 and kinds.max() == -100
    words = [processor.tokenizer.decode([names.ids[column]]) for column in named[2].nonzero()[0]]
    assert sorted(words) == sorted([" red", "红", " star", " stars", "星"])


def test_perfect_tokens_are_all_right_and_others_are_not(processor, beginning):
    """Features that are made from the targets through the heads themselves: what they ask for can be answered."""
    names = Names(processor.tokenizer)
    model = Qwen2VL.from_pretrained(beginning, device="cpu", dtype="float32")
    seen = pictures(processor, names, np.random.default_rng(1), 200)
    assert seen.rows.shape[0] == 4 * seen.names.shape[0] and int(seen.grids.prod(-1).sum()) == seen.rows.shape[0]
    torch.manual_seed(0)
    heads = Heads(192, names, model.head_weight.detach())
    tokens = torch.randn(seen.names.shape[0], 192, requires_grad=True)
    before = heads.right(tokens, seen)
    learn = torch.optim.Adam([tokens, *heads.parameters()], lr=0.05)
    for _ in range(300):
        losses = heads(tokens, seen)
        learn.zero_grad()
        sum(losses.values()).backward()
        learn.step()
    after = heads.right(tokens, seen)
    assert before["letters"] < 0.2 and before["boxes"] < 0.3
    assert min(after.values()) > 0.95, after


def test_pictures_of_which_nothing_is_to_be_said_have_a_loss(processor, beginning, monkeypatch):
    """An empty picture has no shape, no letter and no box, and asks where its tokens are."""
    monkeypatch.setattr(seeing, "scene", lambda draws: (Image.new("RGB", (112, 112)), []))
    names = Names(processor.tokenizer)
    seen = pictures(processor, names, np.random.default_rng(0), 16)
    heads = Heads(192, names, Qwen2VL.from_pretrained(beginning, device="cpu").head_weight.detach())
    losses = heads(torch.randn(16, 192), seen)
    empty = {name for name, loss in losses.items() if float(loss.detach()) == 0}
    assert empty == {"places", "boxes", "edges", "kinds"} and all(loss.isfinite() for loss in losses.values())


def test_a_sitting_without_questions_trains_the_tower_alone(beginning, tmp_path, monkeypatch):
    """And goes on as if it had not been cut."""
    monkeypatch.setattr(sitting, "_ASKED", 32)
    look = Sitting("x", 3, tokens=0, pictures=64, every=1)
    model = train(tmp_path / "whole", beginning, look, said=lambda line: None)

    with pytest.raises(Killed):
        train(tmp_path / "cut", beginning, look, said=killed_at(2))
    again = train(tmp_path / "cut", beginning, look, before=[{"begin": "y"}], said=lambda line: None)
    for file in ("model.safetensors", HEADS):
        assert (model / file).read_bytes() == (again / file).read_bytes()
    told = sittings_of(again)
    assert told[0] == {"begin": "y"} and [row["step"] for row in told[1]["curve"]] == [0, 1, 2, 3]
    assert set(told[1]["curve"][3]["losses"]) == set(seeing.LOSSES) and "letters" in told[1]["curve"][0]["right"]
    theirs, ours = (dict(Qwen2VL.from_pretrained(folder).named_parameters()) for folder in (beginning, model))
    changed = {name.split(".")[0] for name in ours if not torch.equal(ours[name], theirs[name])}
    assert changed == {"visual"}
    with pytest.raises(Qwen2VLError, match="tokens, pictures: a step needs one of them, both are 0"):
        train(tmp_path / "none", beginning, Sitting("x", 1, tokens=0))
    with pytest.raises(Qwen2VLError, match="processes: the sitting wants 2, torchrun started 1"):
        train(tmp_path / "two", beginning, Sitting("x", 1, processes=2))


def test_two_processes_train_one_model_on_pictures_of_their_own(tmp_path):
    """A sitting goes on from the first one's weights alone, and a measurement refuses others that are not equal."""
    asked = ["--from", "random", "--tokens", 0, "--pictures", 32, "--every", 1, "--threads", 1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    command += ["-m", "examples.small", "train", "--output", tmp_path / "run", "--steps", 2, *asked]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    model = tmp_path / "run" / "model"
    assert result.stdout.split() == [str(model)]
    (told,) = sittings_of(model)
    assert told["processes"] == 2 and [row["step"] for row in told["curve"]] == [0, 1, 2]
    states = [torch.load(tmp_path / "run" / f"state-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert states[0]["rows"] == states[1]["rows"] and "tensors" in states[0]
    alone = train(
        tmp_path / "alone",
        tmp_path / "run" / "begin",
        Sitting("random", 2, 0, 32, every=1),
        said=lambda line: None,
    )
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (model, alone))
    assert not torch.equal(ours["visual.blocks.0.mlp.fc1.weight"], theirs["visual.blocks.0.mlp.fc1.weight"])


def test_16_bits_learn_through_their_masters(beginning, tmp_path, monkeypatch):
    """A step of this size is lost in the rounding of a bfloat16 weight, and kept in its master."""
    monkeypatch.setattr(sitting, "_ASKED", 32)
    train(tmp_path / "run", beginning, Sitting("x", 2, 0, 64, lr=1e-6, dtype="bfloat16"), said=lambda line: None)
    saved = torch.load(tmp_path / "run" / "state-0.pt", weights_only=True)
    name = "visual.blocks.0.mlp.fc1.weight"
    weight = dict(Qwen2VL.from_pretrained(beginning, dtype="bfloat16").named_parameters())[name]
    master = saved["tensors"][f"{name}.master"]
    assert master.dtype == torch.float32 and not torch.equal(master, weight.float())
    assert torch.allclose(master, weight.float(), atol=1e-4)


def test_seen_holds_what_its_docstring_says(processor):
    names = Names(processor.tokenizer)
    seen = pictures(processor, names, np.random.default_rng(5), 64)
    tokens = seen.names.shape[0]
    assert isinstance(seen, Seen) and tokens >= 64 and seen.names.shape[1] == len(names.ids)
    assert seen.letters.shape == seen.places.shape == seen.boxes.shape == seen.edges.shape == (tokens, 4)
    assert ((seen.places >= 0) == (seen.letters != len(CHARACTERS))).all()
    assert seen.boxes.max() < 40 and seen.where.min() >= 0 and seen.edges.abs().max() <= 4
