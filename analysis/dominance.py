"""Tests whether one arm dominates another (Definitions 3.1 and 3.2 of the paper).

python -m analysis.dominance results.csv --challenger easy:size=12800,steps=200 --reference all:steps=400
python -m analysis.dominance --published --dataset cifar10 --challenger easy:size=12800 --reference all:steps=400
python -m analysis.dominance --published --dataset cifar10 --all-pairs

The challenger *dominates* the reference if it is better at every level of the range. It *weakly dominates* if at every
level it is better, or worse by less than the margin. It is *dominated* if it is worse at every level. Otherwise the
comparison is *undecided*. Each level is a one-sided t test at the given confidence. A verdict requires all levels to
pass, which is an intersection-union test (Berger 1982) and needs no correction for multiple testing. The worst level is
selected from the data, so its interval is simultaneous over the levels (Bonferroni).

Three tests are reported, which differ in what they assume about the spread between replicates:

per_level   Nothing: each level has its own spread.
pooled      The spread follows a smooth trend over the levels with scatter around it, so that each level borrows
            strength from the others. This is the moderated t test of Smyth (2004) with a trend, as in limma, adapted to
            correlated levels of the same replicates (`difference.pooled`). It gives the verdict.
mean        Tests the mean difference over the levels, the area between the curves. It assumes nothing if the replicates
            are known, and makes no claim about any single level.

Replicates are paired by seed and number, if at least half of those of the smaller arm have a partner. Levels that less
than half of an arm's replicates, or one of several, have finished are not tested. The published curves have no
individual replicates: they are compared with Welch's test, assuming perfect correlation between the levels of a
replicate where it matters, which is the conservative case.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lth_diet.config.fields import MAX_LEVELS
from lth_diet.errors import Parser, UserError
from lth_diet.program import run_program

from . import arms, collect, identities, paper
from .arms import Arm, Curve, Results
from .difference import (
    MAX_REPLICATES,
    Difference,
    bounds,
    from_summaries,
    paired,
    pooled,
    probability_of_improvement,
    replicates_needed,
    verdict,
    welch,
)

MARGIN, LEVELS = paper.MARGIN, paper.LEVELS
CONFIDENCE = 0.95

ASSUMPTIONS = {
    "per_level": "each level has its own spread between replicates",
    "pooled": "the spread between replicates follows a smooth trend over the levels, with scatter around it",
    "mean": "tests the mean difference over the levels, which is the area between the curves, not any single level",
}
_PERFECT_CORRELATION = "; perfect correlation between the levels of a replicate is assumed, which is conservative"
_LEVEL_VERDICTS = {
    "dominates": "better",
    "weakly dominates": "no worse",
    "dominated": "worse",
    "undecided": "undecided",
}


@dataclasses.dataclass(frozen=True)
class Statement:
    """Result of one test of a difference.

    Args:
        assumption: Assumption about the spread between replicates.
        verdict: dominates, weakly dominates, dominated or undecided.
        levels: One row per level: level, weights_remaining_percent, difference, lower, upper (one-sided bounds) and
            verdict. The test of the mean has one row, with level NaN.
        worst: The level with the smallest difference; its lower and upper bounds form a simultaneous interval.
        holds_at_margin: Smallest margin at which the challenger weakly dominates; NaN if the spread is unknown.
        difference: The tested difference; for the pooled test, with moderated variance and df.
    """

    assumption: str
    verdict: str
    levels: pd.DataFrame
    worst: dict[str, float]
    holds_at_margin: float
    difference: Difference

    def interval(self, confidence: float) -> tuple[np.ndarray, np.ndarray]:
        """Two-sided interval of the difference at each level, not simultaneous."""
        found = self.difference
        return bounds(found.mean, found.variance, found.df, (1 + confidence) / 2)

    def simultaneous(self, confidence: float) -> tuple[np.ndarray, np.ndarray]:
        """Two-sided intervals of the differences that hold for all levels at once."""
        return _simultaneous_bounds(self.difference, confidence)

    def replicates(self, margin: float, confidence: float) -> dict[str, int | None]:
        """Number of replicates per arm needed for each verdict; see `difference.replicates_needed`."""
        mean = self.difference.mean
        gaps = {"dominates": mean, "weakly dominates": mean + margin, "dominated": -mean}
        return {name: replicates_needed(self.difference, gap, confidence) for name, gap in gaps.items()}

    def replicates_below(self, bound: float, confidence: float) -> int | None:
        """Number of replicates per arm needed for a simultaneous interval of the worst level below a bound."""
        worst = [int(self.difference.mean.argmin())]
        mean, variance = self.difference.mean[worst], self.difference.variance[worst]
        alone = dataclasses.replace(self.difference, mean=mean, variance=variance)
        return replicates_needed(alone, bound - mean, _simultaneous(confidence, len(self.levels)))

    def __repr__(self) -> str:
        return f"Statement({self.verdict}, {len(self.levels)} levels, worst {self.worst['difference']:+.2f} points)"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Comparison of a challenger with a reference over a range of levels.

    Args:
        challenger: The arm that is tested.
        reference: The arm that it is compared with.
        n: Number of replicates of challenger and reference.
        paired: Whether replicates are paired.
        margin: Non-inferiority margin in percentage points.
        confidence: Confidence of each one-sided test.
        statements: Results of the tests per_level, pooled and mean.
        notes: Remarks for the reader, such as replicates that were excluded.
        improvement: Probability that a replicate of the challenger beats one of the reference, with its interval, see
            `difference.probability_of_improvement`; None for published curves.
    """

    challenger: Arm
    reference: Arm
    n: tuple[int, int]
    paired: bool
    margin: float
    confidence: float
    statements: dict[str, Statement]
    notes: list[str]
    improvement: tuple[float, float, float] | None = None

    def __repr__(self) -> str:
        return f"Comparison({self.challenger} against {self.reference}: {self.verdict})"

    @property
    def also(self) -> str:
        """The notes, to follow a verdict in its line; empty if there are none."""
        return "".join(f"; {note}" for note in self.notes)

    @property
    def size(self) -> str:
        """Number of replicates, such as `n = 8` or `n = 8 and 7`."""
        return f"n = {self.n[0]}" if self.n[0] == self.n[1] else f"n = {self.n[0]} and {self.n[1]}"

    @property
    def verdict(self) -> str:
        """Verdict of the pooled test."""
        return self.statements["pooled"].verdict

    @functools.cached_property
    def replicates(self) -> dict[str, int | None]:
        """Number of replicates per arm that each verdict would need, by the pooled test."""
        return self.statements["pooled"].replicates(self.margin, self.confidence)

    def as_dict(self) -> dict:
        """Content of `--json`; unknown numbers are None."""
        statements = {
            name: {
                "verdict": statement.verdict,
                "assumption": statement.assumption,
                "worst": statement.worst,
                "holds_at_margin": statement.holds_at_margin,
                "replicates_needed": statement.replicates(self.margin, self.confidence),
                "levels": statement.levels.to_dict("records"),
            }
            for name, statement in self.statements.items()
        }
        return _without_nan(
            {
                "verdict": self.verdict,
                "challenger": self.challenger.spec,
                "reference": self.reference.spec,
                "n": list(self.n),
                "paired": self.paired,
                "probability_of_improvement": list(self.improvement) if self.improvement else None,
                "margin": self.margin,
                "confidence": self.confidence,
                "levels": self.statements["pooled"].levels.level.tolist(),
                "statements": statements,
                "notes": self.notes,
            }
        )


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def compare(
    curves: dict[Arm, Curve],
    challenger: Arm,
    reference: Arm,
    margin: float = MARGIN,
    levels: tuple[int, int] = LEVELS,
    confidence: float = CONFIDENCE,
) -> Comparison:
    """Compares two arms with all three tests.

    Args:
        curves: Curves of one data set and model, by arm.
        challenger: The arm that is tested.
        reference: The arm that it is compared with.
        margin: Non-inferiority margin in percentage points, at least 0.
        levels: First and last level of the range; levels missing from an arm are skipped.
        confidence: Confidence of each one-sided test, 0.5 to 1.

    Raises:
        UserError: If the arms differ in more than their pre-training and numerical settings, have no level of the range
            in common, or an arm has no replicate with all of them.
    """
    ours, theirs = curves[challenger], curves[reference]
    forbidden, numerical = identities.differences(ours.identity, theirs.identity)
    if forbidden:
        raise UserError(f"{challenger} and {reference} cannot be compared: they differ in {forbidden}")
    first, last = levels
    common = [level for level in ours.finished_levels if level in theirs.finished_levels and first <= level <= last]
    both = {challenger: ours, reference: theirs}
    if not common:
        available = " and ".join(f"{collect.format_levels(each.levels)} ({arm})" for arm, each in both.items())
        raise UserError(
            f"levels {first} to {last}: the arms have none in common; the results have levels {available}"
            + "".join(f"; {sentence}" for arm, each in both.items() for sentence in _describe_unfinished(arm, each))
        )
    difference, notes, improvement = _difference(both, common, confidence)
    if numerical:
        notes.append(f"the arms also differ in {numerical}")
    weights, others = (curve.summary.weights_remaining_percent.loc[common].to_numpy() for curve in (ours, theirs))
    if (far := np.abs(weights / others - 1) > arms.SAME_WEIGHTS).any():
        at = int(far.argmax())
        raise UserError(
            f"{challenger} and {reference} cannot be compared: at level {common[at]} they have {weights[at]:.3g} and "
            f"{others[at]:.3g} % of their weights"
        )
    caveat = _PERFECT_CORRELATION if ours.values is None or theirs.values is None else ""
    average = dataclasses.replace(
        difference, mean=difference.average[0], variance=difference.average[1], df=difference.average[2]
    )
    moderated_variance, moderated_df = pooled(difference)
    moderated = dataclasses.replace(difference, variance=moderated_variance, df=moderated_df)
    no_level = [np.nan], [np.nan]
    statements = {
        "per_level": _statement(ASSUMPTIONS["per_level"], difference, common, weights, margin, confidence),
        "pooled": _statement(ASSUMPTIONS["pooled"] + caveat, moderated, common, weights, margin, confidence),
        "mean": _statement(ASSUMPTIONS["mean"] + caveat, average, *no_level, margin, confidence),
    }
    if (statements["pooled"].levels.upper < 0).all() and statements["pooled"].verdict == "weakly dominates":
        notes.append("worse at every level, but by less than the margin")
    if common != list(range(first, last + 1)):
        notes.append(f"tested at {collect.name_levels(common)} of {first} to {last} only")
    return Comparison(
        challenger,
        reference,
        difference.n,
        difference.paired,
        margin,
        confidence,
        statements,
        notes,
        improvement,
    )


def _describe_unfinished(arm: Arm, curve: Curve) -> list[str]:
    """Says which levels are not tested because few replicates have finished them."""
    n = curve.summary.n
    few = [level for level in curve.levels if level not in curve.finished_levels]
    return [f"{arm}: {n[few[0]]} of {n.max()} replicates have finished {collect.name_levels(few)}"] if few else []


def _difference(
    both: dict[Arm, Curve], levels: list[int], confidence: float
) -> tuple[Difference, list[str], tuple[float, float, float] | None]:
    """Paired if two or more replicates, and half of those of the smaller arm, have a partner.

    Replicates that lack a level are excluded, and so are those without a partner if the others are paired.
    """
    curves = list(both.values())
    if any(curve.values is None for curve in curves):
        rows = [curve.summary.loc[levels] for curve in curves]
        n = tuple(int(part.n.min()) for part in rows)
        return from_summaries(*(tuple(p[name].to_numpy() for p in rows) for name in ("mean", "sd")), n), [], None
    complete = [curve.values[levels].dropna() for curve in curves]
    notes = [
        f"{len(curve.values) - len(part)} of {len(curve.values)} replicates of {arm} excluded because they lack some "
        "levels"
        for (arm, curve), part in zip(both.items(), complete, strict=True)
        if len(part) < len(curve.values)
    ]
    pairs = complete[0].index.intersection(complete[1].index)
    if len(pairs) > 1 and 2 * len(pairs) >= min(map(len, complete)):
        unpaired = len(complete[0]) + len(complete[1]) - 2 * len(pairs)
        if unpaired:
            replicates = f"{unpaired} replicate{'s' * (unpaired > 1)}"
            notes.append(f"{replicates} excluded because no partner has the same seed and number")
        values = [part.loc[pairs].to_numpy() for part in complete]
        return paired(*values), notes, probability_of_improvement(*values, True, confidence)
    if any(part.empty for part in complete):
        raise UserError(f"levels {collect.format_levels(levels)}: no replicate has all of them; choose a smaller range")
    values = [part.to_numpy() for part in complete]
    return welch(*values), notes, probability_of_improvement(*values, False, confidence)


def _statement(
    assumption: str, difference: Difference, levels: list, weights: Sequence[float], margin: float, confidence: float
) -> Statement:
    lower, upper = bounds(difference.mean, difference.variance, difference.df, confidence)
    by_level = [_LEVEL_VERDICTS[str(name)] for name in verdict(lower[:, None], upper[:, None], margin)]
    table = pd.DataFrame(
        {
            "level": levels,
            "weights_remaining_percent": weights,
            "difference": difference.mean,
            "lower": lower,
            "upper": upper,
            "verdict": by_level,
        }
    )
    simultaneous = _simultaneous_bounds(difference, confidence)
    worst = int(difference.mean.argmin())
    row = {key: table[key].iloc[worst] for key in ("level", "weights_remaining_percent", "difference")}
    return Statement(
        assumption,
        str(verdict(lower, upper, margin)),
        table,
        {key: value.item() for key, value in row.items()}
        | {"lower": float(simultaneous[0][worst]), "upper": float(simultaneous[1][worst])},
        float(np.maximum(-lower, 0).max()),
        difference,
    )


def _simultaneous_bounds(difference: Difference, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    each = _simultaneous(confidence, difference.mean.shape[-1])
    return bounds(difference.mean, difference.variance, difference.df, each)


def _simultaneous(confidence: float, levels: int) -> float:
    """Confidence of each bound of a two-sided interval that holds for all levels at once (Bonferroni)."""
    return 1 - (1 - confidence) / (2 * levels)


def interval(lower: float, upper: float) -> str:
    """Formats bounds in percentage points."""
    return f"[{lower:+.2f}, {upper:+.2f}]" if np.isfinite(lower) else "unknown"


def describe(comparison: Comparison, wanted: str | None = None) -> str:
    """Describes the verdict, the worst level and the number of replicates needed for a better verdict.

    Args:
        comparison: The comparison to describe.
        wanted: The verdict to aim for, dominates or weakly dominates; None for the one that needs fewest replicates.
    """
    statement, found = comparison.statements["pooled"], comparison.verdict
    verb = {"dominated": "is dominated by", "undecided": "against"}.get(found, found)
    worst = statement.worst
    text = (
        f"{comparison.challenger} {verb} {comparison.reference}{': undecided' * (found == 'undecided')} "
        f"(margin {comparison.margin:g} points, {100 * comparison.confidence:g} % confidence, {comparison.size}, "
        f"{'paired' if comparison.paired else 'unpaired'}); worst at level {worst['level']} "
        f"({worst['weights_remaining_percent']:.1f} % of weights): {worst['difference']:+.2f} points, "
        f"simultaneous interval {interval(worst['lower'], worst['upper'])}"
    )
    if found in ("dominates", "dominated", wanted) or (found != "undecided" and wanted is None):
        return text
    if min(comparison.n) == 1:
        return text + "; needs at least two replicates per arm to estimate the spread"
    needed = {name: count for name, count in comparison.replicates.items() if count and wanted in (name, None)}
    if not needed:
        goal = "decide" if wanted is None else f"show that it {wanted}"
        return (
            f"{text}; up to {MAX_REPLICATES:,} replicates per arm would not {goal} if these differences are the true "
            f"ones; weakly dominates at {_margin(statement)}"
        )
    name = min(needed, key=needed.get)
    is_ = "is " * (name == "dominated")
    return f"{text}; needs about {needed[name]} replicates per arm to show that it {is_}{name}"


def _margin(statement: Statement) -> str:
    margin = statement.holds_at_margin
    return "an unknown margin" if np.isnan(margin) else f"a margin of {margin:.2f} points"


def table(comparison: Comparison) -> str:
    """Formats the per-level and pooled tests side by side, and the mean below."""
    rows = []
    per_level, moderated, mean = (comparison.statements[name] for name in ("per_level", "pooled", "mean"))
    for own, shared in zip(per_level.levels.itertuples(), moderated.levels.itertuples(), strict=True):
        rows.append(
            f"{own.level:5d} {own.weights_remaining_percent:7.1f} % {own.difference:+10.2f}   "
            f"{interval(own.lower, own.upper):16} {own.verdict:10}  "
            f"{interval(shared.lower, shared.upper):16} {shared.verdict}"
        )
    (average,) = mean.levels.itertuples()
    bounds = interval(average.lower, average.upper)
    rows.append(f" mean           {average.difference:+10.2f}   {bounds:16} {average.verdict}")
    head = "level   weights difference   per level                    pooled"
    return "\n".join([head, *rows])


def matrix(curves: dict[Arm, Curve], margin: float, levels: tuple[int, int], confidence: float) -> pd.DataFrame:
    """Verdict of every arm (rows) against every other (columns); empty if two arms cannot be compared.

    `attrs["notes"]` names the pairs that are compared without some of their replicates, or unpaired.
    """
    names = [arm.spec for arm in curves]
    cells = pd.DataFrame("", index=names, columns=names)
    notes = []
    for challenger, reference in itertools.permutations(curves, 2):
        try:
            found = compare(curves, challenger, reference, margin, levels, confidence)
        except UserError:
            continue
        cells.loc[challenger.spec, reference.spec] = found.verdict
        if cells.loc[reference.spec, challenger.spec] == "":  # once per pair
            notes += _describe_replicates(found, [curves[challenger], curves[reference]])
    cells.attrs["notes"] = notes
    return cells


def _describe_replicates(found: Comparison, curves: list[Curve]) -> list[str]:
    if any(curve.values is None for curve in curves):
        return []
    fewer = any(n < len(curve.values) for n, curve in zip(found.n, curves, strict=True))
    unpaired = ", unpaired" * (not found.paired and min(found.n) > 1)
    of = f" of {' and '.join(str(len(curve.values)) for curve in curves)}" * fewer
    return [f"{found.challenger} against {found.reference}: {found.size}{of}{unpaired}"] if fewer or unpaired else []


def _describe_missing_levels(curves: dict[Arm, Curve], levels: tuple[int, int]) -> list[str]:
    missing = {arm: sorted(set(range(levels[0], levels[1] + 1)) - set(c.finished_levels)) for arm, c in curves.items()}
    return [f"{arm} is compared without {collect.name_levels(lacking)}" for arm, lacking in missing.items() if lacking]


SYMBOLS = {"dominates": ">", "weakly dominates": "≥", "dominated": "<", "undecided": "·", "": " "}


def to_symbols(cells: pd.DataFrame) -> str:
    """Formats the matrix with one symbol per verdict and numbered columns."""
    width = max(map(len, cells.index))
    lines = ["row against column: > dominates, ≥ weakly dominates, < is dominated, · undecided"]
    lines.append(" " * (width + 4) + "".join(f"{number:>3}" for number in range(1, len(cells) + 1)))
    for number, (name, row) in enumerate(cells.iterrows(), 1):
        lines.append(f"{number:>3} {name:{width}}" + "".join(f"{SYMBOLS[cell]:>3}" for cell in row))
    return "\n".join(lines)


def add_result_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that select the results: a CSV file or the published curves, data set and model."""
    parser.add_argument("results", type=Path, nargs="?", help="CSV file written by python -m analysis.collect")
    parser.add_argument("--published", action="store_true", help="use the published curves of the paper")
    parser.add_argument("--dataset", help="only this data set")
    parser.add_argument("--model", help="only this model")


def add_test_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of the tests: margin, levels and confidence."""
    parser.add_argument(
        "--margin",
        type=float,
        help=f"non-inferiority margin in percentage points; default: that of the experiment, {MARGIN:g} in the paper",
    )
    parser.add_argument(
        "--levels",
        type=int,
        nargs=2,
        metavar=("FIRST", "LAST"),
        help=f"range of levels; default: that of the experiment, {LEVELS[0]} to {LEVELS[1]} in the paper",
    )
    parser.add_argument(
        "--confidence", type=float, default=CONFIDENCE, help="confidence of each one-sided test, default %(default)s"
    )


def check_test_arguments(arguments: argparse.Namespace) -> None:
    """Validates margin, levels and confidence.

    Raises:
        UserError: If one is out of range.
    """
    if arguments.margin is not None and not 0 <= arguments.margin < np.inf:
        raise UserError(f"--margin = {arguments.margin}: must be 0 or more percentage points")
    if not 0.5 < arguments.confidence < 1:
        raise UserError(f"--confidence = {arguments.confidence}: must be greater than 0.5 and less than 1")
    if arguments.levels is None:
        return
    first, last = arguments.levels = tuple(arguments.levels)
    if not 0 <= first <= last <= MAX_LEVELS:
        raise UserError(f"--levels = {first} {last}: must be 0 to {MAX_LEVELS}, the first at most the last")


def print_settings(results: Results) -> None:
    """Prints what a reader of a comparison should know about the settings of the arms on standard error."""
    for sentence in paper.describe_settings_of(results):
        print(f"note: {sentence}", file=sys.stderr)


def load_results(arguments: argparse.Namespace) -> pd.DataFrame:
    """Loads the selected results and prints which replicates are incomplete.

    Raises:
        UserError: Unless exactly one of a CSV file and --published is given, or if the file is invalid.
    """
    if arguments.published == (arguments.results is not None):
        raise UserError("give either a CSV file written by python -m analysis.collect or --published")
    frame = collect.published() if arguments.published else collect.load(arguments.results)
    collect.print_incomplete(frame)
    return frame


def _print_all_pairs(
    curves: dict[Arm, Curve], about: dict[str, str], notes: list[str], arguments: argparse.Namespace
) -> None:
    """Prints a matrix for each setup, whose families may have other margins and levels."""
    found = {}
    for setup, mine in arms.by_setup(curves).items():
        margin, levels = paper.test_range(about["dataset"], mine, None, arguments.margin, arguments.levels)
        cells = matrix(mine, margin, levels, arguments.confidence)
        if not (cells == "").all(axis=None):
            title = paper.title(about["dataset"], setup)
            found[f"{title}, {about['model']}: levels {levels[0]} to {levels[1]}, margin {margin:g} points"] = cells
            notes = [*notes, *_describe_missing_levels(mine, levels), *cells.attrs["notes"]]
    if not found:
        raise UserError(f"levels {levels[0]} to {levels[1]}: no two arms can be compared")
    if arguments.json:
        verdicts = {name: row for cells in found.values() for name, row in cells.T.to_dict().items()}
        print(json.dumps(about | {"verdicts": verdicts, "notes": notes}, indent=2))
        return
    print(*(f"note: {note}" for note in notes), sep="\n", end="\n" * bool(notes))
    for title, cells in found.items():
        print(title, to_symbols(cells), sep="\n")


@collect.catch_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m analysis.dominance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_result_arguments(parser)
    parser.add_argument("--challenger", help="arm to test, such as easy:size=12800,steps=200,noise=0.1")
    parser.add_argument("--reference", help="arm to compare with, such as all:steps=400")
    parser.add_argument("--all-pairs", action="store_true", help="compare every arm with every other")
    add_test_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args(argv)
    check_test_arguments(arguments)
    if arguments.all_pairs == bool(arguments.challenger or arguments.reference):
        raise UserError("give either --challenger and --reference or --all-pairs")
    if not arguments.all_pairs and not (arguments.challenger and arguments.reference):
        raise UserError("--challenger and --reference must be given together; give both, or --all-pairs")
    frame = collect.select_one(load_results(arguments), arguments.dataset, arguments.model)
    dataset, model = str(arguments.dataset or frame.dataset.iloc[0]), str(frame.model.iloc[0])
    curves = arms.curves_by_arm(frame)
    about = {"dataset": dataset, "model": model}
    about_arms = paper.describe_settings_of({dataset: curves})
    if arguments.all_pairs:
        _print_all_pairs(curves, about, about_arms, arguments)
        return 0
    challenger, reference = (arms.find(spec, curves) for spec in (arguments.challenger, arguments.reference))
    if challenger == reference:
        raise UserError(f"--challenger and --reference are both {challenger.spec}; expected two different arms")
    margin, levels = paper.test_range(dataset, curves, challenger, arguments.margin, arguments.levels)
    comparison = compare(curves, challenger, reference, margin, levels, arguments.confidence)
    if arguments.json:
        print(json.dumps(about | comparison.as_dict(), indent=2))
        return 0
    print(f"{about['dataset']}, {about['model']}: {describe(comparison)}")
    for note in [*about_arms, *comparison.notes]:
        print(f"note: {note}")
    print(f"\nPercentage points, with one-sided {100 * comparison.confidence:g} % bounds:\n\n{table(comparison)}\n")
    for name, statement in comparison.statements.items():
        print(f"{name}: {statement.verdict}; weakly dominates at {_margin(statement)} ({statement.assumption})")
    return 0


if __name__ == "__main__":
    run_program(main)
