"""The Composer model that wraps a network, and the initialization of its parameters."""

import math

import torch
from composer.models import ComposerClassifier
from torch import nn
from torchmetrics import MetricCollection

from lth_diet.networks.resnet import ResNet


@torch.no_grad()
def initialize(network: nn.Module, seed: int) -> None:
    """Draw every parameter from one seed: Kaiming normal (fan in) weights, BatchNorm weights ~ U(0, 1).

    BatchNorm biases are zero; biases of linear layers keep PyTorch's default, U(±1/sqrt(fan in)).
    """
    random = torch.Generator().manual_seed(seed)
    for module in network.modules():
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
    """A ResNet for Composer's Trainer, without training metrics: they would cost a device synchronisation a batch.

    Args:
        depth, classes, width, channels: As for `ResNet`, which is the classifier's `module`.
        seed: Initialise from it; None leaves PyTorch's own initialisation.
    """
    network = ResNet(depth, classes, width, channels)
    if seed is not None:
        initialize(network, seed)
    network.to(memory_format=torch.channels_last)
    return ComposerClassifier(network, num_classes=classes, train_metrics=MetricCollection([]))
