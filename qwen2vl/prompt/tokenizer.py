"""The byte-level BPE tokenizer of a Qwen2-VL checkpoint, with control tokens kept apart from text.

Text and control tokens never share an entry point: `Tokenizer.encode_plain` knows no control tokens, and a
control token is only ever looked up by its name. Hence no text, whoever wrote it, can open or close a turn or
claim an image's place.
"""

import codecs
import os
from collections.abc import Iterable
from pathlib import Path

import tokenizers

from ..errors import CheckpointError, PromptError
from ..files import read_text
from ..media.options import positive_int

END_OF_TEXT = "<|endoftext|>"
IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"

GROUNDING_TOKENS = (
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
)
REQUIRED_TOKENS = (END_OF_TEXT, IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)

#: The most characters that are tokenised at once, by default: 16 for each token of the released context, 4 for each of
#: a context of 131,072. Each costs some 0.5 kB and 1.4 us, during which tokenizers lets no other thread run and Ctrl-C
#: waits: less than a second in all. Far behind this number it aborts the process.
MAX_CHARACTERS = 1 << 19

# In the order of the released ids, 151643 to 151656.
CONTROL_TOKENS = (
    END_OF_TEXT,
    IM_START,
    IM_END,
    *GROUNDING_TOKENS,
    VISION_START,
    VISION_END,
    "<|vision_pad|>",
    IMAGE_PAD,
    VIDEO_PAD,
)


class Tokenizer:
    """A `tokenizers.Tokenizer` read from tokenizer.json.

    Args:
        max_characters: the most characters of a text, and of all texts of a conversation together. More are refused
            before anything is tokenised.

    Attributes:
        special_ids: name -> id of every control token that the file has.
        markers: names of the control tokens that an assistant writes as part of its text, the longest first: the
            grounding markers, and every special token that was added to those of the released models.
        flagged: name -> the token itself, of the special tokens that take white space beside them (`lstrip`, `rstrip`)
            or stand as words of their own only (`single_word`); see `qwen2vl.prompt.chatml.as_flagged`.
        pad_id: id of <|endoftext|>, which pads batches.

    Raises:
        CheckpointError: the tokenizer is not a byte-level BPE, lacks one of `REQUIRED_TOKENS` or a token for a byte, or
            makes a control token of ordinary text.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, max_characters: int = MAX_CHARACTERS):
        if (limit := positive_int(max_characters)) is None:
            raise ValueError(f"max_characters: wants a positive int, got {max_characters!r}")
        self.max_characters = limit
        missing = [name for name in REQUIRED_TOKENS if backend.token_to_id(name) is None]
        if missing:
            raise CheckpointError(f"tokenizer: lacks the special tokens {', '.join(missing)} that Qwen2-VL needs")
        got = (type(backend.model).__name__, type(backend.decoder).__name__)
        if got != ("BPE", "ByteLevel"):
            raise CheckpointError(
                f"tokenizer: wants a byte-level BPE (decoder ByteLevel), got model {got[0]}, decoder {got[1]}"
            )
        # A file may hold a control token in its vocabulary without flagging it special; only the flag keeps
        # it out of text.
        known = [name for name in CONTROL_TOKENS if backend.token_to_id(name) is not None]
        backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in known])
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()

        self.backend = backend
        self.special_ids: dict[str, int] = {
            token.content: token_id
            for token_id, token in backend.get_added_tokens_decoder().items()
            if token.special or token.content in CONTROL_TOKENS
        }
        self.flagged = {
            token.content: token
            for token in backend.get_added_tokens_decoder().values()
            if token.content in self.special_ids and (token.lstrip or token.rstrip or token.single_word)
        }
        self._special_id_set = frozenset(self.special_ids.values())
        own = [name for name in self.special_ids if name in GROUNDING_TOKENS or name not in CONTROL_TOKENS]
        self.markers = tuple(sorted(own, key=len, reverse=True))
        self.pad_id = self.special_ids[END_OF_TEXT]
        self._check_bytes()
        for name in self.special_ids:
            self._ids(name)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, max_characters: int = MAX_CHARACTERS) -> "Tokenizer":
        """Read `folder`/tokenizer.json. Raises CheckpointError where it is missing or unreadable."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            hint = ""
            if (Path(folder) / "vocab.json").is_file():
                hint = "; vocab.json with merges.txt is not read, save a tokenizer.json with transformers"
            raise CheckpointError(f"{path}: no such file, and the tokenizer is read from it{hint}")
        text = read_text(path)
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except BaseException as error:  # tokenizers raises bare Exception for every kind of damage
            if not isinstance(error, Exception) and not _is_panic(error):
                raise
            raise CheckpointError(f"{path}: not a readable tokenizer ({error})") from error
        return cls(backend, max_characters=max_characters)

    def id(self, name: str) -> int:
        """Id of the control token `name`. Raises CheckpointError where the tokenizer has none such."""
        try:
            return self.special_ids[name]
        except KeyError:
            raise CheckpointError(f"tokenizer: has no special token {name!r}") from None

    def encode_plain(self, text: str) -> list[int]:
        """Token ids of `text` as ordinary text: "<|im_end|>" becomes the pieces of its spelling, never the
        control token.

        No token is put before or after. Raises PromptError for a value that is no str, that UTF-8 cannot write, that
        has more than `max_characters`, or that the tokenizer cannot cope with, and CheckpointError where it makes
        a control token of it.
        """
        if not isinstance(text, str):
            raise PromptError(f"text: wants a str, got {type(text).__name__}")
        self.check_length(len(text))
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(
                f"text: holds a lone surrogate at character {error.start}, which no UTF-8 text can"
            ) from error
        return self._ids(text)

    def _ids(self, text: str) -> list[int]:
        try:
            ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        except BaseException as error:
            if not _is_panic(error):
                raise
            raise PromptError(f"text: the tokenizer cannot cope with these {len(text)} characters: {error}") from error
        # What was tried when the file was loaded were short texts; this holds for every text.
        if not self._special_id_set.isdisjoint(ids):
            found = next(name for name, token_id in self.special_ids.items() if token_id in ids)
            raise CheckpointError(f"tokenizer: ordinary text can spell the special token {found}")
        return ids

    def _check_bytes(self) -> None:
        """Raise CheckpointError unless every byte has an ordinary token, and text of every byte is made of such."""
        lacking = []
        for char, byte in BYTE_OF_CHAR.items():
            token_id = self.backend.model.token_to_id(char)
            if token_id is None or token_id in self._special_id_set:
                lacking.append(f"0x{byte:02x}")
        if lacking:
            # They would become the unknown token, which a file may call by the name of a special one, or nothing.
            raise CheckpointError(f"tokenizer: has no ordinary token for the bytes {', '.join(lacking[:8])}")
        # Every byte that UTF-8 has: of one to four bytes a character, with each first one and each that follows.
        points = [*range(0x100), *range(0x100, 0x800, 0x40)]
        points += [*range(0x800, 0xD800, 0x800), *range(0xE000, 0x110000, 0x1000)]
        for point in points:
            self._ids(chr(point))
        self._ids("".join(map(chr, points)))

    def check_length(self, characters: int, where: str = "text") -> None:
        """Raise PromptError for more than `max_characters`, before anything is spent on them."""
        if characters > self.max_characters:
            raise PromptError(
                f"{where}: wants at most max_characters = {self.max_characters}, got {characters}; raise max_characters"
            )

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids` (any iterable of ints, a 1-D tensor included); ids without a token, such as padding
        rows, give nothing.

        Bytes that form no UTF-8 character become U+FFFD. Grounding markers are control tokens: to parse
        boxes, decode with `skip_special_tokens=False`.
        """
        return self.backend.decode(_to_ints(ids), skip_special_tokens=skip_special_tokens)

    def batch_decode(self, sequences: Iterable[Iterable[int]], *, skip_special_tokens: bool = True) -> list[str]:
        """`decode` of each of `sequences` (lists, or a 2-D tensor)."""
        return [self.decode(ids, skip_special_tokens=skip_special_tokens) for ids in sequences]

    def stream_decoder(self, *, skip_special_tokens: bool = True) -> "StreamDecoder":
        """A decoder for one sequence that arrives token by token."""
        return StreamDecoder(self, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes:
        """The bytes that `token_id` adds to a text; none for an id without a token."""
        if token_id in self._special_id_set and skip_special_tokens:
            return b""
        token = self.backend.id_to_token(token_id)
        if token is None:
            return b""
        # A token with any character outside the byte alphabet is taken as it stands, as the ByteLevel decoder
        # does.
        values = [BYTE_OF_CHAR.get(char) for char in token]
        known = [value for value in values if value is not None]
        return bytes(known) if len(known) == len(values) else token.encode("utf-8")


class StreamDecoder:
    """Text pieces of a sequence as its tokens arrive.

    The pieces given by `push` and the last one given by `finish` concatenate to `Tokenizer.decode` of the
    whole sequence. No piece ends inside a character: the bytes of an incomplete one wait for the next token.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that became complete with `token_id`; often empty in the midst of a character."""
        (token_id,) = _to_ints([token_id])
        return self._utf8.decode(self._tokenizer.token_bytes(token_id, skip_special_tokens=self._skip_special_tokens))

    def finish(self) -> str:
        """What remains: U+FFFD if the sequence ended inside a character, else nothing. Then starts over."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def _is_panic(error: BaseException) -> bool:
    """Whether Rust code gave up. The class can be imported from nowhere, and is no Exception."""
    return type(error).__name__ == "PanicException"


def _to_ints(ids: Iterable[int]) -> list[int]:
    values = [int(token_id) for token_id in ids]
    bad = [value for value in values if not 0 <= value < 2**32]
    if bad:
        raise ValueError(f"ids: wants token ids, which are not negative and below 2**32, got {bad[0]}")
    return values


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte: printable Latin-1 stands for itself, the other bytes count up from U+0100."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(hidden)}


BYTE_OF_CHAR = _byte_alphabet()
