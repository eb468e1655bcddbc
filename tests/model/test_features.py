"""Features of pictures that come again: encoded once, never another's, and never those of other weights."""

import pickle
from copy import deepcopy

import numpy as np
import pytest
import torch

from benchmarks.random_checkpoint import small_config
from qwen2vl import Qwen2VL, features
from qwen2vl.features import KeptFeatures
from qwen2vl.vision import VisionTower
from qwen2vl_kernels import use_backend
from tests.conftest import relative_error


@pytest.fixture(scope="module")
def loaded():
    return Qwen2VL.from_config(small_config(tie_word_embeddings=False), device="cpu", dtype=torch.float32, std=0.1)


@pytest.fixture
def model(loaded):
    model = deepcopy(loaded)
    model.kept_features = KeptFeatures()
    return model


@pytest.fixture
def encoded(model, monkeypatch):
    """The grids that the tower was given, call by call."""
    calls, encode = [], model.visual.encode
    monkeypatch.setattr(model.visual, "encode", lambda kinds, grids: calls.append(grids) or encode(kinds, grids))
    with torch.no_grad():
        yield calls


GRIDS = {"a": (1, 4, 4), "b": (1, 2, 8), "c": (1, 6, 4), "clip": (2, 4, 4)}


def _rows(name, values=1176):
    t, h, w = GRIDS[name]
    generator = torch.Generator().manual_seed(len(name) * 100 + ord(name[0]))
    return torch.randint(0, 256, (t * h * w, values), dtype=torch.uint8, generator=generator)


def _encode(model, images="", video=False, **options):
    given = {}
    if images:
        given |= {"pixel_values": torch.cat([_rows(n) for n in images])}
        given |= {"image_grid_thw": torch.tensor([GRIDS[n] for n in images])}
    if video:
        given |= {"pixel_values_videos": _rows("clip"), "video_grid_thw": torch.tensor([GRIDS["clip"]])}
    return model.encode_media(**given, **options)


def _fresh(model, *arguments):
    kept, model.kept_features = model.kept_features, None
    try:
        return _encode(model, *arguments)
    finally:
        model.kept_features = kept


def test_what_comes_again_is_not_encoded_again(model, encoded):
    for images, video, wanted in (
        ("a", False, ["a"]),
        ("a", False, []),
        ("ab", False, ["b"]),
        ("cab", True, ["c", "clip"]),
        ("ba", True, []),
        ("", True, []),
    ):
        encoded.clear()
        got = _encode(model, images, video)
        assert [grid for call in encoded for grid in call] == [GRIDS[name] for name in wanted]
        assert len(encoded) <= 1, "all that is missing in one call of the tower"
        for some, others in zip(got, _fresh(model, images, video), strict=True):
            assert (some is None) == (others is None) and (some is None or relative_error(some, others) < 1e-6)
    assert len(model.kept_features) == 4


def test_a_picture_twice_in_one_call(model, encoded):
    got, _ = _encode(model, "aba")
    assert encoded == [[GRIDS["a"], GRIDS["b"]]] and torch.equal(got[:4], got[-4:])


def test_another_picture_is_another(model, encoded):
    """By one value, by its grid, by its dtype, by the number of its frames."""
    rows = _rows("a")
    other = rows.clone()
    other[7, 9] += 1
    for given, grid in (
        (rows, (1, 4, 4)),
        (other, (1, 4, 4)),
        (rows, (1, 2, 8)),
        (rows, (1, 8, 2)),
        (rows, (4, 2, 2)),
        (rows.float(), (1, 4, 4)),
        (rows.bfloat16(), (1, 4, 4)),
        (rows[:, :588].contiguous(), (1, 4, 4)),
    ):
        before = len(encoded)
        for _ in range(2):
            model.encode_media(given, torch.tensor([grid]))
        assert len(encoded) == before + 1
    rows.add_(1)
    model.encode_media(rows, torch.tensor([[1, 4, 4]]))
    assert len(encoded) == 9, "what was written to is another"


def test_nobody_writes_to_what_is_kept(model, encoded):
    want = _encode(model, "a")[0].clone()
    _encode(model, "a")[0].fill_(torch.nan)
    assert torch.equal(_encode(model, "a")[0], want) and len(encoded) == 1


def test_other_weights_and_backends(model, encoded):
    """Weights written to in place, moved, or of another dtype; an op's other form."""
    _encode(model, "a")
    before = _encode(model, "a")[0]
    model.visual.merger.ln_q.weight.mul_(2)
    assert relative_error(_encode(model, "a")[0], before) > 1e-2
    model.visual.load_state_dict({name: value / 2 for name, value in model.visual.state_dict().items()})
    _encode(model, "a")
    with use_backend(varlen_attention="eager"):
        _encode(model, "a")
    assert len(encoded) == 4
    model.to(torch.bfloat16)
    assert _encode(model, "a")[0].dtype == torch.bfloat16 and len(model.kept_features) == 1


def test_they_are_bounded(model, encoded):
    """What was used longest ago makes room; what is larger than all of it is not kept."""
    one = _encode(model, "a")[0].nbytes
    model.kept_features = KeptFeatures(2 * one)
    for images, calls in (("a", 1), ("b", 2), ("a", 2), ("c", 3), ("a", 4)):
        _encode(model, images)
        assert len(encoded) == calls + 1 and model.kept_features.bytes <= 2 * one, images
    _encode(model, video=True)
    assert len(model.kept_features) == 1, "a clip of twice a picture's tokens"
    model.kept_features = KeptFeatures(one)
    _encode(model, "a", video=True)
    assert len(model.kept_features) == 1
    _encode(model, "a")
    assert len(encoded) == 7
    model.kept_features.clear()
    assert len(model.kept_features) == 0 == model.kept_features.bytes
    with pytest.raises(ValueError, match="max_bytes must be a non-negative int, got -1"):
        KeptFeatures(-1)


def test_where_nothing_is_kept(model, encoded, monkeypatch):
    """For training, whatever may change without notice, and where nobody asked: then no picture is hashed either."""
    monkeypatch.setattr(features, "digest", lambda *a, **k: pytest.fail("hashed"))
    with torch.enable_grad():
        _encode(model, "a")[0].sum().backward()
    assert all(one.grad is not None for one in model.visual.parameters())
    hook = model.visual.blocks[0].register_forward_hook(lambda *a: None)
    _encode(model, "a")
    hook.remove()
    model.kept_features = None
    _encode(model, "a")
    assert len(encoded) == 3


def test_kept_in_whatever_mode(model, encoded):
    with torch.inference_mode():
        want = _encode(model, "a")[0]
    model.requires_grad_(False)
    with torch.enable_grad():
        got = _encode(model, "a")[0]
        weight = torch.ones_like(got, requires_grad=True)
        (got * weight).sum().backward()
    assert len(encoded) == 1 and weight.grad is not None and torch.equal(weight.grad, want)


def test_copies_begin_empty(model, encoded):
    _encode(model, "a")
    for copy in (deepcopy(model).kept_features, pickle.loads(pickle.dumps(model.kept_features))):
        assert len(copy) == 0 and copy.max_bytes == model.kept_features.max_bytes


def test_an_agent_is_shown_each_picture_once(folder, processor, monkeypatch):
    """Three steps, with one more picture each."""
    from qwen2vl import GenerationConfig
    from qwen2vl.agents.loop import model_writer

    model = Qwen2VL.from_pretrained(folder, device="cpu")
    given = model.kept_features = KeptFeatures()
    write = model_writer(model, processor, config=GenerationConfig(max_new_tokens=2))
    calls, encode = [], model.visual.encode
    monkeypatch.setattr(model.visual, "encode", lambda kinds, grids: calls.append(grids) or encode(kinds, grids))
    messages = []
    for seed in range(3):
        picture = np.random.default_rng(seed).integers(0, 256, (56, 56, 3), dtype=np.uint8)
        messages += [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Go"}]}]
        messages += [{"role": "assistant", "content": write(messages)}]
    assert calls == [[(1, 4, 4)]] * 3 and len(given) == 3 and model.kept_features is given


def test_chat_encodes_each_picture_once(run, monkeypatch):
    calls, encode = [], VisionTower.encode
    monkeypatch.setattr(VisionTower, "encode", lambda self, kinds, grids: calls.append(1) or encode(self, kinds, grids))
    told = run("chat", "--model", "model", "--max-new-tokens", 2, stdin="/image day.png\nWhat?\nAnd now?\nSure?\n")
    assert told.exit_code == 0, told.output
    assert len(calls) == 1
