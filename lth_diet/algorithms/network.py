from torch import nn


def bare_network(model: nn.Module) -> nn.Module:
    """The network inside wrappers that call it `module`, as ComposerClassifier and DistributedDataParallel do."""
    while isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    return model
