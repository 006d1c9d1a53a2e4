"""Initialization of a network, and the Composer model that wraps it."""

import math

import torch
from composer.models import ComposerClassifier
from torch import nn
from torchmetrics import MetricCollection

from lth_diet.networks.resnet import ResNet


@torch.no_grad()
def initialize(network: nn.Module, seed: int) -> None:
    """Initialize all parameters in place from one seed.

    Weights of Conv2d and Linear are Kaiming normal (fan-in) and their biases are uniform in ±1/sqrt(fan-in), which is
    PyTorch's default. BatchNorm weights are uniform in [0, 1), BatchNorm biases are zero.

    Raises:
        ValueError: If a parameter is not covered by these rules. It would differ between the replicates of a pair.
    """
    random = torch.Generator().manual_seed(seed)
    for module in network.modules():
        seeded = {"weight", "bias"} if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d) else set()
        for name, _ in module.named_parameters(recurse=False):
            if name not in seeded:
                raise ValueError(f"initialize does not seed {name} of {type(module).__name__}; add a rule for it")
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, generator=random)
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                module.bias.uniform_(-bound, bound, generator=random)
        elif isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0, 1, generator=random)
            module.bias.zero_()
            module.reset_running_stats()


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
