"""Training and evaluation samples made on the spot: no files, no download, the same ones from the same numbers."""

from .sample import Sample
from .skills import LEVELS, SKILLS, generate, play

__all__ = ["LEVELS", "SKILLS", "Sample", "generate", "play"]
