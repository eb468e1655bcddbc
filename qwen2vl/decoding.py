"""Steps of decoding: run one by one, or captured once as a CUDA graph and replayed; and choices that the host reads
while the next step runs.

A captured step serves a number of rows and a capacity: 1, 2, 4 or 8 rows or a multiple of 8, of which those that no
sequence needs idle, over a cache of its own, to which prompts are copied. Nothing in it depends on lengths, settings or
``max_new_tokens``. It is kept with its cache for the next answer, and all that a model captures on a stream shares one
pool of memory.
"""

from __future__ import annotations

import time
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from .cache import KVCache
from .choosing import Choice
from .errors import Qwen2VLError
from .graphs import capture, pool_of, round_up, setting_of, unfit, weights_of
from .model import Qwen2VL
from .parallel import TensorParallel

#: The caches of captured steps that are kept between answers take at most so many bytes, for each model.
KEPT_BYTES = 1 << 30
#: Captured steps have room for at least so many tokens a row.
LEAST_CAPACITY = 256


class Steps:
    """One more token for each row of a cache, time after time: ``steps(tokens (B,))`` gives logits ``(B, vocab)``."""

    def __init__(self, model: Qwen2VL, cache: KVCache) -> None:
        self.model, self.cache = model, cache

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.step(tokens.unsqueeze(1), self.cache).squeeze(1)

    def serves(self, capacity: int) -> bool:
        """Whether they can be gone on with, up to ``capacity`` tokens a row."""
        return self.cache.capacity >= capacity

    def close(self) -> None:
        """No more tokens are wanted."""


class _Captured:
    """A step over a cache of its own. It holds no model, which it would keep alive."""

    @torch.inference_mode(False)  # tensors that the next answer can change in whatever mode it runs
    @torch.no_grad()  # inside, as leaving inference mode switches gradients on
    def __init__(self, model: Qwen2VL, rows: int, capacity: int, pool: Any) -> None:
        self.cache = KVCache(model.model.cache_config, rows, capacity, device=model.device, dtype=model.dtype)
        self.cache.idle(range(rows))  # what runs until the first prompt changes nothing
        self.ids = torch.zeros((rows, 1), dtype=torch.int64, device=model.device)
        self.replay, self.logits = capture(lambda: model.step_on_device(self.ids, self.cache), model.device, pool)
        self.weights, self.setting = weights_of(model), setting_of(model.device)

    def serves(self, rows: int, capacity: int, setting: tuple) -> bool:
        return self.cache.batch == rows and self.cache.capacity >= capacity and self.setting == setting

    @property
    def bytes(self) -> int:
        return self.cache.k.nbytes + self.cache.v.nbytes


class _Kept:
    """What a model has captured and nobody uses now, the one used last at the end."""

    def __init__(self) -> None:
        self.captured: list[_Captured] = []

    def take(self, model: Qwen2VL, rows: int, capacity: int) -> _Captured:
        weights, setting = weights_of(model), setting_of(model.device)
        with _lock:
            self.captured = [one for one in self.captured if one.weights == weights]
            for one in self.captured:
                if one.serves(rows, capacity, setting):
                    self.captured.remove(one)
                    return one
            # Those that are too small now will be so again.
            self.captured = [one for one in self.captured if not one.serves(rows, 0, setting)]
        return _Captured(model, rows, graph_capacity(capacity), pool_of(model, setting))

    def give(self, captured: _Captured) -> None:
        with _lock:
            self.captured.append(captured)
            while sum(one.bytes for one in self.captured) > KEPT_BYTES:
                self.captured.pop(0)


_lock = Lock()
_of_models: WeakKeyDictionary[Qwen2VL, _Kept] = WeakKeyDictionary()


class CapturedSteps(Steps):
    """The same by replay. Logits hold until the next call; what is captured is this answer's alone until it is closed,
    so that answers that are asked for at the same time do not share a cache."""

    def __init__(self, model: Qwen2VL, prompts: KVCache, times: int, capacity: int) -> None:
        self.rows = prompts.batch * times
        with _lock:
            self._kept = _of_models.setdefault(model, _Kept())
        self._captured: _Captured | None = self._kept.take(model, graph_rows(self.rows), capacity)
        super().__init__(model, self._captured.cache)
        self.cache.load(prompts, times)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        if self._captured is None:
            raise RuntimeError("these steps are closed")
        after = self.cache.lengths_after_step()
        self._captured.ids.narrow(0, 0, self.rows).copy_(tokens.unsqueeze(1))
        self._captured.replay()
        self.cache.lengths = after
        return self._captured.logits.narrow(0, 0, self.rows).squeeze(1)

    def serves(self, capacity: int) -> bool:
        one = self._captured
        now = weights_of(self.model), self.cache.batch, capacity, setting_of(self.model.device)
        return one is not None and one.weights == now[0] and one.serves(*now[1:])

    def close(self) -> None:
        captured, self._captured = self._captured, None
        if captured is not None:
            self._kept.give(captured)


def begin_steps(model: Qwen2VL, prompts: KVCache, times: int, capacity: int, graphs: bool) -> Steps:
    """Steps behind the rows of ``prompts``, each ``times`` times, with room for ``capacity`` tokens a row; whoever
    begins them closes them."""
    if graphs:
        return CapturedSteps(model, prompts, times, capacity)
    return Steps(model, prompts if times == 1 else prompts.repeated(times, capacity))


def wants_graphs(model: Qwen2VL, asked: bool | None) -> bool:
    """Whether steps are captured: where ``QWEN2VL_GRAPHS=1`` is set, on CUDA, unless ``asked`` is False.

    Raises :class:`Qwen2VLError` where they are asked for and cannot be captured.
    """
    reason = unfit(model, model.model)
    if asked and reason:
        raise Qwen2VLError(f"graphs: {reason}")
    return not reason and asked is not False


def graph_rows(rows: int) -> int:
    """1, 2, 4, 8, then multiples of 8."""
    return 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 8) * 8


def graph_capacity(tokens: int) -> int:
    """A power of two or one and a half times one, so that few captures serve a conversation that grows."""
    return max(LEAST_CAPACITY, round_up(tokens))


class Mark(NamedTuple):
    """A moment between two pieces of the device's work: an event where the host goes on, else the host's clock."""

    event: Any
    seconds: float

    @classmethod
    def now(cls, device: torch.device) -> Mark:
        if device.type != "cuda":
            return cls(None, time.perf_counter())
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return cls(event, 0.0)

    def wait(self) -> None:
        """Until this moment has come."""
        if self.event is not None:
            self.event.synchronize()

    def since(self, begin: Mark) -> float:
        """Seconds; waits for this moment."""
        self.wait()
        return self.seconds - begin.seconds if self.event is None else begin.event.elapsed_time(self.event) / 1e3


class Underway:
    """A choice on its way to the host; where the model is split, that of rank 0."""

    def __init__(self, choice: Choice, parallel: TensorParallel | None = None) -> None:
        if parallel is not None:
            parallel.from_first(choice.tokens)
        self.tokens = choice.tokens  # on the device, for the next step
        self._copies = Choice(*(None if one is None else one.to("cpu", non_blocking=True) for one in choice))  # type: ignore[arg-type]
        self._copied = Mark.now(choice.tokens.device)

    def wait(self) -> Choice:
        """The choice on the host."""
        self._copied.wait()
        return self._copies
