"""The output of --plan."""

import json
from collections.abc import Sequence

from lth_diet.config.run_ids import run_id
from lth_diet.config.schema import Config
from lth_diet.config.weights import remaining_weights
from lth_diet.data import catalog
from lth_diet.files import read_json
from lth_diet.launch import instability, stacks
from lth_diet.launch.arms import Arm
from lth_diet.launch.text import humanize
from lth_diet.runs.instability_directory import InstabilityDirectory
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.runs.scores_directory import ScoresDirectory
from lth_diet.runs.work_left import describe_state, replicate_steps_left, scoring_phases, steps_left


def plan_scores(folder: ScoresDirectory) -> str:
    """Describe what scoring would run: its networks, their steps and what is done."""
    phases = scoring_phases(folder)
    noise = f", {100 * folder.config.pretrain.label_noise:g} % label noise" * (folder.config.pretrain.label_noise > 0)
    steps = _in_epochs(folder.config, folder.config.scores.steps)
    lines = [f"{folder.path}: EL2N scores by {len(phases)} {folder.config.model_name}{noise}, {steps}"]
    if folder.done:
        return f"{lines[0]}  done"
    for network, first, last in phases:
        lines.append(f"  {humanize(network.name):<10} steps {first} to {last}  {describe_state(network, first)}")
    return "\n".join([*lines, f"scores: {steps_left(phases):,} steps to train"])


def _in_epochs(config: Config, steps: int) -> str:
    """Such as `62,400 steps (160 epochs)`."""
    batches = catalog.info(config.dataset.name, config.dataset.root).train_size // config.train.batch_size
    return f"{steps:,} steps ({round(steps / batches, 2):,g} epochs)"


def plan_arms(arms: Sequence[Arm], ranks: int = 1) -> str:
    """Describe what the arms of a launch would train; scores that several arms need are described once.

    Args:
        arms: The arms.
        ranks: Number of ranks, for the recommended size of a stack.
    """
    first_with = {arm.scores.path: arm for arm in reversed(arms) if arm.scores is not None}
    pairs = [(arm.run, arm.scores if arm in first_with.values() else None) for arm in arms]
    texts = [plan(*pair) for pair in pairs]
    total = sum(total_steps(*pair) for pair in pairs)
    if len(arms) > 1:
        texts.append(f"total of {len(arms)} arms: {total:,} steps to train")
    is_imp = not any(isinstance(arm.run, InstabilityDirectory) for arm in arms)
    line = stacks.recommendation([arm.config for arm in arms], ranks) if total and is_imp else ""
    return "\n\n".join(texts) + f"\n{line}" * bool(line)


def total_steps(run: RunDirectory | InstabilityDirectory, scores: ScoresDirectory | None) -> int:
    """Number of steps that a run, and the scores to compute first, have left to train."""
    scoring = steps_left(scoring_phases(scores)) if scores else 0
    return scoring + sum(replicate_steps_left(run, replicate) for replicate in run.replicates())


def plan(run: RunDirectory | InstabilityDirectory, scores: ScoresDirectory | None = None) -> str:
    """Describe what a run would train: its phases, their steps and what is done.

    Args:
        run: The run.
        scores: Scores to compute first, if the arm needs them.
    """
    lines = [plan_scores(scores)] if scores else []
    if isinstance(run, InstabilityDirectory):
        return "\n".join(
            [*lines, instability.plan_instability(run), f"total: {total_steps(run, scores):,} steps to train"]
        )
    lines += [f"{run.path}: {run.config.model_name}, arm {run.config.arm}, run id {run_id(run.config)}"]
    lines.append(f"training of {_in_epochs(run.config, run.config.train.steps)}")
    if run.config.rewind_step:
        lines[-1] += f", pre-training of {_in_epochs(run.config, run.config.rewind_step)}"
    remaining = remaining_weights(run.config)
    for replicate in run.replicates():
        phases = run.phases_of(replicate)
        lines.append(f"replicate {replicate.index}: {replicate_steps_left(run, replicate):,} steps to train")
        if replicate.given_up:
            lines[-1] += f" ({replicate.describe_failure()})"
        for number, (phase, first, last) in enumerate(phases):
            weights = 100 * remaining[max(number - 1, 0)] / remaining[0]
            state = describe_state(phase, first)
            lines.append(f"  {humanize(phase.name):<9} {weights:>5.1f} % of weights  steps {first} to {last}  {state}")
    return "\n".join([*lines, f"total: {total_steps(run, scores):,} steps to train"])


def summary(folder: ScoresDirectory) -> str:
    """Return the summary of finished scores as JSON; an empty string if it could not be computed."""
    path = folder.path / "examples/summary.json"
    return json.dumps(read_json(path), indent=2) if path.exists() else ""
