"""Which training examples pre-training sees: pure functions from arrays to sorted indices."""

import numpy as np

from lth_diet.seeds import generator


def random_subset(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """`size` examples at random, equally many of each class (paper, section 3 (i)).

    Args:
        labels: Class of each example, shape (N,).
        size: M, 1 to N. What does not divide by the number of classes, and what a small class lacks, is drawn at
            random from the examples left.
        seed: Of the stream "subset".

    Returns:
        Sorted indices, shape (size,).

    Raises:
        ValueError: If there are fewer than `size` examples.
    """
    if not 0 < size <= len(labels):
        raise ValueError(f"a subset of {size} of {len(labels)} examples; allowed: 1 to {len(labels)}")
    shuffled = generator(seed).permutation(len(labels))
    classes = np.unique(labels)
    chosen = np.concatenate([shuffled[labels[shuffled] == c][: size // len(classes)] for c in classes])
    rest = shuffled[~np.isin(shuffled, chosen)]
    return np.sort(np.concatenate([chosen, rest[: size - len(chosen)]]))
