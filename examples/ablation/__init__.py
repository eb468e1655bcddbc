"""Two ablations of the paper (arXiv 2409.12191, section 3.3) at a tiny scale, on generated samples.

positions   M-RoPE against 1-D RoPE, on clips longer than those trained on
resolution  pictures as they are against pictures all of one size

Every model is trained from nothing by :class:`qwen2vl.training.trainer.Trainer`. The models of an ablation are equal in
everything but what it is about: weights that they begin from, samples of every step, number of steps. Samples of
evaluation are never trained on, and equal for all.
"""

from .run import ABLATIONS, measure, show

__all__ = ["ABLATIONS", "measure", "show"]
