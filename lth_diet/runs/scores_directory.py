"""The directory of a set of scores, which arms with equal scoring settings share."""

from pathlib import Path

import numpy as np

from lth_diet.config.identity import scores_id, scores_identity
from lth_diet.config.schema import Config
from lth_diet.errors import UserError
from lth_diet.runs.config_directory import ConfigDirectory, with_defaults
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.runs.run_store import RunStore, open_run_store
from lth_diet.scores import artifact
from lth_diet.scores.artifact import Scores


class ScoresDirectory(ConfigDirectory):
    """The folder of a scores artifact, `runs/scores/<scores id>`, which arms with equal scoring settings share.

    Args:
        config: Of any arm; what is not a scoring setting is ignored.

    Raises:
        UserError: If the folder is there but another configuration made it.
    """

    def __init__(self, config: Config):
        self.config = config
        about = {
            "scores_id": scores_id(config),
            "identity": scores_identity(config),
            "dataset": config.dataset.name,
            "model": config.model_name,
            "label_noise": config.pretrain.label_noise,
            "seed": config.seed,
            "networks": config.scores.networks,
            "steps": config.scores.steps,
            "experiment": config.experiment_name,
        }
        super().__init__(open_run_store(config.runs) / "scores" / scores_id(config), about)

    def network_store(self, number: int) -> RunStore:
        """Where a network is, which is held by itself."""
        return self.store / f"network_{number}"

    def network(self, number: int) -> PhaseDirectory:
        return PhaseDirectory(self.network_store(number).path)

    def networks(self) -> list[PhaseDirectory]:
        """All K of them."""
        return [self.network(number) for number in range(self.config.scores.networks)]

    @property
    def done(self) -> bool:
        return (self.path / "manifest.json").exists()

    def load(self, labels: np.ndarray) -> Scores:
        """The scores.

        Args:
            labels: Those that pre-training will see, shape (N,).

        Raises:
            UserError: If they are damaged, or not made as the configuration says.
        """
        self.store.pull()
        remedy = f"delete {self.store / 'manifest.json'}, and the same command makes them again of their networks"
        try:
            found = artifact.load_scores(self.path / "scores.safetensors", labels)
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from None
        there = found.manifest.get("identity")
        if not isinstance(there, dict) or with_defaults(there) != with_defaults(scores_identity(self.config)):
            raise UserError(f"{self.path}: scores that another configuration made; {remedy}")
        return found


def missing_scores(run: RunDirectory) -> ScoresDirectory | None:
    """The scores of the arm, if no file was named; None too if pre-training is done and has no more need of them."""
    config = run.config
    if not config.needs_scores or config.scores.file is not None:
        return None
    folder = ScoresDirectory(config)
    return folder if folder.done or not all(replicate.pretrain.done for replicate in run.replicates()) else None


def load_arm_scores(config: Config, labels: np.ndarray) -> Scores:
    """The scores that an easy or hard arm chooses by; arguments and errors as of `ScoreFolder.load`."""
    if config.scores.file is None:
        return ScoresDirectory(config).load(labels)
    try:
        return artifact.load_scores(Path(config.scores.file), labels)
    except UserError as error:
        raise UserError(f"scores.file: {error}") from None
