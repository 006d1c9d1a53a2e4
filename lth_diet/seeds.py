"""One named random stream per purpose, so that changing one thing changes nothing else.

Streams depend on the configured seed, their owner and their name only: replicate r of every arm shares its
initialisation, data order and augmentation, which pairs the arms.
"""

import hashlib

import numpy as np


def stream(seed: int, owner: int | str, name: str) -> int:
    """The 64-bit seed of a stream.

    Args:
        seed: The configured one.
        owner: A replicate's index, "network_<k>" of the networks that score, or "all" for what all of them share.
        name: "init", "order", "augmentation", "subset" or (of "all") "noise".
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{owner}/{name}".encode()).digest()[:8], "little")


def generator(seed: int, *index: int) -> np.random.Generator:
    """A generator that depends on a stream's seed and a position in the stream (a pass or a step) alone."""
    return np.random.default_rng([seed, *index])
