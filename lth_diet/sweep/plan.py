"""What of a sweep is finished, in progress and missing, and how long the rest takes."""

import statistics
from collections.abc import Iterable, Mapping

from lth_diet.errors import UserError
from lth_diet.sweep.grid import MAX_RUNS, Settings, Sweep, Work


def shared_runs(sweep: Sweep, overrides: Iterable[str]) -> dict[str, list[str]]:
    """Run to the other sweep files of the same folder that have it, under the same overrides."""
    others: dict[str, list[str]] = {name: [] for name in sweep.runs}
    for path in sorted(sweep.path.parent.glob("*.yaml")):
        if path.resolve() == sweep.path.resolve():
            continue
        try:
            there = Sweep(path, overrides).runs
        except UserError:  # it is not the one that was asked for
            continue
        for name in others.keys() & there.keys():
            others[name].append(path.stem)
    return others


def plan(sweep: Sweep, others: Mapping[str, list[str]]) -> str:
    """What is finished, half done and missing, what is shared, and how much there is left to train.

    Args:
        sweep: Nothing of it is changed.
        others: Of `in_common`.
    """
    work, runs = sweep.work(), sweep.runs
    replicates = [each for each in work if each.recipe == "imp"]
    scores = [each for each in work if each.recipe == "score"]
    where = next(iter(runs.values())).config.runs
    lines = [
        f"{sweep.path}: runs: {len(runs)}, replicates: {len(replicates)}, sets of scores: {len(scores)}; in {where}"
    ]
    rows = [("", "", "finished", "half done", "missing", "trainings left", "steps left", "also in")]
    for each in scores:
        users = {other.name.partition("/")[0] for other in replicates if other.needs == each.name}
        networks = f"{len(each.phases)} networks, for {len(users)} runs"
        rows.append((each.name, networks, *_counts([each]), ""))
    for name, run in runs.items():
        mine = [each for each in replicates if each.name.startswith(f"{name}/")]
        rows.append((name, run.config.arm_description, *_counts(mine), " ".join(others[name])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        words = (cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False))
        lines.append("  ".join([*words, *cells[2:-1], row[-1]]).rstrip())
    steps = sum(each.steps_left for each in work)
    shared = sum(bool(names) for names in others.values())
    lines.append(f"shared: {shared} of {len(runs)} runs with other sweeps of {sweep.path.parent}")
    lines.append(f"left: {sum(each.trainings_left for each in work):,} trainings, {steps:,} steps")
    return "\n".join([*lines, _estimate_time(sweep.settings, work, steps)])


def _counts(work: list[Work]) -> list[str]:
    states = [each.state for each in work]
    left = sum(each.trainings_left for each in work), sum(each.steps_left for each in work)
    return [*(str(states.count(s) or "") for s in ("finished", "half done", "missing")), *(f"{n:,}" for n in left)]


def _estimate_time(settings: Settings, work: list[Work], steps: int) -> str:
    """Of what is left, as far as the time of a step is known."""
    phases = [phase for each in work for phase, first, last in each.phases if first < last and phase.done]
    results = [phase.result() for phase in phases] if settings.step_ms is None else []
    measured = [1000 * result["seconds"] / result["steps"] for result in results if result.get("seconds")]
    if settings.step_ms is None and not measured:
        return "time: unknown before a training is finished, or step_ms=<milliseconds a step> is given"
    ms = settings.step_ms or statistics.median(measured)
    source = f"median of {len(measured)} trainings" if measured else "step_ms"
    share = 1.0 if settings.gpus_per_run is None else settings.gpus_per_run
    unit = "GPU-hours" if share else "hours of one process"
    hours = steps * ms / 3.6e6
    line = f"time: {hours * (share or 1):,.1f} {unit} at {ms:.1f} ms a step ({source})"
    threads = max(each.config.threads for each in work)
    many = MAX_RUNS * threads  # of what is not said
    slots = settings.slots(
        settings.cpus or many, many if settings.gpus is None else settings.gpus, settings.cpus_per_run or threads, share
    )
    if not 0 < slots < MAX_RUNS:
        return line
    longest = max(each.steps_left for each in work if each.recipe == "imp") * ms / 3.6e6
    return f"{line}; {max(hours / slots, longest):,.1f} hours with {slots} at a time"
