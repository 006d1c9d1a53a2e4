"""Statistics of scores and subsets: agreement of the networks, mislabeled examples, classes."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from lth_diet.data.dataset import Dataset
from lth_diet.scores.artifact import Scores

SubsetRule = Callable[[np.ndarray], np.ndarray]
_SHARES = (0.01, 0.05, 0.1, 0.25, 0.5)


@dataclasses.dataclass(frozen=True)
class ScoredExamples:
    """Training examples with what is known of them.

    Attributes:
        data: Their images and true labels.
        labels: Labels as pre-training sees them, shape (N,).
        scores: Of the same examples and labels, if there are any.
    """

    data: Dataset
    labels: np.ndarray
    scores: Scores | None = None

    @property
    def wrong(self) -> np.ndarray:
        """Which labels are not the true ones, boolean (N,)."""
        return self.labels != self.data.train.labels

    @property
    def class_names(self) -> list[str]:
        """As matplotlib is to draw them: a dollar sign begins no formula, and what is no character is a ?."""
        return [name.encode(errors="replace").decode().replace("$", r"\$") for name in self.data.class_names]

    @property
    def order(self) -> np.ndarray:
        """Positions from the easiest to the hardest; as they stand without scores."""
        return np.arange(len(self.labels)) if self.scores is None else np.argsort(self.scores.mean, kind="stable")

    def of_class(self, label: int, order: np.ndarray) -> np.ndarray:
        """Those of `order` that bear a label."""
        return order[self.labels[order] == label]

    def halves(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean scores of the first and of the second half of the networks; None if there is but one."""
        values = self.scores.el2n
        middle = len(values) // 2
        return (values[:middle].mean(0), values[middle:].mean(0)) if middle else None


def describe_scores(examples: ScoredExamples) -> dict[str, Any]:
    """Agreement of the networks, and how well the scores find wrong labels.

    Returns:
        Numbers for JSON. Those by share have as keys the percentage of all examples that are taken as easiest or
        hardest. `halves` compares the mean over the first with that over the second half of the networks.
    """
    from scipy.stats import spearmanr

    order, wrong = examples.order, examples.wrong
    sizes = {f"{100 * share:g}": max(1, round(share * len(order))) for share in _SHARES}
    found = {"examples": len(order), "networks": len(examples.scores.el2n), "wrong_labels_percent": percent(wrong)}
    halves = examples.halves()
    if halves:
        if all(np.ptp(half) for half in halves):  # else there are no ranks to compare
            found["halves_spearman"] = round(float(spearmanr(*halves).statistic), 4)
        found["halves_overlap_of_easiest_percent"] = {
            share: _overlap(halves, lambda scores, size=size: np.argsort(scores, kind="stable")[:size])
            for share, size in sizes.items()
        }
    if wrong.any() and not wrong.all():
        from sklearn.metrics import roc_auc_score

        found["wrong_labels_roc_auc"] = round(float(roc_auc_score(wrong, examples.scores.mean)), 4)
        ends = {"easiest": order, "hardest": order[::-1]}
        for end, ranked in ends.items():
            shares = {share: percent(wrong[ranked[:size]]) for share, size in sizes.items()}
            found[f"wrong_labels_in_{end}_percent"] = shares
    return found


def describe_subset(examples: ScoredExamples, indices: np.ndarray, choose: SubsetRule | None = None) -> dict[str, Any]:
    """Size, classes and wrong labels of a subset, and how far half of the networks would have chosen the same.

    Args:
        examples: All of them.
        indices: The subset.
        choose: From scores (N,) to a subset, where that is how it was chosen.
    """
    names = examples.data.class_names
    counts = np.bincount(examples.labels[indices], minlength=len(names))
    found = {
        "size": len(indices),
        "wrong_labels_percent": {"subset": percent(examples.wrong[indices]), "data": percent(examples.wrong)},
        "classes": dict(zip(names, counts.tolist(), strict=True)),
    }
    if choose:
        scores = examples.scores.mean[indices]
        found["scores"] = {"lowest": float(scores.min()), "highest": float(scores.max())}
        if halves := examples.halves():
            found["halves_overlap_percent"] = _overlap(halves, choose)
    return found


def percent(chosen: np.ndarray) -> float:
    return round(100 * float(chosen.mean()), 4)


def _overlap(halves: tuple[np.ndarray, np.ndarray], choose: SubsetRule) -> float:
    first, second = (choose(scores) for scores in halves)
    return round(100 * len(np.intersect1d(first, second)) / len(first), 4)
