"""The namespace of this build's ops, which ``kernel-builder`` makes up for each build (module ``_ops``).

It stands in for the file of the same name in the package, whose namespace is always ``qwen2vl``: a process may load
several builds of one kernel at once, and none may register its ops under the name of another.
"""

from .._ops import add_op_namespace_prefix
from .._ops import ops as torch_ops

__all__ = ["NAMESPACE", "torch_ops"]

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
