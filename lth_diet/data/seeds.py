"""Independent random streams, one per purpose, so that changing one setting leaves the other streams unchanged.

A stream depends only on the configured seed, its scope and its purpose. Replicate r therefore has the same
initialization, data order and augmentation in every arm, which makes comparisons between arms paired.

`Builder` in `training/builders.py` derives the seeds of "init", "order" and "augmentation", `IMP.subset_algorithms`
that of "subset", `noisy_labels` in `data/label_noise.py` that of "noise", and `Line` in `instability.py` that of
"interpolation".
"""

import hashlib

import numpy as np


def derive_seed(seed: int, scope: int | str, purpose: str) -> int:
    """Derive the 64-bit seed of a stream.

    Args:
        seed: Seed of the configuration.
        scope: Index of a replicate, "network_<k>" for a scoring network, "replicate_<r>_copy_<c>" for a copy
            of an instability analysis, or "all" for streams that all share.
        purpose: "init", "order" (of the training examples), "augmentation" or "subset"; for scope "all", "noise", or
            "interpolation" for the images on which an instability analysis measures errors.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{scope}/{purpose}".encode()).digest()[:8], "little")


def generator(seed: int, *index: int) -> np.random.Generator:
    """Return a generator for one position (an epoch or a step) of the stream with this seed."""
    return np.random.default_rng([seed, *index])
