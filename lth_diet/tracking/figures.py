"""Accuracy against weights remaining, as a matplotlib figure."""

import math

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

# Okabe and Ito's colors with markers: distinguishable by color-blind readers and in grayscale
STYLES = [("#E69F00", "D"), ("#0072B2", "s"), ("#009E73", "o"), ("#D55E00", "^"), ("#CC79A7", "X"), ("#000000", "v")]


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
