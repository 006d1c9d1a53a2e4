"""Composer Algorithms that work in any Trainer and depend only on Composer."""

from lth_diet.algorithms.apply_mask import ApplyMask
from lth_diet.algorithms.rewind import Rewind
from lth_diet.algorithms.subset_sampling import SubsetSampling

__all__ = ["ApplyMask", "Rewind", "SubsetSampling"]
