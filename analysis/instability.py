"""Error barriers against steps, and how well a low barrier predicts that pruning from that step matches.

python -m analysis.instability --experiment digits -o figures    prints tables; writes barriers.* and prediction_*.*

Barriers come from recipes/instability.py, accuracies from recipes/imp.py, of one experiment. The prediction of an arm
is the barrier of its dense networks at k = t_r, its rewind step; of arm init that at k = 0 (Frankle et al. 2020).
"""

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter
from mlflow import MlflowClient
from scipy.stats import spearmanr

from lth_diet.config.schema import describe_arm
from lth_diet.errors import Parser, UserError
from lth_diet.program import run_program
from lth_diet.tracking.figures import ARM_STYLES, STYLES, barrier_curves

from . import arms, collect, dominance, identities, matching
from .arms import Arm, Curve, Results
from .identities import Identity
from .matching import Match

_MIN_ARMS = 4  # a rank correlation of fewer arms says nothing


@dataclasses.dataclass(frozen=True)
class Barriers:
    """Error barriers of one step of pre-training.

    Args:
        step: Step k, in batches.
        test: Barrier of the test error of each replicate, in percentage points.
    """

    step: int
    test: list[float]


@dataclasses.dataclass(frozen=True)
class Analysis:
    """Error barriers of dense networks of one arm.

    Args:
        label: The arm without a step, such as `random 256, 50 % noise`.
        identity: Identity of the analysis, see `identities`.
        barriers: The barriers at each step, by increasing step.
    """

    label: str
    identity: Identity
    barriers: tuple[Barriers, ...]

    def at(self, step: int) -> Barriers | None:
        return next((each for each in self.barriers if each.step == step), None)


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Barriers and accuracies of the arms of a family.

    Args:
        match: The arms of a family, compared with all examples at t*.
        barriers: Mean barrier of each arm that has one, in percentage points, also of all examples at t*.
    """

    match: Match
    barriers: dict[Arm, float]

    @property
    def differences(self) -> dict[Arm, float]:
        """Mean difference to all examples at t* over the tested levels, of the arms with a barrier."""
        found = {}
        for entry in self.match.entries:
            (mean,) = entry.comparison.statements["mean"].levels.itertuples()
            found |= {entry.arm: float(mean.difference), entry.comparison.reference: 0.0}
        return {arm: found[arm] for arm in self.barriers if arm in found}

    @property
    def correlation(self) -> float | None:
        """Spearman's rank correlation of barriers and differences; None for fewer than four arms."""
        differences = self.differences
        if len(differences) < _MIN_ARMS:
            return None
        return float(spearmanr([self.barriers[arm] for arm in differences], list(differences.values())).statistic)

    def __str__(self) -> str:
        count = len(self.differences)
        if self.correlation is None:
            return f"{self.match.family}: barrier and accuracy are known of {count} arms, too few for a correlation"
        return (
            f"{self.match.family}: rank correlation of the error barrier at t_r and the accuracy over the tested "
            f"levels: {self.correlation:+.2f} (n = {count} arms)"
        )


def collect_analyses(client: MlflowClient, experiments: list[str]) -> list[Analysis]:
    """Collects the barriers of dense networks from MLflow; two analyses differ in more than seed and replicate."""
    found: dict[tuple[str, Identity], dict[int, dict[tuple, float]]] = {}
    for run in collect.search_runs(client, experiments, "tags.phase = 'instability' and tags.level = '0'"):
        params = {key: text for key, text in run.data.params.items() if not key.startswith("instability.")}
        identity = identities.normalize(identities.from_params(params, None))
        steps = found.setdefault((_label(identity), tuple(sorted(identity.items()))), {})
        replicate = run.data.tags.get("instability_id"), run.data.tags.get("replicate")  # may be in two experiments
        for metric in client.get_metric_history(run.info.run_id, "test_error_barrier"):
            steps.setdefault(metric.step, {}).setdefault(replicate, metric.value)
    analyses = [
        Analysis(label, dict(identity), tuple(Barriers(k, [*values.values()]) for k, values in sorted(steps.items())))
        for (label, identity), steps in found.items()
        if steps
    ]
    order = {name: index for index, name in enumerate(arms.ORDER)}
    return sorted(analyses, key=lambda each: (order.get(each.identity.get("arm", ""), len(order)), each.label))


def _label(identity: Identity) -> str:
    size, noise = identity.get("pretrain.subset.size"), float(identity.get("pretrain.label_noise", 0))
    balanced = identity.get("pretrain.subset.class_balanced") == "true"
    offset = int(identity.get("pretrain.subset.offset", 0))
    name = describe_arm(identity.get("arm", ""), None if size is None else int(size), 0, noise, balanced, offset)
    return name.replace(", t_r = 0", "")


def predict_all(matches: Sequence[Match], results: Results, analyses: Sequence[Analysis]) -> list[Prediction]:
    """Calls `predict` for every family with arms that were compared."""
    return [predict(match, results[match.family.dataset], analyses) for match in matches if match.entries]


def predict(found: Match, curves: dict[Arm, Curve], analyses: Sequence[Analysis]) -> Prediction:
    """Finds the barriers of the arms of a family: those of the same settings, at their rewind steps."""
    compared = {entry.arm for entry in found.entries} | {entry.comparison.reference for entry in found.entries}
    barriers = {}
    for arm in sorted(compared, key=lambda arm: arm.sort_key):
        same = (each.at(arm.rewind_steps) for each in analyses if _agrees(curves[arm].identity, each.identity))
        measured = [value for each in same if each for value in each.test]
        if measured:
            barriers[arm] = statistics.fmean(measured)
    return Prediction(found, barriers)


def _agrees(run: Identity, analysis: Identity) -> bool:
    """Whether an analysis is of the networks that a run of IMP rewinds to, up to its step and numerical settings."""
    ignored = {"pretrain.steps", "prune.fraction", *identities.NUMERICAL}
    if run.get("arm") == "init":  # at k = 0 all arms have the same networks
        run, analysis = identities.setup(run), identities.setup(analysis)
    return ignored.issuperset(identities.differing_keys([run, analysis]))


def figure(prediction: Prediction) -> Figure:
    """Draws the difference to all examples at t* against the barrier, with the name and rewind step of each arm."""
    drawn = Figure(figsize=(5.4, 4), layout="constrained")
    axes = drawn.subplots()
    not_matching = {entry.arm for entry in prediction.match.entries if not entry.matching}
    differences = prediction.differences
    for arm, difference in differences.items():
        color, marker = ARM_STYLES.get(arm.name, STYLES[-1])
        barrier, face = prediction.barriers[arm], "none" if arm in not_matching else color
        axes.plot(barrier, difference, marker, markersize=7, color=color, markerfacecolor=face)
        label = arm.name if arm.name == "init" else f"{arm.name} {arm.rewind_steps}"
        axes.annotate(label, (barrier, difference), (5, 3), textcoords="offset points", fontsize=8.5, color=color)
    axes.axhline(0, color="#777777", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.25)
    rho = "" if prediction.correlation is None else f"; rank correlation {prediction.correlation:+.2f}"
    axes.set_title(
        f"{prediction.match.family} (n = {len(differences)} arms{rho})", fontsize=10, loc="left", parse_math=False
    )
    axes.set_xlabel("Error barrier at the rewind step (points); filled: matching", fontsize=9)
    axes.set_ylabel("Accuracy minus that of all at t* (points)", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


@collect.catch_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m analysis.instability", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    collect.add_store_arguments(parser)
    dominance.add_test_arguments(parser)
    parser.add_argument("-o", "--output", type=Path, help="folder for the figures; default: no figures")
    arguments = parser.parse_args(argv)
    dominance.check_test_arguments(arguments)
    analyses = collect_analyses(*collect.open_store(arguments.tracking_uri, arguments.experiment))
    if not analyses:
        raise UserError("no error barrier of dense networks is measured yet; see docs/instability.md")
    print(table(analyses))
    results = collect.results_by_dataset(collect.collect(arguments.tracking_uri, arguments.experiment))
    matches = matching.match_all(results, arguments.margin, arguments.levels, arguments.confidence)
    predictions = predict_all(matches, results, analyses)
    print("\n".join(map(str, predictions)))
    if arguments.output:
        collect.write(arguments.output, lambda path: path.mkdir(parents=True, exist_ok=True))
        drawn = {"barriers": barrier_figure(analyses)}
        drawn |= {f"prediction_{number}": figure(each) for number, each in enumerate(predictions, 1) if each.barriers}
        for path in (arguments.output / f"{name}.{suffix}" for name in drawn for suffix in ("svg", "png")):
            collect.write(path, drawn[path.stem].savefig)
            print(path)
    return 0


def table(analyses: Sequence[Analysis]) -> str:
    """Formats a Markdown table: barrier of the test error, mean ± sd over replicates, by arm and step."""
    steps = sorted({each.step for analysis in analyses for each in analysis.barriers})
    lines = ["| error barrier at k = | " + " | ".join(map(str, steps)) + " | n |", "|---|" + "---:|" * (len(steps) + 1)]
    for analysis in analyses:
        found = [analysis.at(step) for step in steps]
        counts = sorted({len(each.test) for each in analysis.barriers})
        lines.append(f"| {analysis.label} | " + " | ".join(map(_cell, found)) + f" | {'-'.join(map(str, counts))} |")
    return "\n".join(lines)


def _cell(found: Barriers | None) -> str:
    if found is None:
        return ""
    sd = f" ± {statistics.stdev(found.test):.1f}" if len(found.test) > 1 else ""
    return f"{statistics.fmean(found.test):.1f}{sd}"


def barrier_figure(analyses: Sequence[Analysis]) -> Figure:
    """Draws the barriers against the step k, one curve per arm."""
    labels = [each.label for each in analyses]
    names = [
        f"{label} ({labels[: index + 1].count(label)})" * (labels.count(label) > 1) or label
        for index, label in enumerate(labels)
    ]
    return barrier_curves(dict(zip(names, (each.barriers for each in analyses), strict=True)), "Stability to SGD noise")


if __name__ == "__main__":
    run_program(main)
