"""``python -m benchmarks tune``: launch configurations timed on the GPU at hand, beside the ones that ship.

The ops choose a configuration with a pure function, so that no call searches. This runs every candidate of a grid on
the shapes that matter, through the op's own launcher with that function replaced. A candidate may win only if its
result is right; one that crashes or hangs costs itself. Whoever changes the functions' constants writes in what the
result's groups say, with the GPU that measured them; nothing is written by itself.
"""

from .processes import Died, Worker
from .result import result, show, tables, write
from .search import Rows, Search
from .subject import Subject, Work
from .subjects import subjects
from .verdict import Trial

__all__ = [
    "Died",
    "Rows",
    "Search",
    "Subject",
    "Trial",
    "Work",
    "Worker",
    "result",
    "show",
    "subjects",
    "tables",
    "write",
]
