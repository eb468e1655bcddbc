"""The errors that callers of qwen2vl can catch. All are ``ValueError`` so that generic handlers keep working."""


class Qwen2VLError(ValueError):
    """Base of every error that this package raises about what it was given."""


class MediaError(Qwen2VLError):
    """An image or a video could not be read, or is outside what the model accepts."""


class PromptError(Qwen2VLError):
    """Messages are malformed, or placeholders and media do not match."""


class CheckpointError(Qwen2VLError):
    """A checkpoint's configuration or weights are missing, damaged, unsupported or do not fit."""


class ContextLengthError(Qwen2VLError):
    """The prompt and the tokens asked for do not fit into the model's context window."""
