"""The tests that transformers shares between its models, over tiny models of the three families.

``tests.stacks.transformers_own`` hands this file to pytest, with ``transformers_tests`` on the path: the package
``tests`` of transformers' source distribution under a name that is not ours. What that distribution lacks is empty
there, the tests of generation among it.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import unittest
from typing import Any

import torch
import transformers
from transformers.testing_utils import torch_device

from qwen2vl_kernels.integrations.transformers import DEFAULT, status
from tests.integrations.tiny_models import LEFT_OFF, TOKEN_TYPES, VISION_START, config
from tests.kernels.ops.mrope_layouts import IMAGE, PAD


def shared(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"transformers_tests.{module}"), name)


class ModelTester:
    """What the shared tests ask for: a configuration, inputs for it and the sizes of what comes out.

    They cut inputs along their first dimension and stretch them, so each row has one image of one patch, which is one
    token, and its last token is padding.
    """

    is_training = True
    batch_size, seq_length = 3, 12
    num_hidden_layers, num_attention_heads = 2, 10
    pad_token_id = PAD

    def __init__(self, family: str) -> None:
        self.family = family
        self.hidden_size = (
            144 if family == "Qwen3VL" else 160
        )  # as wide as the towers, which some tests take for granted
        made = self.get_config()
        self.text_config, self.vision_config = made.text_config.to_dict(), made.vision_config.to_dict()
        self.causal_lm_class = getattr(transformers, f"{family}ForConditionalGeneration")

    def get_config(self) -> Any:
        made = config(self.family, hidden_size=self.hidden_size, num_attention_heads=self.num_attention_heads)
        made.vision_config.depth, made.vision_config.spatial_merge_size = self.num_hidden_layers, 1
        setattr(made.vision_config, "hidden_size" if self.family == "Qwen2VL" else "out_hidden_size", self.hidden_size)
        made.tie_word_embeddings = made.text_config.tie_word_embeddings = True
        made.vocab_size = made.text_config.vocab_size
        return made

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        made = self.get_config()
        ids = torch.randint(20, made.text_config.vocab_size, (self.batch_size, self.seq_length))
        ids[:, 2], ids[:, 3], ids[:, -1] = VISION_START, IMAGE, PAD
        inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
        if TOKEN_TYPES:
            inputs["mm_token_type_ids"] = (ids == IMAGE).long()
        inputs["pixel_values"] = torch.rand(self.batch_size, 3 * 2 * made.vision_config.patch_size**2)
        inputs["image_grid_thw"] = torch.ones(self.batch_size, 3, dtype=torch.long)
        return made, {name: value.to(torch_device) for name, value in inputs.items()}


MIXINS = (shared("test_modeling_common", "ModelTesterMixin"), shared("generation.test_utils", "GenerationTesterMixin"))
if importlib.util.find_spec("transformers_tests.test_training_mixin"):  # from 5.0 on
    MIXINS += (shared("test_training_mixin", "TrainingTesterMixin"),)


def case(family: str) -> type:
    classes = tuple(getattr(transformers, family + suffix) for suffix in ("Model", "ForConditionalGeneration"))
    members = {"all_model_classes": classes, "_is_composite": True, "model_tester": ModelTester(family)}
    members |= {"test_pruning": False, "test_head_masking": False}  # of heads, which 4.x asks of every model
    return type(family, (*MIXINS, unittest.TestCase), {**members, "__module__": __name__})


Qwen2VL, Qwen2_5_VL, Qwen3VL = case("Qwen2VL"), case("Qwen2_5_VL"), case("Qwen3VL")


def test_these_kernels_are_on_where_they_are_asked_for() -> None:
    """The image processor aside, which no model imports."""
    applied = {row.feature.rpartition(" ")[2] for row in status() if row.state == "applied"} - {"image_processor"}
    expected = set(DEFAULT) - LEFT_OFF - {"image_processor"}
    assert applied == (expected if os.environ["QWEN2VL_KERNELS"] else set())
