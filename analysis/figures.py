"""Draws Figures 2 to 7 of the paper from results or from the published curves.

python -m analysis.figures --figure 2 results.csv -o figures              writes figure2.svg and figure2.png
python -m analysis.figures --figure 2 results.csv --published -o figures  adds the published curves as thin lines
python -m analysis.figures --published -o figures                         draws all figures from the published curves
"""

import argparse
import dataclasses
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from lth_diet.errors import Parser, UserError
from lth_diet.program import run_program
from lth_diet.tracking.figures import ARM_STYLES, STYLES

from . import arms, collect, paper
from .arms import Arm, Curve, Results
from .paper import Family

NUMBERS = (2, 3, 4, 5, 6, 7)
LEVELS_DRAWN = (8, 10, 12)
"""Levels of Figure 4: 16.8, 10.7 and 6.9 % of weights remaining."""

_SUBSETS = ("random", "easy", "hard")
# Colors close to those of the paper. Markers and dashes distinguish the lines in grayscale.
_STYLES = {
    "init": {"color": ARM_STYLES["init"][0], "linestyle": (0, (1, 1.5)), "linewidth": 2},
    "half": {"color": "#E69F00", "linestyle": (0, (5, 1.5, 1, 1.5)), "linewidth": 1.8},
    "full": {"color": ARM_STYLES["all"][0], "linestyle": (0, (6, 2)), "linewidth": 1.8},
} | {name: dict(zip(("color", "marker"), ARM_STYLES[name], strict=True)) for name in _SUBSETS}
_DENSE = {"color": "#777777", "linestyle": (0, (3, 3)), "linewidth": 1}
_MAX_OTHERS = len(STYLES)


@dataclasses.dataclass(frozen=True)
class Panel:
    """One set of axes: accuracy against weights remaining, or against subset size at one level.

    Args:
        family: The arms to compare.
        size: Subset size of the arms; None if the x axis is the subset size.
        level: Pruning level if the x axis is the subset size; None if it is weights remaining.
        others: Arms that no other panel shows, instead of those of the family.
    """

    family: Family
    size: int | None = None
    level: int | None = None
    others: tuple[Arm, ...] = ()

    @property
    def title(self) -> str:
        if self.others:
            return f"{dataclasses.replace(self.family, label_noise=0.0)}: other arms"
        if self.level is not None:
            fraction = dict(self.family.settings).get("prune.fraction")
            if not fraction:
                return f"{self.family}, level {self.level}"
            return f"{self.family}, {100 * (1 - float(fraction)) ** self.level:.1f} % of weights"
        return f"{self.family}" + (f", {self.size:,} examples" if self.size else "")


def panels(number: int, results: Results) -> list[list[Panel]]:
    """Panels of a figure, row by row, for the families that have results."""
    found = [family for family, _ in paper.families_of_all(results)]
    order = {family: index for index, family in enumerate(paper.FAMILIES)}
    found.sort(key=lambda family: order.get(family.without_setup, len(order)))
    clean = [family for family in found if not family.label_noise]
    larger = {family.setup for family in clean if family.without_setup == paper.CINIC10}
    shown = [f for f in clean if f.without_setup != paper.CINIC10_400 or f.setup not in larger]
    cinic = [family for family in clean if family.dataset == "cinic10"]
    noisy = [family for family in found if family.label_noise]
    several = [family for family in shown if len(_sizes(family, results[family.dataset])) > 1]
    if number == 2:
        others = [panel for name, curves in results.items() for panel in _other_panels(name, curves)]
        return _in_rows([*_drawable([Panel(family, family.size) for family in shown], results), *others])
    found = {
        3: [[Panel(family, family.size) for family in noisy]],
        4: [[Panel(family, level=level) for level in LEVELS_DRAWN] for family in several],
        5: _every_size([family for family in clean if family not in cinic], results),
        6: _every_size(sorted(cinic, key=lambda family: family.t_star), results),
        7: _every_size(noisy, results),
    }[number]
    return [row for row in (_drawable(row, results) for row in found) if row]


def _drawable(panels: list[Panel], results: Results) -> list[Panel]:
    """Panels with an arm other than init."""

    def drawable(panel: Panel) -> bool:
        return bool(_lines(panel, results[panel.family.dataset])[0].keys() - {"init"})

    return [panel for panel in panels if drawable(panel)]


def _other_panels(dataset: str, curves: dict[Arm, Curve]) -> list[Panel]:
    """Panels of the arms that have no role in the families of their setup, such as t_r = 30 if t* is 40."""
    panels = []
    for setup, mine in arms.by_setup(curves).items():
        families = paper.families(dataset, mine)
        with_role = {
            arms.lookup(arm, mine)
            for family in families
            for size in (family.size, *family.sizes)
            for arm in _roles(Panel(family, size)).values()
        }
        others = [arm for arm in mine if arm not in with_role]
        family = families[0] if families else Family(dataset, 0, setup=setup)
        panels += [
            Panel(family, others=tuple(others[start : start + _MAX_OTHERS]))
            for start in range(0, len(others), _MAX_OTHERS)
        ]
    return panels


def _sizes(family: Family, curves: dict[Arm, Curve]) -> list[int]:
    """Subset sizes of a family that have results."""
    return [size for size in family.sizes if any(arms.lookup(family.arm(n, size=size), curves) for n in _SUBSETS)]


def _every_size(families: list[Family], results: Results) -> list[list[Panel]]:
    rows = []
    for family in families:
        rows += _in_rows([Panel(family, size) for size in _sizes(family, results[family.dataset])])
    return rows


def _in_rows(panels: list[Panel]) -> list[list[Panel]]:
    across = 3 if len(panels) % 3 == 0 else 4
    return [panels[start : start + across] for start in range(0, len(panels), across)]


def _roles(panel: Panel) -> dict[str, Arm]:
    """Arms of a panel by role: init, half and full (all examples at t*/2 and t*), and the subsets at t*/2."""
    family = panel.family
    if panel.others:
        return {"init": family.arm("init")} | {str(arm): arm for arm in panel.others}
    roles = {"init": family.arm("init"), "half": family.arm("all"), "full": family.arm("all", family.t_star)}
    subsets = _SUBSETS[:2] if family.label_noise else _SUBSETS  # the paper has no hard arm under noise
    return roles | {name: family.arm(name, size=panel.size) for name in subsets if panel.size}


def _dense(family: Family, curves: dict[Arm, Curve]) -> float | None:
    """Accuracy of the unpruned network, all examples at t* (for CINIC-10 at 400 steps, as in the paper)."""
    steps = 400 if family.dataset == "cinic10" else family.t_star
    for wanted in (family.arm("all", steps), family.arm("all", family.t_star)):
        arm = arms.lookup(wanted, curves)
        if arm is not None and 0 in curves[arm].levels:
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
    if published and not differs_from_published(panel, curves) and not panel.others:
        for line in _lines(dataclasses.replace(panel, family=panel.family.without_setup), published)[0].values():
            _plot(axes, line, thin=True)
    lines, missing = _lines(panel, curves)
    for line in lines.values():
        _plot(axes, line, False, panel.others)
    dense = _dense(panel.family, curves)
    if dense is not None and panel.level is None and not panel.others:
        axes.axhline(dense, **_DENSE)
    axes.set_title(panel.title, fontsize=9, parse_math=False)  # the name of a data set may contain $
    axes.set_ylabel("Test accuracy (%)", fontsize=8)
    axes.tick_params(labelsize=7.5)
    axes.grid(alpha=0.25, linewidth=0.5)
    _x_axis(axes, panel, lines)
    several = [name for name, arm in missing.items() if arms.candidates(arm, curves)]
    absent = [name for name in missing if name not in several]
    notes = {"below": _set_y_range(axes, lines), "missing": absent, "several configurations": several}
    text = "; ".join(f"{label}: {', '.join(names)}" for label, names in notes.items() if names)
    box = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1} if text else None
    style = {"fontsize": 6.5, "color": "#333333", "bbox": box, "parse_math": False}
    axes.text(0.02, 0.02, textwrap.fill(text, 46), transform=axes.transAxes, **style)


@dataclasses.dataclass(frozen=True)
class _Line:
    """A line to draw; x is None for a horizontal line, mean and sd are in %."""

    role: str
    x: np.ndarray | None
    mean: np.ndarray
    sd: np.ndarray


def differs_from_published(panel: Panel, curves: dict[Arm, Curve]) -> str:
    """Says in what the arms of a panel differ from the published ones; empty if they agree, or it is not known."""
    shown = (arms.lookup(arm, curves) for arm in _roles(panel).values())
    found = (paper.differences_from_published(panel.family.dataset, curves[arm].identity) for arm in shown if arm)
    return next(filter(None, found), "")


def describe_unpublished(results: Results) -> list[str]:
    """Says which arms are not compared with the published curves, because they are not runs of Table 1 of the paper."""
    found: dict[tuple[str, str], list[str]] = {}
    for name, curves in results.items():
        for arm, curve in curves.items():
            if differences := paper.differences_from_published(name, curve.identity):
                found.setdefault((name, differences), []).append(str(arm))
    return [
        f"{paper.NAMES[name]}: {'; '.join(names)}: not compared with the published curves ({differences} there)"
        for (name, differences), names in found.items()
    ]


def _lines(panel: Panel, curves: dict[Arm, Curve]) -> tuple[dict[str, _Line], dict[str, Arm]]:
    """Lines of a panel by role, and the arms that are missing or that several configurations have, by name."""
    return (_against_size if panel.level is not None else _against_weights)(panel, curves)


def _against_weights(panel: Panel, curves: dict[Arm, Curve]) -> tuple[dict[str, _Line], dict[str, Arm]]:
    lines, missing = {}, {}
    for role, wanted in _roles(panel).items():
        arm = arms.lookup(wanted, curves)
        if arm is not None:
            curve = curves[arm]
            summary = curve.summary.loc[: panel.family.last_level] if curve.values is None else curve.summary
            columns = ("weights_remaining_percent", "mean", "sd")
            lines[role] = _Line(role, *(summary[name].to_numpy() for name in columns))
        elif not panel.others:
            same_runs = panel.family == paper.CIFAR10 and wanted == paper.SAME_RUNS
            missing[_short(wanted) + " (same runs as all, t*/2, in the paper)" * same_runs] = wanted
    return lines, missing


def _short(arm: Arm) -> str:
    return str(dataclasses.replace(arm, setup=()))


def _against_size(panel: Panel, curves: dict[Arm, Curve]) -> tuple[dict[str, _Line], dict[str, Arm]]:
    family, level, lines, missing = panel.family, panel.level, {}, {}
    available = {arm: curve.summary.loc[level] for arm, curve in curves.items() if level in curve.levels}
    for role, wanted in _roles(panel).items():
        arm = arms.lookup(wanted, available)
        if arm is not None:
            lines[role] = _Line(role, None, available[arm]["mean"], available[arm]["sd"])
        else:
            missing[_short(wanted)] = wanted
    for role in _SUBSETS:
        found = {size: arms.lookup(family.arm(role, size=size), available) for size in _subset_sizes(available)}
        points = {size: available[arm] for size, arm in found.items() if arm is not None}
        if points:
            mean, sd = (np.array([points[size][name] for size in sorted(points)]) for name in ("mean", "sd"))
            lines[role] = _Line(role, np.array(sorted(points)), mean, sd)
        else:
            missing[f"{role}, t_r = {family.half}"] = family.arm(role)
    return lines, missing


def _subset_sizes(available: Iterable[Arm]) -> set[int]:
    return {arm.subset_size for arm in available if arm.subset_size is not None}


def _style(role: str, others: tuple[Arm, ...] = ()) -> dict:
    names = [str(arm) for arm in others]
    if role in names:
        color, marker = STYLES[names.index(role)]
        return {"linewidth": 1.6, "markersize": 4.5, "color": color, "marker": marker}
    return {"linewidth": 1.6, "markersize": 4.5} | _STYLES[role]


def _plot(axes: Axes, line: _Line, thin: bool, others: tuple[Arm, ...] = ()) -> None:
    style = _style(line.role, others) | ({"linewidth": 0.7, "markersize": 2, "alpha": 0.6, "zorder": 1} if thin else {})
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
    """Fits the lower end of the y axis to the better arms, as in the paper; returns the roles entirely below it."""
    better = [line for role, line in lines.items() if role in ("half", "full", "random", "easy")] or lines.values()
    means = np.concatenate([[], *(np.atleast_1d(line.mean) for line in better)])
    if not means.size:
        return []
    span = max(means.max() - means.min(), 1.0)
    bottom = means.min() - 0.2 * span
    axes.set_ylim(bottom, max(np.max(line.mean) for line in lines.values()) + 0.12 * span)
    return [role for role, line in lines.items() if np.max(line.mean) < bottom]


def legend(chosen: list[Panel], results: Results) -> tuple[list[Line2D], list[str]]:
    """Legend handles and labels of the arms in the given panels, with their numbers of replicates."""
    names = {"init": "init: no pre-training", "half": "all, t*/2", "full": "all, t*"}
    names |= {name: f"{name}, t*/2" for name in _SUBSETS}
    counts: dict[tuple[str, tuple[Arm, ...]], set[int]] = {}
    for panel in chosen:
        curves = results[panel.family.dataset]
        for size in panel.family.sizes if panel.level is not None else [panel.size]:
            for role, wanted in _roles(dataclasses.replace(panel, size=size)).items():
                arm = arms.lookup(wanted, curves)
                if arm is not None:
                    key = role, () if role in _STYLES else panel.others
                    counts.setdefault(key, set()).update(curves[arm].summary.n.astype(int))
    handles = [Line2D([], [], **_style(role, others)) for role, others in counts]
    labels = [
        f"{names.get(role, role)} (n = {'–'.join(map(str, sorted({min(n), max(n)})))})"
        for (role, _), n in counts.items()
    ]
    with_dense = [panel for panel in chosen if panel.level is None and not panel.others]
    if any(_dense(panel.family, results[panel.family.dataset]) for panel in with_dense):
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
    rows = panels(number, results)
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
    drawn.suptitle(textwrap.fill(title, int(14 * width)), fontsize=9.5, parse_math=False)
    handles, labels = legend([panel for row in rows for panel in row], results)
    long_names = any(panel.others for row in rows for panel in row)
    columns = across if long_names else min(across + 1, 4)
    drawn.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, handlelength=3.5)
    return drawn


def headline_figure(panel: Panel, curves: dict[Arm, Curve]) -> Figure:
    """Draws a panel large: error bars, and the name of each arm at the end of its line instead of a legend.

    Args:
        panel: Accuracy against weights remaining.
        curves: Curves of the panel's data set.
    """
    names = {"half": "all, t*/2", "full": "all, t*"} | {name: f"{name}, t*/2" for name in _SUBSETS}
    drawn = Figure(figsize=(5.4, 4), layout="constrained")  # in inches; its text is readable on a phone
    axes = drawn.subplots()
    lines, _ = _lines(panel, {arm: curve.finished for arm, curve in curves.items()})
    for line in lines.values():
        style = _style(line.role, panel.others)
        axes.errorbar(line.x, line.mean, line.sd, elinewidth=0.8, capsize=2, **style)
    axes.set_title(f"{panel.family}: test accuracy (%)", fontsize=11, loc="left", parse_math=False)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.25, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    _x_axis(axes, panel, lines)
    axes.set_xlabel("Weights remaining (%); error bars: ± 1 sd over replicates", fontsize=9)
    low, high = axes.get_ylim()
    heights = _spread([line.mean[-1] for line in lines.values()], (high - low) / 19, high)
    for line, height in zip(lines.values(), heights, strict=True):
        axes.annotate(
            names.get(line.role, line.role),
            (line.x[-1], line.mean[-1]),
            (1.02, height),
            textcoords=axes.get_yaxis_transform(),
            fontsize=10,
            va="center",
            color=_style(line.role, panel.others)["color"],
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6, "relpos": (0, 0.5)},
        )
    return drawn


def _spread(values: list[float], gap: float, top: float) -> list[float]:
    """Moves heights as little as is simple, so that any two are at least `gap` apart and none is above `top`."""
    heights, above = list(values), top + gap
    for index in sorted(range(len(values)), key=lambda index: -values[index]):
        above = heights[index] = min(values[index], above - gap)
    return heights


def _describe_missing_panels(number: int, rows: list[list[Panel]], published: Results) -> str:
    """Names the panels of the published figure that have no results."""
    shown = {dataclasses.replace(panel, family=panel.family.without_setup) for row in rows for panel in row}
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
    results = collect.results_by_dataset(collect.select(frame, arguments.dataset, arguments.model))
    published = collect.results_by_dataset(collect.published()) if arguments.published and arguments.results else None
    for note in describe_unpublished(results) if published else ():
        print(f"note: {note}", file=sys.stderr)
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
