"""Accuracy against weights remaining: a table and a picture, one line an arm.

python -m analysis.curves --experiment digits -o quickstart.png
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis.collect import collect
from lth_diet.figures import accuracy_curves
from lth_diet.tracking import tracking_uri

ARM = ["arm", "subset_size", "rewind_steps", "run_id"]


def summary(results: pd.DataFrame) -> pd.DataFrame:
    """Mean, standard deviation and number of replicates of each arm and level."""
    groups = results.groupby([*ARM, "level", "weights_remaining_percent"], dropna=False).test_accuracy_percent
    return groups.agg(["mean", "std", "count"]).reset_index()


def labels(frame: pd.DataFrame) -> pd.Series:
    """Each row's arm in words, such as `random 256, t_r = 20`; with its run id where two runs share the words."""
    size = frame.subset_size.map(lambda size: "" if pd.isna(size) else f" {int(size)}")
    steps = frame.rewind_steps.map(lambda steps: f", t_r = {steps}").where(frame.arm != "init", "")
    words = frame.arm + size + steps
    shared = frame.groupby(words).run_id.transform("nunique") > 1
    return words.where(~shared, words + " (" + frame.run_id + ")")


def table(frame: pd.DataFrame) -> str:
    """Levels down, arms across."""
    sd = frame["std"].map(lambda sd: "" if pd.isna(sd) else f" ± {sd:.2f}")
    cells = frame["mean"].map("{:.2f}".format) + sd + frame["count"].map(" ({})".format)
    cells = frame.assign(label=labels(frame), cell=cells)
    wide = cells.pivot_table("cell", ["level", "weights_remaining_percent"], "label", "first", sort=False).sort_index()
    wide.index = [f"{level}  {weights:.1f} %" for level, weights in wide.index]
    return wide.rename_axis("level, weights", axis=0).rename_axis(None, axis=1).fillna("-").to_string()


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
    curves = dict(iter(frame.groupby(labels(frame), sort=False)))
    title = ", ".join(f"{dataset}, {model}" for dataset, model in pairs)
    accuracy_curves(curves, title).savefig(arguments.output)
    print(f"picture: {arguments.output.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
