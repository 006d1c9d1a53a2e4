"""Access to the network inside the wrappers of Composer and PyTorch."""

from composer.models import ComposerModel
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


def bare_network(model: nn.Module) -> nn.Module:
    """Return the network inside the wrappers of Composer, DistributedDataParallel, DataParallel and torch.compile.

    A ComposerModel is a wrapper if all its parameters are in its attribute ``module``, as in ComposerClassifier. An
    attribute ``module`` of the network itself stays a part of the network.
    """
    while (inner := _wrapped(model)) is not None:
        model = inner
    return model


def _wrapped(model: nn.Module) -> nn.Module | None:
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, nn.Module):
        return compiled
    inner = getattr(model, "module", None)
    if isinstance(model, DataParallel | DistributedDataParallel):
        return inner
    if isinstance(model, ComposerModel) and isinstance(inner, nn.Module):
        return inner if len(list(inner.parameters())) == len(list(model.parameters())) else None
    return None
