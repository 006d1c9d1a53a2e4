"""Initialization of a network, and the Composer models that wrap a network or a stack."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from composer.models import ComposerClassifier
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torchmetrics import Metric, MetricCollection

from lth_diet.networks.parameters import computed_weights
from lth_diet.networks.resnet import ResNet
from lth_diet.networks.stack import random_states, stack

_KAIMING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


@torch.no_grad()
def initialize(network: nn.Module, seed: int) -> None:
    """Initialize all parameters of a network on the CPU in place, from one seed.

    Weights of Linear, Conv1d, Conv2d and Conv3d are Kaiming normal (fan-in) and their biases are uniform in
    ±1/sqrt(fan-in), which is PyTorch's default. BatchNorm weights are uniform in [0, 1), BatchNorm biases are zero. Any
    other module is initialized by its method `reset_parameters`, if it has one, after all modules inside it. Buffers
    are not changed, except by these methods and for BatchNorm.

    Raises:
        ValueError: If a parameter is not covered by these rules: it would differ between the replicates of a pair. The
            network is unchanged then.
    """
    for name, sources in computed_weights(network).items():
        raise ValueError(
            f"initialize does not seed {name}, which is computed from {' and '.join(sources)}; add parametrizations, "
            "such as weight_norm, after initialize"
        )
    for name, parameter in network.named_parameters():
        if is_lazy(parameter):
            raise ValueError(f"initialize does not seed {name}, which has no shape yet; pass a batch through it first")
        if parameter.device.type != "cpu" or not parameter.is_floating_point():
            raise ValueError(
                f"initialize does not seed {name}, a {parameter.dtype} tensor on {parameter.device}; expected "
                "floating-point numbers on the CPU"
            )
    tensors = [*network.parameters(), *network.buffers()]
    before = [tensor.clone() for tensor in tensors]
    try:
        for parameter in network.parameters():
            parameter.fill_(math.nan)  # shows below whether it was initialized
        states = random_states(network)
        _reset(network, torch.Generator().manual_seed(seed))
        if random_states(network) != states:
            raise ValueError(
                "initialize does not seed the random numbers of Python, NumPy and torch.Generator that a method "
                "reset_parameters draws; use PyTorch's default generator"
            )
        for name, parameter in network.named_parameters():
            if parameter.isnan().any():
                layer = type(network.get_submodule(name.rpartition(".")[0])).__name__
                raise ValueError(
                    f"initialize does not seed {name} of {layer}; give {layer} a method reset_parameters that sets it"
                )
    except Exception:
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        raise


def _reset(network: nn.Module, random: torch.Generator) -> None:
    for module in network.modules():
        if isinstance(module, _KAIMING):
            nn.init.kaiming_normal_(module.weight, generator=random)
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                module.bias.uniform_(-bound, bound, generator=random)
        elif isinstance(module, _BATCHNORM):
            if module.affine:
                module.weight.uniform_(0, 1, generator=random)
                module.bias.zero_()
            module.reset_running_stats()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**63 - 1, (), generator=random)))
        for module in reversed(list(network.modules())):
            if isinstance(module, (*_KAIMING, *_BATCHNORM)):
                continue
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif hasattr(module, "_reset_parameters"):  # MultiheadAttention, Transformer
                module._reset_parameters()


def build_classifier(
    depth: int, classes: int, width: int = 16, channels: int = 3, seed: int | None = None
) -> ComposerClassifier:
    """Build a ResNet for Composer's Trainer, without training metrics, which would synchronize the device every batch.

    Args:
        depth, classes, width, channels: Arguments of `ResNet`, which is the classifier's `module`.
        seed: Seed of the initialization. None keeps PyTorch's default initialization.
    """
    network = ResNet(depth, classes, width, channels)
    if seed is not None:
        initialize(network, seed)
    network.to(memory_format=torch.channels_last)
    return ComposerClassifier(network, num_classes=classes, train_metrics=MetricCollection([]))


class StackedClassifier(ComposerClassifier):
    """The Composer model of a stack of R networks, without training metrics.

    A batch, in training and evaluation, has images (B, R * C, H, W), where replicate r has channels r * C to
    (r + 1) * C - 1, and labels (B, R).

    Attributes:
        losses: Mean cross entropy of each replicate in the last batch, detached, of shape (R,); None before.

    Args:
        module: A stack, from images to logits (B, R * classes).
        metrics: For each replicate, its evaluation metrics by name.
        num_classes: Number of classes.
    """

    def __init__(self, module: nn.Module, metrics: Sequence[dict[str, Metric]], num_classes: int):
        each = {f"{name}_{r}": metric for r, named in enumerate(metrics) for name, metric in named.items()}
        for r, named in enumerate(metrics):
            for metric in named.values():
                metric.replicate = r
        evaluation = MetricCollection(each, compute_groups=False)
        super().__init__(module, num_classes, train_metrics=MetricCollection([]), val_metrics=evaluation)
        self.replicates = len(metrics)
        self.losses: Tensor | None = None

    def forward(self, batch: tuple[Tensor, Any]) -> Tensor:
        """Return the logits (B, R, classes)."""
        return super().forward(batch).unflatten(1, (self.replicates, -1))

    def loss(self, outputs: Tensor, batch: tuple[Any, Tensor]) -> Tensor:
        """Return the sum of the replicates' mean losses, so that each gradient depends on one replicate only."""
        _, labels = batch
        losses = F.cross_entropy(outputs.flatten(0, 1), labels.flatten(), reduction="none")
        means = losses.view(labels.shape).mean(0)
        self.losses = means.detach()
        return means.sum()

    def update_metric(self, batch: tuple[Any, Tensor], outputs: Tensor, metric: Metric) -> None:
        """Update a metric of one replicate."""
        _, labels = batch
        metric.update(outputs[:, metric.replicate], labels[:, metric.replicate])


def stack_classifiers(
    classifiers: Sequence[ComposerClassifier], image_shape: tuple[int, int, int]
) -> ComposerClassifier:
    """Stack R classifiers into one, with the evaluation metrics of each, named `<name>_<r>`.

    Args:
        classifiers: Classifiers of one architecture, whose loss is the cross entropy. They are not changed.
        image_shape: C, H and W.

    Returns:
        A StackedClassifier. One classifier is returned as it is.

    Raises:
        ValueError: If the networks cannot be stacked, as in `stack`, or a loss is another than the cross entropy.
    """
    if len(classifiers) == 1:
        return classifiers[0]
    network = stack([each.module for each in classifiers], image_shape)
    classes = classifiers[0].num_classes
    logits, labels = torch.arange(2.0 * classes).cos().view(2, classes), torch.tensor([0, classes - 1])
    for r, each in enumerate(classifiers):
        if not torch.allclose(each.loss(logits, (None, labels)), F.cross_entropy(logits, labels)):
            raise ValueError(
                f"the loss of classifier {r} is not the mean cross entropy; train these classifiers one by one"
            )
    return StackedClassifier(
        network, [copy.deepcopy(each.get_metrics(is_train=False)) for each in classifiers], classes
    )
