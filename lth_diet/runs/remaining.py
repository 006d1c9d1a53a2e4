"""Phases and steps that a run has left to train."""

from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.run_directory import ReplicateDirectory, RunDirectory
from lth_diet.runs.scores_directory import ScoresDirectory


def phases_of(run: RunDirectory, replicate: ReplicateDirectory) -> list[tuple[PhaseDirectory, int, int]]:
    """List every phase of a replicate with its start step and end step."""
    rewind, end = run.config.rewind_step, run.config.train.steps
    levels = range(run.config.prune.levels + 1)
    return [(replicate.pretrain, 0, rewind), *((replicate.level(level), rewind, end) for level in levels)]


def resume_step(phase: PhaseDirectory, start: int) -> int:
    """Step at which an unfinished phase resumes: that of its checkpoint, else its start step."""
    checkpoint = phase.checkpoint()
    return checkpoint[1] if checkpoint else start


def steps_left(run: RunDirectory, replicate: ReplicateDirectory) -> int:
    """Number of steps that a replicate has left to train, counted from its checkpoints."""
    return sum(end - resume_step(phase, start) for phase, start, end in phases_of(run, replicate) if not phase.done)


def scoring_steps_left(folder: ScoresDirectory) -> int:
    """Number of steps that the scoring networks have left to train, counted from their checkpoints."""
    end = folder.config.scores.steps
    return sum(end - resume_step(network, 0) for network in folder.networks() if not network.done)
