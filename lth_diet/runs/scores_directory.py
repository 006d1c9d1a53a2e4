"""The scores directory, which arms with equal scoring settings share."""

from pathlib import Path

import numpy as np

from lth_diet.config.run_ids import scores_id, scores_identity
from lth_diet.config.schema import Config
from lth_diet.errors import UserError
from lth_diet.runs.config_directory import ConfigDirectory, with_defaults
from lth_diet.runs.instability_directory import InstabilityDirectory
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.runs.run_store import RunStore, open_run_store
from lth_diet.scores import artifact
from lth_diet.scores.artifact import Scores


class ScoresDirectory(ConfigDirectory):
    """The directory of a set of scores: `runs/scores/<scores id>`.

    Args:
        config: Configuration of any arm; only its scoring settings matter.

    Raises:
        UserError: If the directory was created with different scoring settings.
    """

    def __init__(self, config: Config):
        content = {
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
        super().__init__(config, open_run_store(config.runs) / "scores" / scores_id(config), content)

    def network_store(self, number: int) -> RunStore:
        """The directory of a scoring network, which is locked separately."""
        return self.store / f"network_{number}"

    def network(self, number: int) -> PhaseDirectory:
        return PhaseDirectory(self.network_store(number).path)

    def networks(self) -> list[PhaseDirectory]:
        """All K scoring networks."""
        return [self.network(number) for number in range(self.config.scores.networks)]

    def named_networks(self) -> list[tuple[str, PhaseDirectory]]:
        """All K scoring networks, with their names."""
        return [(network.name, network) for network in self.networks()]

    @property
    def done(self) -> bool:
        return (self.path / "manifest.json").exists()

    def load(self, labels: np.ndarray) -> Scores:
        """Load the scores.

        Args:
            labels: Training labels that pre-training will see, shape (N,).

        Raises:
            UserError: If the scores are damaged, or were computed on other labels or with other settings.
        """
        self.store.pull()
        manifest = self.store / "manifest.json"
        remedy = f"delete {manifest}, then rerun the training command to recompute the scores from their networks"
        try:
            scores = artifact.load_scores(self.path / "scores.safetensors", labels)
        except UserError as error:
            raise UserError(f"{error}; {remedy}") from None
        identity = scores.manifest.get("identity")
        if not isinstance(identity, dict) or with_defaults(identity) != with_defaults(scores_identity(self.config)):
            raise UserError(f"{self.path}: the scores were computed with a different configuration; {remedy}")
        return scores


def missing_scores(run: RunDirectory | InstabilityDirectory) -> ScoresDirectory | None:
    """Scores directory that an arm needs; None without scores, with `scores.file`, or after pre-training is done."""
    config = run.config
    if not config.needs_scores or config.scores.file is not None:
        return None
    folder = ScoresDirectory(config)
    return folder if folder.done or not all(replicate.pretrain.done for replicate in run.replicates()) else None


def load_arm_scores(config: Config, labels: np.ndarray) -> Scores:
    """Load the scores that select the subset of an easy or hard arm, from `scores.file` or the scores directory.

    Args:
        config: Configuration of the arm.
        labels: Training labels that pre-training will see, shape (N,).

    Raises:
        UserError: If the scores are damaged, or were computed on other labels or with other settings.
    """
    if config.scores.file is None:
        return ScoresDirectory(config).load(labels)
    try:
        return artifact.load_scores(Path(config.scores.file), labels)
    except UserError as error:
        raise UserError(f"scores.file: {error}") from None
