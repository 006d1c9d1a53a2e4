"""What the paper says, put as statements on arms and tested: on its own published curves, or on your results.

python -m analysis.claims --published      a Markdown table, a row a claim, a column a data set
python -m analysis.claims results.csv
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence

import pandas as pd

from analysis import arms, collect, dominance, paper
from analysis.arms import Arm, Curve
from analysis.dominance import Comparison, compare
from analysis.paper import Family
from lth_diet.errors import Parser, UserError


@dataclasses.dataclass(frozen=True)
class Claim:
    """That one arm (weakly) dominates another.

    Args:
        words: As the paper puts it.
        challenger: Of `Family.arm`: its name, and full for all examples at t*, half for them at t*/2.
        reference: Likewise.
        strict: dominates; else weakly dominates.
        noise: Only under label noise.
    """

    words: str
    challenger: str
    reference: str
    strict: bool
    noise: bool = False

    @property
    def verdict(self) -> str:
        """That shows it."""
        return "dominates" if self.strict else "weakly dominates"

    def arms(self, family: Family) -> tuple[Arm, Arm]:
        """Challenger and reference of a family."""
        full = {"full": family.arm("all", family.t_star), "half": family.arm("all")}
        return tuple(full.get(name) or family.arm(name) for name in (self.challenger, self.reference))


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
DENSE = "all at t* stays with the dense accuracy"


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim, tested.

    Args:
        claim: Which.
        family: Of which arms.
        comparison: None if it cannot be tested.
        reason: Why not.
    """

    claim: Claim
    family: Family
    comparison: Comparison | None
    reason: str = ""

    @property
    def outcome(self) -> str:
        """holds, contradicted (the simultaneous interval of the worst level excludes it), undecided or not tested."""
        if self.comparison is None:
            return "not tested"
        statement = self.comparison.statements["pooled"]
        if statement.verdict in ("dominates", self.claim.verdict):
            return "holds"
        needed = 0.0 if self.claim.strict else -self.comparison.margin
        return "contradicted" if statement.worst["upper"] < needed else "undecided"

    @property
    def replicates(self) -> int | None:
        """Of each arm that would show it with a power of 80 %, were these differences and spreads the true ones."""
        return self.comparison.replicates[self.claim.verdict]

    @property
    def detail(self) -> str:
        """What the comparison says, in words."""
        return dominance.in_words(self.comparison, self.claim.verdict)

    def sentence(self) -> str:
        """For a reader of the report."""
        if self.comparison is None:
            return f"{self.family}: {self.claim.words}: not tested, {self.reason}"
        return f"{self.family}: {self.claim.words}: {self.outcome}. {self.detail}"


def test(
    family: Family, curves: dict[Arm, Curve], margin: float, levels: tuple[int, int], confidence: float
) -> list[Finding]:
    """Every claim that is about a family."""
    findings = []
    for claim in CLAIMS:
        about = {claim.challenger, claim.reference}
        no_hard = "hard" in about and family.label_noise  # the paper has no such arm
        no_subset = family.size is None and about & {"random", "easy", "hard"}
        if (claim.noise and not family.label_noise) or no_hard or no_subset:
            continue
        challenger, reference = claim.arms(family)
        missing = [arms.missing(arm, curves) for arm in (challenger, reference) if arm not in curves]
        if missing:
            findings.append(Finding(claim, family, None, " and ".join(missing)))
            continue
        try:
            found = compare(curves, challenger, reference, margin, levels, confidence)
            findings.append(Finding(claim, family, found))
        except UserError as error:  # no level or replicate in common yet
            findings.append(Finding(claim, family, None, str(error)))
    return findings


def dense(
    family: Family, curves: dict[Arm, Curve], margin: float, levels: tuple[int, int], confidence: float
) -> tuple[float | None, float | None] | None:
    """Down to which percentage of weights all examples at t* stay within the margin of their own level 0.

    From level 1 on, level by level, until one fails: a fixed sequence of tests needs no correction. Replicates pair
    with themselves; of published curves, level 0 and the others are taken as independent: too wide if they go together.

    Returns:
        By the pooled statement, and by the means alone; None where level 1 fails already. None if there is no such arm.
    """
    arm = family.arm("all", family.t_star)
    if arm not in curves or 0 not in curves[arm].levels or max(curves[arm].levels) == 0:
        return None
    curve, unpruned = curves[arm], Arm("dense")
    first = curve.summary.loc[[0] * len(curve.levels)].set_index(curve.summary.index)
    values = curve.values
    if values is not None:
        values = pd.DataFrame(dict.fromkeys(values.columns, values[0]))
    comparison = compare(
        {arm: curve, unpruned: Curve(first, values)}, arm, unpruned, margin, (1, levels[1]), confidence
    )
    table = comparison.statements["pooled"].levels
    weights = table.weights_remaining_percent

    def down_to(stays: pd.Series) -> float | None:
        run = stays.cummin()
        return float(weights[run].min()) if run.any() else None

    return down_to(table.lower > -margin), down_to(table.difference > -margin)


def _cell(finding: Finding | None) -> str:
    """Outcome; worst level; margin and replicates at which it would hold; area between the curves."""
    if finding is None:
        return ""
    if finding.comparison is None:
        return "not tested"
    statement = finding.comparison.statements["pooled"]
    worst, (area,) = statement.worst, finding.comparison.statements["mean"].levels.itertuples()
    lines = [
        f"**{finding.outcome}**",
        f"{worst['difference']:+.2f} at {worst['weights_remaining_percent']:.1f} %",
        f"area {area.difference:+.2f} {dominance.interval(area.lower, area.upper)}",
    ]
    if finding.outcome != "holds":
        needed = "no n" if finding.replicates is None else f"n = {finding.replicates}"
        lines.append(f"margin {statement.holds_at_margin:.2f}; {needed}")
    return "<br>".join(lines)


def table(frame: pd.DataFrame, margin: float, levels: tuple[int, int], confidence: float) -> str:
    """Claims down, families across, in Markdown."""
    columns = {}
    for dataset, rows in frame.groupby("dataset", sort=False):
        curves = arms.of(collect.one(rows, dataset, None))
        for family in paper.families(dataset, curves):
            cells = {
                finding.claim.words: _cell(finding) for finding in test(family, curves, margin, levels, confidence)
            }
            stays = dense(family, curves, margin, levels, confidence)
            words = ["-" if weights is None else f"to {weights:.1f} %" for weights in stays or (None, None)]
            columns[family] = cells | {f"{DENSE}, by the test": words[0], f"{DENSE}, by the means": words[1]}
    order = [family for family in paper.FAMILIES if family in columns]
    order += [family for family in columns if family not in order]
    names = dict.fromkeys(name for family in order for name in columns[family])
    names = [claim.words for claim in CLAIMS if claim.words in names] + [
        name for name in names if name.startswith(DENSE)
    ]
    lines = [["claim", *map(str, order)], ["---"] * (len(order) + 1)]
    lines += [[name, *(columns[family].get(name, "") for family in order)] for name in names]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@collect.one_sentence
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m analysis.claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    dominance.add_source(parser)
    dominance.add_range(parser)
    arguments = parser.parse_args(argv)
    dominance.check_range(arguments)
    frame = collect.select(dominance.source(arguments), arguments.dataset, arguments.model)
    print(table(frame, arguments.margin, arguments.levels, arguments.confidence))
    return 0


if __name__ == "__main__":
    sys.exit(main())
