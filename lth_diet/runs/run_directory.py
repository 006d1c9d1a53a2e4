"""The run directory, which holds the results of one arm and shows what is finished.

runs/<dataset>_<arm>-<run id>/
    config.json                     configuration of the run
    replicate_<r>/
        pretrain/                   weights.safetensors: the rewind point, unmasked
                                    subset.safetensors, .json, .png, images.png: the subset that pre-training saw
        level_<L>/                  mask.safetensors: the mask that level L trains with (level 0: all true)
                                    weights.safetensors: parameters and buffers at the end of the level
        failed.json                 why the last attempt stopped
runs/scores/<scores id>/
    config.json                     scoring configuration
    network_<k>/                    el2n.safetensors: scores by network k
    scores.safetensors              scores by each network, and their mean
    examples/                       pictures and figures of the scores
    manifest.json                   written last, with the sha256 of the scores: marks them as finished

Each phase (pretrain, level_<L>, network_<k>) also has the files that `phase_directory` describes.
"""

import contextlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lth_diet.config.run_ids import run_id, run_identity, run_name
from lth_diet.config.schema import Config
from lth_diet.errors import UserError
from lth_diet.files import read_json, remove, remove_partial_files, write_json
from lth_diet.runs.config_directory import HOW_TO_REPLACE, ConfigDirectory, read_config
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.run_store import RunStore, open_run_store


class RunDirectory(ConfigDirectory):
    """The directory of one arm: `runs/<dataset>_<arm>-<run id>`.

    Args:
        config: Configuration of the arm.
        ranks: Number of ranks that train each replicate together, with `parallelism: data`; otherwise ignored.

    Raises:
        UserError: If the directory was created with a different configuration or number of ranks.
    """

    def __init__(self, config: Config, ranks: int = 1):
        content = {
            "run_id": run_id(config),
            "identity": run_identity(config),
            "dataset": config.dataset.name,
            "model": config.model_name,
            "arm": config.arm,
            "subset_size": config.subset_size,
            "rewind_steps": config.rewind_step,
            "label_noise": config.label_noise,
            "seed": config.seed,
            "train_steps": config.train.steps,
            "experiment": config.experiment_name,
            "ranks": ranks if config.parallelism == "data" else 1,
            "planned_levels": config.prune.levels,
        }
        super().__init__(config, open_run_store(config.runs) / run_name(config), content)

    def replicate(self, index: int) -> "ReplicateDirectory":
        return ReplicateDirectory(self.store / f"replicate_{index}")

    def replicates(self) -> list["ReplicateDirectory"]:
        """The replicates that the configuration asks for."""
        return [self.replicate(index) for index in self.config.replicates]

    def phases_of(self, replicate: "ReplicateDirectory") -> list[tuple[PhaseDirectory, int, int]]:
        """List the trainings of a replicate with their start steps and end steps."""
        rewind, end = self.config.rewind_step, self.config.train.steps
        levels = range(self.config.prune.levels + 1)
        return [(replicate.pretrain, 0, rewind), *((replicate.level(level), rewind, end) for level in levels)]

    @property
    def done(self) -> bool:
        """Whether everything that the configuration asks for is trained."""
        levels = self.config.prune.levels
        return all(replicate.pretrain.done and replicate.finished(levels) for replicate in self.replicates())

    def _check(self, existing: dict[str, Any]) -> None:
        super()._check(existing)
        theirs, ours = existing.get("ranks", 1), self._content["ranks"]
        if theirs != ours:  # the number of ranks changes the batches of BatchNorm
            raise UserError(
                f"{self.path} was created by {theirs} ranks with parallelism: data, but this launch has {ours}; "
                f"use composer -n {theirs}, or {HOW_TO_REPLACE}"
            )

    def _merge(self, existing: dict[str, Any] | None) -> dict[str, Any]:
        kept = {}
        if existing:
            kept["planned_levels"] = max(existing["planned_levels"], self.config.prune.levels)
            if self.config.experiment is None:
                kept["experiment"] = existing["experiment"]
        return json.loads(json.dumps({**self._content, **kept}))


class ReplicateDirectory:
    """The directory of one replicate: pre-training and all levels with one seed.

    Args:
        store: The directory; a plain path suffices for reading.

    Raises:
        UserError: If the name of the directory has no number.
    """

    def __init__(self, store: RunStore | Path):
        self.store = store if isinstance(store, RunStore) else RunStore(store)
        self.path = self.store.path
        self.index = _number_in_name(self.path)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def run_config(self) -> dict[str, Any]:
        """Content of the config.json of the run."""
        return read_config(self.path.parent)

    @property
    def pretrain(self) -> PhaseDirectory:
        return PhaseDirectory(self.path / "pretrain", self.store.upload)

    def pretrainings(self) -> list[PhaseDirectory]:
        """All pre-trainings that may have started."""
        return [self.pretrain]

    def level(self, number: int) -> PhaseDirectory:
        return PhaseDirectory(self.path / f"level_{number}", self.store.upload)

    def levels(self) -> Iterator[tuple[int, PhaseDirectory]]:
        """Number and directory of each level that has started, in order."""
        numbers = sorted(_number_in_name(path) for path in self.path.glob("level_*"))
        return ((number, self.level(number)) for number in numbers)

    def phases(self) -> list[PhaseDirectory]:
        """Pre-training and the levels that have started, in order; each depends on those before it."""
        return [self.pretrain, *(phase for _, phase in self.levels())]

    def name_of(self, phase: PhaseDirectory) -> str:
        """Name of a phase in its result, such as `5c9a828fce/replicate_0/level_1`, which starts with the run id."""
        config = self.run_config
        return (
            f"{config.get('run_id') or config['instability_id']}/{phase.path.relative_to(self.path.parent).as_posix()}"
        )

    def foreign_phases(self) -> list[tuple[PhaseDirectory, str]]:
        """Finished phases whose results have another name, as where directories were copied or swapped, and this name.

        Results of earlier versions have none.
        """
        named = [(phase, phase.result().get("phase")) for phase in self.phases() if phase.done]
        return [(phase, name) for phase, name in named if name not in (None, self.name_of(phase))]

    def finished(self, levels: int) -> bool:
        """Whether levels 0 to `levels` are done."""
        return all(self.level(number).done for number in range(levels + 1))

    @property
    def failed(self) -> bool:
        """Whether the last attempt stopped with an error."""
        return (self.path / "failed.json").exists()

    def record_failure(self, reason: str) -> None:
        """Write why this attempt stopped to failed.json, unless the disk is full or another process has the lock."""
        with contextlib.suppress(OSError, UserError), self.store.lock(timeout=0):
            if self.given_up:
                return
            write_json(self.path / "failed.json", {"reason": reason})
            self.store.upload()

    def give_up(self, reason: str) -> None:
        """Write why this replicate cannot be trained to failed.json, which `lock` then keeps; the caller has the lock.

        In a stack, another attempt would end in the same way, and cost the other replicates their time.
        """
        write_json(self.path / "failed.json", {"reason": reason, "final": True})
        self.store.upload()

    def describe_failure(self) -> str:
        """Why a replicate that has given up is not trained, and how to train it again."""
        reason = read_json(self.path / "failed.json")["reason"]
        return f"it failed ({reason}); delete {self.store}/failed.json to train it again"

    @property
    def given_up(self) -> bool:
        """Whether this replicate is not trained again until its failed.json is deleted."""
        with contextlib.suppress(UserError, OSError):
            return read_json(self.path / "failed.json").get("final") is True
        return False

    @contextlib.contextmanager
    def lock(self, timeout: float = 10.0) -> Iterator[None]:
        """Lock the directory, remove what a killed or failed attempt left, and check all phases; see `RunStore.lock`.

        Raises:
            UserError: If a file of a finished phase is missing or damaged, or the result is that of another phase.
        """
        with self.store.lock(timeout):
            if self.given_up:
                yield
                return
            remove_partial_files(self.path)
            for phase in self.phases():
                phase.remove_stale_checkpoints()
                if phase.repair_curve():
                    print(
                        f"warning: {phase.path / 'curve.jsonl'}: removed rows that a suspended process had appended",
                        file=sys.stderr,
                        flush=True,
                    )
            remove(self.path / "failed.json")
            self.store.upload()
            for phase in self.phases():
                phase.check()
            for phase, name in self.foreign_phases():
                raise UserError(
                    f"{phase.path}: its result is that of {name}; put the right one back, or delete it and all that is "
                    "computed from it and rerun the same command to train them"
                )
            yield


def _number_in_name(path: Path) -> int:
    """Number in replicate_<r> or level_<L>."""
    if not re.fullmatch(r"[a-z]+_[0-9]{1,9}", path.name):
        raise UserError(f"{path}: not a replicate or level directory; expected a number after the underscore")
    return int(path.name.partition("_")[2])
