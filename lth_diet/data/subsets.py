"""Which training examples pre-training sees: pure functions from arrays to sorted indices."""

from pathlib import Path

import numpy as np
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from lth_diet.data.seeds import generator
from lth_diet.errors import UserError, raise_if_corrupt
from lth_diet.files import write_atomically


def random_subset(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """`size` examples at random, equally many of each class (paper, section 3 (i)).

    Args:
        labels: Class of each example, as pre-training sees it, shape (N,).
        size: M, 1 to N. What does not divide by the number of classes, and what a small class lacks, is drawn at
            random from the examples left.
        seed: Of the stream "subset".

    Returns:
        Sorted indices, shape (size,).

    Raises:
        ValueError: If there are fewer than `size` examples.
    """
    _check(len(labels), size, 0)
    shuffled = generator(seed).permutation(len(labels))
    classes = np.unique(labels)
    chosen = np.concatenate([shuffled[labels[shuffled] == c][: size // len(classes)] for c in classes])
    rest = shuffled[~np.isin(shuffled, chosen)]
    return np.sort(np.concatenate([chosen, rest[: size - len(chosen)]]))


def easy(
    scores: np.ndarray, labels: np.ndarray, size: int, class_balanced: bool = False, offset: int = 0
) -> np.ndarray:
    """The `size` examples with the lowest scores (paper, section 3 (ii)).

    Args:
        scores: Of each example, shape (N,); equal ones are in the order of their positions.
        labels: Class of each example, as pre-training sees it, shape (N,).
        size: M, 1 to N - offset.
        class_balanced: Take the easiest of every class, then the second easiest of every class, and so on: classes
            differ by one example at most, as long as they have enough.
        offset: Skip as many of the easiest; if balanced, those that a balanced subset of that size has.

    Returns:
        Sorted indices, shape (size,); a smaller subset is part of a larger one.

    Raises:
        ValueError: If there are fewer than `size` examples after `offset`, or a score is not a number.
    """
    return _first(np.argsort(scores, kind="stable"), scores, labels, size, class_balanced, offset)


def hard(
    scores: np.ndarray, labels: np.ndarray, size: int, class_balanced: bool = False, offset: int = 0
) -> np.ndarray:
    """The `size` examples with the highest scores (paper, section 3 (iii)): as `easy`, from the other end.

    Unless balanced, it has no example in common with an easy subset as long as both together have at most N.
    """
    return _first(np.argsort(scores, kind="stable")[::-1], scores, labels, size, class_balanced, offset)


def _first(
    order: np.ndarray, scores: np.ndarray, labels: np.ndarray, size: int, class_balanced: bool, offset: int
) -> np.ndarray:
    _check(len(labels), size, offset)
    if np.isnan(scores).any():
        raise ValueError("a score is not a number (NaN): no order to choose by")
    if class_balanced:
        skipped = _in_turn(order, labels)[:offset]
        return np.sort(_in_turn(order[~np.isin(order, skipped)], labels)[:size])
    return np.sort(order[offset : offset + size])


def _in_turn(order: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The first of every class, then the second of every class, and so on."""
    place = np.empty(len(order), int)  # of each example of `order` within its class
    for label in np.unique(labels):
        members = labels[order] == label
        place[members] = np.arange(members.sum())
    return order[np.argsort(place, kind="stable")]


def _check(examples: int, size: int, offset: int) -> None:
    if not 0 < size <= examples - offset:
        raise ValueError(f"a subset of {size} of {examples} examples; allowed: 1 to {examples - offset}")


def save_indices(folder: Path, indices: np.ndarray) -> None:
    """Write subset.safetensors.

    Raises:
        UserError: If it is there with other indices: what began with them cannot go on with these.
    """
    path = folder / "subset.safetensors"
    if path.exists():
        with raise_if_corrupt(path, f"the examples that pre-training began with; delete {folder} to begin again"):
            there = load_tensors(path.read_bytes())["indices"]
        if not np.array_equal(there, indices):
            raise UserError(f"{path}: pre-training began with other examples; delete {folder} to begin again")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save_tensors({"indices": indices.astype(np.int64)}))
