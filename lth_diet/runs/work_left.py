"""Phases and steps that a run has left to train."""

from lth_diet.runs.instability_directory import InstabilityDirectory
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.run_directory import ReplicateDirectory, RunDirectory
from lth_diet.runs.scores_directory import ScoresDirectory

Phases = list[tuple[PhaseDirectory, int, int]]
"""Phases with their start steps and end steps."""


def scoring_phases(folder: ScoresDirectory) -> Phases:
    """List the trainings of the scoring networks."""
    return [(network, 0, folder.config.scores.steps) for network in folder.networks()]


def resume_step(phase: PhaseDirectory, start: int) -> int:
    """Step at which an unfinished phase resumes: that of its checkpoint, else its start step."""
    checkpoint = phase.checkpoint()
    return checkpoint[1] if checkpoint else start


def describe_state(phase: PhaseDirectory, start: int) -> str:
    """Whether a phase is done, would resume, or is to do."""
    step = resume_step(phase, start)
    return "done" if phase.done else f"resumes at step {step}" if step > start else "to do"


def replicate_steps_left(run: RunDirectory | InstabilityDirectory, replicate: ReplicateDirectory) -> int:
    """Number of steps that a replicate has left to train; none if it has given up."""
    return 0 if replicate.given_up else steps_left(run.phases_of(replicate))


def steps_left(phases: Phases) -> int:
    """Number of steps that phases have left to train, counted from their checkpoints."""
    return sum(end - resume_step(phase, start) for phase, start, end in phases if not phase.done)
