"""Two ablations of the paper (arXiv 2409.12191, section 3.3) at a tiny scale, on generated samples.

positions   M-RoPE against 1-D RoPE, on clips longer than those trained on
resolution  pictures in their own sizes against pictures resized to one size

:class:`qwen2vl.training.trainer.Trainer` trains every model from nothing. The models of an ablation differ only in what
it is about: they have the same weights to begin from, the same samples in every step and the same number of steps. They
are asked the same samples in evaluation, none of which was trained on.
"""

from .run import ABLATIONS, measure, show

__all__ = ["ABLATIONS", "measure", "show"]
