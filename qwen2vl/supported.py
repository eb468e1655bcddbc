"""What is supported, and the test that shows it: what ``qwen2vl info`` prints, and the table of README."""

from __future__ import annotations

from typing import NamedTuple


class Supported(NamedTuple):
    """``shown_by``: a test's file and name, below ``tests/``."""

    what: str
    forms: str
    shown_by: str


SUPPORTED = (
    Supported(
        "sizes",
        "2B, 7B, 72B; others of the architecture",
        "model/test_weights.py::test_presets_have_the_released_sizes_and_cost_no_memory_on_meta",
    ),
    Supported(
        "checkpoints",
        "safetensors in one file or shards, as released and as transformers 4 and 5 save them",
        "model/test_checkpoint_files.py::test_a_head_of_its_own_is_used_whatever_the_config_says",
    ),
    Supported(
        "dtype float32", "logits and greedy tokens of transformers", "model/test_parity.py::test_64_greedy_tokens"
    ),
    Supported(
        "dtypes bfloat16, float16",
        "as close to float64 as transformers",
        "model/test_parity.py::test_sixteen_bits_are_as_close_as_transformers",
    ),
    Supported(
        "quantised",
        "AWQ of 4 bits, GPTQ of 4 and 8, fp8 by tensors, rows and blocks, experts too: loaded, run, saved",
        "model/test_quantised.py::test_it_answers_as_its_values_and_is_saved_as_it_was",
    ),
    Supported(
        "quantising",
        "to AWQ, also calibrated, to GPTQ of 4 and 8 bits, to fp8 by rows",
        "model/test_quantising.py::test_the_small_model_loses_little",
    ),
    Supported(
        "experts",
        "Qwen2-MoE's layers, with and without a shared expert: loaded, run, trained, saved",
        "model/test_moe.py::test_a_text_model_equals_qwen2_moe",
    ),
    Supported(
        "inference on several ranks",
        "tensor parallel, quantised weights and experts too",
        "model/test_parallel.py::test_answers_of_one_process",
    ),
    Supported("adapters", "LoRA as peft saves it", "model/test_adapter.py::test_it_is_what_peft_makes_of_it"),
    Supported("training, replicas", "DDP", "training/test_distributed.py::test_replicas_of_two"),
    Supported(
        "training, sharded",
        "FSDP2, with the decoder split by heads and columns where asked for",
        "training/test_distributed.py::test_fsdp_of_two_times_decoder_split_in_two",
    ),
)
