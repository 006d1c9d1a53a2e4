"""The directory of an instability analysis.

runs/instability/<dataset>_<arm>-<id>/
    config.json                     configuration of the analysis
    replicate_<r>/
        pretrain_<k>-<k>-...        weights_<k>.safetensors: the network at each of these steps of pre-training
        step_<k>/copy_<c>/          weights.safetensors: copy c, trained from step k
        step_<k>/barrier/           result.json: errors along the lines between copies, and their barriers

The files of each phase are described in `phase_directory`. The directory does not depend on the steps k: further steps
are added to it, with a shorter or longer pre-training of the same seeds.
"""

import contextlib
from pathlib import Path
from typing import Any

from lth_diet.config.instability import InstabilityKeys, LoadedInstability
from lth_diet.config.run_ids import instability_id, instability_identity
from lth_diet.config.schema import Config
from lth_diet.errors import UserError
from lth_diet.files import read_json
from lth_diet.runs.config_directory import ConfigDirectory
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.run_directory import ReplicateDirectory, RunDirectory
from lth_diet.runs.run_store import RunStore, open_run_store


class InstabilityDirectory(ConfigDirectory):
    """The directory of the instability analysis of one arm.

    Args:
        loaded: Configuration and keys of the analysis.

    Raises:
        UserError: If the directory was created with a different configuration.
    """

    def __init__(self, loaded: LoadedInstability):
        config, self.keys, self.arm_config = loaded.config, loaded.keys, loaded.arm_config
        name = instability_id(config, self.keys.level, self.keys.copies)
        content = {
            "instability_id": name,
            "identity": instability_identity(config, self.keys.level, self.keys.copies),
            "dataset": config.dataset.name,
            "model": config.model_name,
            "arm": config.arm,
            "level": self.keys.level,
            "copies": self.keys.copies,
            "experiment": config.experiment_name,
        }
        store = open_run_store(config.runs) / "instability" / f"{config.dataset.name}_{config.arm}-{name}"
        super().__init__(config, store, content)

    @property
    def arm_label(self) -> str:
        """The arm without a step, such as `random 2048, 10 % noise`."""
        return self.config.arm_description.replace(f", t_r = {self.config.rewind_step}", "")

    def replicate(self, index: int) -> "InstabilityReplicate":
        return InstabilityReplicate(self.store / f"replicate_{index}", self.keys)

    def replicates(self) -> list["InstabilityReplicate"]:
        """The replicates that the configuration asks for."""
        return [self.replicate(index) for index in self.config.replicates]

    @property
    def done(self) -> bool:
        """Whether everything that the configuration asks for is measured."""
        return all(each.barrier(step).done for each in self.replicates() for step in self.keys.steps)

    def phases_of(self, replicate: "InstabilityReplicate") -> list[tuple[PhaseDirectory, int, int]]:
        """List the trainings of a replicate with their start steps and end steps; the copies of a step are one."""
        missing = replicate.missing_steps
        pretraining = [(replicate.pretrain, 0, missing[-1])] if missing else []
        copies = [[replicate.copy(step, number) for number in range(self.keys.copies)] for step in self.keys.steps]
        first_left = [next((copy for copy in each if not copy.done), each[0]) for each in copies]
        end = self.config.train.steps
        return pretraining + [(copy, step, end) for copy, step in zip(first_left, self.keys.steps, strict=True)]

    def _merge(self, existing: dict[str, Any] | None) -> dict[str, Any]:
        if existing and self.config.experiment is not None:
            return {**existing, "experiment": self.config.experiment}
        return super()._merge(existing)


class InstabilityReplicate(ReplicateDirectory):
    """The directory of one replicate of an instability analysis.

    Args:
        store: The directory; a plain path suffices for reading.
        keys: Keys of the analysis.
    """

    def __init__(self, store: RunStore | Path, keys: InstabilityKeys):
        super().__init__(store)
        self.keys = keys

    @property
    def pretrain(self) -> PhaseDirectory:
        """The pre-training of the steps whose networks are missing, else the one that has the last step."""
        missing = self.missing_steps
        return self.pretraining(missing) if missing else self.pretraining_with(self.keys.steps[-1])

    @property
    def missing_steps(self) -> tuple[int, ...]:
        """Steps whose networks no finished pre-training has."""
        return tuple(step for step in self.keys.steps if self.pretraining_with(step) is None)

    def pretraining(self, steps: tuple[int, ...]) -> PhaseDirectory:
        """The pre-training that saves the networks at some steps."""
        return self._phase(self.path / f"pretrain_{'-'.join(map(str, steps))}")

    def pretraining_with(self, step: int) -> PhaseDirectory | None:
        """A finished pre-training that has the network at a step."""
        started = self.pretrainings()
        found = (phase for phase in started if phase.done and str(step) in phase.name.partition("_")[2].split("-"))
        return next(found, None)

    def pretrainings(self) -> list[PhaseDirectory]:
        return [self._phase(path) for path in sorted(self.path.glob("pretrain_*"))]

    def copy(self, step: int, number: int) -> PhaseDirectory:
        """The training of a copy from a step."""
        return self._phase(self.path / f"step_{step}" / f"copy_{number}")

    def barrier(self, step: int) -> PhaseDirectory:
        """The errors between the copies of a step."""
        return self._phase(self.path / f"step_{step}" / "barrier")

    def phases(self) -> list[PhaseDirectory]:
        """All phases that have started, in order; each depends on some of those before it."""
        paths = [*sorted(self.path.glob("step_*/copy_*")), *sorted(self.path.glob("step_*/barrier"))]
        return [*self.pretrainings(), *map(self._phase, paths)]

    def computed_from(self, phase: PhaseDirectory) -> list[Path]:
        """Directories to delete if a file of a phase is damaged: its own, and those that depend on it."""
        if phase.path.parent != self.path:
            return [phase.path.parent]
        steps = phase.name.partition("_")[2].split("-")
        return [phase.path, *(path for step in steps if (path := self.path / f"step_{step}").exists())]

    def _phase(self, path: Path) -> PhaseDirectory:
        return PhaseDirectory(path, self.store.upload)


def open_replicate(path: Path) -> ReplicateDirectory:
    """The directory of a replicate of a run or, if its config.json says so, of an instability analysis."""
    with contextlib.suppress(UserError):
        if "instability_id" in read_json(path.parent / "config.json"):
            return InstabilityReplicate(path, InstabilityKeys())
    return ReplicateDirectory(path)


def mask_path(arm_config: Config, replicate: int, step: int, level: int) -> Path:
    """Path of a mask that IMP with the rewind step `step` found.

    Args:
        arm_config: Configuration of the arm. At step 0 it is that of arm init, which does not depend on the examples.
        replicate: Index of the replicate.
        step: Step k, to which the run of IMP rewinds.
        level: Level of the mask, at least 1.

    Raises:
        UserError: If that level is not finished, or its mask is damaged.
    """
    pretrain = arm_config.pretrain.model_copy(update={"steps": step})
    update: dict[str, Any] = {"pretrain": pretrain} if step else {"arm": "init"}
    run = RunDirectory(arm_config.model_copy(update=update))
    directory = run.replicate(replicate)
    phase = directory.level(level)
    if not phase.done:
        settings = f"pretrain.steps={step}" if step else "arm=init"
        raise UserError(
            f"level = {level}: {phase.path} is not finished; find the mask first, with recipes/imp.py and the same "
            f"settings, {settings} and prune.levels={level} or more"
        )
    if not (phase.path / "mask.safetensors").exists():
        directory.store.pull()  # another node has found it
    return phase.verified("mask.safetensors")
