"""Iterative magnitude pruning (IMP) with weight rewinding: Algorithm 1 of the paper."""

import functools
from collections.abc import Callable

from composer import Algorithm
from composer.models import ComposerClassifier
from composer.utils import dist
from safetensors.torch import load_file, save
from torch import Tensor

from lth_diet.algorithms import ApplyMask, Rewind, SubsetSampling
from lth_diet.config.schema import Config
from lth_diet.data import subsets
from lth_diet.data.loader import EvaluationLoader, Loader
from lth_diet.data.subsets import save_indices
from lth_diet.errors import TrainingError, UserError
from lth_diet.masks.mask import Mask
from lth_diet.masks.pruning import prune_by_magnitude
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.run_directory import ReplicateDirectory
from lth_diet.runs.scores_directory import load_arm_scores
from lth_diet.scores.artifact import Scores
from lth_diet.scores.summary import ScoredExamples
from lth_diet.training import trainer
from lth_diet.training.builders import Builder
from lth_diet.training.progress import Progress

Weights = dict[str, Tensor]
"""Parameters and buffers of a network by name."""


class IMP:
    """Runs one replicate of one arm.

    A phase whose results exist is not trained again, so that a rerun resumes. Under data parallelism every rank calls
    `run`; rank 0 writes the results.

    Args:
        config: Configuration of the arm.
        replicate: Directory of the results. Its index selects the seeds.
        progress: Receives progress, results and warnings.
        track: Called after phases and checkpoints to send new results to MLflow.
    """

    def __init__(self, config: Config, replicate: ReplicateDirectory, progress: Progress, track: Callable[[], None]):
        self.config = config
        self.replicate = replicate
        self.progress = progress
        self.track = track
        self.builder = Builder(config, replicate.index)

    def run(self) -> None:
        """Algorithm 1. The mask of level n has been pruned n times."""
        dist.barrier()  # rank 0 may have downloaded results of other nodes
        levels = self.config.prune.levels
        mask = Mask.dense(self.builder.build_network().module)  # lines 1 and 2
        rewind_point = self.pretrain()  # line 3
        for level in range(levels):  # line 4
            weights = self.train(level, mask, rewind_point)  # line 5
            mask = self.prune(level + 1, mask, weights)  # line 6
        self.train(levels, mask, rewind_point)  # line 8
        if self.is_rank_zero:
            self.track()  # sends what an earlier launch could not send

    def pretrain(self) -> Weights:
        """Train the dense network for t_r steps on the arm's examples.

        Returns:
            The rewind point: the network's weights at step t_r.
        """
        phase, rewind_step = self.replicate.pretrain, self.config.rewind_step
        if not phase.done:
            model, rewind = self.builder.build_network(), Rewind(rewind_step)
            if rewind_step == 0:
                result, rewind.state = {"steps": 0}, model.module.state_dict()
            else:
                loader = self.builder.build_loader(self.builder.noisy_data)
                schedule = trainer.Schedule(0, rewind_step, self.config.pretrain.lr)
                result = self._train_phase(phase, model, loader, schedule, [rewind, *self.subset_algorithms()], 100.0)
                if self.scores is not None:
                    result["scores_sha256"] = self.scores.manifest["sha256"]
            self._finish_phase(phase, result, rewind.state)
        dist.barrier()
        return load_file(phase.verified("weights.safetensors"))

    def subset_algorithms(self) -> list[Algorithm]:
        """Select the examples of pre-training (paper, section 3) and save their indices and pictures.

        Returns:
            The algorithm that trains on the subset; empty if the arm pre-trains on all examples.
        """
        if self.config.subset_size is None:
            return []
        subset, labels, rule = self.config.pretrain.subset, self.builder.noisy_data.train.labels, None
        if self.scores is None:
            indices = subsets.random_subset(labels, subset.size, self.builder.seed("subset"))
        else:
            select = {"easy": subsets.easy, "hard": subsets.hard}[self.config.arm]
            options = {"class_balanced": subset.class_balanced, "offset": subset.offset}
            rule = functools.partial(select, labels=labels, size=subset.size, **options)
            indices = rule(self.scores.mean)
        if self.is_rank_zero:
            from lth_diet.scores.pictures import save_subset_pictures  # imports matplotlib, which is slow

            folder = self.replicate.pretrain.path
            save_indices(folder, indices)
            with self.progress.warn_on_error("cannot draw the pictures of the subset"):
                save_subset_pictures(folder, ScoredExamples(self.builder.data, labels, self.scores), indices, rule)
        return [SubsetSampling(indices, until=self.config.rewind_step)]

    @functools.cached_property
    def scores(self) -> Scores | None:
        """Scores that select the subset; None if the arm needs none.

        Raises:
            UserError: If the scores are invalid, or another replicate of the run used different scores.
        """
        if not self.config.needs_scores:
            return None
        scores = load_arm_scores(self.config, self.builder.noisy_data.train.labels)
        for path in self.replicate.path.parent.glob("replicate_*"):
            other = ReplicateDirectory(path).pretrain
            if other.done and other.result().get("scores_sha256") != scores.manifest["sha256"]:
                raise UserError(
                    f"{other.path}: its subset was selected by scores other than the current ones; delete {path} to "
                    "train this replicate again"
                )
        return scores

    def train(self, level: int, mask: Mask, rewind_point: Weights) -> Weights:
        """Train mask ⊙ rewind point from step t_r to the last step, and measure its test accuracy.

        Returns:
            The trained weights.

        Raises:
            UserError: If a weight that the mask prunes is not zero.
        """
        phase, rewind_step, settings = self.replicate.level(level), self.config.rewind_step, self.config.train
        if not phase.done:
            if self.is_rank_zero:
                phase.write("mask.safetensors", mask.to_bytes({"level": str(level)}))
            model, weights_remaining_percent = self.builder.build_network(), 100 * mask.density
            mask.validate(model.module)
            algorithms = [Rewind(rewind_step, rewind_point), ApplyMask(mask)]
            schedule = trainer.Schedule(rewind_step, settings.steps, settings.lr, settings.milestones)
            result = self._train_phase(phase, model, self.loader, schedule, algorithms, weights_remaining_percent)
            result |= {"level": level, "weights_remaining_percent": weights_remaining_percent}
            self._finish_phase(phase, result, model.module.state_dict())
        dist.barrier()
        result = phase.result()
        accuracy, weights_remaining_percent = result["test_accuracy_percent"], result["weights_remaining_percent"]
        self.progress.report_accuracy(self.replicate.name, phase.name, accuracy, weights_remaining_percent)
        weights = load_file(phase.verified("weights.safetensors"))
        if not mask.is_zero_outside(weights):
            raise UserError(
                f"{phase.path}: weights pruned by its mask are not zero; delete this level and all later ones to "
                "train them again"
            )
        return weights

    def prune(self, level: int, mask: Mask, weights: Weights) -> Mask:
        """Prune the remaining weights with the lowest magnitudes.

        Returns:
            The mask of `level`.

        Raises:
            TrainingError: If the weights cannot be pruned.
            UserError: If `level` was trained with a different mask.
        """
        phase = self.replicate.level(level)
        try:
            pruned = prune_by_magnitude(weights, mask, self.config.prune.fraction)
        except ValueError as error:
            raise TrainingError(f"{phase.path}: {error}") from None
        emptied = [name for name in pruned.empty_layers if name not in mask.empty_layers]
        if emptied and not phase.done:
            self.progress.log(f"warning: {phase.path}: no weight remains of {', '.join(emptied)}")
        if phase.done and Mask.load(phase.verified("mask.safetensors")) != pruned:
            raise UserError(
                f"{phase.path}: its mask is not the result of pruning level {level - 1}; delete this level and all "
                "later ones to train them again"
            )
        return pruned

    @functools.cached_property
    def loader(self) -> Loader:
        """Training batches of the levels: all examples with their true labels."""
        return self.builder.build_loader(self.builder.data)

    @functools.cached_property
    def evaluation_loader(self) -> EvaluationLoader:
        """Test images."""
        return self.builder.build_evaluation_loader(self.builder.data.test)

    @property
    def is_rank_zero(self) -> bool:
        """Whether this rank writes the results."""
        return dist.get_global_rank() == 0

    def _train_phase(
        self,
        phase: PhaseDirectory,
        model: ComposerClassifier,
        loader: Loader,
        schedule: trainer.Schedule,
        algorithms: list[Algorithm],
        weights_remaining_percent: float,
    ) -> dict:
        self.progress.start_phase(self.replicate.name, phase.name, weights_remaining_percent)
        return trainer.train(
            model, loader, self.evaluation_loader, schedule, algorithms, phase, self.config, self.progress, self.track
        )

    def _finish_phase(self, phase: PhaseDirectory, result: dict, weights: Weights) -> None:
        if self.is_rank_zero:
            contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
            phase.write("weights.safetensors", save(contiguous))
            phase.finish(result)
            self.track()
