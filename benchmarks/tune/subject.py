"""What a subject of the tuner is: a kernel at a shape, its work and how its results are judged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ..case import Check, two_times

Tensors = tuple[torch.Tensor, ...]
Fields = dict[str, int]
#: The dtype of the inputs, by device. The rehearsal's are float16, which Triton's interpreter knows by itself.
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float16}


@dataclass(frozen=True)
class Work:
    """Inputs on a device. ``run()`` launches and returns the results, ``check(results)`` compares them."""

    run: Callable[[], Tensors]
    check: Callable[[Tensors], list[Check]]


@dataclass(frozen=True)
class Subject:
    """A kernel at a shape.

    Attributes:
        group: the subjects that are launched with one configuration; they differ in ``shape``.
        kernel: name of the kernel that is timed; what else ``run`` launches is not. ``None`` where the module launches
            no other.
        module, function: ``getattr(module, function)`` chooses the configuration.
        grid: fields of the configuration, and the values to try, in all their combinations or those in ``tried``.
        make: the work on a device in a dtype; on "meta" there is nothing to check.
        place: of the configuration in what ``function`` returns, where that is a tuple.
        fixed: fields that all shapes of the group must share, as the bits of a result depend on them.
        columns: of the head, where a table has configurations by width. All shapes are one kernel then.
        capability: of the GPUs that have the kernel, by default all.
        ready: called in the place of Triton's compiler with a candidate's fields, the dtype, a folder of cubins or
            ``None``, and whether this process is to launch it; raises where there is no such kernel.
    """

    group: str
    shape: str
    kernel: str | None
    module: Any
    function: str
    grid: dict[str, tuple[int, ...]]
    make: Callable[[torch.device, torch.dtype], Work]
    place: int | None = None
    fixed: tuple[str, ...] = ()
    columns: int | None = None
    tried: tuple[Fields, ...] | None = None
    capability: int | None = None
    ready: Callable[[Fields, torch.dtype, Path | None, bool], None] | None = None

    @property
    def name(self) -> str:
        return f"{self.group}, {self.shape}"

    @property
    def compiled_as(self) -> str:
        """Subjects that have this in common are the same kernels for the compiler."""
        return self.name if self.columns is None else self.group


@contextmanager
def configured(subject: Subject, fields: Fields | None) -> Iterator[list[Any]]:
    """Inside the block the subject's chooser returns its choice with ``fields`` replaced; yields what it returned."""
    choose, seen = getattr(subject.module, subject.function), []

    def chosen(*arguments: Any) -> Any:
        shipped = choose(*arguments)
        one = shipped if subject.place is None else shipped[subject.place]
        seen.append(one if fields is None else replace(one, **fields))
        if subject.place is None:
            return seen[-1]
        return (*shipped[: subject.place], seen[-1], *shipped[subject.place + 1 :])

    with mock.patch.object(subject.module, subject.function, chosen):
        yield seen


def random_of(device: torch.device, dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """Normal numbers, the same ones in every process."""
    if device.type == "meta":
        return lambda *shape: torch.empty(shape, dtype=dtype, device=device)
    generator = torch.Generator(device).manual_seed(0)
    return lambda *shape: torch.randn(shape, dtype=dtype, device=device, generator=generator)


def results_of(formula: Callable, inputs: Sequence[torch.Tensor], grads: Tensors | None, double: bool) -> Tensors:
    """Results of the formula, or with ``grads`` its gradients for the floating inputs; in float64 with ``double``."""

    def to(x: torch.Tensor) -> torch.Tensor:
        return x.double() if double and x.is_floating_point() else x

    with torch.inference_mode(False), torch.set_grad_enabled(grads is not None):
        leaves = [to(x.clone()).requires_grad_(grads is not None and x.is_floating_point()) for x in inputs]
        out = formula(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        if grads is None:
            return out
        return torch.autograd.grad(out, [x for x in leaves if x.requires_grad], [to(g.clone()) for g in grads])


def checked(
    formula: Callable,
    inputs: Sequence[torch.Tensor],
    grads: Tensors | None = None,
    which: slice = slice(None),
    part: Callable[[Tensors], Tensors] = tuple,
) -> Callable[[Tensors], list[Check]]:
    """The two-times rule for ``part`` of the results, against the ``which`` of those of the formula."""

    @cache
    def references() -> tuple[Tensors, Tensors]:
        return tuple(results_of(formula, inputs, grads, double)[which] for double in (False, True))  # type: ignore[return-value]

    def check(results: Tensors) -> list[Check]:
        rows = zip(part(results), *references(), strict=True)
        return [two_times(f"result {n}", got, low.view(got.shape), exact.view(got.shape), 1e-6)
                for n, (got, low, exact) in enumerate(rows)]  # fmt: skip

    return check
