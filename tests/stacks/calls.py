"""What the scripts of all stacks share."""

from collections import Counter
from collections.abc import Iterable
from types import ModuleType


def count_calls(layers: ModuleType, names: Iterable[str]) -> Counter[str]:
    """Of the ops that ``layers`` of an adapter call: towers that agree as nothing was replaced would show none."""
    calls: Counter[str] = Counter()

    def counted(name, op):
        def call(*args, **kwargs):
            calls[name] += 1
            return op(*args, **kwargs)

        return call

    for name in names:
        setattr(layers, name, counted(name, getattr(layers, name)))
    return calls
