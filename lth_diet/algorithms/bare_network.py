"""Access to the network inside the wrappers of Composer and PyTorch."""

from torch import nn


def bare_network(model: nn.Module) -> nn.Module:
    """Return the network inside wrappers with a `module`, such as ComposerClassifier and DistributedDataParallel."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model
