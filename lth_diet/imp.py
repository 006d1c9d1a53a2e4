"""Iterative magnitude pruning (IMP) with weight rewinding: Algorithm 1 of the paper."""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from composer import Algorithm
from composer.models import ComposerClassifier
from composer.utils import dist
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import Module

from lth_diet.algorithms import ApplyMask, Rewind, SubsetSampling
from lth_diet.config.schema import Config
from lth_diet.data import subsets
from lth_diet.data.loader import EvaluationLoader, Loader, StackedLoader
from lth_diet.data.subsets import save_indices
from lth_diet.errors import TrainingError, UserError
from lth_diet.masks.mask import Mask
from lth_diet.masks.pruning import prune_by_magnitude
from lth_diet.networks import stack
from lth_diet.runs.block import BlockPhase
from lth_diet.runs.instability_directory import open_replicate
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
    """Runs one replicate of one arm, or a block of replicates that train as one stack.

    A phase whose results exist is not trained again, so that a rerun resumes. Under data parallelism every rank calls
    `run`; rank 0 writes the results. In a block, a replicate whose loss is not finite fails, and the others go on.
    Methods return a dictionary by position in the block, without the replicates that have failed.

    Args:
        config: Configuration of the arm.
        replicates: Directories of the results, `config.stack` of them. Their indices select the seeds.
        progress: Receives progress, results and warnings.
        track: Called after phases and checkpoints to send new results to MLflow.
    """

    def __init__(
        self,
        config: Config,
        replicates: Sequence[ReplicateDirectory],
        progress: Progress,
        track: Callable[[], None],
    ):
        self.config = config
        self.replicates = list(replicates)
        self.members = [k for k, replicate in enumerate(replicates) if not replicate.given_up]
        self.progress = progress
        self.track = track
        self.builder = Builder(config, *(replicate.index for replicate in replicates))

    def run(self) -> None:
        """Algorithm 1. The mask of level n has been pruned n times."""
        dist.barrier()  # rank 0 may have downloaded results of other nodes
        levels = self.config.prune.levels
        masks = dict.fromkeys(self.members, Mask.dense(self.network))  # lines 1 and 2
        rewind_points = self.pretrain()  # line 3
        for level in range(levels):  # line 4
            weights = self.train(level, masks, rewind_points)  # line 5
            masks = self.prune(level + 1, masks, weights)  # line 6
        self.train(levels, masks, rewind_points)  # line 8
        if self.is_rank_zero:
            self.track()  # sends what an earlier launch could not send

    def pretrain(self) -> dict[int, Weights]:
        """Train the dense networks for t_r steps on the arm's examples.

        Returns:
            The rewind points: the networks' weights at step t_r.
        """
        block, rewind_step = self._block([replicate.pretrain for replicate in self.replicates]), self.config.rewind_step
        if not block.done:
            model, rewind = self.builder.build_network(), Rewind(rewind_step)
            if rewind_step == 0:
                results, rewind.state = {k: {"steps": 0} for k in block.training}, model.module.state_dict()
            else:
                loader = self.builder.build_loader(self.builder.noisy_data)
                schedule = trainer.Schedule(0, rewind_step, self.config.pretrain.lr)
                algorithms = [rewind, *self.subset_algorithms(block, rewind_step)]
                results = self._train_phase(block, model, loader, schedule, algorithms, 100.0)
                results = self.add_scores(results)
            self._finish_phase(block, results, {"weights.safetensors": rewind.state})
        dist.barrier()
        return {k: load_file(self.replicates[k].pretrain.verified("weights.safetensors")) for k in self.members}

    def add_scores(self, results: dict[int, dict]) -> dict[int, dict]:
        """Add the checksum of the scores, if the arm has any, to the results of pre-training."""
        if self.scores is None:
            return results
        return {k: {**each, "scores_sha256": self.scores.manifest["sha256"]} for k, each in results.items()}

    def subset_algorithms(self, block: BlockPhase, until: int) -> list[Algorithm]:
        """Select the examples of pre-training (paper, section 3) and save their indices and pictures.

        Args:
            block: The phases of pre-training.
            until: Their last step.

        Returns:
            The algorithm that trains on the subset; empty if the arm pre-trains on all examples.
        """
        if self.config.subset_size is None:
            return []
        subset, labels, rule = self.config.pretrain.subset, self.builder.noisy_data.train.labels, None
        if self.scores is None:
            rows = [subsets.random_subset(labels, subset.size, seed) for seed in self.builder.seeds("subset")]
        else:
            select = {"easy": subsets.easy, "hard": subsets.hard}[self.config.arm]
            options = {"class_balanced": subset.class_balanced, "offset": subset.offset}
            rule = functools.partial(select, labels=labels, size=subset.size, **options)
            rows = [rule(self.scores.mean)] * len(block)
        if self.is_rank_zero:
            from lth_diet.scores.pictures import save_subset_pictures  # imports matplotlib, which is slow

            examples = ScoredExamples(self.builder.data, labels, self.scores)
            self._warn_of_imbalance(rows[block.training[0]], labels)
            for k in block.training:
                save_indices(block.phases[k].path, rows[k])
                with self.progress.warn_on_error("cannot draw the pictures of the subset"):
                    save_subset_pictures(block.phases[k].path, examples, rows[k], rule)
        return [SubsetSampling(rows if len(block) > 1 else rows[0], until=until)]

    def _warn_of_imbalance(self, indices: np.ndarray, labels: np.ndarray) -> None:
        """Warn if classes are missing from the subset or rare in it; the screen shows equal warnings once."""
        names = self.builder.data.class_names
        counts, present = (np.bincount(some, minlength=len(names)) for some in (labels[indices], labels))
        of_class = {name: int(n) for name, n, among in zip(names, counts, present, strict=True) if among}
        found = subsets.describe_imbalance(of_class, self.config.arm)
        if found:
            self.progress.log(f"warning: {self.progress.arm or self.config.arm}: {found}")

    @functools.cached_property
    def scores(self) -> Scores | None:
        """Scores that select the subset; None if the arm needs none.

        Raises:
            UserError: If the scores are invalid, or another replicate of the run used different scores.
        """
        if not self.config.needs_scores:
            return None
        scores = load_arm_scores(self.config, self.builder.noisy_data.train.labels)
        for path in self.replicates[0].path.parent.glob("replicate_*"):
            for other in open_replicate(path).pretrainings():
                result = other.result() if other.done else {"steps": 0}
                if result["steps"] and result.get("scores_sha256") != scores.manifest["sha256"]:
                    raise UserError(
                        f"{other.path}: its subset was selected by scores other than the current ones; delete {path} "
                        "to train this replicate again"
                    )
        return scores

    def train(self, level: int, masks: dict[int, Mask], rewind_points: dict[int, Weights]) -> dict[int, Weights]:
        """Train mask ⊙ rewind point from step t_r to the last step, and measure its test accuracy.

        Returns:
            The trained weights.

        Raises:
            UserError: If a weight that the mask prunes is not zero.
        """
        block, settings = self._block([replicate.level(level) for replicate in self.replicates]), self.config.train
        if not block.done:
            for k in block.training:
                masks[k].validate(self.network)
                if self.is_rank_zero:
                    block.phases[k].write("mask.safetensors", masks[k].to_bytes({"level": str(level)}))
            model, remaining = self.builder.build_network(), {k: 100 * masks[k].density for k in self.members}
            algorithms = rewinding_algorithms(block, self.config.rewind_step, masks, rewind_points)
            schedule = trainer.Schedule(self.config.rewind_step, settings.steps, settings.lr, settings.milestones)
            results = self._train_phase(block, model, self.loader, schedule, algorithms, min(remaining.values()))
            for k, result in results.items():
                result |= {"level": level, "weights_remaining_percent": remaining[k]}
            self._finish_phase(block, results, {"weights.safetensors": model.module.state_dict()})
        dist.barrier()
        return {k: self._trained_weights(self.replicates[k], level, masks[k]) for k in self.members}

    def _trained_weights(self, replicate: ReplicateDirectory, level: int, mask: Mask) -> Weights:
        phase = replicate.level(level)
        result = phase.result()
        accuracy, weights_remaining_percent = result["test_accuracy_percent"], result["weights_remaining_percent"]
        self.progress.report_accuracy(replicate.name, phase.name, accuracy, weights_remaining_percent)
        weights = load_file(phase.verified("weights.safetensors"))
        if not mask.is_zero_outside(weights):
            raise UserError(
                f"{phase.path}: weights pruned by its mask are not zero; delete this level and all later ones to "
                "train them again"
            )
        return weights

    def prune(self, level: int, masks: dict[int, Mask], weights: dict[int, Weights]) -> dict[int, Mask]:
        """Prune the remaining weights with the lowest magnitudes.

        Returns:
            The masks of `level`.

        Raises:
            TrainingError: If the weights cannot be pruned.
            UserError: If `level` was trained with a different mask.
        """
        pruned = {}
        for k in list(self.members):
            phase = self.replicates[k].level(level)
            try:
                pruned[k] = self._prune(level, phase, masks[k], weights[k])
            except ValueError as error:
                reason = f"{phase.path}: {error}"
                if len(self.replicates) == 1:
                    raise TrainingError(reason) from None
                self._give_up(k, reason)
        return pruned

    def _prune(self, level: int, phase: PhaseDirectory, mask: Mask, weights: Weights) -> Mask:
        pruned = prune_by_magnitude(weights, mask, self.config.prune.fraction)
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
    def network(self) -> Module:
        """One network of this architecture."""
        return Builder(self.config, self.replicates[0].index).build_network().module

    @functools.cached_property
    def loader(self) -> Loader | StackedLoader:
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

    def _block(self, phases: Sequence[PhaseDirectory]) -> BlockPhase:
        failed = [k for k in range(len(phases)) if k not in self.members]
        return BlockPhase(phases, failed, self._give_up)

    def _give_up(self, k: int, reason: str) -> None:
        self.members.remove(k)
        replicate = self.replicates[k]
        replicate.give_up(reason)
        self.progress.set_state(replicate.name, "failed")
        self.progress.log(f"error: {replicate.name}: {reason}")
        self.track()

    def _train_phase(
        self,
        block: BlockPhase,
        model: ComposerClassifier,
        loader: Loader | StackedLoader,
        schedule: trainer.Schedule,
        algorithms: list[Algorithm],
        weights_remaining_percent: float,
    ) -> dict[int, dict]:
        names = [self.replicates[k].name for k in block.training]
        self.progress.start_phase(names, block.leader.name, weights_remaining_percent)
        return trainer.train(
            model, loader, self.evaluation_loader, schedule, algorithms, block, self.config, self.progress, self.track
        )

    def _finish_phase(self, block: BlockPhase, results: dict[int, dict], weights: dict[str, Weights]) -> None:
        """Write weights, by the name of their file, and results of all members.

        Those of the leader are last: it has the checkpoint, from which the others may have to resume.
        """
        if self.is_rank_zero and results:
            states = {file: stack.split(each, len(block)) for file, each in weights.items()}
            for k in sorted(results, reverse=True):
                for file, parts in states.items():
                    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in parts[k].items()}
                    block.phases[k].write(file, save(contiguous))
                block.phases[k].finish({"phase": self.replicates[0].name_of(block.phases[k]), **results[k]})
            self.track()


def rewinding_algorithms(
    block: BlockPhase, rewind_step: int, masks: dict[int, Mask], rewind_points: dict[int, Weights]
) -> list[Algorithm]:
    """Start from the rewind points and apply the masks. In place of a member that has failed trains another."""
    if len(masks) < len(block) and block.checkpoint():
        return [Rewind(rewind_step), ApplyMask()]  # as in the checkpoint, which has those of failed members too
    present = [k if k in masks else block.training[0] for k in range(len(block))]
    rewind_point = stack.concatenate([rewind_points[k] for k in present])
    return [Rewind(rewind_step, rewind_point), ApplyMask(stack.concatenate([masks[k] for k in present]))]
