"""Statistics of scores and subsets: mislabeled examples, classes, agreement between networks."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from lth_diet.data.dataset import Dataset
from lth_diet.scores.artifact import Scores

SubsetRule = Callable[[np.ndarray], np.ndarray]
"""Selects a subset: maps scores of shape (N,) to indices."""
_FRACTIONS = (0.01, 0.05, 0.1, 0.25, 0.5)


@dataclasses.dataclass(frozen=True)
class ScoredExamples:
    """Training examples with their labels and scores.

    Attributes:
        data: Data set with the images and the true labels.
        labels: Labels of pre-training, with label noise, shape (N,).
        scores: Scores computed with `labels`, or None.
    """

    data: Dataset
    labels: np.ndarray = dataclasses.field(repr=False)
    scores: Scores | None = None

    @property
    def mislabeled(self) -> np.ndarray:
        """Whether each label differs from the true one, bool of shape (N,)."""
        return self.labels != self.data.train.labels

    @property
    def class_names(self) -> list[str]:
        """Class names for matplotlib: `$` is escaped and characters that cannot be encoded become `?`."""
        return [name.encode(errors="replace").decode().replace("$", r"\$") for name in self.data.class_names]

    @property
    def order(self) -> np.ndarray:
        """Indices of the examples from lowest to highest mean score; 0 to N - 1 without scores."""
        return np.arange(len(self.labels)) if self.scores is None else np.argsort(self.scores.mean, kind="stable")

    def of_class(self, label: int, indices: np.ndarray) -> np.ndarray:
        """The indices of the examples with this label, in the same order."""
        return indices[self.labels[indices] == label]

    def halves(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean scores over the first and the second half of the networks; None if there is only one network."""
        values = self.scores.el2n
        middle = len(values) // 2
        return (values[:middle].mean(0), values[middle:].mean(0)) if middle else None


def describe_scores(examples: ScoredExamples) -> dict[str, Any]:
    """Measure how well networks agree on the scores, and how well the scores detect mislabeled examples.

    Returns:
        Statistics as JSON. `halves_*` compare the mean scores over the first and the second half of the networks;
        `*easiest*` and `*hardest*` map the size of a subset, in percent of all examples, to a statistic of that many
        examples with the lowest or highest scores.
    """
    from scipy.stats import spearmanr

    order, mislabeled = examples.order, examples.mislabeled
    sizes = {f"{100 * fraction:g}": max(1, round(fraction * len(order))) for fraction in _FRACTIONS}
    summary = {
        "examples": len(order),
        "networks": len(examples.scores.el2n),
        "wrong_labels_percent": percent(mislabeled),
    }
    halves = examples.halves()
    if halves:
        if all(np.ptp(half) for half in halves):  # ranks of constant scores are undefined
            summary["halves_spearman"] = round(float(spearmanr(*halves).statistic), 4)
        summary["halves_overlap_of_easiest_percent"] = {
            share: _overlap(halves, lambda scores, size=size: np.argsort(scores, kind="stable")[:size])
            for share, size in sizes.items()
        }
    if mislabeled.any() and not mislabeled.all():
        from sklearn.metrics import roc_auc_score

        summary["wrong_labels_roc_auc"] = round(float(roc_auc_score(mislabeled, examples.scores.mean)), 4)
        for end, ranking in {"easiest": order, "hardest": order[::-1]}.items():
            shares = {share: percent(mislabeled[ranking[:size]]) for share, size in sizes.items()}
            summary[f"wrong_labels_in_{end}_percent"] = shares
    return summary


def describe_subset(examples: ScoredExamples, indices: np.ndarray, rule: SubsetRule | None = None) -> dict[str, Any]:
    """Measure the size, classes and mislabeled examples of a subset, and how much it depends on the networks.

    Args:
        examples: All training examples.
        indices: Indices of the subset.
        rule: How scores select the subset; None for a random subset.

    Returns:
        Statistics as JSON. With a rule, `halves_overlap_percent` is the overlap of the subsets that it selects by the
        first and by the second half of the networks.
    """
    names = examples.data.class_names
    counts = np.bincount(examples.labels[indices], minlength=len(names))
    summary = {
        "size": len(indices),
        "wrong_labels_percent": {"subset": percent(examples.mislabeled[indices]), "data": percent(examples.mislabeled)},
        "classes": dict(zip(names, counts.tolist(), strict=True)),
    }
    if rule:
        scores = examples.scores.mean[indices]
        summary["scores"] = {"lowest": float(scores.min()), "highest": float(scores.max())}
        if halves := examples.halves():
            summary["halves_overlap_percent"] = _overlap(halves, rule)
    return summary


def percent(mask: np.ndarray) -> float:
    """Percentage of True values, 0 to 100, rounded to four decimals."""
    return round(100 * float(mask.mean()), 4)


def _overlap(halves: tuple[np.ndarray, np.ndarray], rule: SubsetRule) -> float:
    first, second = (rule(scores) for scores in halves)
    return round(100 * len(np.intersect1d(first, second)) / len(first), 4)
