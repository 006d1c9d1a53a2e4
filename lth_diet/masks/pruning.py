"""Pruning rules, which compute the mask of the next level from trained weights and the current mask."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lth_diet.masks.counts import count_pruned
from lth_diet.masks.mask import Mask


def prune_by_magnitude(weights: Mapping[str, Tensor], mask: Mask, fraction: float) -> Mask:
    """Prune the remaining weights with the smallest absolute values, over all layers (global magnitude pruning).

    Exactly ceil(fraction x remaining) weights are pruned, with ties broken by position (layer order, then row-major
    order within a tensor), so the number of remaining weights at each level is known in advance and the result is
    deterministic. The authors' code also prunes every weight equal to the threshold: at least one more per level.

    Args:
        weights: Maps the mask's names to trained weights.
        mask: Mask of the current level. Pruned weights stay pruned.
        fraction: Fraction of the remaining weights to prune, between 0 and 1 (exclusive), taken as the decimal number
            that it is written as: 0.07 of 100 is 7, although 0.07 * 100 > 7 in binary floating point.

    Returns:
        Mask of the next level.

    Raises:
        ValueError: If fraction is out of range or a remaining weight is NaN.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction}; expected between 0 and 1 (exclusive)")
    remains = np.concatenate([tensor.numpy().ravel() for tensor in mask.values()])
    magnitude = np.concatenate([weights[name].detach().abs().cpu().float().numpy().ravel() for name in mask])
    if np.isnan(magnitude[remains]).any():
        raise ValueError("a remaining weight is NaN, so the weights cannot be ranked by magnitude")
    candidates = np.flatnonzero(remains)
    count = count_pruned(len(candidates), fraction)
    remains[candidates[np.argsort(magnitude[candidates], kind="stable")[:count]]] = False
    parts = torch.from_numpy(remains).split([tensor.numel() for tensor in mask.values()])
    return Mask({name: part.view(mask[name].shape).clone() for name, part in zip(mask, parts, strict=True)})
