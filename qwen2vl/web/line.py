"""Who waits for the model: one is served at a time, in the order of coming."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, NoReturn

Moved = Callable[[int], None]


class _Place(NamedTuple):
    work: Callable[[], None]
    moved: Moved


class Line:
    """Pieces of work from any thread, for the one thread that calls :meth:`serve`."""

    def __init__(self) -> None:
        self._waiting: deque[_Place] = deque()
        self._serving = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """How many wait, the one that is being served included."""
        with self._changed:
            return len(self._waiting) + self._serving

    def join(self, work: Callable[[], None], moved: Moved = lambda ahead: None) -> None:
        """Stand at the end. ``moved`` is told how many are ahead, now and whenever it becomes fewer; while it is told
        the line stands still, so it must not wait."""
        with self._changed:
            self._waiting.append(_Place(work, moved))
            if ahead := len(self._waiting) - 1 + self._serving:
                moved(ahead)
            self._changed.notify()

    def leave(self, work: Callable[[], None]) -> bool:
        """Take work out of the line. False where it is not there: it is done, or being done."""
        with self._changed:
            place = next((place for place in self._waiting if place.work is work), None)
            if place is None:
                return False
            self._waiting.remove(place)
            self._tell()
            return True

    def _tell(self) -> None:
        for ahead, place in enumerate(self._waiting):
            place.moved(ahead + self._serving)

    def serve_next(self, timeout: float | None = None) -> bool:
        """Do the first one's work. False where nobody came within ``timeout`` seconds. What the work raises is
        raised."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting, timeout):
                return False
            place = self._waiting.popleft()
            self._serving = True
        try:
            place.work()
        finally:
            with self._changed:
                self._serving = False
                self._tell()
        return True

    def serve(self, meanwhile: Callable[[], None], every: float = 60.0) -> NoReturn:
        """Serve all who come, for ever. ``meanwhile`` is called after each, and after ``every`` seconds without one."""
        while True:
            self.serve_next(every)
            meanwhile()
