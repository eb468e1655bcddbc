"""Packs: what they hold, in which order, how they resume, and what is refused."""

from dataclasses import replace

import pytest
import torch

from qwen2vl.errors import DataError
from qwen2vl.training.packing import IGNORE, Packer, collate
from tests.training.samples import InMemory, make_example, mixed, tiny_config

CONFIG = tiny_config()


def test_a_pack_is_its_samples_end_to_end():
    examples = [make_example(0, "image"), make_example(1), make_example(2, "video"), make_example(3, "images")]
    batch = collate(examples, CONFIG)
    assert batch.cu_seqlens.tolist() == [0, *torch.tensor([e.tokens for e in examples]).cumsum(0).tolist()]
    assert batch.cu_seqlens.dtype == torch.int32 and batch.sources == tuple(e.source for e in examples)
    assert torch.equal(batch.pixel_values, torch.cat((examples[0].pixel_values, examples[3].pixel_values)))
    assert torch.equal(batch.image_grid_thw, torch.cat((examples[0].image_grid_thw, examples[3].image_grid_thw)))
    assert torch.equal(batch.pixel_values_videos, examples[2].pixel_values_videos)
    for e, begin, end in zip(examples, batch.cu_seqlens, batch.cu_seqlens[1:], strict=False):
        assert torch.equal(batch.input_ids[begin:end], e.input_ids)
        assert batch.targets[begin:end].tolist() == [*e.labels[1:].tolist(), IGNORE]
        alone = collate([e], CONFIG)
        assert torch.equal(batch.positions[:, begin:end], alone.positions[:, : e.tokens])
        assert batch.positions[:, begin].tolist() == [0, 0, 0]


def test_a_label_on_a_first_token_is_no_target_of_the_sample_before():
    """Every label is taught, also that of the first token, which nothing in its sample precedes."""
    a, b = (replace(make_example(i), labels=make_example(i).input_ids) for i in (0, 1))
    batch = collate([a, b], CONFIG)
    assert batch.targets[a.tokens - 1] == IGNORE
    assert int((batch.targets != IGNORE).sum()) == batch.supervised == a.tokens + b.tokens - 2


def test_a_pack_of_text_gets_a_placeholder_image_without_loss():
    example = make_example(0)
    batch = collate([example], CONFIG)
    assert batch.tokens == example.tokens + 1 and batch.image_grid_thw.tolist() == [[1, 2, 2]]
    assert batch.pixel_values.shape == (4, 588) and batch.sources == ("memory:0", None)
    assert batch.targets[-1] == IGNORE and batch.cu_seqlens.tolist() == [0, example.tokens, example.tokens + 1]
    assert collate([make_example(0, "video")], CONFIG).pixel_values is None


def test_first_fit_by_hand():
    lengths = [10, 7, 4, 9, 3, 6]
    packer = Packer(InMemory([make_example(i, length=n) for i, n in enumerate(lengths)]), CONFIG, max_tokens=14,
                    lookahead=3)  # fmt: skip
    packs = [[int(s.split(":")[1]) for s in next(packer).sources if s] for _ in range(5)]
    # Waiting 0 1 2: 10 + 4. Then 1 3 4: 7 + 3. Then 3 5 0: 9. Then 5 0 1: 6 + 7. Then 0 2 3: 10 + 4. Short ones lead.
    assert packs == [[2, 0], [4, 1], [3], [5, 1], [2, 0]]


def test_every_sample_comes_once_an_epoch_and_packs_keep_to_the_budget():
    packer = Packer(mixed(24), CONFIG, max_tokens=40, lookahead=8)
    seen = []
    while len(seen) < 24 * 3:
        batch = next(packer)
        real = [s for s in batch.sources if s]
        assert batch.tokens - (len(batch.sources) - len(real)) <= 40
        seen += real
    counts = {s: seen.count(s) for s in set(seen)}
    assert len(counts) == 24 and max(counts.values()) - min(counts.values()) <= 2


@pytest.mark.parametrize("lookahead", [1, 5, 30])
def test_resumes_at_every_pack(lookahead):
    """Also across the end of the data (24 samples, a buffer of 30), and twice in a row."""

    def make():
        return Packer(mixed(24), CONFIG, max_tokens=40, lookahead=lookahead)

    packer, states, packs = make(), [], []
    for _ in range(14):
        states.append(packer.state_dict())
        packs.append(next(packer))
    for i, state in enumerate(states):
        resumed = make()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        for expected in packs[i : i + 3]:
            got = next(resumed)
            assert got.sources == expected.sources and torch.equal(got.input_ids, expected.input_ids)


def test_refusals():
    with pytest.raises(DataError, match=r"^memory:3: has 9 tokens, more than max_tokens 8"):
        next(Packer(InMemory([make_example(3)]), CONFIG, max_tokens=8))
    with pytest.raises(DataError, match="without giving a single sample"):
        next(Packer(InMemory([]), CONFIG, max_tokens=8))
    with pytest.raises(DataError, match="max_tokens and lookahead must be positive, got 0 and 64"):
        Packer(InMemory([]), CONFIG, max_tokens=0)
    good, image = make_example(1), make_example(4, "image")
    for bad, message in (
        (replace(good, input_ids=good.input_ids.int()), "input_ids must be int64 of shape"),
        (replace(good, labels=good.labels[1:]), r"labels must be int64 \(9,\), got torch.int64 \(8,\)"),
        (replace(good, input_ids=good.input_ids + 60), r"input_ids must be in \[0, 64\)"),
        (replace(good, labels=good.labels.clamp_min(0) + 64), r"labels must be -100 or in \[0, 64\)"),
        (replace(image, pixel_values=None), "pixel_values and image_grid_thw must be given together"),
        (replace(image, pixel_values=image.pixel_values[1:]), "image_grid_thw stands for 16 patches, pixel_values has"),
        (replace(good, input_ids=torch.full((9,), 60)), "input_ids has 9 placeholders 60, image_grid_thw makes 0"),
    ):
        with pytest.raises(DataError, match=f"^{bad.source}: {message}"):
            collate([bad], CONFIG)
    floats = replace(image, pixel_values=torch.zeros(16, 1176), source="memory:5")
    with pytest.raises(DataError, match=r"^memory:5: pixel_values has rows of \(1176,\) torch.float32, those of memo"):
        collate([image, floats], CONFIG)
    with pytest.raises(DataError, match="at least one sample"):
        collate([], CONFIG)
