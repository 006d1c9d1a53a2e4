"""Finds the matching initializations for t* (Definition 3.2 of the paper) and the cheapest of them.

python -m analysis.matching results.csv -o figures       prints a table; writes figures/matching.svg and .png
python -m analysis.matching --published --margin 1

An arm is matching if it weakly dominates all examples at t* with the same label noise. Its cost is the number of
examples times the pre-training steps. Options and tests are those of python -m analysis.dominance. The arms are tested
separately, without correction: of many arms that fall short by the margin, a few pass by chance.
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lth_diet.config.schema import Dataset
from lth_diet.data import catalog
from lth_diet.errors import Parser, UserError
from lth_diet.program import run_program

from . import arms, collect, dominance, paper
from .arms import Arm, Curve, Results
from .dominance import Comparison
from .paper import Family


@dataclasses.dataclass(frozen=True)
class Entry:
    """Comparison of an arm with all examples at t*.

    Args:
        arm: The arm.
        cost: Examples × steps of pre-training; NaN if the number of examples is unknown.
        comparison: The arm against all examples at t*.
    """

    arm: Arm
    cost: float
    comparison: Comparison

    @property
    def matching(self) -> bool:
        """Whether the arm is a matching initialization."""
        return self.comparison.verdict in ("dominates", "weakly dominates")

    @property
    def cost_text(self) -> str:
        """The cost with thousands separators, such as `5,120`, or `unknown`."""
        return "unknown" if math.isnan(self.cost) else f"{self.cost:,.0f}"

    @property
    def worst(self) -> dict[str, float]:
        """Level with the smallest difference."""
        return self.comparison.statements["pooled"].worst


@dataclasses.dataclass(frozen=True)
class Match:
    """Comparison of all arms of a family with all examples at t*.

    Args:
        family: The family.
        entries: The arms, by increasing cost.
        missing: Why there is no reference arm; empty if there is one.
        untested: Arms that could not be compared, and why.
    """

    family: Family
    entries: list[Entry]
    missing: str = ""
    untested: tuple[str, ...] = ()

    @property
    def cheapest(self) -> Entry | None:
        """The matching arm with the lowest cost; None if no arm matches."""
        return next((entry for entry in self.entries if entry.matching), None)


def match(
    family: Family, curves: dict[Arm, Curve], margin: float | None, levels: tuple[int, int] | None, confidence: float
) -> Match:
    """Tests every arm of a family against all examples at t*; settings as in `claims.evaluate`."""
    margin, levels = family.test_range(margin, levels)
    wanted = family.arm("all", family.t_star)
    reference = arms.lookup(wanted, curves)
    if reference is None:
        return Match(family, [], arms.describe_missing(wanted, curves))
    entries, untested = [], []
    for arm in arms.by_setup(curves)[family.setup]:
        if arm == reference or (arm.label_noise != family.label_noise and arm.name != "init"):
            continue
        try:
            comparison = dominance.compare(curves, arm, reference, margin, levels, confidence)
            entries.append(Entry(arm, _cost(family.dataset, arm), comparison))
        except UserError as error:  # no common level yet
            untested.append(f"{arm} ({error})")
    entries.sort(key=lambda entry: (math.isnan(entry.cost), entry.cost))
    return Match(family, entries, "", tuple(untested))


def _cost(dataset: str, arm: Arm) -> float:
    if arm.name == "init":
        return 0.0
    if arm.subset_size is not None:
        return float(arm.rewind_steps * arm.subset_size)
    known = get_args(Dataset.model_fields["name"].annotation)
    if dataset not in known or dataset == "image_folder":
        return math.nan
    return float(arm.rewind_steps * catalog.info(dataset, "").train_size)


def describe(found: Match) -> str:
    """Describes how many arms are matching initializations, and the cheapest."""
    start = f"{found.family}: "
    if found.missing:
        return start + f"matching initializations not tested: {found.missing}"
    cheapest, tested = found.cheapest, f"{len(found.entries)} arm{'s' * (len(found.entries) > 1)}"
    untested = f"; not tested: {'; '.join(found.untested)}" if found.untested else ""
    if not found.entries:
        return start + "matching initializations not tested: " + ("; ".join(found.untested) or "no other arm")
    if cheapest is None:
        return start + f"none of {tested} is shown to be a matching initialization{untested}"
    matching = [entry for entry in found.entries if entry.matching]
    are = "are matching initializations" if len(matching) > 1 else "is a matching initialization"
    unknown = [str(entry.arm) for entry in matching if math.isnan(entry.cost)]
    cost = f"{cheapest.arm} ({cheapest.cost_text} examples × steps)"
    if len(unknown) == len(matching):
        which = f": {', '.join(unknown)} (of unknown cost)"
    elif unknown:
        which = f"; the cheapest of known cost is {cost}; of unknown cost: {', '.join(unknown)}"
    else:
        which = f"; the cheapest is {cost}" if len(matching) > 1 else f": {cost}"
    return f"{start}{len(matching)} of {tested} {are}{which}{untested}"


def heat_map(axes: Axes, found: Match) -> None:
    """Draws the smallest difference over the levels by subset size and arm; matching arms have a frame."""
    shown = [entry for entry in found.entries if entry.arm.name != "init"]
    columns = [*sorted({entry.arm.subset_size for entry in shown if entry.arm.subset_size}), None]
    rows = _rows(found)
    grid = np.full((len(rows), len(columns)), np.nan)
    for entry in shown:
        y, x = rows.index(_row(entry.arm)), columns.index(entry.arm.subset_size)
        grid[y, x] = entry.worst["difference"]
        style = {"color": "white" if abs(grid[y, x]) > 2 else "black", "ha": "center", "va": "center", "fontsize": 7}
        axes.text(x, y, f"{grid[y, x]:+.2f}" + "\nmatching" * entry.matching, **style)
        if entry.matching:
            axes.add_patch(Rectangle((x - 0.47, y - 0.46), 0.94, 0.92, fill=False, linewidth=1.5))
    # the color scale is the same in all figures and saturates at ±3 points
    axes.imshow(np.ma.masked_invalid(grid), cmap="PuOr", norm=TwoSlopeNorm(0, -3, 3), aspect="auto")
    axes.set_xticks(range(len(columns)), [f"{size:,}" if size else "all" for size in columns], fontsize=7.5)
    axes.set_yticks(range(len(rows)), list(map(str, rows)), fontsize=7.5)
    axes.set_xlabel("Subset size (examples)", fontsize=8)
    title = f"{found.family}: difference to all, t_r = {found.family.t_star}, at the worst level (points)"
    axes.set_title(title, fontsize=8, parse_math=False)


def _rows(found: Match) -> list[Arm]:
    """Rows of a heat map: arms of any subset size."""
    rows = {_row(entry.arm) for entry in found.entries if entry.arm.name != "init"}
    return sorted(rows, key=lambda row: row.sort_key)


def _row(arm: Arm) -> Arm:
    return dataclasses.replace(arm, subset_size=None, label_noise=0.0, setup=())


def figure(matches: Sequence[Match]) -> Figure:
    """Draws one heat map per family, stacked vertically."""
    rows = [max(len(_rows(found)), 2) for found in matches]
    across = max(len({entry.arm.subset_size for entry in found.entries}) for found in matches)
    size = (1.6 + 0.62 * max(across, 4), 0.42 * sum(rows) + 0.85 * len(rows))
    drawn = Figure(figsize=size, layout="constrained", dpi=130)
    grid = drawn.subplots(len(matches), 1, squeeze=False, height_ratios=[count + 1 for count in rows])
    for (axes,), found in zip(grid, matches, strict=True):
        heat_map(axes, found)
    return drawn


def match_all(results: Results, margin: float | None, levels: tuple[int, int] | None, confidence: float) -> list[Match]:
    """Calls `match` for every family in the results."""
    return [match(*each, margin, levels, confidence) for each in paper.families_of_all(results)]


@collect.catch_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m analysis.matching", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    dominance.add_result_arguments(parser)
    dominance.add_test_arguments(parser)
    parser.add_argument("-o", "--output", type=Path, help="folder for the heat map; default: no heat map")
    arguments = parser.parse_args(argv)
    dominance.check_test_arguments(arguments)
    frame = collect.select(dominance.load_results(arguments), arguments.dataset, arguments.model)
    results = collect.results_by_dataset(frame)
    dominance.print_settings(results)
    found = match_all(results, arguments.margin, arguments.levels, arguments.confidence)
    if not found:
        raise UserError("these results have no arm with pre-training, so there is nothing to test")
    drawable = [entry for entry in found if _rows(entry)]
    suffixes = ("svg", "png") if arguments.output and drawable else ()
    paths = [arguments.output / f"matching.{suffix}" for suffix in suffixes]
    if paths:
        drawn = figure(drawable)
        collect.write(arguments.output, lambda path: path.mkdir(parents=True, exist_ok=True))
    for path in paths:
        collect.write(path, drawn.savefig)
    width = max((len(str(entry.arm)) for family in found for entry in family.entries), default=0)
    for family in found:
        margin, levels = family.family.test_range(arguments.margin, arguments.levels)
        print(f"{describe(family)} (margin {margin:g} points, levels {levels[0]} to {levels[1]})")
        for entry in family.entries:
            worst = f"worst {entry.worst['difference']:+.2f} at level {entry.worst['level']}  {entry.comparison.size}"
            start = f"  {entry.arm!s:{width}}  {entry.cost_text:>13}"
            print(f"{start}  {entry.comparison.verdict:16}  {worst}{entry.comparison.also}")
    for path in paths:
        print(path)
    return 0


if __name__ == "__main__":
    run_program(main)
