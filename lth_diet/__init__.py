"""Iterative magnitude pruning with rewinding to a pre-training on a data diet."""

__version__ = "0.1.0"
