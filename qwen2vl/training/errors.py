"""What can go wrong in training, all of it :class:`qwen2vl.errors.Qwen2VLError`."""

from ..errors import Qwen2VLError


class TrainingConfigError(Qwen2VLError):
    """A key of the configuration is unknown, missing, of the wrong type or out of range; the message names it."""


class DataError(Qwen2VLError):
    """A sample cannot be trained on; the message says where it came from."""


class NonFiniteLossError(Qwen2VLError):
    """The loss became infinite or not a number; the message names the samples it came from."""
