"""Lottery tickets on a data diet: iterative magnitude pruning with rewinding to a short pre-training."""

__version__ = "0.1.0"
