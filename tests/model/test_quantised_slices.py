"""Parts of quantised layers, cut in the layout of their files: each holds the values that the whole has there."""

import pytest
import torch

from qwen2vl import CheckpointError
from qwen2vl.layers import Linear
from qwen2vl.quantised_slices import Slice, check_cut, stored_slices, with_own_groups
from qwen2vl.quantization import Quantization, QuantLinear, from_stored
from tests.model.test_quantised import FORMATS, write_layer

OUTPUTS, COLUMNS = 512, 768
REFUSED = {
    ("gptq act-order", 1): "ordered by importance",
    ("fp8 blocks", 0): "256 of 512 for each rank cut blocks of 48",
}


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", FORMATS)
def test_parts_hold_the_values_of_the_whole(name, dim):
    how = Quantization.from_dict(FORMATS[name])
    stored, values = write_layer(torch.randn(OUTPUTS, COLUMNS), FORMATS[name], 0)
    whole = (OUTPUTS, COLUMNS)[dim]
    for part in range(2):
        cut = Slice(dim, part * whole // 2, (part + 1) * whole // 2, whole)
        if (name, dim) in REFUSED:
            with pytest.raises(CheckpointError, match=REFUSED[name, dim]):
                check_cut("o_proj", how, cut)
            continue
        check_cut("o_proj", how, cut)
        own = values.narrow(dim, cut.begin, cut.count)
        layer = QuantLinear(Linear(own.shape[1], own.shape[0], bias=False), how)
        places = stored_slices(how, cut)
        tensors = {
            one: tensor.narrow(*places[one][:2], places[one].count).contiguous() if one in places else tensor
            for one, tensor in stored.items()
        }
        for one, (shapes, _) in how.stored(*own.shape).items():
            assert tuple(tensors[one].shape) in shapes
        for one, tensor in from_stored(layer, with_own_groups(how, cut, tensors)).items():
            layer.set(one, tensor)
        got = layer(torch.eye(own.shape[1])).T
        torch.testing.assert_close(got.double(), own, rtol=1e-5, atol=1e-6)


def test_a_group_is_not_cut():
    how = Quantization.from_dict(FORMATS["gptq int4"])
    with pytest.raises(CheckpointError, match="down_proj: 96 of 384 for each rank cut groups of 64; take fewer ranks"):
        check_cut("down_proj", how, Slice(1, 96, 192, 384))
