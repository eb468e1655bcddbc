"""Parts of quantised layers, cut in the layout of their files: each holds the values that the whole has there."""

from itertools import pairwise

import pytest
import torch

from qwen2vl import CheckpointError
from qwen2vl.layers import Linear
from qwen2vl.quantised_slices import Slice, check_cut, own_part, stored_slices
from qwen2vl.quantization import Quantization, QuantLinear, from_stored
from tests.model.test_quantised import FORMATS, write_layer

OUTPUTS, COLUMNS = 512, 768
#: (dim, where the ranks' parts begin and end): in the middle, and where groups and blocks of 64 to 128 are cut.
CUTS = [(0, (0, 256, 512)), (0, (0, 8, 400, 512)), (1, (0, 384, 768)), (1, (0, 96, 416, 768)), (1, (0, 32, 736, 768))]


def loaded(how, stored, cut, shape):
    """A rank's layer, of what it reads of the whole one's tensors."""
    layer = QuantLinear(Linear(shape[1], shape[0], bias=False), how)
    places = stored_slices(how, cut)
    tensors = {
        one: tensor.narrow(*places[one][:2], places[one].count).contiguous() if one in places else tensor
        for one, tensor in stored.items()
    }
    tensors, layer.block, order = own_part(layer, cut, tensors)
    for one, tensor in from_stored(layer, tensors, order).items():
        layer.set(one, tensor)
    return layer


@pytest.mark.parametrize(("dim", "ends"), CUTS)
@pytest.mark.parametrize("name", FORMATS)
def test_parts_hold_the_values_of_the_whole(name, dim, ends):
    how = Quantization.from_dict(FORMATS[name])
    stored, values = write_layer(torch.randn(OUTPUTS, COLUMNS), FORMATS[name], 0)
    for begin, end in pairwise(ends):
        cut = Slice(dim, begin, end, ends[-1])
        check_cut("o_proj", how, cut)
        own = values.narrow(dim, cut.begin, cut.count)
        layer = loaded(how, stored, cut, own.shape)
        got = layer(torch.eye(own.shape[1])).T
        torch.testing.assert_close(got.double(), own, rtol=1e-5, atol=1e-6)


def test_groups_of_any_columns_are_filled_up_sparingly():
    """Half of a layer in the order of activations: blocks are of the size that takes the fewest bytes, and what fills
    them up is a third at most of what they hold."""
    how = Quantization.from_dict(FORMATS["gptq act-order"] | {"group_size": 128})
    stored, _ = write_layer(torch.randn(64, 4096), FORMATS["gptq act-order"] | {"group_size": 128}, 0)
    layer = loaded(how, stored, Slice(1, 2048, 4096, 4096), (64, 2048))
    columns = layer.weight.shape[1] * 2
    assert layer.block[1] in (32, 64) and 2048 < columns < 2048 * 4 // 3
    assert layer.order.shape == (columns,) and set(layer.order.tolist()) == set(range(2048))
    given = layer(torch.randn(2, 2048))
    assert given.shape == (2, 64) and given.isfinite().all()


def test_words_are_not_cut():
    how = Quantization.from_dict(FORMATS["gptq int4"])
    with pytest.raises(CheckpointError, match="down_proj: 48 of 384 for each rank cut stretches of 32; take fewer ran"):
        check_cut("down_proj", how, Slice(1, 48, 96, 384))
    with pytest.raises(CheckpointError, match="q_proj: 4 of 64 for each rank cut words of 8; take fewer ranks"):
        check_cut("q_proj", how, Slice(0, 4, 8, 64))


@pytest.mark.parametrize("change", [lambda g: g.fill_(0), lambda g: g - 100, lambda g: g + 100])
def test_groups_that_are_not_there(change):
    how = Quantization.from_dict(FORMATS["gptq act-order"])
    stored, _ = write_layer(torch.randn(64, 768), FORMATS["gptq act-order"], 0)
    stored["g_idx"] = change(stored["g_idx"])
    with pytest.raises(CheckpointError, match="g_idx: must name each of 12 groups 64 times at most"):
        loaded(how, stored, Slice(1, 384, 768, 768), (64, 384))


def test_a_part_out_of_order_is_refused_where_none_is_stated():
    how = Quantization.from_dict(FORMATS["gptq int4"])
    stored, _ = write_layer(torch.randn(64, 768), FORMATS["gptq int4"], 0)
    stored["g_idx"] = stored["g_idx"].flip(0)
    with pytest.raises(CheckpointError, match="g_idx: "):
        loaded(how, stored, Slice(1, 384, 768, 768), (64, 384))
