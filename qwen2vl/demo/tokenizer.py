"""A small byte-level tokenizer with Qwen2-VL's special tokens, for demos, tests and benchmarks without a
released checkpoint.

It reads and writes the released file layout, so the real loading path serves it; only its merges are few.
"""

import json
import os
from pathlib import Path

from ..tokenizer import BYTE_OF_CHAR, CONTROL_TOKENS, END_OF_TEXT, IM_END

RELEASED_FIRST_ID = 151643

# Contractions, letters with one leading sign, single digits, signs with their line ends, line ends, spaces.
PRE_TOKENIZATION_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)|\s+",
    )
)

# Each merge is a pair of symbols that exist by then; "Ġ" stands for the space, "Ċ" for the newline.
_MERGES = """
Ġ t|h e|i m|a g|i s|i n|e r|u s|us er|o n|r e|a t|o r|e n|a n|im ag|imag e|Ġ image|t u|tu re|i c|p ic
pic ture|Ġ picture|v i|vi d|vid e|vide o|Ġ video|Ġt he|an d|Ġ and|Ġ in|Ġ is|in g|o u|y ou|Ġ you|o f
Ġ of|Ġ a|Ġ s|Ġ w|Ġ o|h at|W hat|Ġw hat|a s|s is|as sis|assis t|assist an|assistan t|s y|s t|sy st
syst e|syste m|e s|i t|e d|a l|Ċ Ċ|Ġ Ġ|Ã ©|Ð ¾
"""

CHAT_TEMPLATE = (
    "{%- set seen = namespace(image=0, video=0) -%}"
    "{%- if messages[0].role != 'system' -%}"
    "{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}"
    "{%- else -%}"
    "{%- for item in message.content -%}"
    "{%- if item.type == 'image' or 'image' in item or 'image_url' in item -%}"
    "{%- set seen.image = seen.image + 1 -%}"
    "{%- if add_vision_id -%}{{- 'Picture ' ~ seen.image ~ ': ' -}}{%- endif -%}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif item.type == 'video' or 'video' in item or 'video_url' in item -%}"
    "{%- set seen.video = seen.video + 1 -%}"
    "{%- if add_vision_id -%}{{- 'Video ' ~ seen.video ~ ': ' -}}{%- endif -%}"
    "{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- else -%}{{- item.text -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def write_byte_tokenizer(folder: str | os.PathLike[str], *, released_ids: bool = False) -> dict[str, int]:
    """Write tokenizer.json, tokenizer_config.json and chat_template.json into `folder`, which is made where
    missing.

    The vocabulary is the 256 bytes, a few dozen merges and `CONTROL_TOKENS`, all flagged special. Text is
    normalised to NFC and split as Qwen2 splits it, digits one by one. Equal calls write equal bytes.

    Args:
        released_ids: give the special tokens the ids 151643 to 151656 of the released checkpoints and leave
            the ids between them and the merges without a token; otherwise they follow the merges directly,
            for a small embedding.

    Returns:
        Name -> id of the special tokens.
    """
    merges = _MERGES.replace("\n", "|").strip("|").split("|")
    symbols = [*BYTE_OF_CHAR, *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {symbol: n for n, symbol in enumerate(symbols)}
    first = RELEASED_FIRST_ID if released_ids else len(symbols)
    special_ids = {name: first + n for n, name in enumerate(CONTROL_TOKENS)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}

    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token_id, "content": name, **flags} for name, token_id in special_ids.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": PRE_TOKENIZATION_PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                byte_level,
            ],
        },
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            # An added token takes the next free id unless the vocabulary already places it: this keeps the
            # released ids.
            "vocab": vocabulary | special_ids,
            "merges": merges,
        },
    }
    tokenizer_config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(token_id): {"content": name, **flags} for name, token_id in special_ids.items()},
        "additional_special_tokens": [name for name in CONTROL_TOKENS if name != END_OF_TEXT],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": END_OF_TEXT,
        "padding_side": "left",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", tokenizer_config),
        ("chat_template.json", {"chat_template": CHAT_TEMPLATE}),
    ):
        text = json.dumps(content, ensure_ascii=False, indent=2) + "\n"
        (folder / name).write_bytes(text.encode("utf-8"))
    return special_ids
