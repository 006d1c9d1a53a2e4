"""Tests the claims of the paper on its published curves or on your results.

python -m analysis.claims --published      prints Markdown tables: one row per claim and data set
python -m analysis.claims results.csv
"""

import argparse
import dataclasses
from collections.abc import Sequence

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

        A claim is contradicted if the simultaneous interval of the worst level excludes it.
        """
        if self.comparison is None:
            return "not tested"
        statement = self.comparison.statements["pooled"]
        if statement.verdict in ("dominates", self.claim.verdict):
            return "holds"
        needed = 0.0 if self.claim.strict else -self.comparison.margin
        return "contradicted" if statement.worst["upper"] < needed else "undecided"

    @property
    def replicates(self) -> int | None:
        """Replicates per arm that would confirm the claim; see `difference.replicates_needed`."""
        return self.comparison.replicates[self.claim.verdict]

    @property
    def detail(self) -> str:
        """Description of the comparison."""
        return dominance.describe(self.comparison, self.claim.verdict)

    def describe(self) -> str:
        """Describes the claim, its outcome and the comparison."""
        if self.comparison is None:
            return f"{self.family}: {self.claim.text}: not tested: {self.reason}"
        also = f". The arms also differ in {self.comparison.numerical}" if self.comparison.numerical else ""
        return f"{self.family}: {self.claim.text}: {self.outcome}. {self.detail}{also}"


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

    Levels are tested in order from level 1 until one fails; a fixed sequence of tests needs no correction. Each
    replicate is paired with itself. Published curves treat level 0 and the others as independent, which is conservative
    if they are positively correlated.

    Returns:
        Percentage of weights remaining at the last level that passes, by the pooled test and by the means alone; an
        entry is None if level 1 fails.

    Raises:
        UserError: If the arm or its level 0 or a pruned level is missing, or several arms are all examples at t*.
    """
    margin, levels = family.test_range(margin, levels)
    wanted = family.arm("all", family.t_star)
    arm = arms.lookup(wanted, curves)
    if arm is None:
        raise UserError(arms.describe_missing(wanted, curves))
    if 0 not in curves[arm].levels or max(curves[arm].levels) == 0:
        raise UserError(f"{arm} has no level 0 or no pruned level")
    curve, unpruned = curves[arm], Arm("dense")
    first = curve.summary.loc[[0] * len(curve.levels)].set_index(curve.summary.index)
    values = curve.values
    if values is not None:
        values = pd.DataFrame(dict.fromkeys(values.columns, values[0]))
    comparison = compare(
        {arm: curve, unpruned: Curve(first, values, curve.identity)}, arm, unpruned, margin, (1, levels[1]), confidence
    )
    table = comparison.statements["pooled"].levels
    weights = table.weights_remaining_percent

    def down_to(stays: pd.Series) -> float | None:
        run = stays.cummin()
        return float(weights[run].min()) if run.any() else None

    return down_to(table.lower > -margin), down_to(table.difference > -margin)


def table(frame: pd.DataFrame, margin: float | None, levels: tuple[int, int] | None, confidence: float) -> str:
    """Formats two Markdown tables: one row per claim and family, and the dense accuracy by family."""
    findings, dense = [], {}
    for dataset, rows in frame.groupby(collect.dataset_names(frame), sort=False):
        curves = arms.curves_by_arm(rows)
        for family in paper.families(dataset, curves):
            findings += evaluate(family, curves, margin, levels, confidence)
            try:
                kept = dense_accuracy_kept(family, curves, margin, levels, confidence)
                dense[family] = ["-" if weights is None else f"to {weights:.1f} %" for weights in kept]
            except UserError as error:
                dense[family] = [f"not tested: {error}", ""]
    order = [family for family in paper.FAMILIES if family in dense]
    order += [family for family in dense if family not in order]
    findings.sort(key=lambda finding: (CLAIMS.index(finding.claim), order.index(finding.family)))
    head = ["claim", "data", "verdict", "worst level", "at weights, %", "area"]
    head += [f"{100 * confidence:g} % interval", "margin", "n"]
    claims = _markdown(head, [_row(finding) for finding in findings], text_columns=3)
    head = ["data", "all at t* keeps the dense accuracy, by the test", "by the means"]
    return claims + "\n\n" + _markdown(head, [[str(family), *dense[family]] for family in order], text_columns=3)


def _row(finding: Finding) -> list[str]:
    """Claim, data, outcome, worst level, area between the curves, and margin and n at which the claim would hold."""
    start = [finding.claim.text, str(finding.family)]
    if finding.comparison is None:
        return [*start, f"not tested: {finding.reason}", *[""] * 6]
    statement = finding.comparison.statements["pooled"]
    worst, (area,) = statement.worst, finding.comparison.statements["mean"].levels.itertuples()
    row = [
        *start,
        f"**{finding.outcome}**{_also(finding.comparison)}",
        f"{worst['difference']:+.2f}",
        f"{worst['weights_remaining_percent']:.1f}",
    ]
    row += [f"{area.difference:+.2f}", dominance.interval(area.lower, area.upper)]
    if finding.outcome == "holds":
        return [*row, "", ""]
    return [*row, f"{statement.holds_at_margin:.2f}", str(finding.replicates or "none")]


def _also(comparison: Comparison) -> str:
    return f", with {comparison.numerical}" if comparison.numerical else ""


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
    arguments = parser.parse_args(argv)
    dominance.check_test_arguments(arguments)
    frame = collect.select(dominance.load_results(arguments), arguments.dataset, arguments.model)
    print(table(frame, arguments.margin, arguments.levels, arguments.confidence))
    return 0


if __name__ == "__main__":
    run_program(main)
