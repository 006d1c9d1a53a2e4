"""Iterative magnitude pruning with weight rewinding: Algorithm 1 of the paper."""

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
from lth_diet.errors import UserError
from lth_diet.masks.mask import Mask
from lth_diet.masks.pruning import prune_by_magnitude
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.run_directory import ReplicateDirectory
from lth_diet.runs.scores_directory import load_arm_scores
from lth_diet.scores.artifact import Scores
from lth_diet.scores.pictures import save_subset_pictures
from lth_diet.scores.summary import ScoredExamples
from lth_diet.training import trainer
from lth_diet.training.builders import Builder
from lth_diet.training.progress import Progress

Weights = dict[str, Tensor]


class IMP:
    """One replicate of one arm. Every stage returns at once if its output exists.

    With several ranks all of them come here, train together and read the same files; rank 0 writes them.

    Args:
        config: The arm.
        replicate: Where its results go; its index picks the random streams.
        progress: Told of what happens.
        track: Called whenever there is something new for MLflow in the replicate's directory.
    """

    def __init__(self, config: Config, replicate: ReplicateDirectory, progress: Progress, track: Callable[[], None]):
        self.config = config
        self.replicate = replicate
        self.progress = progress
        self.track = track
        self.builder = Builder(config, replicate.index)

    def run(self) -> None:
        """Algorithm 1 (level n is what has been pruned n times)."""
        dist.barrier()  # rank 0 has what other nodes left
        levels = self.config.prune.levels
        mask = Mask.dense(self.builder.build_network().module)  # lines 1 and 2
        rewind_point = self.pretrain()  # line 3
        for level in range(levels):  # line 4
            weights = self.train(level, mask, rewind_point)  # line 5
            mask = self.prune(level + 1, mask, weights)  # line 6
        self.train(levels, mask, rewind_point)  # line 8
        if self.is_rank_zero:
            self.track()  # also what an earlier launch could not send

    def pretrain(self) -> Weights:
        """Train the dense network for t_r steps on the arm's examples; the rewind point."""
        phase, last = self.replicate.pretrain, self.config.rewind_step
        if not phase.done:
            model, rewind = self.builder.build_network(), Rewind(last)
            if last == 0:
                result, rewind.state = {"steps": 0}, model.module.state_dict()
            else:
                loader = self.builder.build_loader(self.builder.noisy_data)
                schedule = trainer.Schedule(0, last, self.config.pretrain.lr)
                result = self._train(phase, model, loader, schedule, [rewind, *self.subset_algorithms()], 100.0)
                if self.scores is not None:
                    result["scores_sha256"] = self.scores.manifest["sha256"]
            self._finish(phase, result, rewind.state)
        dist.barrier()
        return load_file(phase.verified("weights.safetensors"))

    def subset_algorithms(self) -> list[Algorithm]:
        """What restricts pre-training to the arm's examples; keeps a record of them beside it."""
        if self.config.subset_size is None:
            return []
        subset, labels, choose = self.config.pretrain.subset, self.builder.noisy_data.train.labels, None
        if self.scores is None:
            indices = subsets.random_subset(labels, subset.size, self.builder.seed("subset"))
        else:
            end = {"easy": subsets.easy, "hard": subsets.hard}[self.config.arm]
            options = {"class_balanced": subset.class_balanced, "offset": subset.offset}
            choose = functools.partial(end, labels=labels, size=subset.size, **options)
            indices = choose(self.scores.mean)
        if self.is_rank_zero:
            folder = self.replicate.pretrain.path
            save_indices(folder, indices)
            with self.progress.warn_on_error("no pictures of the subset"):
                save_subset_pictures(folder, ScoredExamples(self.builder.data, labels, self.scores), indices, choose)
        return [SubsetSampling(indices, until=self.config.rewind_step)]

    @functools.cached_property
    def scores(self) -> Scores | None:
        """Those that the arm chooses by; all replicates of a run have to choose by the same."""
        if not self.config.needs_scores:
            return None
        scores = load_arm_scores(self.config, self.builder.noisy_data.train.labels)
        for path in self.replicate.path.parent.glob("replicate_*"):
            other = ReplicateDirectory(path).pretrain
            if other.done and other.result().get("scores_sha256") != scores.manifest["sha256"]:
                raise UserError(f"{other.path} chose by other scores than those that are there now; delete {path}")
        return scores

    def train(self, level: int, mask: Mask, rewind_point: Weights) -> Weights:
        """Train mask ⊙ rewind point from step t_r to T."""
        phase, train = self.replicate.level(level), self.config.train
        if not phase.done:
            if self.is_rank_zero:
                phase.write("mask.safetensors", mask.to_bytes({"level": str(level)}))
            algorithms = [Rewind(self.config.rewind_step, rewind_point), ApplyMask(mask)]
            schedule = trainer.Schedule(self.config.rewind_step, train.steps, train.lr, train.milestones)
            model, weights_remaining_percent = self.builder.build_network(), 100 * mask.density
            mask.validate(model.module)
            result = self._train(phase, model, self.loader, schedule, algorithms, weights_remaining_percent)
            result |= {"level": level, "weights_remaining_percent": weights_remaining_percent}
            self._finish(phase, result, model.module.state_dict())
        dist.barrier()
        result = phase.result()
        measured = result["test_accuracy_percent"], result["weights_remaining_percent"]
        self.progress.report_accuracy(self.replicate.name, phase.name, *measured)
        weights = load_file(phase.verified("weights.safetensors"))
        if not mask.is_zero_outside(weights):
            raise UserError(f"{phase.path}: weights that its mask prunes are not zero; delete it and what follows")
        return weights

    def prune(self, level: int, mask: Mask, weights: Weights) -> Mask:
        """The mask of `level`: the smallest of the trained weights that are left go."""
        phase, pruned = self.replicate.level(level), prune_by_magnitude(weights, mask, self.config.prune.fraction)
        if phase.done and Mask.load(phase.verified("mask.safetensors")) != pruned:
            raise UserError(
                f"{phase.path}: its mask is not what pruning level {level - 1} leaves; delete it and what follows to "
                "compute it again"
            )
        return pruned

    @functools.cached_property
    def loader(self) -> Loader:
        """All examples with their own labels."""
        return self.builder.build_loader(self.builder.data)

    @functools.cached_property
    def evaluation(self) -> EvaluationLoader:
        return self.builder.build_evaluation_loader(self.builder.data.test)

    @property
    def is_rank_zero(self) -> bool:
        """Whether this rank writes the results."""
        return dist.get_global_rank() == 0

    def _train(
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
            model, loader, self.evaluation, schedule, algorithms, phase, self.config, self.progress, self.track
        )

    def _finish(self, phase: PhaseDirectory, result: dict, weights: Weights) -> None:
        if self.is_rank_zero:
            contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
            phase.write("weights.safetensors", save(contiguous))
            phase.finish(result)
            self.track()
