"""Pillow's strictness about files that end early, whatever other libraries in the process want of it.

``ImageFile.LOAD_TRUNCATED_IMAGES`` is one flag for the whole process. Libraries set it when they are imported, and
Pillow then gives black where a file has no more pixels: a picture that nobody took, and an answer about it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

from PIL import ImageFile

_lock = threading.Lock()
_inside = 0  # blocks that are being run, of all threads
_outside: bool = False  # the flag, to be given back by the last of them


@contextlib.contextmanager
def strict_pillow() -> Iterator[None]:
    """A block in which Pillow refuses a file that ends early. Threads may be inside side by side.

    The flag that was there comes back when the last of them leaves, unless somebody has set it meanwhile. For as long,
    Pillow is strict with the rest of the process, too.
    """
    global _inside, _outside
    with _lock:
        if ImageFile.LOAD_TRUNCATED_IMAGES or not _inside:
            _outside = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES or _outside


def _leave_all() -> None:
    """In a child of a fork, where the threads that were inside are not."""
    global _lock, _inside
    if _inside:
        ImageFile.LOAD_TRUNCATED_IMAGES = _outside
    _lock, _inside = threading.Lock(), 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_all)
