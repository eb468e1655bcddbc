"""Qwen2VLImageProcessorNative against the class of transformers that it extends."""

import copy
import json
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("transformers", reason="transformers is not installed")

from qwen2vl_kernels.integrations import image_preprocess
from qwen2vl_kernels.integrations.image_processor import Qwen2VLImageProcessorNative as Native
from qwen2vl_kernels.ops.image_to_patches import images_to_patches

Theirs = Native.__mro__[1]
IN_5 = Theirs.__name__ == "Qwen2VLImageProcessorPil"
only_5 = pytest.mark.skipif(not IN_5, reason="needs transformers 5")
SMALL = {"min_pixels": 56 * 56, "max_pixels": 150 * 150}
MEAN, STD = [0.1, 0.2, 0.3], [0.5, 0.25, 2.0]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def same(images, settings=None, **call) -> None:
    settings = SMALL if settings is None else settings
    got, want = (cls(**settings)(images, **call) for cls in (Native, Theirs))
    assert got.keys() == want.keys()
    for key in want:
        assert type(got[key]) is type(want[key]), key
        np.testing.assert_array_equal(np.asarray(got[key]), np.asarray(want[key]), err_msg=key, strict=True)


@pytest.fixture
def native_calls(monkeypatch):
    """How often the kernel was called: an answer may otherwise come from the class extended."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(len(args[0]))
        return images_to_patches(*args, **kwargs)

    monkeypatch.setattr(image_preprocess, "images_to_patches", counted)
    return calls


# Columns first, the order of every Pillow: these sizes lose at most twice as many rows as columns.
@given(
    st.integers(1, 300), st.floats(0.5, 2.0), st.sampled_from(["RGB", "L", "RGBA", "P", "LA", "1"]), st.integers(0, 99)
)
@example(28, 1.0, "RGB", 0)
@example(1, 1.0, "RGB", 0)
def test_same_bytes_as_transformers(height, ratio, mode, seed):
    width = max(1, round(height * ratio))
    image = Image.fromarray(noise(height, width, 4, seed=seed), "RGBA").convert(mode)
    same(image, return_tensors="pt")


def test_many_images_in_one_call_of_the_kernel(native_calls):
    images = [Image.fromarray(noise(*hw, 3, seed=n)) for n, hw in enumerate([(60, 91), (30, 40), (200, 180)])]
    same(images, return_tensors="np")
    assert native_calls == ([3] if IN_5 else [1, 1, 1])


@pytest.mark.parametrize("tensors", ["pt", "np", None])
def test_arrays_and_tensors_in_either_layout(tensors, native_calls):
    pixels = noise(90, 120, 3)
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    for image in (pixels, planes, torch.from_numpy(planes), pixels[::-1], pixels[:, ::-1], pixels[::2, ::3]):
        if isinstance(image, np.ndarray) or IN_5:
            same(image, return_tensors=tensors)
    assert native_calls


@only_5
def test_nested_lists_grey_and_transparent_arrays():
    same([[Image.fromarray(noise(40, 50, 3))], [Image.fromarray(noise(70, 50, 3))]], return_tensors="pt")
    same(noise(1, 60, 60), return_tensors="pt")
    same(noise(60, 70, 4), return_tensors="pt")


@pytest.mark.parametrize(
    "call",
    [
        {"do_normalize": False},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5},
        {"resample": Image.Resampling.BILINEAR},
        {"image_mean": MEAN, "image_std": STD},
        {"patch_size": 16},
        {"merge_size": 1},
        {"temporal_patch_size": 1},
        {"temporal_patch_size": 3},
        {"size": {"shortest_edge": 28 * 28 * 20, "longest_edge": 28 * 28 * 24}},
    ],
    ids=lambda call: ",".join(call),
)
def test_each_override_gives_what_transformers_gives(call):
    same(Image.fromarray(noise(97, 130, 3)), return_tensors="pt", **call)
    if "size" not in call:
        same(Image.fromarray(noise(97, 130, 3)), {**SMALL, **call}, return_tensors="pt")


def test_floating_point_pixels_are_left_to_transformers(native_calls):
    same(noise(60, 80, 3).astype(np.float32), return_tensors="pt")
    assert not native_calls


def test_without_resizing():
    same(Image.fromarray(noise(56, 84, 3)), return_tensors="pt", do_resize=False)
    with pytest.raises(ValueError, match=r"do_resize=False.*28, got 56 x 85"):
        Native()(Image.fromarray(noise(56, 85, 3)), do_resize=False)


def test_bytes_are_the_float_rows_before_normalising():
    image = Image.fromarray(noise(97, 130, 3))
    rows = Native(**SMALL, output="uint8")(image, return_tensors="pt")
    assert rows["pixel_values"].dtype == torch.uint8
    plain = Theirs(**SMALL)(image, do_rescale=False, do_normalize=False, return_tensors="pt")
    assert torch.equal(rows["pixel_values"].float(), plain["pixel_values"])
    assert torch.equal(rows["image_grid_thw"], plain["image_grid_thw"])


@only_5
def test_output_for_one_call():
    image, processor = Image.fromarray(noise(97, 130, 3)), Native(**SMALL)
    want = Theirs(**SMALL)(image, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(image, output="bfloat16", return_tensors="pt")["pixel_values"], want.bfloat16())
    assert processor(image, output="uint8")["pixel_values"].dtype == np.uint8
    assert processor(image)["pixel_values"].dtype == np.float32


def test_what_cannot_be_served_is_named():
    image = Image.fromarray(noise(60, 60, 3))
    with pytest.raises(ValueError, match=r"output must be one of.*'int8'"):
        Native(output="int8")
    with pytest.raises(ValueError, match=r"output='uint8' needs.*resample="):
        Native(output="uint8")(image, resample=Image.Resampling.BILINEAR)
    with pytest.raises(ValueError, match=r"output='uint8' needs.*float32"):
        Native(output="uint8")(np.zeros((60, 60, 3), np.float32))


@only_5
def test_what_5_cannot_serve_is_named():
    image = Image.fromarray(noise(60, 60, 3))
    with pytest.raises(ValueError, match="output='bfloat16' needs return_tensors='pt', got None"):
        Native()(image, output="bfloat16")
    with pytest.raises(ValueError, match=r"output='bfloat16' needs.*do_normalize=False"):
        Native()(image, output="bfloat16", return_tensors="pt", do_normalize=False)
    with pytest.raises(TypeError, match="videos are for Qwen2VLVideoProcessor"):
        Native()(image, videos=[image])


def test_released_settings_load_save_and_pickle(tmp_path):
    released = {
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(released), encoding="utf-8")
    first = Native.from_pretrained(tmp_path)
    assert first.size["longest_edge"] == 12845056 and first.merge_size == 2
    image = Image.fromarray(noise(97, 130, 3))
    want = Theirs.from_pretrained(tmp_path)(image, return_tensors="pt")["pixel_values"]
    first.save_pretrained(tmp_path / "again")
    again = Native.from_pretrained(tmp_path / "again")
    for processor in (first, again, pickle.loads(pickle.dumps(first)), copy.deepcopy(first)):
        assert type(processor) is Native
        assert processor.to_dict() == first.to_dict()
        assert torch.equal(processor(image, return_tensors="pt")["pixel_values"], want)


@only_5
def test_number_of_patches():
    processor = Native(**SMALL)
    for height, width in [(97, 130), (400, 30), (10, 10)]:
        patches = processor.get_number_of_image_patches(height, width, {})
        assert patches == len(processor(noise(height, width, 3))["pixel_values"])


@only_5
def test_transformers_finds_it_once_registered(tmp_path):
    from transformers import AutoImageProcessor, PretrainedConfig

    class Config(PretrainedConfig):
        model_type = "native_processor_test"

    AutoImageProcessor.register(Config, Native)
    Native(**SMALL).save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is Native


@only_5
def test_a_transformers_model_gives_the_same_logits():
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    vision: dict[str, Any] = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
    text: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]},
    }
    ids: dict[str, Any] = {
        "image_token_id": 60,
        "video_token_id": 61,
        "vision_start_token_id": 62,
        "vision_end_token_id": 63,
    }
    model = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **ids)).eval()
    image, logits = Image.fromarray(noise(97, 130, 3)), []
    for cls in (Native, Theirs):
        inputs = cls(**SMALL)(image, return_tensors="pt")
        slots = int(inputs["image_grid_thw"].prod()) // 4
        tokens = torch.tensor([[1, 62, *[60] * slots, 63, 2, 3]])
        types = (tokens == 60).int()
        with torch.no_grad():
            logits.append(model(input_ids=tokens, mm_token_type_ids=types, **inputs).logits)
    assert torch.isfinite(logits[0]).all() and logits[0].std() > 0
    assert torch.equal(*logits)
