"""Graphs where no GPU is: a mode that sees what leaves the device, and a stand-in of a captured graph."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: They launch nothing.
VIEWS = {"unflatten", "flatten", "expand", "unsqueeze", "squeeze", "narrow", "select", "slice", "device"}
VIEWS |= {"unbind", "view", "detach", "split_with_sizes"}


class OnDevice(TorchDispatchMode):
    """Refuses tensors on the host, and counts what is launched. Over fake tensors, which refuse to give values."""

    def __init__(self):
        super().__init__()
        self.launched = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for one in tree_leaves((args, kwargs, result)):
            assert not isinstance(one, torch.Tensor) or one.device.type == "cuda", f"{func}: a tensor on the host"
        name = func.name().partition("::")[2].partition(".")[0]
        if name not in VIEWS:
            self.launched[name] += 1
        return result


class FromOutside(TorchDispatchMode):
    """Collects the memory that is read or written and was not made inside, which a replay finds where it was."""

    def __init__(self):
        super().__init__()
        self.addresses, self.made = set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {storage_of(one) for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        self.addresses |= given - self.made.keys()
        result = func(*args, **kwargs or {})
        made = [one for one in tree_leaves(result) if isinstance(one, torch.Tensor)]
        # Kept, so that no address is given out twice.
        self.made |= {storage_of(one): one for one in made if storage_of(one) not in given}
        return result


def storage_of(tensor):
    return tensor.untyped_storage().data_ptr()


class Recorder(TorchDispatchMode):
    """What a graph holds: calls, with the tensors that they read and the places of what they made."""

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def replay(self):
        self.replays += 1
        for func, args, kwargs, made in self.calls:
            for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def capture_into(captured):
    """In the place of :func:`qwen2vl.graphs.capture`; recorders go to the list ``captured``."""

    def capture(run, device, pool):
        for _ in range(2):
            run()
        with Recorder() as recorder:
            result = run()
        captured.append(recorder)
        return recorder.replay, result

    return capture
