"""What can go wrong in training beside :class:`qwen2vl.errors.DataError`, all of it Qwen2VLError too."""

from ..errors import Qwen2VLError


class TrainingConfigError(Qwen2VLError):
    """A key of the configuration is unknown, missing, of the wrong type or out of range; the message names it."""


class NonFiniteLossError(Qwen2VLError):
    """The loss became infinite or not a number; the message names the samples it came from."""
