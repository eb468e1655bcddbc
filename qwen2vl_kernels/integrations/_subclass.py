"""A class in the place of an object's own: how one object is patched and no other of its class.

A function set on the object itself would be bound to it. Copies of the object would run the original's weights (the
replicas of ``nn.DataParallel``) or could not be told from it, and whoever wraps functions of classes (transformers'
checkpointing, FSDP) would not find it. A subclass with the same name is looked up as every class is.
"""

from __future__ import annotations

import copyreg
import types
from collections.abc import Callable
from functools import partial
from typing import Any

_STOCK = "__qwen2vl_kernels_stock__"


def stock_class(cls: type) -> type:
    """The class whose place ``cls`` took, ``cls`` itself if none."""
    return vars(cls).get(_STOCK, cls)


def subclass(base: Any, name: str, function: Any, copied: Callable[[Any], None]) -> type:
    """``base`` with ``function`` as its attribute ``name``; ``copied`` is told every copy of an object of it.

    A pickle names ``base``: it is loaded where this package is not, as what it was before it was patched.
    """

    def __reduce_ex__(self: Any, protocol: int) -> Any:
        reduced: Any = base.__reduce_ex__(self, max(protocol, 2))
        if reduced[:2] != (copyreg.__newobj__, (made,)):  # type: ignore[attr-defined]
            return reduced
        return _Copy(made, copied), (), *reduced[2:]

    body = {
        name: function,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": __reduce_ex__,
        _STOCK: stock_class(base),
    }
    made: Any = types.new_class(base.__name__, (base,), exec_body=lambda namespace: namespace.update(body))
    return made


class _Copy:
    """Makes an object for ``copy`` and ``deepcopy`` to fill; in a pickle one of the stock class."""

    def __init__(self, made: Any, copied: Callable[[Any], None]) -> None:
        self.made, self.copied = made, copied

    def __call__(self) -> Any:
        copy = self.made.__new__(self.made)
        self.copied(copy)
        return copy

    def __reduce__(self) -> Any:
        return partial, (object.__new__, stock_class(self.made))
