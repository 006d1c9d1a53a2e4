"""Pruning rules, which compute the mask of the next level from trained weights and the current mask."""

import numbers
import warnings
from collections.abc import Mapping
from decimal import Decimal

import numpy as np
import torch
from torch import Tensor

from lth_diet.masks.counts import count_pruned
from lth_diet.masks.mask import Mask
from lth_diet.networks.parameters import enumerate_names


def prune_by_magnitude(weights: Mapping[str, Tensor], mask: Mapping[str, Tensor], fraction: float) -> Mask:
    """Prune the remaining weights with the smallest absolute values, over all layers (global magnitude pruning).

    Exactly ceil(fraction x remaining) weights are pruned, with ties broken by position (layer order, then row-major
    order within a tensor), so the number of remaining weights at each level is known in advance and the result is
    deterministic. The authors' code also prunes every weight equal to the threshold: at least one more per level.
    A warning names layers that lose their last weight.

    Args:
        weights: Maps the mask's names to trained weights, such as a `state_dict`.
        mask: Mask of the current level. Pruned weights stay pruned.
        fraction: Fraction of the remaining weights to prune, between 0 and 1 (exclusive), taken as the decimal number
            that it is written as: 0.07 of 100 is 7, although 0.07 * 100 > 7 in binary floating point.

    Returns:
        Mask of the next level.

    Raises:
        ValueError: If fraction is out of range, a weight is missing, has another shape than its mask or is NaN where
            the mask keeps it, or no weight would remain.
        TypeError: If fraction is not a number, or weights or mask is not a mapping.
    """
    if not isinstance(fraction, numbers.Real | Decimal):
        raise TypeError(f"fraction is {fraction!r}, a {type(fraction).__name__}; expected a number such as 0.2")
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction}; expected between 0 and 1 (exclusive)")
    mask = mask if isinstance(mask, Mask) else Mask(mask)
    weights = mask.select(weights)
    remains = np.concatenate([tensor.numpy().ravel() for tensor in mask.values()])
    magnitude = np.concatenate([weights[name].abs().float().numpy().ravel() for name in mask])
    if np.isnan(magnitude[remains]).any():
        raise ValueError("a remaining weight is NaN, so the weights cannot be ranked by magnitude")
    candidates = np.flatnonzero(remains)
    count = count_pruned(len(candidates), fraction)
    if count >= len(candidates):
        raise ValueError(f"pruning {fraction} of {len(candidates)} remaining weights leaves none; stop a level earlier")
    remains[candidates[np.argsort(magnitude[candidates], kind="stable")[:count]]] = False
    parts = torch.from_numpy(remains).split([tensor.numel() for tensor in mask.values()])
    pruned = Mask({name: part.view(mask[name].shape) for name, part in zip(mask, parts, strict=True)})
    emptied = [name for name in pruned.empty_layers if name not in mask.empty_layers]
    if emptied:
        warnings.warn(f"no weight remains of {enumerate_names(emptied)}", stacklevel=2)
    return pruned
