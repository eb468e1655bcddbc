"""config.json: a value is read wherever it stands, and a null hides none."""

import json
from dataclasses import replace

import pytest

from benchmarks.random_checkpoint import small_config
from qwen2vl import CheckpointError, Qwen2VLConfig
from tests.model.checkpoint_files import LAYOUTS

#: No value is the one that stands in where none is given.
CONFIG = replace(
    small_config(),
    text=replace(small_config().text, rope_theta=5e5, rms_norm_eps=1e-5, max_position_embeddings=4096),
    vision=replace(small_config().vision, embed_dim=320, num_heads=4, rope_theta=5e3, mlp_ratio=3, patch_size=16),
    torch_dtype="float16",
)
FLAT = CONFIG.to_dict()
KEYS = [key for key in FLAT if key not in ("model_type", "vision_config")]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("layout", ["nested 4.x", "nested 5.x"])
@pytest.mark.parametrize("at", ["top", "text"])
@pytest.mark.parametrize("other", ["null", "absent"])
def test_a_value_at_the_top_or_in_text_config_is_read(layout, key, at, other):
    """The other place holds null, as transformers 4.53 writes it, or nothing."""
    data = LAYOUTS[layout](FLAT)
    places = {"top": data, "text": data["text_config"]}
    for place in places.values():
        for name in _names(key):
            place.pop(name, None)
            if other == "null":
                place[name] = None
    places[at][key] = FLAT[key]
    if key == "rope_scaling":  # with it goes what transformers 5 writes of theta
        places[at]["rope_theta"] = FLAT["rope_theta"]
    if key == "rope_theta" and layout == "nested 5.x":
        data["text_config"]["rope_parameters"]["rope_theta"] = None
    assert Qwen2VLConfig.from_dict(data) == CONFIG


def _names(key):
    return {
        "rope_scaling": ("rope_scaling", "rope_parameters"),
        "torch_dtype": ("torch_dtype", "dtype"),
    }.get(key, (key,))


@pytest.mark.parametrize("key", [key for key in FLAT["vision_config"] if key not in ("in_chans", "spatial_patch_size")])
def test_a_null_in_vision_config_counts_as_left_out(key):
    null, without = json.loads(json.dumps(FLAT)), json.loads(json.dumps(FLAT))
    null["vision_config"][key] = None
    del without["vision_config"][key]
    assert Qwen2VLConfig.from_dict(null) == Qwen2VLConfig.from_dict(without)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "yarn"}}, "rope type 'yarn'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ],
)
def test_what_is_not_supported_is_refused_at_the_top_too(change, message):
    data = LAYOUTS["nested 4.x"](FLAT)
    for key in change:
        del data["text_config"][key]
    with pytest.raises(CheckpointError, match=message):
        Qwen2VLConfig.from_dict(data | change)
