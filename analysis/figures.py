"""Draws Figures 2 to 7 of the paper from results or from the published curves.

python -m analysis.figures --figure 2 results.csv -o figures              writes figure2.svg and figure2.png
python -m analysis.figures --figure 2 results.csv --published -o figures  adds the published curves as thin lines
python -m analysis.figures --published -o figures                         draws all figures from the published curves
"""

import argparse
import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from lth_diet.errors import Parser, UserError
from lth_diet.program import run_program

from . import arms, collect, paper
from .arms import Arm, Curve
from .paper import Family

NUMBERS = (2, 3, 4, 5, 6, 7)
LEVELS_DRAWN = (8, 10, 12)
"""Levels of Figure 4: 16.8, 10.7 and 6.9 % of weights remaining."""

# Okabe-Ito colors close to those of the paper, yellow darkened. Markers and dashes distinguish the lines in grayscale.
_STYLES = {
    "init": {"color": "#8A7F00", "linestyle": (0, (1, 1.5)), "linewidth": 2},
    "half": {"color": "#E69F00", "linestyle": (0, (5, 1.5, 1, 1.5)), "linewidth": 1.8},
    "full": {"color": "#0072B2", "linestyle": (0, (6, 2)), "linewidth": 1.8},
    "random": {"color": "#009E73", "marker": "o"},
    "easy": {"color": "#D55E00", "marker": "^"},
    "hard": {"color": "#CC79A7", "marker": "X"},
}
_DENSE = {"color": "#777777", "linestyle": (0, (3, 3)), "linewidth": 1}
_SUBSETS = ("random", "easy", "hard")

Results = dict[str, dict[Arm, Curve]]
"""Curves by data set and arm."""


@dataclasses.dataclass(frozen=True)
class Panel:
    """One set of axes: accuracy against weights remaining, or against subset size at one level.

    Args:
        family: The arms to compare.
        size: Subset size of the arms; None if the x axis is the subset size.
        level: Pruning level if the x axis is the subset size; None if it is weights remaining.
    """

    family: Family
    size: int | None = None
    level: int | None = None

    @property
    def title(self) -> str:
        if self.level is not None:
            return f"{self.family}, {100 * 0.8**self.level:.1f} % of weights"
        return f"{self.family}" + (f", {self.size:,} examples" if self.size else "")


def results_by_dataset(frame: pd.DataFrame) -> Results:
    """Groups results by data set and arm.

    Raises:
        UserError: If a data set has several models.
    """
    return {name: arms.curves_by_arm(collect.select_one(rows, name, None)) for name, rows in frame.groupby("dataset")}


def panels(number: int, results: Results) -> list[list[Panel]]:
    """Panels of a figure, row by row, for the families that have results."""
    found = [family for name, curves in results.items() for family in paper.families(name, curves)]
    found.sort(key=lambda f: paper.FAMILIES.index(f) if f in paper.FAMILIES else len(paper.FAMILIES))
    clean = [family for family in found if not family.label_noise]
    shown = [family for family in clean if family != paper.CINIC10_400 or paper.CINIC10 not in clean]
    cinic = [family for family in clean if family.dataset == "cinic10"]
    noisy = [family for family in found if family.label_noise]
    several = [family for family in shown if len(_sizes(family, results[family.dataset])) > 1]
    return {
        2: [[Panel(family, family.size) for family in shown]],
        3: [[Panel(family, family.size) for family in noisy]],
        4: [[Panel(family, level=level) for level in LEVELS_DRAWN] for family in several],
        5: _every_size([family for family in clean if family not in cinic], results),
        6: _every_size(sorted(cinic, key=lambda family: family.t_star), results),
        7: _every_size(noisy, results),
    }[number]


def _sizes(family: Family, curves: dict[Arm, Curve]) -> list[int]:
    """Subset sizes of a family that have results."""
    return [size for size in family.sizes if any(family.arm(name, size=size) in curves for name in _SUBSETS)]


def _every_size(families: list[Family], results: Results) -> list[list[Panel]]:
    rows = []
    for family in families:
        row = [Panel(family, size) for size in _sizes(family, results[family.dataset])]
        across = 3 if len(row) % 3 == 0 else 4
        rows += [row[start : start + across] for start in range(0, len(row), across)]
    return rows


def _roles(panel: Panel) -> dict[str, Arm]:
    """Arms of a panel by role: init, half and full (all examples at t*/2 and t*), and the subsets at t*/2."""
    family = panel.family
    roles = {"init": family.arm("init"), "half": family.arm("all"), "full": family.arm("all", family.t_star)}
    subsets = _SUBSETS[:2] if family.label_noise else _SUBSETS  # the paper has no hard arm under noise
    return roles | {name: family.arm(name, size=panel.size) for name in subsets if panel.size}


def _dense(family: Family, curves: dict[Arm, Curve]) -> float | None:
    """Accuracy of the unpruned network, all examples at t* (for CINIC-10 at 400 steps, as in the paper)."""
    steps = 400 if family.dataset == "cinic10" else family.t_star
    for arm in (family.arm("all", steps), family.arm("all", family.t_star)):
        if arm in curves and 0 in curves[arm].levels:
            return float(curves[arm].summary.loc[0, "mean"])
    return None


def draw(axes: Axes, panel: Panel, curves: dict[Arm, Curve], published: dict[Arm, Curve] | None = None) -> None:
    """Draws a panel and names the arms that are missing or below the y range.

    Args:
        axes: Axes to draw on.
        panel: The panel.
        curves: Curves of the panel's data set.
        published: Published curves to add as thin lines.
    """
    for line in _lines(panel, published or {})[0].values():
        _plot(axes, line, thin=True)
    lines, missing = _lines(panel, curves)
    for line in lines.values():
        _plot(axes, line, thin=False)
    dense = _dense(panel.family, curves)
    if dense is not None and panel.level is None:
        axes.axhline(dense, **_DENSE)
    axes.set_title(panel.title, fontsize=9)
    axes.set_ylabel("Test accuracy (%)", fontsize=8)
    axes.tick_params(labelsize=7.5)
    axes.grid(alpha=0.25, linewidth=0.5)
    _x_axis(axes, panel, lines)
    notes = {"below": _set_y_range(axes, lines), "missing": missing}
    text = "; ".join(f"{label}: {', '.join(names)}" for label, names in notes.items() if names)
    box = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1} if text else None
    axes.text(0.02, 0.02, textwrap.fill(text, 46), transform=axes.transAxes, fontsize=6.5, color="#333333", bbox=box)


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line to draw; x is None for a horizontal line, mean and sd are in %."""

    role: str
    x: np.ndarray | None
    mean: np.ndarray
    sd: np.ndarray


def _lines(panel: Panel, curves: dict[Arm, Curve]) -> tuple[dict[str, _Line], list[str]]:
    """Lines of a panel by role, and names of missing arms."""
    return (_against_size if panel.level is not None else _against_weights)(panel, curves)


def _against_weights(panel: Panel, curves: dict[Arm, Curve]) -> tuple[dict[str, _Line], list[str]]:
    lines, missing = {}, []
    for role, arm in _roles(panel).items():
        if arm in curves:
            summary = curves[arm].summary.loc[: panel.family.last_level]
            columns = ("weights_remaining_percent", "mean", "sd")
            lines[role] = _Line(role, *(summary[name].to_numpy() for name in columns))
        else:
            same_runs = panel.family == paper.CIFAR10 and arm == paper.SAME_RUNS
            missing.append(str(arm) + " (same runs as all, t*/2, in the paper)" * same_runs)
    return lines, missing


def _against_size(panel: Panel, curves: dict[Arm, Curve]) -> tuple[dict[str, _Line], list[str]]:
    family, level, lines, missing = panel.family, panel.level, {}, []
    available = {arm: curve.summary.loc[level] for arm, curve in curves.items() if level in curve.levels}
    for role, arm in _roles(panel).items():
        if arm in available:
            lines[role] = _Line(role, None, available[arm]["mean"], available[arm]["sd"])
        else:
            missing.append(str(arm))
    for role in _SUBSETS:
        points = {a.subset_size: row for a, row in available.items() if a == family.arm(role, size=a.subset_size)}
        if points:
            mean, sd = (np.array([points[size][name] for size in sorted(points)]) for name in ("mean", "sd"))
            lines[role] = _Line(role, np.array(sorted(points)), mean, sd)
        else:
            missing.append(f"{role}, t_r = {family.half}")
    return lines, missing


def _style(role: str) -> dict:
    return {"linewidth": 1.6, "markersize": 4.5} | _STYLES[role]


def _plot(axes: Axes, line: _Line, thin: bool) -> None:
    style = _style(line.role) | ({"linewidth": 0.7, "markersize": 2, "alpha": 0.6, "zorder": 1} if thin else {})
    if line.x is None:
        axes.axhline(line.mean, **style)
        return
    axes.plot(line.x, line.mean, **style)
    if not thin:
        low, high = line.mean - line.sd, line.mean + line.sd
        axes.fill_between(line.x, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _x_axis(axes: Axes, panel: Panel, lines: dict[str, _Line]) -> None:
    """Sets a logarithmic x axis with ticks at the levels or subset sizes."""
    x = np.unique(np.concatenate([[], *(line.x for line in lines.values() if line.x is not None)]))
    if not x.size:
        return
    if panel.level is not None:
        ticks, labels = x, [f"{size:,.0f}" for size in x]
        axes.tick_params("x", rotation=45 if len(x) > 5 else 0)
        axes.set_xlabel("Subset size (examples)", fontsize=8)
    else:
        every = 4 if len(x) > 13 else 2 if len(x) > 9 else 1
        ticks = x[::-1][::every]
        labels = [f"{weights:.1f}".removesuffix(".0") if weights > 99 else f"{weights:.1f}" for weights in ticks]
        axes.set_xlabel("Weights remaining (%)", fontsize=8)
    axes.set_xscale("log")
    axes.set_xticks(ticks, labels)
    axes.xaxis.set_minor_locator(NullLocator())
    ends = (x.min() / 1.08, x.max() * 1.08)
    axes.set_xlim(ends if panel.level is not None else ends[::-1])


def _set_y_range(axes: Axes, lines: dict[str, _Line]) -> list[str]:
    """Fits the y axis to the better arms, as in the paper; returns the roles that lie entirely below it."""
    better = [line for role, line in lines.items() if role in ("half", "full", "random", "easy")] or lines.values()
    means = np.concatenate([[], *(np.atleast_1d(line.mean) for line in better)])
    if not means.size:
        return []
    span = max(means.max() - means.min(), 1.0)
    bottom = means.min() - 0.2 * span
    axes.set_ylim(bottom, means.max() + 0.12 * span)
    return [role for role, line in lines.items() if np.max(line.mean) < bottom]


def legend(chosen: list[Panel], results: Results) -> tuple[list[Line2D], list[str]]:
    """Legend handles and labels of the arms in the given panels, with their numbers of replicates."""
    names = {"init": "init: no pre-training", "half": "all, t*/2", "full": "all, t*"}
    names |= {name: f"{name}, t*/2" for name in _SUBSETS}
    counts: dict[str, set[int]] = {}
    for panel in chosen:
        curves = results[panel.family.dataset]
        for size in panel.family.sizes if panel.level is not None else [panel.size]:
            for role, arm in _roles(dataclasses.replace(panel, size=size)).items():
                if arm in curves:
                    counts.setdefault(role, set()).update(curves[arm].summary.n.astype(int))
    handles = [Line2D([], [], **_style(role)) for role in counts]
    labels = [f"{names[role]} (n = {'–'.join(map(str, sorted({min(n), max(n)})))})" for role, n in counts.items()]
    if any(panel.level is None and _dense(panel.family, results[panel.family.dataset]) for panel in chosen):
        handles, labels = [*handles, Line2D([], [], **_DENSE)], [*labels, "dense (unpruned)"]
    return handles, labels


_CAPTIONS = {
    2: "Accuracy against weights remaining, all arms",
    3: "Label noise during pre-training",
    4: "Accuracy against subset size",
    5: "All subset sizes, CIFAR",
    6: "All subset sizes, CINIC-10",
    7: "All subset sizes under label noise",
}


def figure(number: int, results: Results, published: Results | None = None) -> Figure:
    """Draws one of Figures 2 to 7.

    Args:
        number: Number of the figure in the paper.
        results: Results to draw.
        published: Published curves to add as thin lines.

    Raises:
        UserError: If the results have no arm of this figure.
    """
    rows = [row for row in panels(number, results) if row]
    if not rows:
        raise UserError(f"these results have no arm of figure {number} ({_CAPTIONS[number].lower()})")
    across = max(map(len, rows))
    width = 3.5 * across if across > 1 else 5.0
    drawn = Figure(figsize=(width, 2.75 * len(rows) + 0.85), layout="constrained", dpi=130)
    grid = drawn.subplots(len(rows), across, squeeze=False)
    for row, line in zip(rows, grid, strict=True):
        for axes in line[len(row) :]:
            axes.set_visible(False)
        for panel, axes in zip(row, line, strict=False):
            name = panel.family.dataset
            draw(axes, panel, results[name], (published or {}).get(name))
    title = f"Figure {number}: {_CAPTIONS[number]}; band: ± 1 sd over n replicates"
    if published:
        title += "; thin: published" + _describe_missing_panels(number, rows, published)
    drawn.suptitle(textwrap.fill(title, int(14 * width)), fontsize=9.5)
    handles, labels = legend([panel for row in rows for panel in row], results)
    drawn.legend(handles, labels, loc="outside lower center", ncols=min(across + 1, 4), fontsize=8, handlelength=3.5)
    return drawn


def _describe_missing_panels(number: int, rows: list[list[Panel]], published: Results) -> str:
    """Names the panels of the published figure that have no results."""
    shown = {panel for row in rows for panel in row}
    missing: dict[Family, list[Panel]] = {}
    for panel in (panel for row in panels(number, published) for panel in row if panel not in shown):
        missing.setdefault(panel.family, []).append(panel)
    names = [
        f"{family} with {', '.join(f'{panel.size:,}' for panel in missing[family])} examples"
        if any(panel.family == family for panel in shown)
        else str(family)
        for family in missing
    ]
    return f"; no results for {'; '.join(names)}" if names else ""


def _distinct_figures(results: Results) -> list[int]:
    """Numbers of the figures with results, except those that only repeat panels of earlier ones."""
    numbers, shown = [], set()
    for number in NUMBERS:
        new = {panel for row in panels(number, results) for panel in row} - shown
        numbers += [number] * bool(new)
        shown |= new
    return numbers


@collect.catch_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m analysis.figures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="?", help="CSV file written by python -m analysis.collect")
    parser.add_argument("--published", action="store_true", help="draw the published curves, alone or with the results")
    parser.add_argument("--dataset", help="only this data set")
    parser.add_argument("--model", help="only this model")
    parser.add_argument("--figure", type=int, choices=NUMBERS, help="default: all figures that have results")
    parser.add_argument("-o", "--output", type=Path, default=Path("figures"), help="folder, default %(default)s")
    arguments = parser.parse_args(argv)
    if arguments.results is None and not arguments.published:
        raise UserError("give a CSV file written by python -m analysis.collect, --published, or both")
    frame = collect.published() if arguments.results is None else collect.load(arguments.results)
    collect.print_incomplete(frame)
    results = results_by_dataset(collect.select(frame, arguments.dataset, arguments.model))
    published = results_by_dataset(collect.published()) if arguments.published and arguments.results else None
    numbers = [arguments.figure] if arguments.figure else _distinct_figures(results)
    figures = {number: figure(number, results, published) for number in numbers}
    collect.write(arguments.output, lambda path: path.mkdir(parents=True, exist_ok=True))
    for number, drawn in figures.items():
        for suffix in ("svg", "png"):
            path = arguments.output / f"figure{number}.{suffix}"
            collect.write(path, drawn.savefig)
            print(path)
    return 0


if __name__ == "__main__":
    run_program(main)
