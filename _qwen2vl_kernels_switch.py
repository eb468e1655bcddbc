"""What ``QWEN2VL_KERNELS`` does as Python starts; ``qwen2vl_kernels.pth`` imports it where that variable is set.

A program whose code nobody edits imports transformers some time after its start, and then these kernels are to be
applied. So the imports of the modules that they change are watched, and each is handed over once it was executed. The
file stands beside the packages: to import one of them takes PyTorch with it, which most programs never need. Neither
does it import what Python has not loaded by then, such as ``typing``.
"""

from __future__ import annotations

import os
import sys

#: Of transformers, the modules with something that can be replaced.
WATCHED = frozenset(
    f"transformers.models.{name}"
    for name in (
        "qwen2.modeling_qwen2",
        "qwen2_vl.modeling_qwen2_vl",
        "qwen2_vl.image_processing_qwen2_vl",
        "qwen2_vl.image_processing_pil_qwen2_vl",
        "qwen2_5_vl.modeling_qwen2_5_vl",
        "qwen3_vl.modeling_qwen3_vl",
    )
)


class _Watcher:
    """A finder that finds what the others find, and wraps its loader."""

    def __init__(self) -> None:
        self._finding: set[str] = set()  # a finder that asks all others, as this one does, comes back here

    def find_spec(self, name: str, path=None, target=None):
        if name not in WATCHED or name in self._finding:
            return None
        self._finding.add(name)
        try:
            finders = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
            spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        finally:
            self._finding.discard(name)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


class _Loader:
    """A module's own loader until the module is executed, when that one takes its place again."""

    def __init__(self, loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str):
        if name == "_loader":  # of a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self._loader, name)

    def exec_module(self, module) -> None:
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        executed(module.__name__)


def executed(name: str) -> None:
    """Hand a module over. Whatever goes wrong is a warning, as the program was to run without these kernels."""
    try:
        from qwen2vl_kernels.integrations.transformers_import import imported

        imported(name)
    except Exception as error:
        _warn(f"qwen2vl_kernels in transformers: {name} stays as it is: {type(error).__name__}: {error}")


def _warn(message: str) -> None:
    import warnings

    try:
        from qwen2vl_kernels.integrations._patches import PatchWarning as category
    except Exception:
        category = UserWarning
    try:
        warnings.warn(message, category, stacklevel=3)
    except category:  # where warnings are errors, this one must not end an import
        print(message, file=sys.stderr)


def watch() -> None:
    """Watch imports from here on, once."""
    if not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


if os.environ.get("QWEN2VL_KERNELS") and os.environ.get("QWEN2VL_KERNELS_DISABLE", "") in ("", "0"):
    watch()
