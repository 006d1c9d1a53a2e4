"""Accuracy against weights remaining: a table and a picture, one line an arm.

python -m analysis.curves --experiment digits -o quickstart.png
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import pandas as pd

from analysis.collect import collect
from lth_diet.tracking import tracking_uri

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

ARM = ["arm", "subset_size", "rewind_steps", "run_id"]
# Okabe and Ito's colours, and markers: apart for the colour-blind and in grey
STYLES = [("#E69F00", "D"), ("#0072B2", "s"), ("#009E73", "o"), ("#D55E00", "^"), ("#CC79A7", "X"), ("#000000", "v")]


def summary(results: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard deviation and number of replicates of each arm and level."""
    groups = results.groupby([*ARM, "level", "weights_remaining_percent"], dropna=False).test_accuracy_percent
    return groups.agg(["mean", "std", "count"]).reset_index()


def label(arm: str, size: int | None, steps: int) -> str:
    """An arm in words, such as `random 256, t_r = 20`."""
    what = arm if pd.isna(size) else f"{arm} {size}"
    return what if arm == "init" else f"{what}, t_r = {steps}"


def table(frame: pd.DataFrame) -> str:
    """Levels down, arms across."""
    cells = frame.assign(
        arm=[label(*row) for row in frame[ARM[:3]].itertuples(index=False)],
        cell=[
            f"{row.mean:.2f}" + ("" if pd.isna(row.std) else f" ± {row.std:.2f}") + f" ({row.count})"
            for row in frame[["mean", "std", "count"]].itertuples(index=False, name="Row")
        ],
    )
    wide = cells.pivot_table("cell", ["level", "weights_remaining_percent"], "arm", "first", sort=False).sort_index()
    wide.index = [f"{level}  {weights:.1f} %" for level, weights in wide.index]
    return wide.rename_axis("level, weights", axis=0).rename_axis(None, axis=1).fillna("-").to_string()


def draw(frame: pd.DataFrame, title: str, path: Path) -> None:
    """One line an arm over a logarithmic axis of weights remaining; the band is ± one standard deviation."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for index, (arm, points) in enumerate(frame.groupby(ARM, dropna=False, sort=False)):
        colour, marker = STYLES[index % len(STYLES)]
        x, mean, sd = points.weights_remaining_percent, points["mean"], points["std"].fillna(0)
        counts = "–".join(map(str, sorted({points["count"].min(), points["count"].max()})))
        name = f"{label(*arm[:3])} (n = {counts})"
        axes.plot(x, mean, color=colour, marker=marker, markersize=5, label=name)
        axes.fill_between(x, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)
    ticks = sorted(frame.weights_remaining_percent.unique(), reverse=True)[::2]
    axes.set_xscale("log")
    axes.invert_xaxis()
    axes.set_xticks(ticks, [f"{tick:.1f}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="Weights remaining (%)", ylabel="Test accuracy (%)", title=title)
    axes.grid(alpha=0.3)
    axes.legend(title="pre-training; band: ± 1 sd")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tracking-uri", default=tracking_uri())
    parser.add_argument("--experiment", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True, help="PNG or SVG file")
    arguments = parser.parse_args(argv)
    try:
        results = collect(arguments.tracking_uri, arguments.experiment)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if results.empty:
        print(f"error: no level is done yet in experiment {arguments.experiment!r}", file=sys.stderr)
        return 2
    frame = summary(results)
    print("test accuracy in %, mean ± sd (replicates)\n" + table(frame))
    pairs = sorted(set(zip(results.dataset, results.model, strict=True)))
    draw(frame, ", ".join(f"{dataset}, {model}" for dataset, model in pairs), arguments.output)
    print(f"picture: {arguments.output.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
