"""The plan of a sweep: what is finished, partial and missing, and how long the rest takes."""

import contextlib
import statistics
from collections.abc import Iterable, Mapping

from lth_diet.config.schema import Config
from lth_diet.errors import UserError
from lth_diet.launch import stacks
from lth_diet.sweep.grid import MAX_RUNS, Settings, Sweep, Work


def shared_runs(sweep: Sweep, overrides: Iterable[str]) -> dict[str, list[str]]:
    """Return the other sweep files of the same folder that contain each run, under the same overrides."""
    others: dict[str, list[str]] = {name: [] for name in sweep.runs}
    paths = [path for path in sorted(sweep.path.parent.glob("*.yaml")) if path.resolve() != sweep.path.resolve()]
    for path in paths:
        with contextlib.suppress(UserError):  # an invalid file does not matter here
            for name in others.keys() & Sweep(path, overrides).runs.keys():
                others[name].append(path.stem)
    return others


def plan(sweep: Sweep, others: Mapping[str, list[str]]) -> str:
    """Describe what is finished, partial and missing, what is shared, and how much is left to train.

    Args:
        sweep: The sweep. Its files are only read.
        others: Result of `shared_runs`.
    """
    work, runs = sweep.work(), sweep.runs
    blocks = [each for each in work if each.recipe == "imp"]
    replicates = sum(len(each.parts) for each in blocks)
    scores = [each for each in work if each.recipe == "score"]
    where = next(iter(runs.values())).config.runs
    lines = [f"{sweep.path}: runs: {len(runs)}, replicates: {replicates}, sets of scores: {len(scores)}; in {where}"]
    rows = [("", "", "finished", "partial", "missing", "trainings left", "steps left", "also in")]
    for each in scores:
        users = {other.name.partition("/")[0] for other in blocks if other.needs == each.name}
        networks = f"{len(each.phases)} networks, for {len(users)} runs"
        rows.append((each.name, networks, *_counts([each]), ""))
    for name, run in runs.items():
        mine = [each for each in blocks if each.name.startswith(f"{name}/")]
        rows.append((name, run.config.arm_description, *_counts(mine), " ".join(others[name])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        labels = (cell.ljust(width) for cell, width in zip(row[:2], widths, strict=False))
        lines.append("  ".join([*labels, *cells[2:-1], row[-1]]).rstrip())
    steps = sum(each.steps_left for each in work)
    shared = sum(bool(names) for names in others.values())
    lines.append(f"shared: {shared} of {len(runs)} runs, with other sweeps in {sweep.path.parent}")
    lines.append(f"left: {sum(each.trainings_left for each in work):,} trainings, {steps:,} steps")
    lines.append(_estimate_time(sweep.settings, work, steps))
    return "\n".join([*lines, *(_recommend_stack(sweep.settings, work) if steps else ())])


def _recommend_stack(settings: Settings, work: list[Work]) -> list[str]:
    """The size of a stack that is recommended for the runs that are left, with a block for each slot that is known."""
    runs: dict[str, Config] = {}
    for each in (each for each in work if each.recipe == "imp" and not each.done):
        run = each.name.partition("/")[0]
        replicates = {*runs.get(run, each.config).replicates, *each.config.replicates}  # of all entries of the run
        runs[run] = each.config.model_copy(update={"replicates": tuple(sorted(replicates))})
    uses_gpus = {None: None, 0: False}.get(0 if settings.gpus == 0 else settings.gpus_per_run, True)
    known = None if uses_gpus is None else ["GPU" if uses_gpus else "CPU"]
    line = stacks.recommendation([*runs.values()], _known_slots(settings, work) or 1, known, "job") if runs else ""
    return [line] if line else []


def _known_slots(settings: Settings, work: list[Work]) -> int | None:
    """Number of processes at a time; None if the file does not say how many GPUs or CPU cores there are."""
    share = 1.0 if settings.gpus_per_run is None else settings.gpus_per_run
    threads = max(each.config.threads for each in work)
    many = MAX_RUNS * threads  # stands for an unknown number of GPUs or CPU cores
    slots = settings.slots(
        settings.cpus or many, many if settings.gpus is None else settings.gpus, settings.cpus_per_run or threads, share
    )
    return slots if 0 < slots < MAX_RUNS else None


def _counts(work: list[Work]) -> list[str]:
    states = [part.state for each in work for part in each.parts]
    left = sum(each.trainings_left for each in work), sum(each.steps_left for each in work)
    return [*(str(states.count(s) or "") for s in ("finished", "partial", "missing")), *(f"{n:,}" for n in left)]


def _estimate_time(settings: Settings, work: list[Work], steps: int) -> str:
    """Describe the time for the steps that are left, if the time per step is known."""
    phases = [phase for each in work for phase, first, last in each.phases if first < last and phase.done]
    results = [phase.result() for phase in phases] if settings.step_ms is None else []
    measured = [1000 * result["seconds"] / result["steps"] for result in results if result.get("seconds")]
    if settings.step_ms is None and not measured:
        return "time: unknown until a training is finished; or give step_ms=<milliseconds per step>"
    ms = settings.step_ms or statistics.median(measured)
    source = f"median of {len(measured)} trainings" if measured else "step_ms"
    share = 1.0 if settings.gpus_per_run is None else settings.gpus_per_run
    unit = "GPU-hours" if share else "process-hours"
    hours = steps * ms / 3.6e6
    line = f"time: {hours * (share or 1):,.1f} {unit} at {ms:.1f} ms per step ({source})"
    slots = _known_slots(settings, work)
    if slots is None:
        return line
    longest = max(each.steps_left for each in work if each.recipe == "imp") * ms / 3.6e6
    return f"{line}; {max(hours / slots, longest):,.1f} hours with {slots} at a time"
