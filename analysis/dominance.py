"""Does one arm dominate another (paper, Definitions 3.1 and 3.2)? Three statements with error bars, and a verdict.

python -m analysis.dominance results.csv --challenger easy:size=12800,steps=200 --reference all:steps=400
python -m analysis.dominance --published --dataset cifar10 --challenger easy:size=12800 --reference all:steps=400
python -m analysis.dominance --published --dataset cifar10 --all-pairs

An arm *dominates* if it is better at every level of the range, *weakly dominates* if it is worse by less than the
margin at every level, is *dominated* if it is worse at every level; else it is *undecided*. Each level is a one-sided t
test at the confidence. The verdict needs all of them, so it is an intersection-union test (Berger 1982) and needs no
correction for their number. The worst level is chosen after looking, so its interval is simultaneous (Bonferroni).

The three statements differ in what they assume of the spread between replicates:

per_level   nothing: each level has a spread of its own.
pooled      over the levels the spread follows a smooth trend and scatters about it, so that a level borrows from the
            others. This is the moderated t of Smyth (2004) with a trend, as limma has it, made safe for levels that
            belong to the same replicates (`difference.pooled`). It gives the verdict.
mean        of the mean difference over the levels, the area between the curves: nothing, where replicates are known.
            It says nothing of a single level.

Replicates are paired where both arms have the same seed and number. Published curves have no replicates: Welch, and
whatever depends on how levels go together within a replicate takes the worst case, perfect correlation.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from analysis import arms, collect
from analysis.arms import Arm, Curve
from analysis.difference import (
    MOST_REPLICATES,
    Difference,
    bounds,
    from_summaries,
    paired,
    pooled,
    replicates_needed,
    verdict,
    welch,
)
from lth_diet.errors import Parser, UserError

MARGIN = 0.3
LEVELS = (3, 12)
CONFIDENCE = 0.95

ASSUMPTIONS = {
    "per_level": "each level has a spread of its own",
    "pooled": "the spread between replicates follows a smooth trend over the levels and scatters about it",
    "mean": "the mean difference over the levels, the area between the curves; no claim about a single level",
}
_HIDDEN = "; how levels go together within a replicate is not known, so perfect correlation is assumed: the widest"


_AT_A_LEVEL = {"dominates": "better", "weakly dominates": "no worse", "dominated": "worse", "undecided": "undecided"}


@dataclasses.dataclass(frozen=True)
class Statement:
    """One way to look at a difference.

    Args:
        assumption: What it takes for granted, in words.
        verdict: dominates, weakly dominates, dominated or undecided.
        levels: A row a level: level, weights_remaining_percent, difference, lower, upper (one-sided bounds), verdict.
            The mean has one row, without a level.
        worst: The level with the smallest difference, with lower and upper of a simultaneous interval.
        holds_at_margin: The smallest margin at which the challenger weakly dominates; NaN without a spread.
        difference: What it was made from; of the pooled statement with moderated variance and df.
    """

    assumption: str
    verdict: str
    levels: pd.DataFrame
    worst: dict[str, float]
    holds_at_margin: float
    difference: Difference

    def replicates(self, margin: float, confidence: float) -> dict[str, int | None]:
        """Verdict to the replicates of each arm that reach it (`replicates_needed`)."""
        mean = self.difference.mean
        gaps = {"dominates": mean, "weakly dominates": mean + margin, "dominated": -mean}
        return {word: replicates_needed(self.difference, gap, confidence) for word, gap in gaps.items()}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Challenger against reference over a range of levels."""

    challenger: Arm
    reference: Arm
    n: tuple[int, int]
    paired: bool
    margin: float
    confidence: float
    statements: dict[str, Statement]
    notes: list[str]

    @property
    def verdict(self) -> str:
        return self.statements["pooled"].verdict

    @functools.cached_property
    def replicates(self) -> dict[str, int | None]:
        """Verdict to the replicates of each arm that would reach it, by the pooled statement."""
        return self.statements["pooled"].replicates(self.margin, self.confidence)

    def as_dict(self) -> dict:
        """What `--json` prints: numbers that are not known are null."""
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
    """All three statements on two arms.

    Args:
        margin: Of non-inferiority, in percentage points.
        levels: First and last level of the range; levels that an arm lacks are left out.
        confidence: Of each one-sided test, 0.5 to 1.

    Raises:
        UserError: If the arms have no level of the range in common.
    """
    ours, theirs = curves[challenger], curves[reference]
    common = [level for level in ours.levels if level in theirs.levels and levels[0] <= level <= levels[1]]
    if not common:
        there = " and ".join(
            f"{min(c.levels)} to {max(c.levels)} ({arm})" for arm, c in ((challenger, ours), (reference, theirs))
        )
        raise UserError(f"levels {levels[0]} to {levels[1]}: the arms have none in common; there are {there}")
    difference, notes = _difference(ours, theirs, common)
    weights = ours.summary.weights_remaining_percent.loc[common].to_numpy()
    hidden = _HIDDEN if ours.values is None or theirs.values is None else ""
    average = dataclasses.replace(
        difference, mean=difference.average[0], variance=difference.average[1], df=difference.average[2]
    )
    moderated_variance, moderated_df = pooled(difference)
    moderated = dataclasses.replace(difference, variance=moderated_variance, df=moderated_df)
    whole = [np.nan], [np.nan]
    statements = {
        "per_level": _statement(ASSUMPTIONS["per_level"], difference, common, weights, margin, confidence),
        "pooled": _statement(ASSUMPTIONS["pooled"] + hidden, moderated, common, weights, margin, confidence),
        "mean": _statement(ASSUMPTIONS["mean"] + hidden, average, *whole, margin, confidence),
    }
    if (statements["pooled"].levels.upper < 0).all() and statements["pooled"].verdict == "weakly dominates":
        notes.append("worse at every level, and by less than the margin")
    if common != list(range(levels[0], levels[1] + 1)):
        notes.append(f"levels {levels[0]} to {levels[1]} were asked for; both arms have {_span(common)}")
    return Comparison(challenger, reference, difference.n, difference.paired, margin, confidence, statements, notes)


def _span(levels: list[int]) -> str:
    run = levels == list(range(levels[0], levels[-1] + 1))
    return f"{levels[0]} to {levels[-1]}" if run and len(levels) > 1 else ", ".join(map(str, levels))


def _difference(ours: Curve, theirs: Curve, levels: list[int]) -> tuple[Difference, list[str]]:
    """Paired where two or more replicates pair; only replicates that have all the levels count."""
    if ours.values is None or theirs.values is None:
        rows = [curve.summary.loc[levels] for curve in (ours, theirs)]
        n = tuple(int(part.n.min()) for part in rows)
        return from_summaries(*(tuple(p[name].to_numpy() for p in rows) for name in ("mean", "sd")), n), []
    whole = [curve.values[levels].dropna() for curve in (ours, theirs)]
    notes = [
        f"{len(curve.values) - len(part)} of {len(curve.values)} replicates of the {which} lack some of the levels "
        "and are left out"
        for which, curve, part in zip(("challenger", "reference"), (ours, theirs), whole, strict=True)
        if len(part) < len(curve.values)
    ]
    pairs = whole[0].index.intersection(whole[1].index)
    if len(pairs) > 1:
        alone = len(whole[0]) + len(whole[1]) - 2 * len(pairs)
        if alone:
            notes.append(f"{alone} replicates without a partner of the same seed and number are left out")
        return paired(*(part.loc[pairs].to_numpy() for part in whole)), notes
    if any(part.empty for part in whole):
        raise UserError(f"levels {_span(levels)}: no replicate has all of them; allowed: a smaller range")
    return welch(*(part.to_numpy() for part in whole)), notes


def _statement(
    assumption: str, difference: Difference, levels: list, weights: Sequence[float], margin: float, confidence: float
) -> Statement:
    lower, upper = bounds(difference.mean, difference.variance, difference.df, confidence)
    single = [_AT_A_LEVEL[str(word)] for word in verdict(lower[:, None], upper[:, None], margin)]
    table = pd.DataFrame(
        {
            "level": levels,
            "weights_remaining_percent": weights,
            "difference": difference.mean,
            "lower": lower,
            "upper": upper,
            "verdict": single,
        }
    )
    simultaneous = bounds(difference.mean, difference.variance, difference.df, 1 - (1 - confidence) / (2 * len(table)))
    worst = int(difference.mean.argmin())
    whole = {key: table[key].iloc[worst] for key in ("level", "weights_remaining_percent", "difference")}
    return Statement(
        assumption,
        str(verdict(lower, upper, margin)),
        table,
        {key: value.item() for key, value in whole.items()}
        | {"lower": float(simultaneous[0][worst]), "upper": float(simultaneous[1][worst])},
        float(np.maximum(-lower, 0).max()),
        difference,
    )


def interval(lower: float, upper: float) -> str:
    """Bounds as text, in percentage points."""
    return f"[{lower:+.2f}, {upper:+.2f}]" if np.isfinite(lower) else "unknown"


def in_words(comparison: Comparison, wanted: str | None = None) -> str:
    """One sentence: the verdict, the worst level and what would be needed.

    Args:
        wanted: The verdict that is hoped for, dominates or weakly dominates; None: whichever takes fewest replicates.
    """
    statement, n, found = comparison.statements["pooled"], comparison.n, comparison.verdict
    words = {"dominated": "is dominated by", "undecided": "against"}.get(found, found)
    worst = statement.worst
    text = (
        f"{comparison.challenger} {words} {comparison.reference}{': undecided' * (found == 'undecided')} "
        f"(margin {comparison.margin:g}, {100 * comparison.confidence:g} %, n = {n[0]} and {n[1]}, "
        f"{'paired' if comparison.paired else 'not paired'}); worst at level {worst['level']} "
        f"({worst['weights_remaining_percent']:.1f} % of weights): {worst['difference']:+.2f}, "
        f"simultaneous interval {interval(worst['lower'], worst['upper'])}"
    )
    if found in ("dominates", "dominated", wanted) or (found != "undecided" and wanted is None):
        return text
    if min(n) == 1:
        return text + "; one replicate has no spread"
    needed = {word: count for word, count in comparison.replicates.items() if count and wanted in (word, None)}
    if not needed:
        what = "decide" if wanted is None else f"show that it {wanted}"
        most = f"no number of replicates up to {MOST_REPLICATES:,} would {what}, if these differences are the true ones"
        return f"{text}; {most}; weakly dominates at a margin of {statement.holds_at_margin:.2f}"
    word = min(needed, key=needed.get)
    return f"{text}; {needed[word]} replicates of each would show that it {'is ' * (word == 'dominated')}{word}"


def table(comparison: Comparison) -> str:
    """The per-level and pooled statements side by side, and the mean."""
    rows = []
    per_level, moderated, mean = (comparison.statements[name] for name in ("per_level", "pooled", "mean"))
    for own, shared in zip(per_level.levels.itertuples(), moderated.levels.itertuples(), strict=True):
        rows.append(
            f"{own.level:5d} {own.weights_remaining_percent:7.1f} % {own.difference:+10.2f}   "
            f"{interval(own.lower, own.upper):16} {own.verdict:10}  "
            f"{interval(shared.lower, shared.upper):16} {shared.verdict}"
        )
    (whole,) = mean.levels.itertuples()
    rows.append(f" mean           {whole.difference:+10.2f}   {interval(whole.lower, whole.upper):16} {whole.verdict}")
    head = "level   weights difference   per level                    pooled"
    return "\n".join([head, *rows])


def matrix(curves: dict[Arm, Curve], margin: float, levels: tuple[int, int], confidence: float) -> pd.DataFrame:
    """The verdict of every arm (rows) against every other (columns); arms without common levels are left empty."""
    names = [arm.spec for arm in curves]
    cells = pd.DataFrame("", index=names, columns=names)
    for challenger in curves:
        for reference in curves:
            if challenger != reference:
                try:
                    found = compare(curves, challenger, reference, margin, levels, confidence).verdict
                except UserError:
                    continue
                cells.loc[challenger.spec, reference.spec] = found
    return cells


SIGNS = {"dominates": ">", "weakly dominates": "≥", "dominated": "<", "undecided": "·", "": " "}


def in_signs(cells: pd.DataFrame) -> str:
    """The matrix with a sign for each verdict and numbered columns."""
    width = max(map(len, cells.index))
    lines = ["rows against columns: > dominates, ≥ weakly dominates, < is dominated, · undecided"]
    lines.append(" " * (width + 4) + "".join(f"{number:>3}" for number in range(1, len(cells) + 1)))
    for number, (name, row) in enumerate(cells.iterrows(), 1):
        lines.append(f"{number:>3} {name:{width}}" + "".join(f"{SIGNS[cell]:>3}" for cell in row))
    return "\n".join(lines)


def add_source(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which results: a CSV file or the published curves, data set and model."""
    parser.add_argument("results", type=Path, nargs="?", help="CSV file of python -m analysis.collect")
    parser.add_argument("--published", action="store_true", help="the paper's own curves")
    parser.add_argument("--dataset")
    parser.add_argument("--model")


def add_range(parser: argparse.ArgumentParser) -> None:
    """The arguments of the tests."""
    parser.add_argument("--margin", type=float, default=MARGIN, help="in percentage points, default %(default)s")
    parser.add_argument("--levels", type=int, nargs=2, default=LEVELS, metavar=("FIRST", "LAST"), help="default 3 12")
    parser.add_argument("--confidence", type=float, default=CONFIDENCE, help="of a one-sided test, default %(default)s")


def check_range(arguments: argparse.Namespace) -> None:
    """Refuse a margin, range or confidence that means nothing.

    Raises:
        UserError: Naming the argument.
    """
    if not 0 <= arguments.margin < np.inf:
        raise UserError(f"--margin: {arguments.margin} is not allowed; allowed: 0 or more percentage points")
    if not 0.5 < arguments.confidence < 1:
        raise UserError(f"--confidence: {arguments.confidence} is not allowed; allowed: above 0.5, below 1")
    first, last = arguments.levels = tuple(arguments.levels)
    if not 0 <= first <= last:
        raise UserError(f"--levels: {first} {last} is not allowed; allowed: first and last, 0 or more")


def source(arguments: argparse.Namespace) -> pd.DataFrame:
    """The table that the arguments name.

    Raises:
        UserError: If they name none or two.
    """
    if arguments.published == (arguments.results is not None):
        raise UserError("give either a CSV file of python -m analysis.collect or --published")
    frame = collect.published() if arguments.published else collect.load(arguments.results)
    collect.say_incomplete(frame)
    return frame


@collect.one_sentence
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m analysis.dominance", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_source(parser)
    parser.add_argument("--challenger", help="an arm, such as easy:size=12800,steps=200,noise=0.1")
    parser.add_argument("--reference", help="an arm, such as all:steps=400")
    parser.add_argument("--all-pairs", action="store_true", help="every arm against every other")
    add_range(parser)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    check_range(arguments)
    if arguments.all_pairs == bool(arguments.challenger or arguments.reference):
        raise UserError("give either --challenger and --reference or --all-pairs")
    if not arguments.all_pairs and not (arguments.challenger and arguments.reference):
        raise UserError("--challenger and --reference belong together; allowed: both, or --all-pairs")
    frame = collect.one(source(arguments), arguments.dataset, arguments.model)
    curves = arms.of(frame)
    settings = arguments.margin, arguments.levels, arguments.confidence
    about = {"dataset": str(frame.dataset.iloc[0]), "model": str(frame.model.iloc[0])}
    if arguments.all_pairs:
        cells = matrix(curves, *settings)
        if arguments.json:
            print(json.dumps(about | {"verdicts": cells.T.to_dict()}, indent=2))
        else:
            first, last = arguments.levels
            print(f"{about['dataset']}, {about['model']}: levels {first} to {last}, margin {arguments.margin:g}")
            print(in_signs(cells))
        return 0
    challenger, reference = (arms.find(spec, curves) for spec in (arguments.challenger, arguments.reference))
    if challenger == reference:
        raise UserError(f"--challenger and --reference are both {challenger.spec}; allowed: two different arms")
    comparison = compare(curves, challenger, reference, *settings)
    if arguments.json:
        print(json.dumps(about | comparison.as_dict(), indent=2))
        return 0
    print(f"{about['dataset']}, {about['model']}: {in_words(comparison)}")
    for note in comparison.notes:
        print(f"note: {note}")
    print(f"\nin percentage points, each bound one-sided at {100 * comparison.confidence:g} %\n{table(comparison)}\n")
    for name, statement in comparison.statements.items():
        print(
            f"{name}: {statement.verdict}; would weakly dominate at a margin of {statement.holds_at_margin:.2f}; "
            f"assumes: {statement.assumption}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
