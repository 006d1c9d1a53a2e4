"""Which training examples pre-training uses: pure functions from labels and scores to sorted indices."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from lth_diet.data.seeds import generator
from lth_diet.errors import UserError, raise_if_corrupt
from lth_diet.files import write_atomically

_KINDS = {"random": "random examples", "easy": "easiest examples", "hard": "hardest examples"}
_LEAST_SHARE = 10  # a class is rare if it has less than its fair share divided by this
_MAX_NAMED = 10


def random_subset(labels: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Choose `size` examples at random, equally many of each class (paper, section 3 (i)).

    Args:
        labels: Class of each example in pre-training, shape (N,).
        size: Number of examples M, 1 to N. If the classes cannot have equal shares, because M is not divisible by
            their number or a class is too small, the rest is chosen at random from the other examples.
        seed: Seed of the "subset" stream.

    Returns:
        Sorted indices, shape (size,).

    Raises:
        ValueError: If there are fewer than `size` examples.
    """
    _check_size(len(labels), size, 0)
    shuffled = generator(seed).permutation(len(labels))
    classes = np.unique(labels)
    chosen = np.concatenate([shuffled[labels[shuffled] == c][: size // len(classes)] for c in classes])
    rest = shuffled[~np.isin(shuffled, chosen)]
    return np.sort(np.concatenate([chosen, rest[: size - len(chosen)]]))


def easy(
    scores: np.ndarray, labels: np.ndarray, size: int, class_balanced: bool = False, offset: int = 0
) -> np.ndarray:
    """Choose the `size` examples with the lowest scores (paper, section 3 (ii)).

    Args:
        scores: Score of each example, shape (N,). Ties are broken by index.
        labels: Class of each example in pre-training, shape (N,).
        size: Number of examples M, 1 to N - offset.
        class_balanced: Choose the easiest example of every class, then the second easiest of every class, and so
            on. The class counts differ by at most one, as long as every class has enough examples.
        offset: Number of easiest examples to skip. If class-balanced, skips the class-balanced subset of this size.

    Returns:
        Sorted indices, shape (size,). A smaller subset is contained in a larger one.

    Raises:
        ValueError: If fewer than `size` examples remain after `offset`, or a score is NaN.
    """
    return _take(np.argsort(scores, kind="stable"), scores, labels, size, class_balanced, offset)


def hard(
    scores: np.ndarray, labels: np.ndarray, size: int, class_balanced: bool = False, offset: int = 0
) -> np.ndarray:
    """Choose the `size` examples with the highest scores (paper, section 3 (iii)).

    The arguments are those of `easy`, with the order reversed. Unless class-balanced, an easy and a hard subset are
    disjoint if their sizes add up to at most N.
    """
    return _take(np.argsort(scores, kind="stable")[::-1], scores, labels, size, class_balanced, offset)


def _take(
    order: np.ndarray, scores: np.ndarray, labels: np.ndarray, size: int, class_balanced: bool, offset: int
) -> np.ndarray:
    _check_size(len(labels), size, offset)
    if np.isnan(scores).any():
        raise ValueError("scores contain NaN, so the examples cannot be ranked")
    if class_balanced:
        skipped = _interleave_classes(order, labels)[:offset]
        return np.sort(_interleave_classes(order[~np.isin(order, skipped)], labels)[:size])
    return np.sort(order[offset : offset + size])


def _interleave_classes(order: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Reorder to the first example of every class, then the second of every class, and so on."""
    rank_in_class = np.empty(len(order), int)
    for label in np.unique(labels):
        members = labels[order] == label
        rank_in_class[members] = np.arange(members.sum())
    return order[np.argsort(rank_in_class, kind="stable")]


def _check_size(examples: int, size: int, offset: int) -> None:
    if not 0 < size <= examples - offset:
        raise ValueError(f"subset size {size} for {examples} examples; expected 1 to {examples - offset}")


def describe_imbalance(counts: Mapping[str, int], arm: str) -> str | None:
    """Describe classes of which a subset has no example, or less than a tenth of their fair share.

    Args:
        counts: Number of examples of the subset by name of the class, with 0 for those that it lacks.
        arm: "random", "easy" or "hard".

    Returns:
        A clause with the key to set, without a period; None if every class has a tenth of an equal share or more.
    """
    size = sum(counts.values())
    missing = [name for name, count in counts.items() if not count]
    rare = [name for name, count in counts.items() if 0 < count * len(counts) * _LEAST_SHARE < size]
    clauses = [f"no example of {_enumerate(missing)}"] if missing else []
    if rare:
        clauses.append(f"less than a tenth of the fair share of {_enumerate(rare)}")
    if not clauses:
        return None
    key = "size" if arm == "random" or size < len(counts) else "class_balanced"
    return f"{' and '.join(clauses)} among the {size} {_KINDS[arm]}; see pretrain.subset.{key}"


def _enumerate(names: list[str]) -> str:
    """Names as `3, 8 and 9`, at most `_MAX_NAMED` of them."""
    shown = [*names[:_MAX_NAMED], f"{len(names) - _MAX_NAMED} other classes"] if len(names) > _MAX_NAMED else names
    shown = [name.encode(errors="backslashreplace").decode() for name in shown]
    return " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))


def save_indices(folder: Path, indices: np.ndarray) -> None:
    """Write the indices to subset.safetensors.

    Raises:
        UserError: If the file exists with other indices; pre-training cannot resume on other examples.
    """
    path = folder / "subset.safetensors"
    if path.exists():
        with raise_if_corrupt(path, f"the indices that pre-training started with; delete {folder} to start again"):
            saved = load_tensors(path.read_bytes())["indices"]
        if not np.array_equal(saved, indices):
            raise UserError(f"{path}: pre-training started with other examples; delete {folder} to start again")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save_tensors({"indices": indices.astype(np.int64)}))
