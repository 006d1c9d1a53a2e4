"""One named random stream per purpose, so that changing one thing changes nothing else.

Streams depend on the configured seed, their scope and their purpose only: replicate r of every arm shares its
initialisation, data order and augmentation, which pairs the arms.
"""

import hashlib

import numpy as np


def derive_seed(seed: int, scope: int | str, purpose: str) -> int:
    """The 64-bit seed of a stream.

    Args:
        seed: The configured one.
        scope: A replicate's index, "network_<k>" of the networks that score, or "all" for what all of them share.
        purpose: "init", "order", "augmentation", "subset" or (of "all") "noise".
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{scope}/{purpose}".encode()).digest()[:8], "little")


def generator(seed: int, *index: int) -> np.random.Generator:
    """A generator that depends on a stream's seed and a position in the stream (a pass or a step) alone."""
    return np.random.default_rng([seed, *index])
