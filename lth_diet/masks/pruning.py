"""Pruning rules: a mask and trained weights to the mask of the next level."""

import fractions
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lth_diet.masks.mask import Mask


def prune_by_magnitude(weights: Mapping[str, Tensor], mask: Mask, fraction: float) -> Mask:
    """Global magnitude pruning: drop the surviving weights with the smallest absolute values, over all layers.

    Exactly ceil(fraction x remaining) weights go, ties by position (layer order, then memory order), so that the
    count of every level is known beforehand and the result is the same everywhere. (The original code takes the
    threshold value itself with it: one weight more a level, and all that tie with it.)

    Args:
        weights: Trained weights, by the mask's names.
        mask: What is left so far; what it has pruned stays pruned.
        fraction: Share of the surviving weights to drop, between 0 and 1 exclusive, read as the decimal it is
            written as (0.2 of 10 is 2, whatever binary floating point makes of it).

    Returns:
        The mask of the next level.

    Raises:
        ValueError: If fraction is out of range or a weight that is to be compared is not a number.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction}; allowed: between 0 and 1")
    survives = np.concatenate([tensor.numpy().ravel() for tensor in mask.values()])
    magnitude = np.concatenate([weights[name].detach().abs().cpu().float().numpy().ravel() for name in mask])
    if np.isnan(magnitude[survives]).any():
        raise ValueError("a weight is not a number (NaN): no order of magnitudes to prune by")
    left = np.flatnonzero(survives)
    goes = math.ceil(fractions.Fraction(str(fraction)) * len(left))
    survives[left[np.argsort(magnitude[left], kind="stable")[:goes]]] = False
    parts = torch.from_numpy(survives).split([tensor.numel() for tensor in mask.values()])
    return Mask({name: part.view(mask[name].shape).clone() for name, part in zip(mask, parts, strict=True)})
