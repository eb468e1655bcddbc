"""Readers of training data: from files on disk to :class:`qwen2vl.training.example.Example`."""

from .dataset import TrainingData, build_dataset, read_examples
from .entry import DataEntry
from .report import DataReport, Problem

__all__ = ["DataEntry", "DataReport", "Problem", "TrainingData", "build_dataset", "read_examples"]
