"""A small byte-level tokenizer with Qwen2-VL's special tokens, for benchmarks, tests and examples.

Its files have the released layout, so that the path of a released checkpoint loads them; only its merges are few.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from qwen2vl.prompt.files import write_tokenizer_files
from qwen2vl.prompt.tokenizer import BYTE_OF_CHAR, CONTROL_TOKENS, Tokenizer

#: The first id of a special token in the released checkpoints.
RELEASED_FIRST_ID = 151643

#: How Qwen2 splits text before it merges bytes: contractions, letters with one leading sign, single digits, signs with
#: the line ends behind them, line ends, spaces.
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

# Each merge joins two symbols that are bytes or came out of a merge before it. "Ġ" stands for the space, "Ċ" for the
# line end.
_MERGES = """
Ġ t|h e|i m|a g|i s|i n|e r|u s|us er|o n|r e|a t|o r|e n|a n|im ag|imag e|Ġ image|t u|tu re|i c|p ic
pic ture|Ġ picture|v i|vi d|vid e|vide o|Ġ video|Ġt he|an d|Ġ and|Ġ in|Ġ is|in g|o u|y ou|Ġ you|o f
Ġ of|Ġ a|Ġ s|Ġ w|Ġ o|h at|W hat|Ġw hat|a s|s is|as sis|assis t|assist an|assistan t|s y|s t|sy st
syst e|syste m|e s|i t|e d|a l|Ċ Ċ|Ġ Ġ|Ã ©|Ð ¾
"""


def write_byte_tokenizer(folder: str | os.PathLike[str], *, released_ids: bool = False) -> dict[str, int]:
    """Write tokenizer.json, tokenizer_config.json and chat_template.json into `folder`, which is made if missing.

    The vocabulary is the 256 bytes, a few dozen merges and `CONTROL_TOKENS`, all flagged special. Text is normalised to
    NFC and split as Qwen2 splits it, digits one by one. Equal calls write equal bytes.

    Args:
        released_ids: give the special tokens the ids 151643 to 151656 of the released checkpoints, and leave the ids
            between them and the merges without a token. Otherwise they follow the merges, for a small embedding.

    Returns:
        Name -> id of the special tokens.
    """
    merges = _MERGES.replace("\n", "|").strip("|").split("|")
    return write_bpe_tokenizer(folder, merges, RELEASED_FIRST_ID if released_ids else None)


def write_bpe_tokenizer(
    folder: str | os.PathLike[str], merges: Sequence[str], first_special_id: int | None = None
) -> dict[str, int]:
    """Write the same files with other merges.

    Args:
        merges: `"a b"` each, of symbols that are bytes or came out of a merge before.
        first_special_id: the id of the first of `CONTROL_TOKENS`; by default the one behind the merges.

    Returns:
        Name -> id of the special tokens.
    """
    # Two merges may result in the same symbol, which then has one id.
    symbols = list(dict.fromkeys([*BYTE_OF_CHAR, *(merge.replace(" ", "") for merge in merges)]))
    vocabulary = {symbol: n for n, symbol in enumerate(symbols)}
    first = len(symbols) if first_special_id is None else first_special_id
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
            # A special token takes the next free id unless the vocabulary says its id, as it does here.
            "vocab": vocabulary | special_ids,
            "merges": list(merges),
        },
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer_files(folder, Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(tokenizer))))
    return special_ids
