"""Instability analysis: is training from step k stable to SGD noise?

For each step k of pre-training, copies of the network are trained from there to the last step with different data order
and augmentation. Errors are measured along the straight line between the weights of two copies, as in Frankle et al.
2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis" (arXiv:1912.05671). The error barrier is the highest
error on the line minus the mean error of its ends: near zero, training is stable. In that paper, iterative magnitude
pruning finds matching subnetworks where training from the rewind point is stable.

At every point of the line, also at its ends, BatchNorm statistics are estimated on training images: the variances of
activations shrink between two networks (Jordan et al. 2023, "REPAIR: REnormalizing Permuted Activations for
Interpolation Repair", arXiv:2211.08403), so that averaged statistics would overstate the barrier.
"""

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from composer import Algorithm, Event, Logger, State
from composer.utils import dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from lth_diet.algorithms.bare_network import bare_network
from lth_diet.config.instability import LoadedInstability
from lth_diet.data import seeds
from lth_diet.data.dataset import Split
from lth_diet.data.loader import EvaluationLoader
from lth_diet.errors import UserError
from lth_diet.imp import IMP, Weights, rewinding_algorithms
from lth_diet.masks.mask import Mask
from lth_diet.runs.block import BlockPhase
from lth_diet.runs.instability_directory import InstabilityReplicate, mask_path
from lth_diet.scoring import without_tf32
from lth_diet.training import devices, trainer
from lth_diet.training.builders import Builder
from lth_diet.training.progress import Progress

POINTS = 11
"""Points of the line between two copies at which errors are measured, both ends included."""
STATISTICS_IMAGES = 2048
"""Training images, without augmentation, on which BatchNorm statistics are estimated."""
ERROR_IMAGES = 5000
"""Training images on which the training error is measured."""
_STATISTICS_BATCH = 512  # BatchNorm statistics are means over batches, so they depend on it


class Instability(IMP):
    """Instability analysis of one replicate of an arm, or of a block of replicates.

    All copies of the block train as one stack. A phase whose results exist is not computed again.

    Args:
        loaded: Configuration and keys of the analysis.
        replicates: Directories of the results, `config.stack` of them.
        progress: Receives progress, results and warnings.
        track: Called after phases and checkpoints.
    """

    def __init__(
        self,
        loaded: LoadedInstability,
        replicates: Sequence[InstabilityReplicate],
        progress: Progress,
        track: Callable[[], None],
    ):
        super().__init__(loaded.config, replicates, progress, track)
        self.arm_config, self.keys = loaded.arm_config, loaded.keys

    def run(self) -> None:
        """Pre-train once, then train copies from each step k and measure the barriers between them."""
        dist.barrier()
        masks = {step: self.masks(step) for step in self.keys.steps}  # a missing one is reported before training
        self.pretrain()
        for step in self.keys.steps:
            self.train_copies(step, masks[step])
            for member in self.members:
                self.measure(member, step)
        self.track()

    def masks(self, step: int) -> dict[int, Mask]:
        """The mask of each member at a step.

        Raises:
            UserError: If IMP has not found it.
        """
        if self.keys.level == 0:
            return dict.fromkeys(self.members, Mask.dense(self.network))
        found = {}
        for member in self.members:
            index = self.replicates[member].index
            found[member] = Mask.load(mask_path(self.arm_config, index, step, self.keys.level))
            found[member].validate(self.network)
        return found

    def pretrain(self) -> None:
        """Train the dense networks on the arm's examples up to the last step that is missing, and save all of these."""
        missing = tuple(sorted({step for member in self.members for step in self.replicates[member].missing_steps}))
        if not missing:
            return
        block, last = self._block([replicate.pretraining(missing) for replicate in self.replicates]), missing[-1]
        model, points = self.builder.build_network(), RewindPoints(missing)
        if last == 0:
            results, points.states = {k: {"steps": 0} for k in block.training}, {0: model.module.state_dict()}
        else:
            loader = self.builder.build_loader(self.builder.noisy_data)
            schedule = trainer.Schedule(0, last, self.config.pretrain.lr)
            algorithms = [points, *self.subset_algorithms(block, last)]
            results = self.add_scores(self._train_phase(block, model, loader, schedule, algorithms, 100.0))
        weights = {f"weights_{step}.safetensors": state for step, state in points.states.items()}
        self._finish_phase(block, results, weights)

    def train_copies(self, step: int, masks: dict[int, Mask]) -> None:
        """Train the copies of all members from a step to the last step of a level, as one stack."""
        owners = [member for member in range(len(self.replicates)) for _ in range(self.keys.copies)]
        numbers = list(range(self.keys.copies)) * len(self.replicates)
        phases = [self.replicates[owner].copy(step, number) for owner, number in zip(owners, numbers, strict=True)]
        failed = [k for k, owner in enumerate(owners) if owner not in self.members]

        def give_up(k: int, reason: str) -> None:
            if owners[k] in self.members:
                self._give_up(owners[k], reason)

        block = BlockPhase(phases, failed, give_up if len(self.replicates) > 1 else None)
        if block.done:
            return
        rewind_points = {member: self._rewind_point(member, step) for member in self.members}
        copies = {k: owner for k, owner in enumerate(owners) if owner in self.members}
        scopes = [copy_scope(self.replicates[owner].index, n) for owner, n in zip(owners, numbers, strict=True)]
        builder = Builder(self.config, *scopes)
        model, settings = builder.build_network(), self.config.train
        algorithms = rewinding_algorithms(
            block,
            step,
            {k: masks[owner] for k, owner in copies.items()},
            {k: rewind_points[owner] for k, owner in copies.items()},
        )
        loader, evaluation = builder.build_loader(builder.data), builder.build_evaluation_loader(builder.data.test)
        schedule = trainer.Schedule(step, settings.steps, settings.lr, settings.milestones)
        remaining = {member: 100 * masks[member].density for member in self.members}
        training = dict.fromkeys(owners[k] for k in block.training)
        names = [self.replicates[member].name for member in training]
        self.progress.start_phase(names, f"step_{step}", [remaining[member] for member in training])
        results = trainer.train(
            model, loader, evaluation, schedule, algorithms, block, self.config, self.progress, self.track
        )
        for k, result in results.items():
            percent = 100 * masks[owners[k]].density
            result |= {"step": step, "copy": numbers[k], "weights_remaining_percent": percent}
        self._finish_phase(block, results, {"weights.safetensors": model.module.state_dict()})

    def measure(self, member: int, step: int) -> None:
        """Measure the errors along the lines between the copies of a member, and their barriers."""
        replicate = self.replicates[member]
        phase, copies = replicate.barrier(step), [replicate.copy(step, c) for c in range(self.keys.copies)]
        if not phase.done:
            weights = [load_file(copy.verified("weights.safetensors")) for copy in copies]
            pairs = list(itertools.combinations(range(len(copies)), 2))
            lines = [self.line.errors(self.network, weights[a], weights[b]) for a, b in pairs]
            result: dict[str, Any] = {"phase": replicate.name_of(phase), "step": step, "pairs": pairs}
            result |= {"fractions": list(self.line.fractions)}
            for name in ("train", "test"):
                errors = [line[name] for line in lines]
                result[f"{name}_error_percent"] = errors
                result[f"{name}_barrier"] = round(float(np.mean([error_barrier(each) for each in errors])), 4)
            result |= {f"{name}_images": len(loader.labels) for name, loader in self.line.loaders.items()}
            result |= {"statistics_images": len(self.line.statistics.labels)}
            result |= {"timestamp": time.time_ns() // 1_000_000, "environment": devices.environment(self.config)}
            phase.path.mkdir(parents=True, exist_ok=True)
            phase.finish(result)
            self.track()
        measured = [copy.result() for copy in copies]
        accuracy = float(np.mean([result["test_accuracy_percent"] for result in measured]))
        self.progress.report_accuracy(
            replicate.name, f"step_{step}", accuracy, measured[0]["weights_remaining_percent"]
        )

    @functools.cached_property
    def line(self) -> "Line":
        """The images on which errors are measured."""
        return Line(self.builder)

    def _rewind_point(self, member: int, step: int) -> Weights:
        phase = self.replicates[member].pretraining_with(step)
        if phase is None:
            path = self.replicates[member].path
            raise UserError(f"{path}: no finished pre-training has step {step}; rerun the same command to train it")
        return load_file(phase.verified(f"weights_{step}.safetensors"))


def copy_scope(replicate: int, number: int) -> str:
    """Scope of the seeds of a copy's data order and augmentation; see `lth_diet.data.seeds`.

    Copies have the same streams at every step k, in every arm and with every mask, so that comparisons are paired.
    """
    return f"replicate_{replicate}_copy_{number}"


class Line:
    """Measures errors along the straight line between two networks.

    Args:
        builder: Builder of the data, whose training labels are the true ones, and of the seed that selects the images.
    """

    def __init__(self, builder: Builder):
        data, seed = builder.data, builder.config.seed
        random = seeds.generator(seeds.derive_seed(seed, "all", "interpolation"))
        order = random.permutation(len(data.train.labels))
        statistics, training = (_part(data.train, order[:count]) for count in (STATISTICS_IMAGES, ERROR_IMAGES))
        device = {"device": devices.torch_device()}
        self.fractions = np.linspace(0, 1, POINTS).round(6).tolist()
        self.statistics = EvaluationLoader(data, statistics, _STATISTICS_BATCH, **device)
        single = Builder(builder.config, "all")
        self.loaders = {
            "train": single.build_evaluation_loader(training),
            "test": single.build_evaluation_loader(data.test),
        }

    def errors(self, network: nn.Module, first: Weights, second: Weights) -> dict[str, list[float]]:
        """Training and test error (%) at each point of the line.

        Args:
            network: A network of the architecture; its weights are changed.
            first, second: Weights of the ends.

        Returns:
            The errors by "train" and "test", in the order of `fractions`.
        """
        network = network.to(devices.torch_device())
        errors: dict[str, list[float]] = {name: [] for name in self.loaders}
        with without_tf32():
            for fraction in self.fractions:
                network.load_state_dict(interpolate(first, second, fraction))
                update_bn(self.statistics, network)
                for name, loader in self.loaders.items():
                    errors[name].append(error_percent(network, loader))
        return errors


def _part(split: Split, examples: np.ndarray) -> Split:
    return Split(np.ascontiguousarray(split.images[examples]), np.ascontiguousarray(split.labels[examples]))


def interpolate(first: Mapping[str, Tensor], second: Mapping[str, Tensor], fraction: float) -> dict[str, Tensor]:
    """The weights (1 - fraction) x first + fraction x second, computed in double precision.

    Args:
        first, second: Weights by name. Those at the ends, fraction 0 and 1, are returned exactly.
        fraction: Position on the line, from 0 to 1.

    Returns:
        Weights of the types of `first`; tensors of integers, such as counters, are those of `first`.
    """
    return {
        name: torch.lerp(a.double(), second[name].double(), fraction).to(a.dtype) if a.is_floating_point() else a
        for name, a in first.items()
    }


@torch.no_grad()
def error_percent(network: nn.Module, images: EvaluationLoader) -> float:
    """Percentage of images that a network misclassifies, in evaluation mode."""
    network.eval()
    wrong = sum((network(batch).argmax(1) != labels).sum() for batch, labels in images)
    return round(100 * int(wrong) / len(images.labels), 6)


def error_barrier(errors: Sequence[float]) -> float:
    """Highest error on a line minus the mean error of its two ends; at least half the difference between the ends.

    Args:
        errors: Errors along the line, both ends included, in any unit; at least two.
    """
    return max(errors) - (errors[0] + errors[-1]) / 2


class RewindPoints(Algorithm):
    """Keeps copies of a network's state at several steps of one training run. They are part of its checkpoints.

    Args:
        steps: The steps; 0 is before the first batch.

    Attributes:
        states: Parameters and buffers at each step that was reached.
    """

    def __init__(self, steps: Sequence[int]):
        self.steps = tuple(steps)
        self.states: dict[int, Weights] = {}

    def match(self, event: Event, state: State) -> bool:
        return event in (Event.FIT_START, Event.BATCH_END) and int(state.timestamp.batch) in self.steps

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        network = bare_network(state.model)
        copies = {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
        self.states.setdefault(int(state.timestamp.batch), copies)

    def state_dict(self) -> dict[str, Any]:
        return {"states": self.states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.states = state["states"]
