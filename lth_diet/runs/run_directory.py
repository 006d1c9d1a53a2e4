"""The run directory, which is the truth: where results lie and what is done.

runs/<dataset>_<arm>-<run id>/
    config.json                     what the run is
    replicate_<r>/
        pretrain/                   weights.safetensors: the rewind point, unmasked
                                    subset.safetensors, .json, .png, images.png: what a subset arm saw
        level_<L>/                  mask.safetensors: the mask that level L trains with (level 0: all true)
                                    weights.safetensors: parameters and buffers at the end of the level
        failed.json                 why the last attempt stopped
runs/scores/<scores id>/
    config.json                     what is scored, and how
    network_<k>/                    el2n.safetensors: its scores
    scores.safetensors              of all networks, and their mean
    examples/                       pictures and figures of the scores
    manifest.json                   written last, with the sha256 of the scores: the done marker

A phase (pretrain, level_<L>, network_<k>) holds what `phases` says.

python -m lth_diet verify runs         check every file of every run below a folder against its checksum
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lth_diet.config.identity import run_id, run_identity, run_name
from lth_diet.config.schema import Config
from lth_diet.errors import UserError
from lth_diet.files import remove_partial_files, write_json
from lth_diet.runs.config_directory import ConfigDirectory, read_config
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.run_store import RunStore, open_run_store


class ReplicateDirectory:
    """The directory of one replicate: one seed of one arm, all its levels.

    Args:
        store: Where it is; a path to look at it only.

    Raises:
        UserError: If its name has no number.
    """

    def __init__(self, store: RunStore | Path):
        self.store = store if isinstance(store, RunStore) else RunStore(store)
        self.path = self.store.path
        self.index = _number_in_name(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def pretrain(self) -> PhaseDirectory:
        return PhaseDirectory(self.path / "pretrain", self.store.upload)

    def level(self, number: int) -> PhaseDirectory:
        return PhaseDirectory(self.path / f"level_{number}", self.store.upload)

    def levels(self) -> Iterator[tuple[int, PhaseDirectory]]:
        """The levels that have been begun, in order."""
        numbers = sorted(_number_in_name(path) for path in self.path.glob("level_*"))
        return ((number, self.level(number)) for number in numbers)

    @property
    def about(self) -> dict[str, Any]:
        """The run's config.json."""
        return read_config(self.path.parent)

    def phases(self) -> list[PhaseDirectory]:
        """Pre-training and the levels that have been begun, in order: each is made of those before it."""
        return [self.pretrain, *(phase for _, phase in self.levels())]

    def finished(self, levels: int) -> bool:
        """Whether levels 0 to `levels` are done."""
        return all(self.level(number).done for number in range(levels + 1))

    def record_failure(self, reason: str) -> None:
        """Leave word of why this attempt stopped, if there is room for it: that may be why."""
        with contextlib.suppress(OSError):
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "failed.json", {"reason": reason})
            self.store.upload_file("failed.json")

    @property
    def failed(self) -> bool:
        """Whether the last attempt stopped before its end."""
        return (self.path / "failed.json").exists()

    @contextlib.contextmanager
    def lock(self, timeout: float = 10.0) -> Iterator[None]:
        """Keep other processes out, as `Place.held` does, and forget why the last attempt stopped."""
        with self.store.lock(timeout):
            remove_partial_files(self.path)
            for phase in self.phases():
                phase.remove_stale_checkpoints()
            (self.path / "failed.json").unlink(missing_ok=True)
            self.store.upload()
            yield


def _number_in_name(path: Path) -> int:
    """Of replicate_<r> or level_<L>."""
    if not re.fullmatch(r"[a-z]+_[0-9]{1,9}", path.name):
        raise UserError(f"{path}: not the directory of a replicate or level; allowed: a number after the _")
    return int(path.name.partition("_")[2])


class RunDirectory(ConfigDirectory):
    """The directory of one arm: `runs/<dataset>_<arm>-<run id>`.

    Args:
        config: The arm.
        ranks: How many train a replicate together, with `parallelism: data`.

    Raises:
        UserError: If the directory is there but another configuration made it.
    """

    def __init__(self, config: Config, ranks: int = 1):
        self.config = config
        about = {
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
        super().__init__(open_run_store(config.runs) / run_name(config), about)

    def _check(self, about: dict[str, Any]) -> None:
        super()._check(about)
        there, mine = about.get("ranks", 1), self._about["ranks"]
        if there != mine:  # BatchNorm saw other batches
            raise UserError(
                f"{self.path} was made by {there} ranks with parallelism: data, and these are {mine}; "
                f"allowed: composer -n {there}, or other runs=..."
            )

    def _to_say(self, there: dict[str, Any] | None) -> dict[str, Any]:
        planned = there["planned_levels"] if there else 0
        return json.loads(json.dumps({**self._about, "planned_levels": max(planned, self.config.prune.levels)}))

    def replicate(self, index: int) -> ReplicateDirectory:
        return ReplicateDirectory(self.store / f"replicate_{index}")

    def replicates(self) -> list[ReplicateDirectory]:
        """Those that the configuration asks for."""
        return [self.replicate(index) for index in self.config.replicates]
