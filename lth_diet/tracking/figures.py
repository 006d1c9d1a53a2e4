"""Accuracy against weights remaining, and error barriers against steps, as matplotlib figures."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

# Okabe and Ito's colors, yellow darkened, with markers: distinguishable by color-blind readers and in grayscale
ARM_STYLES = {
    "init": ("#8A7F00", "D"),
    "all": ("#0072B2", "s"),
    "random": ("#009E73", "o"),
    "easy": ("#D55E00", "^"),
    "hard": ("#CC79A7", "X"),
}
"""Color and marker of each arm."""
STYLES = [("#E69F00", "D"), *(ARM_STYLES[arm] for arm in ("all", "random", "easy", "hard")), ("#000000", "v")]
"""Color and marker cycle for curves that do not each show one arm."""
_LINES = ("-", "--", ":", "-.")


def accuracy_curves(curves: dict[str, pd.DataFrame], title: str) -> Figure:
    """Plot test accuracy against weights remaining, on a logarithmic axis. Bands are ± one standard deviation.

    Args:
        curves: One table per label, with columns weights_remaining_percent, mean, std (NaN: no band) and count.
        title: Title of the figure.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained", dpi=150)
    axes = figure.subplots()
    for index, (label, points) in enumerate(curves.items()):
        color, marker = STYLES[index % len(STYLES)]
        x, mean, sd = points["weights_remaining_percent"], points["mean"], points["std"].fillna(0)
        counts = "–".join(map(str, sorted({points["count"].min(), points["count"].max()})))
        axes.plot(x, mean, color=color, marker=marker, markersize=5, label=f"{label} (n = {counts})")
        axes.fill_between(x, mean - sd, mean + sd, color=color, alpha=0.15, linewidth=0)
    levels = sorted(pd.concat(list(curves.values())).weights_remaining_percent.unique(), reverse=True)
    ticks = levels[:: 1 if len(levels) < 6 else max(2, math.ceil(len(levels) / 12))]
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks(ticks, [f"{tick:.1f}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="Weights remaining (%)", ylabel="Test accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(title="pre-training; band: ± 1 sd")
    return figure


class Barriers(Protocol):
    """Error barriers at a step."""

    step: int
    test: list[float]


def barrier_curves(curves: Mapping[str, Sequence[Barriers]], title: str) -> Figure:
    """Plot barriers of the test error against the step k of pre-training; bars are ± one standard deviation.

    Args:
        curves: For each arm, by a label that begins with its name, the barriers of its replicates (percentage points)
            at each step.
        title: Title of the figure.
    """
    figure = Figure(figsize=(5.4, 4), layout="constrained", dpi=180)
    axes = figure.subplots()
    drawn: Counter[str] = Counter()  # curves by the name of their arm
    for label, points in curves.items():
        arm = re.split(r"\W", label)[0]
        color, marker = ARM_STYLES.get(arm, STYLES[-1])
        line = _LINES[drawn[arm] % len(_LINES)]
        drawn[arm] += 1
        steps, means = [each.step for each in points], [statistics.fmean(each.test) for each in points]
        sd = [statistics.stdev(each.test) if len(each.test) > 1 else 0.0 for each in points]
        counts = "–".join(map(str, sorted({len(each.test) for each in points})))
        style = {"color": color, "marker": marker, "linestyle": line, "markersize": 5, "capsize": 3}
        axes.errorbar(steps, means, sd, **style, label=f"{label} (n = {counts})")
    axes.set_xticks(sorted({each.step for points in curves.values() for each in points}))
    axes.set_ylim(bottom=0)
    axes.set(xlabel="Step k of pre-training", ylabel="Error barrier (points of test error)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(title="pre-training; bars: ± 1 sd")
    return figure
