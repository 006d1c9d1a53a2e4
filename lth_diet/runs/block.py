"""Blocks: replicates, or scoring networks, that train together as one stack (`stack` in the configuration).

Every member keeps its own directory and files. The checkpoint of a phase is stored once, in the directory of the first
member that trains; the others have a pointer to it (see `phase_directory`).
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from lth_diet.runs.environment import Environment
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.run_directory import ReplicateDirectory


class BlockPhase:
    """A phase of all members of a block.

    A member trains if its phase is not finished and it has not failed. The others keep their place in the stack, and
    nothing of them is written.

    Args:
        phases: Directory of the phase of each member, in order.
        failed: Members that have failed, by position.
        on_failure: Called with the position of a member and the reason if it fails while others go on. None: a failure
            of one is an error for all.

    Attributes:
        training: Positions of the members that train.
    """

    def __init__(
        self,
        phases: Sequence[PhaseDirectory],
        failed: Sequence[int] = (),
        on_failure: Callable[[int, str], None] | None = None,
    ):
        self.phases = list(phases)
        self.training = [k for k, phase in enumerate(phases) if not phase.done and k not in failed]
        self._on_failure = on_failure

    def __len__(self) -> int:
        """Number of members."""
        return len(self.phases)

    @property
    def name(self) -> str:
        """Name of the phase in messages: the directory of the member that stores the checkpoint."""
        return str(self.leader.path)

    @property
    def done(self) -> bool:
        """Whether no member is left to train."""
        return not self.training

    @property
    def leader(self) -> PhaseDirectory:
        """The phase that stores the checkpoint."""
        return self.phases[self.training[0]]

    @property
    def followers(self) -> list[PhaseDirectory]:
        """Phases of the other members that train."""
        return [self.phases[k] for k in self.training[1:]]

    def can_go_on_without(self, member: int, reason: str) -> bool:
        """Record that a member has failed; False if this ends the training of all."""
        if self._on_failure is None or len(self) == 1:
            return False
        self.training.remove(member)
        self._on_failure(member, reason)
        return True

    def checkpoint(self) -> tuple[Path, int] | None:
        """Path and step of the checkpoint that all members that train have in common; None if there is none."""
        found = {phase.checkpoint() for phase in [self.leader, *self.followers]}
        return found.pop() if len(found) == 1 else None

    def commit_checkpoint(self, step: int, environment: Environment) -> None:
        """Make the checkpoint of a step, which the leader has, the one to resume from; see `PhaseDirectory`."""
        self.leader.commit_checkpoint(step, environment, self.followers)

    def upload(self) -> None:
        """Share the files with other nodes: those of the leader last, whose checkpoint the others refer to."""
        for phase in [*self.followers, self.leader]:
            phase.upload()


@contextlib.contextmanager
def lock_replicates(replicates: Sequence[ReplicateDirectory], timeout: float = 10.0) -> Iterator[None]:
    """Lock the directories of a block in order, all or none; see `ReplicateDirectory.lock`."""
    with contextlib.ExitStack() as stack:
        for replicate in replicates:
            stack.enter_context(replicate.lock(timeout))
        yield
