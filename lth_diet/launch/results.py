"""Tables of the results of a launch, and how long its replicates took."""

import contextlib
import statistics
from collections.abc import Sequence

from lth_diet.errors import UserError
from lth_diet.launch import instability
from lth_diet.launch.arms import Arm
from lth_diet.runs.instability_directory import InstabilityDirectory
from lth_diet.runs.run_directory import RunDirectory

_WIDTH = 100  # characters of a line


def tables(arms: Sequence[Arm]) -> str:
    """Describe the results of all arms: in one table if they have the same weights at each level, else one for each."""
    measured = [{} if isinstance(arm.run, InstabilityDirectory) else _measured(arm.run) for arm in arms]
    rows = {(level, found[0][0]) for levels in measured for level, found in levels.items()}
    if len(arms) == 1 or not rows or len(dict(rows)) < len(rows):
        names = [f"  ({arm.name})" if arm.name else "" for arm in arms]
        return "\n\n".join(f"{arm.run.path}{name}\n{table(arm.run)}" for arm, name in zip(arms, names, strict=True))
    import pandas as pd  # slow: imported after training

    names = [arm.name for arm in arms]
    means = [{n: statistics.fmean(each for _, each in found) for n, found in levels.items()} for levels in measured]
    frame = pd.DataFrame(means, index=names, columns=sorted(dict(rows)))
    frame = frame.set_axis([f"{weights:.1f}" for _, weights in sorted(rows)], axis="columns")
    frame["n"] = [max(map(len, levels.values()), default=0) for levels in measured]
    text = frame.to_string(float_format="%.2f", na_rep="", line_width=_WIDTH)
    paths = [f"{name:<{max(map(len, names))}}  {arm.run.path}" for name, arm in zip(names, arms, strict=True)]
    return "\n".join(["mean test accuracy (%) by weights remaining (%)", text, "", *paths])


def table(run: RunDirectory | InstabilityDirectory) -> str:
    """Return a table of a run: test accuracy (mean ± sd over the finished replicates) at each level, or barriers."""
    if isinstance(run, InstabilityDirectory):
        return instability.table(run)
    levels = _measured(run)
    if not levels:
        return "no level is finished yet"
    lines = ["level  weights remaining  test accuracy (mean ± sd)    n"]
    for level, results in sorted(levels.items()):
        weights, accuracies = zip(*results, strict=True)
        sd = f"± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else "      "
        accuracy = f"{statistics.fmean(accuracies):.2f} {sd} %"
        lines.append(f"{level:>5}  {weights[0]:>15.1f} %  {accuracy:>25}  {len(accuracies):>3}")
    return "\n".join(lines)


def seconds_per_replicate(run: RunDirectory) -> float:
    """Mean training time of the finished replicates; 0 if there is none."""
    levels = run.config.prune.levels
    times = []
    for replicate in (each for each in run.replicates() if each.finished(levels)):
        with contextlib.suppress(UserError):  # a damaged result, which has been reported
            results = [phase.result() for phase in replicate.phases()]
            times.append(sum(result.get("seconds", 0.0) for result in results))  # arm init does not pre-train
    return statistics.fmean(times) if times else 0.0


def _measured(run: RunDirectory) -> dict[int, list[tuple[float, float]]]:
    """Weights remaining and test accuracy of each replicate, in percent, by level."""
    levels: dict[int, list[tuple[float, float]]] = {}
    for level, phase in (pair for replicate in run.replicates() for pair in replicate.levels() if pair[1].done):
        with contextlib.suppress(UserError):  # a damaged result, which has been reported
            result = phase.result()
            levels.setdefault(level, []).append((result["weights_remaining_percent"], result["test_accuracy_percent"]))
    return levels
