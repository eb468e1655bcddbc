"""How good answers are: the metrics of the paper's tables, and released checkpoints in lmms-eval."""
