"""The errors that callers of qwen2vl can catch. All are ``ValueError`` so that generic handlers keep working."""

import re


class Qwen2VLError(ValueError):
    """Base of every error that this package raises about what it was given."""


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


class DataError(Qwen2VLError):
    """A training sample, or the description of a set of them, cannot be used.

    Attributes:
        source: where the sample is, "data.jsonl:17" or "shard-0003.tar:000042", empty for what concerns no single one.
    """

    def __init__(self, message: str, source: str = ""):
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
