"""Generated pictures and clips with questions and true answers, and the screen game: no files and no download.

The command `qwen2vl eval` measures models by them, and training takes them as data by the name `format = "generated"`.
Nothing else imports this package, so that who trains on files or serves a model never loads it. `python -m
qwen2vl.samples` draws sheets of samples to look at.
"""

from .sample import Sample
from .skills import LEVELS, SKILLS, generate, play

__all__ = ["LEVELS", "SKILLS", "Sample", "generate", "play"]
