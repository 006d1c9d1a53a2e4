"""Tests the claims of the paper on its published curves or on your results.

python -m analysis.claims --published      prints Markdown tables: one row per claim and data set
python -m analysis.claims results.csv
python -m analysis.claims results.csv --latex
"""

import argparse
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lth_diet.errors import Parser, UserError
from lth_diet.program import run_program

from . import arms, collect, dominance, paper
from .arms import Arm, Curve
from .dominance import Comparison, compare
from .paper import Family


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim that one arm dominates or weakly dominates another.

    Args:
        text: The claim in the words of the paper.
        challenger: An arm name of `Family.arm`, or full (all examples at t*) or half (all examples at t*/2).
        reference: The arm that it is compared with, named in the same way.
        strict: True if the claim is "dominates", False if it is "weakly dominates".
        noise: Whether the claim is made only for label noise.
    """

    text: str
    challenger: str
    reference: str
    strict: bool
    noise: bool = False

    @property
    def verdict(self) -> str:
        """Verdict that confirms the claim."""
        return "dominates" if self.strict else "weakly dominates"

    def arms(self, family: Family) -> tuple[Arm, Arm]:
        """Returns challenger and reference of a family."""
        all_examples = {"full": family.arm("all", family.t_star), "half": family.arm("all")}
        return tuple(all_examples.get(name) or family.arm(name) for name in (self.challenger, self.reference))


CLAIMS = (
    Claim("random at t*/2 weakly dominates all at t*/2", "random", "half", False),
    Claim("easy at t*/2 matches all at t*", "easy", "full", False),
    Claim("hard at t*/2 is worse than all at t*/2", "half", "hard", True),
    Claim("hard is worse than random", "random", "hard", True),
    Claim("all at t* dominates all at t*/2", "full", "half", True),
    Claim("all at t*/2 dominates init", "half", "init", True),
    Claim("all at t* dominates init", "full", "init", True),
    Claim("under noise, easy dominates all at t*", "easy", "full", True, noise=True),
    Claim("under noise, easy dominates all at t*/2", "easy", "half", True, noise=True),
    Claim("under noise, easy dominates random", "easy", "random", True, noise=True),
    Claim("under noise, easy dominates init", "easy", "init", True, noise=True),
)


MIN_REPLICATES = 3
"""With fewer replicates per arm, intervals are too wide to be of use."""
_NO_CLAIM = "these results have no arm with pre-training, so there is no claim to test"
_OUTCOMES = {"holds": "holds", "contradicted": "is contradicted", "undecided": "is undecided"}


@dataclasses.dataclass(frozen=True)
class Finding:
    """Result of testing a claim.

    Args:
        claim: The claim.
        family: The arms that it was tested on.
        comparison: The comparison of the two arms; None if the claim was not tested.
        reason: Why the claim was not tested.
    """

    claim: Claim
    family: Family
    comparison: Comparison | None
    reason: str = ""

    @property
    def outcome(self) -> str:
        """One of holds, contradicted, undecided or not tested.

        A claim is contradicted if the simultaneous interval of the worst level excludes it, or the bounds of all do.
        """
        if self.comparison is None:
            return "not tested"
        statement = self.comparison.statements["pooled"]
        if statement.verdict in ("dominates", self.claim.verdict):
            return "holds"
        upper = statement.levels.upper
        return "contradicted" if min(statement.worst["upper"], upper.max()) < self._bound else "undecided"

    @property
    def reverse_matches(self) -> str:
        """Outcome of the claim that the reference weakly dominates the challenger: holds, contradicted or undecided."""
        statement = self.comparison.statements["pooled"]
        if (statement.levels.upper < self.comparison.margin).all():
            return "holds"
        lower = statement.simultaneous(self.comparison.confidence)[0]
        return "contradicted" if lower.max() > self.comparison.margin else "undecided"

    @property
    def _bound(self) -> float:
        return 0.0 if self.claim.strict else -self.comparison.margin

    @property
    def confirming(self) -> int | None:
        """Replicates per arm that would confirm the claim; see `difference.replicates_needed`."""
        return self.comparison.replicates[self.claim.verdict]

    @property
    def contradicting(self) -> int | None:
        """Replicates per arm that would contradict the claim; None if some would confirm it."""
        return self.comparison.statements["pooled"].replicates_below(self._bound, self.comparison.confidence)

    @property
    def deciding(self) -> int | None:
        """Replicates per arm that would confirm or contradict the claim."""
        return self.confirming or self.contradicting

    @property
    def detail(self) -> str:
        """Description of the comparison."""
        return dominance.describe(self.comparison, self.claim.verdict)

    @property
    def too_few(self) -> str:
        """Says that n is too small for an interval, and how many replicates would do; empty if it is not."""
        n = min(self.comparison.n)
        if n >= MIN_REPLICATES or self.outcome in ("holds", "contradicted"):
            return ""
        number = self.deciding or 0
        needed = f"about {number}" if number > MIN_REPLICATES else f"{MIN_REPLICATES + 1} or more"
        return f"n = {n} is too small to decide; run {needed} replicates per arm"

    @property
    def effect(self) -> str:
        """Difference at the worst level, n, and the probability that a replicate beats one of the other arm."""
        found = self.comparison
        worst = found.statements["pooled"].worst
        text = (
            f"{worst['difference']:+.1f} points at worst, at {_short(worst['weights_remaining_percent'])} % of weights"
        )
        if self.too_few:
            return f"{text}; {self.too_few}"
        if found.improvement:
            text += f"; better in {_percent(found.improvement)} of replicates"
        return f"{text}; {found.size}" + (f", {self._outlook}" if self.outcome == "undecided" else "")

    @property
    def _outlook(self) -> str:
        if self.confirming:
            return f"about {self.confirming} would show it"
        return f"about {self.contradicting} would contradict it" if self.contradicting else "more would not decide it"

    @property
    def brief(self) -> str:
        """One line: outcome, claim and effect."""
        return f"{self.outcome}: {self.claim.text}: {self.effect}{self.comparison.also}"

    @property
    def sentence(self) -> str:
        """A sentence for a paper."""
        found, (low, high, row) = self.comparison, interval_at_last_level(self.comparison)
        pairing = "paired" if found.paired else "unpaired"
        interval = f" ({100 * found.confidence:g} % confidence interval {low:.2f} to {high:.2f})" if low == low else ""
        levels = found.statements["pooled"].levels
        return (
            f"On {self.family}, {found.challenger} differs from {found.reference} by {row.difference:+.2f} percentage "
            f"points in test accuracy{interval} at {_short(row.weights_remaining_percent)} % of weights ({pairing} "
            f"replicates, {found.size}); over {_short(levels.weights_remaining_percent.max())} to "
            f"{_short(levels.weights_remaining_percent.min())} % of weights, the claim that {self.claim.text} "
            f"{_OUTCOMES[self.outcome]} (moderated t test at each level, margin {found.margin:g} points{found.also})."
        )


def interval_at_last_level(comparison: Comparison) -> tuple[float, float, Any]:
    """Two-sided interval of the difference at the last level, by the pooled test, and the level's row."""
    statement = comparison.statements["pooled"]
    low, high = statement.interval(comparison.confidence)
    return float(low[-1]), float(high[-1]), list(statement.levels.itertuples())[-1]


def _short(percent: float) -> str:
    """A percentage with two digits, such as `51`, `6.9` or `100`."""
    return f"{percent:.0f}" if percent >= 9.95 else f"{percent:.1f}"


def _percent(improvement: tuple[float, float, float]) -> str:
    share, low, high = (100 * value for value in improvement)
    return f"{share:.0f} %" + (f" ({low:.0f} to {high:.0f})" if low == low else "")


def headline(family: Family, findings: Sequence[Finding]) -> str:
    """What the verdicts of a family say about pre-training, in two or three sentences."""
    mine = [finding for finding in findings if finding.family == family and finding.claim in CLAIMS]
    found = {(each.claim.challenger, each.claim.reference): each for each in reversed(mine) if each.comparison}
    found |= {(each.claim.challenger, each.claim.reference): each for each in mine if each.outcome == "holds"}
    full = found.get(("full", "init"))
    steps = f"{family.t_star} steps before pruning"
    if full is None:
        sentences = [f"{family}: pre-training for {steps} was not compared with none."]
    else:
        low, high, row = interval_at_last_level(full.comparison)
        n = min(full.comparison.n)
        better = f"{abs(row.difference):.1f} points {'better' if row.difference >= 0 else 'worse'}"
        low, high = (low, high) if row.difference >= 0 else (-high, -low)
        networks = f"networks with {_short(row.weights_remaining_percent)} % of their weights"
        interval = f"{100 * full.comparison.confidence:g} % interval {low:.1f} to {high:.1f}, "
        spread = f"({interval if n >= MIN_REPLICATES else ''}n = {n})"
        if full.outcome == "undecided":
            start = f"{family}: it is undecided whether pre-training for {steps} helps"
            end = f": {full.too_few}" if full.too_few else ""
            sentences = [f"{start}{end}. It makes {networks} {better} than none {spread}."]
        else:
            makes = f"{family}: pre-training for {steps} makes {networks} {better} than none {spread}."
            no = "" if full.outcome == "holds" else " It does not dominate no pre-training."
            sentences = [makes + no]
    half, easy = found.get(("full", "half")), found.get(("easy", "full"))
    if half:
        sentences.append(_describe_half(half))
    if easy:
        those = f"half the steps on the {family.size:,} easiest examples"
        verb = "are better than" if easy.claim.strict else "match"
        sentences.append(
            {
                "holds": f"{those.capitalize()} {verb} all examples.",
                "contradicted": f"{those.capitalize()} fall short of all examples.",
            }.get(easy.outcome, f"Whether {those} {verb} all examples is undecided.")
        )
    return " ".join(sentences)


def _describe_half(finding: Finding) -> str:
    """Says whether half the steps suffice, which is that they match all of them."""
    if finding.reverse_matches == "holds":
        return "Half the steps suffice."
    if finding.reverse_matches == "contradicted":
        statement = finding.comparison.statements["pooled"]
        at = int(statement.simultaneous(finding.comparison.confidence)[0].argmax())  # the level that contradicts it
        row = statement.levels.iloc[at]
        where = f"{row.difference:.1f} points fewer at {_short(row.weights_remaining_percent)} % of weights"
        return f"Half the steps do not suffice: {where}."
    if finding.outcome == "holds":
        return f"Half the steps make them {interval_at_last_level(finding.comparison)[2].difference:.1f} points worse."
    return "Whether half the steps suffice is undecided."


def summarize(family: Family, findings: Sequence[Finding]) -> list[str]:
    """The headline of a family, one line per tested claim, and one for those that were not tested."""
    mine = [finding for finding in findings if finding.family == family]
    untested = [finding for finding in mine if finding.comparison is None]
    lines = [headline(family, mine), *(f"  {finding.brief}" for finding in mine if finding.comparison)]
    if untested:
        reasons = "; ".join(dict.fromkeys(finding.reason for finding in untested))
        lines.append(f"  not tested: {len(untested)} claim{'s' * (len(untested) > 1)} ({reasons})")
    return lines


def affordable_replicates(findings: Sequence[Finding]) -> tuple[int, int] | None:
    """Replicates per arm that would decide undecided claims, and how many: all that need at most four times as many.

    Returns:
        If none needs so few, those for the one that needs the fewest; None if more replicates decide no claim.
    """
    undecided = [finding for finding in findings if finding.outcome == "undecided" and finding.deciding]
    needed = sorted(finding.deciding for finding in undecided)
    if not needed:
        return None
    few = [each.deciding for each in undecided if each.deciding <= 4 * min(each.comparison.n)]
    number = max(few, default=needed[0])
    return number, sum(each <= number for each in needed)


def latex(findings: Sequence[Finding]) -> str:
    """Formats a LaTeX table of tested claims, for the package booktabs, with their sentences as comments.

    Raises:
        UserError: If no claim was tested.
    """
    tested = [finding for finding in findings if finding.comparison]
    untested = [finding for finding in findings if not finding.comparison]
    if not tested:
        reasons = "; ".join(dict.fromkeys(finding.reason for finding in untested))
        raise UserError(f"no claim can be tested: {reasons}" if untested else _NO_CLAIM)
    lines = [r"\begin{tabular}{llrrrl}", r"\toprule"]
    lines += [r"Claim & Data & Worst (points) & Weights (\%) & $n$ & Verdict \\", r"\midrule"]
    for finding in tested:
        worst, n = finding.comparison.statements["pooled"].worst, min(finding.comparison.n)
        cells = [_escape(finding.claim.text), _escape(str(finding.family)), f"${worst['difference']:+.2f}$"]
        cells += [f"{worst['weights_remaining_percent']:.1f}", str(n), finding.outcome]
        lines.append(" & ".join(cells) + r" \\")
    sentences = [finding.sentence for finding in tested]
    sentences += [f"{each.family}: {each.claim.text}: not tested: {each.reason}" for each in untested]
    lines += [r"\bottomrule", r"\end{tabular}", *(f"% {_escape(sentence)}" for sentence in sentences)]
    return "\n".join(lines)


def _escape(text: str) -> str:
    return re.sub(r"([%&#_$])", r"\\\1", text).replace("×", r"$\times$")


def evaluate(
    family: Family, curves: dict[Arm, Curve], margin: float | None, levels: tuple[int, int] | None, confidence: float
) -> list[Finding]:
    """Tests every claim that applies to a family; settings as in `dominance.compare`, None for those of the family."""
    margin, levels = family.test_range(margin, levels)
    findings = []
    for claim in CLAIMS:
        names = {claim.challenger, claim.reference}
        no_hard = "hard" in names and family.label_noise  # not in the paper
        no_subset = family.size is None and names & {"random", "easy", "hard"}
        if (claim.noise and not family.label_noise) or no_hard or no_subset:
            continue
        wanted = claim.arms(family)
        challenger, reference = (arms.lookup(arm, curves) for arm in wanted)
        if challenger is None or reference is None:
            missing = [arms.describe_missing(arm, curves) for arm in wanted if arms.lookup(arm, curves) is None]
            findings.append(Finding(claim, family, None, " and ".join(missing)))
            continue
        try:
            found = compare(curves, challenger, reference, margin, levels, confidence)
            findings.append(Finding(claim, family, found))
        except UserError as error:  # no common level or complete replicate yet
            findings.append(Finding(claim, family, None, str(error)))
    return findings


def dense_accuracy_kept(
    family: Family, curves: dict[Arm, Curve], margin: float | None, levels: tuple[int, int] | None, confidence: float
) -> tuple[float | None, float | None]:
    """Finds how far all examples at t* can be pruned and stay within the margin of their own level 0.

    Levels are tested in order from level 1 until one fails or is missing; a fixed sequence of tests needs no
    correction. Each replicate is paired with itself. Published curves treat level 0 and the others as independent,
    which is conservative if they are positively correlated.

    Returns:
        Percentage of weights remaining at the last level that passes, by the pooled test and by the means alone; an
        entry is None if level 1 fails.

    Raises:
        UserError: If the arm or its level 0 or 1 is missing, or several arms are all examples at t*.
    """
    margin, levels = family.test_range(margin, levels)
    wanted = family.arm("all", family.t_star)
    arm = arms.lookup(wanted, curves)
    if arm is None:
        raise UserError(arms.describe_missing(wanted, curves))
    for level in (0, 1):
        if level not in curves[arm].finished_levels:
            raise UserError(f"{arm} has no level {level}")
    if levels[1] == 0:
        raise UserError("levels 0 to 0: no pruned level")
    if curves[arm].summary.n[0] == 1:
        raise UserError(f"{arm} has one replicate, so the spread is unknown")
    curve, unpruned = curves[arm], Arm("dense")
    first = curve.summary.loc[[0] * len(curve.levels)].set_index(curve.summary.index)
    first = first.assign(weights_remaining_percent=curve.summary.weights_remaining_percent)
    values = curve.values
    if values is not None:
        values = pd.DataFrame(dict.fromkeys(values.columns, values[0]))
    comparison = compare(
        {arm: curve, unpruned: Curve(first, values, curve.identity)}, arm, unpruned, margin, (1, levels[1]), confidence
    )
    table = comparison.statements["pooled"].levels
    table = table[table.level == np.arange(1, len(table) + 1)]  # up to a missing level
    weights = table.weights_remaining_percent

    def down_to(stays: pd.Series) -> float | None:
        run = stays.cummin()
        return float(weights[run].min()) if run.any() else None

    return down_to(table.lower > -margin), down_to(table.difference > -margin)


def table(frame: pd.DataFrame, margin: float | None, levels: tuple[int, int] | None, confidence: float) -> str:
    """Formats two Markdown tables: one row per claim and family, and the dense accuracy by family."""
    findings, dense = [], {}
    for family, curves in paper.families_of_all(collect.results_by_dataset(frame)):
        findings += evaluate(family, curves, margin, levels, confidence)
        used, (first, last) = family.test_range(margin, levels)
        dense[family] = [f"{used:g}", f"{first} to {last}"]
        try:
            kept = dense_accuracy_kept(family, curves, margin, levels, confidence)
            dense[family] += ["-" if weights is None else f"to {weights:.1f} %" for weights in kept]
        except UserError as error:
            dense[family] += [f"not tested: {error}", ""]
    if not findings:
        raise UserError(_NO_CLAIM)
    order = [family for family in paper.FAMILIES if family in dense]
    order += [family for family in dense if family not in order]
    findings.sort(key=lambda finding: (CLAIMS.index(finding.claim), order.index(finding.family)))
    head = ["claim", "data", "verdict", "worst level", "at weights, %", "area"]
    head += [f"{100 * confidence:g} % interval", "n", "margin needed", "n needed"]
    claims = _markdown(head, [_row(finding) for finding in findings], text_columns=3)
    head = ["data", "margin", "levels", "all at t* keeps the dense accuracy, by the test", "by the means"]
    return claims + "\n\n" + _markdown(head, [[str(family), *dense[family]] for family in order], text_columns=5)


def _row(finding: Finding) -> list[str]:
    """Claim, data, outcome, worst level, area between the curves, n, and margin and n at which the claim would hold."""
    start = [finding.claim.text, str(finding.family)]
    if finding.comparison is None:
        return [*start, f"not tested: {finding.reason}", *[""] * 7]
    statement, mean = (finding.comparison.statements[name] for name in ("pooled", "mean"))
    worst, (area,) = statement.worst, mean.difference.mean
    (low,), (high,) = mean.interval(finding.comparison.confidence)
    row = [
        *start,
        f"**{finding.outcome}**{finding.comparison.also}",
        f"{worst['difference']:+.2f}",
        f"{worst['weights_remaining_percent']:.1f}",
    ]
    row += [f"{area:+.2f}", dominance.interval(low, high), finding.comparison.size.removeprefix("n = ")]
    if finding.outcome == "holds":
        return [*row, "", ""]
    if np.isnan(statement.holds_at_margin):
        return [*row, "unknown", "unknown"]
    return [*row, f"{statement.holds_at_margin:.2f}", str(finding.confirming or "none")]


def _markdown(head: list[str], rows: list[list[str]], text_columns: int) -> str:
    """Formats a Markdown table; columns after the first `text_columns` are aligned to the right."""
    rule = "|".join(["---"] * text_columns + ["---:"] * (len(head) - text_columns))
    return "\n".join([f"| {' | '.join(head)} |", f"|{rule}|", *(f"| {' | '.join(row)} |" for row in rows)])


@collect.catch_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m analysis.claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    dominance.add_result_arguments(parser)
    dominance.add_test_arguments(parser)
    parser.add_argument("--latex", action="store_true", help="print a LaTeX table and a sentence per claim")
    arguments = parser.parse_args(argv)
    dominance.check_test_arguments(arguments)
    frame = collect.select(dominance.load_results(arguments), arguments.dataset, arguments.model)
    settings = arguments.margin, arguments.levels, arguments.confidence
    results = collect.results_by_dataset(frame)
    dominance.print_settings(results)
    if arguments.latex:
        pairs = paper.families_of_all(results)
        print(latex([finding for family, curves in pairs for finding in evaluate(family, curves, *settings)]))
    else:
        print(table(frame, *settings))
    return 0


if __name__ == "__main__":
    run_program(main)
