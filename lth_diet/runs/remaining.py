"""Which phases and how many steps of a run are left."""

from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.run_directory import ReplicateDirectory, RunDirectory
from lth_diet.runs.scores_directory import ScoresDirectory


def steps_left(run: RunDirectory, replicate: ReplicateDirectory) -> int:
    """Steps that a replicate has yet to train, counted from its checkpoints."""
    return sum(last - resume_step(phase, first) for phase, first, last in phases_of(run, replicate) if not phase.done)


def phases_of(run: RunDirectory, replicate: ReplicateDirectory) -> list[tuple[PhaseDirectory, int, int]]:
    """Every phase of a replicate, with its first and last step."""
    first, last = run.config.rewind_step, run.config.train.steps
    levels = range(run.config.prune.levels + 1)
    return [(replicate.pretrain, 0, first), *((replicate.level(level), first, last) for level in levels)]


def resume_step(phase: PhaseDirectory, first: int) -> int:
    """The step that a phase that is not done goes on at."""
    checkpoint = phase.checkpoint()
    return checkpoint[1] if checkpoint else first


def scoring_steps_left(folder: ScoresDirectory) -> int:
    """Steps that the networks of a scores artifact have yet to train, counted from their checkpoints."""
    last = folder.config.scores.steps
    return sum(last - resume_step(network, 0) for network in folder.networks() if not network.done)
