"""What a run begins from: a Qwen2 text checkpoint and a CLIP tower, each as transformers saves and runs it."""

import json
import shutil

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, Qwen2Config, Qwen2ForCausalLM

from qwen2vl.errors import CheckpointError
from qwen2vl.model import Qwen2VL
from qwen2vl.training.config import ModelConfig
from qwen2vl.training.stages import CLIP_DROPPED, build_model, load_clip_tower
from qwen2vl_kernels import use_backend
from tests.training.samples import tiny_config

CONFIG = tiny_config(tie=False)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a Qwen2 and a CLIP of the tiny model's shapes, and the model's own config."""
    root = tmp_path_factory.mktemp("parts")
    text = CONFIG.text
    torch.manual_seed(3)
    llm = Qwen2ForCausalLM(Qwen2Config(
        hidden_size=text.hidden_size, intermediate_size=text.intermediate_size, vocab_size=text.vocab_size,
        num_hidden_layers=text.num_hidden_layers, num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads, rms_norm_eps=text.rms_norm_eps, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta}, initializer_range=0.2,
    ))  # fmt: skip
    llm.save_pretrained(root / "llm")
    vision = CONFIG.vision
    clip = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=vision.embed_dim, intermediate_size=4 * vision.embed_dim, num_hidden_layers=vision.depth,
        num_attention_heads=vision.num_heads, image_size=56, patch_size=14, hidden_act="quick_gelu",
        layer_norm_eps=1e-6, initializer_range=0.3,
    ))  # fmt: skip
    with torch.no_grad():
        for p in clip.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn(p.shape))
    clip.save_pretrained(root / "clip")
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    return root, llm.eval(), clip.eval()


def build(root, **parts):
    return build_model(ModelConfig(config=str(root / "model"), dtype="float32", **parts))


def test_a_model_begun_from_both_has_their_weights_and_a_merger_of_its_own(parts):
    root, llm, _ = parts
    model = build(root, llm=str(root / "llm"), tower=str(root / "clip"))
    assert model.training and not any(p.is_meta for p in model.parameters())
    for name, theirs in llm.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], theirs), name
    merger = dict(model.visual.merger.named_parameters())
    assert {float(merger[name].detach().abs().max()) for name in merger if name.endswith("bias")} == {0.0}
    assert all(0.01 < float(merger[name].detach().std()) < 0.03 for name in merger if merger[name].ndim > 1)
    again = build(root, llm=str(root / "llm"), tower=str(root / "clip"))
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    alone = build(root)
    assert not torch.equal(alone.lm_head.weight, model.lm_head.weight)


def test_a_head_of_its_own_does_not_go_into_a_tied_model(parts, tmp_path):
    """Qwen2's config leaves the flag out where it is false."""
    root, _, _ = parts
    shutil.copytree(root / "llm", tmp_path / "llm")
    shutil.copytree(root / "model", tmp_path / "model")
    theirs = json.loads((tmp_path / "llm" / "config.json").read_text())
    theirs.pop("tie_word_embeddings", None)
    (tmp_path / "llm" / "config.json").write_text(json.dumps(theirs))
    ours = CONFIG.to_dict() | {"tie_word_embeddings": True}
    (tmp_path / "model" / "config.json").write_text(json.dumps(ours))
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        build(tmp_path, llm=str(tmp_path / "llm"))


def test_text_after_it_is_that_of_qwen2(parts):
    root, llm, _ = parts
    model = build(root, llm=str(root / "llm")).eval()
    ids = torch.randint(0, 56, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), use_backend("eager"):
        torch.testing.assert_close(model(ids), llm(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frames", ["equal", "different"])
def test_the_tower_s_blocks_are_those_of_clip(parts, frames):
    """Patch embedding inflated to two frames and every block, beside CLIP's own modules on the same patches.

    CLIP adds positions and a class token and normalises before its blocks, none of which the tower has: compared are
    its convolution, and its blocks on what goes into ours, with rotary angles of zero.
    """
    root, _, clip = parts
    model = build(root, tower=str(root / "clip")).eval()
    encoder = getattr(clip, "vision_model", clip)
    images = torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(1))
    pair = [images, images] if frames == "equal" else [images, images.flip(0)]
    rows = torch.stack(pair, 2).flatten(1)  # (patches, channel x frame x pixel)
    with torch.no_grad(), use_backend("eager"):
        ours = rows @ model.visual.patch_embed.proj.weight.flatten(1).T
        theirs = sum(encoder.embeddings.patch_embedding(image).flatten(1) for image in pair) / 2
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        x = ours
        for block, their in zip(model.visual.blocks, encoder.encoder.layers, strict=True):
            h = their.layer_norm1(x)
            normal = torch.nn.functional.layer_norm(x, x.shape[-1:], block.norm1.weight, block.norm1.bias, 1e-6)
            torch.testing.assert_close(normal, h)
            heads = CONFIG.vision.num_heads
            qkv = torch.nn.functional.linear(normal, block.attn.qkv.weight, block.attn.qkv.bias)
            q, k, v = qkv.view(len(x), 3, heads, -1).permute(1, 2, 0, 3)
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
            attended = torch.nn.functional.linear(mixed, block.attn.proj.weight, block.attn.proj.bias)
            torch.testing.assert_close(attended, their.self_attn(h[None], None)[0][0], rtol=1e-4, atol=1e-5)
            x = x + attended
            h = their.layer_norm2(x)
            hidden = torch.nn.functional.linear(h, block.mlp.fc1.weight, block.mlp.fc1.bias)
            hidden = hidden * torch.sigmoid(1.702 * hidden)
            out = torch.nn.functional.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)
            torch.testing.assert_close(out, their.mlp(h), rtol=1e-4, atol=1e-5)
            x = x + out


def test_what_is_dropped_of_clip_is_said(parts):
    root, _, _ = parts
    model = Qwen2VL.from_config(CONFIG, device="cpu", dtype="float32")
    dropped = load_clip_tower(model, root / "clip")
    assert "embeddings.position_embedding.weight" in dropped and "embeddings.class_embedding" in dropped
    assert set(dropped) <= set(CLIP_DROPPED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 4}, "num_attention_heads 4, the tower has 2"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu', the tower has 'quick_gelu'"),
        ({"patch_size": 16}, "patch_size 16, the tower has 14"),
    ],
)
def test_a_clip_of_another_kind_is_refused(parts, tmp_path, change, message):
    root, _, _ = parts
    config = json.loads((root / "clip" / "config.json").read_text())
    (tmp_path / "model.safetensors").symlink_to(root / "clip" / "model.safetensors")
    for stated in ({**config, **change}, {"vision_config": {**config, **change}}):
        (tmp_path / "config.json").write_text(json.dumps(stated))
        with pytest.raises(CheckpointError, match=f"config.json does not fit: {message}"):
            build(root, tower=str(tmp_path))


def test_tensors_that_do_not_fit_are_listed(parts, tmp_path):
    root, _, _ = parts
    deeper = CONFIG.to_dict()
    deeper["vision_config"]["depth"] = 3
    (tmp_path / "config.json").write_text(json.dumps(deeper))
    with pytest.raises(CheckpointError, match="num_hidden_layers 2, the tower has 3"):
        build_model(ModelConfig(config=str(tmp_path), dtype="float32", tower=str(root / "clip")))
    with pytest.raises(CheckpointError, match=r"must be a Qwen2 checkpoint .* got 'clip_vision_model'"):
        build(root, llm=str(root / "clip"))
