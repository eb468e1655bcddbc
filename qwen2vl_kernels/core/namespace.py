"""The namespace in which PyTorch knows the ops of this package: ``torch.ops.qwen2vl``.

Every registration and every call of an op goes through this file and names the namespace nowhere else. A build for the
kernels hub brings its own version of it (``hub/torch-ext``), because one process may load several builds at once and
each needs a namespace of its own.
"""

from __future__ import annotations

import torch

NAMESPACE = "qwen2vl"

#: The registered ops by name: ``torch_ops.rotate(...)`` goes through PyTorch's dispatcher.
torch_ops = getattr(torch.ops, NAMESPACE)
