"""The errors that callers of qwen2vl can catch. All are ``ValueError`` so that generic handlers keep working."""

import re

MAX_MESSAGE = 4000  # characters of an error's text, whatever it quotes
#: Control characters but for tab and line end, marks that turn the direction of text, and halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def readable(text: str, most: int = MAX_MESSAGE) -> str:
    """What others wrote as people can read it in a terminal or a log: of at most ``most`` characters (200 or more), of
    longer texts the beginning and the end, and with control characters as escapes."""
    head, tail = _escaped(text[:most]), _escaped(text[-most:])
    if len(text) <= most and len(head) <= most:
        return head
    return f"{head[: most // 2]} ... ({len(text)} characters) ... {tail[-(most // 5) :]}"


def _escaped(text: str) -> str:
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


class Qwen2VLError(ValueError):
    """Base of every error that this package raises about what it was given. Its text is :func:`readable`."""

    def __init__(self, *args: object):
        super().__init__(*(readable(one) if isinstance(one, str) else one for one in args))


class MediaError(Qwen2VLError):
    """An image or a video could not be read, or is outside what the model accepts."""


class MediaWarning(UserWarning):
    """An image or a video was read, but less of it than its file holds or says that it holds."""


class PromptError(Qwen2VLError):
    """Messages are malformed, or placeholders and media do not match."""


class CheckpointError(Qwen2VLError):
    """A checkpoint's configuration or weights are missing, damaged, unsupported or do not fit."""


class ContextLengthError(Qwen2VLError):
    """The prompt and the tokens asked for do not fit into the model's context window."""


class GroundingError(Qwen2VLError):
    """Boxes or quadrilaterals are out of range, or their markup is malformed."""


class FunctionCallError(Qwen2VLError):
    """A function call of a model is malformed, or names what was not declared."""


MAX_SOURCE = 300  # characters of a sample's place in a text


class DataError(Qwen2VLError):
    """A training sample, or the description of a set of them, cannot be used.

    Attributes:
        source: where the sample is, "data.jsonl:17" or "shard-0003.tar:000042", empty for what concerns no single one.
    """

    def __init__(self, message: str, source: str = ""):
        source = readable(source, MAX_SOURCE)
        super().__init__(f"{source}: {message}" if source else message)
        self.source = source

    def __reduce__(self):  # a DataLoader's workers send it to the main process
        message = str(self)
        return type(self), (message[len(self.source) + 2 :] if self.source else message, self.source)


def install_hint(package: str) -> str:
    """The command that installs ``package``, which an extra of this distribution asks for, in the version it asks for.

    It names the package itself: pip would look for ``qwen2vl[...]`` on an index that has no such distribution.
    """
    from importlib import metadata  # which costs what no error does

    try:
        wanted = metadata.requires("qwen2vl") or []
    except metadata.PackageNotFoundError:  # run from its sources
        wanted = []
    named = (one.partition(";")[0].strip() for one in wanted)
    found = next((one for one in named if re.fullmatch(rf"{re.escape(package)}\W.*", one)), package)
    return f'pip install "{found}"'
