"""Lottery tickets on a data diet: iterative magnitude pruning with rewinding to a short pre-training."""

from lth_diet.program import ensure_home

__version__ = "0.1.0"

ensure_home()  # before MLflow, torch and matplotlib are imported, which need one
