"""Parameters of any network by name: prefixes of wrappers, and weights that are computed from parameters."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.utils import parametrize

_WRAPPER = "module."
"""Prefix that ComposerClassifier, DataParallel and DistributedDataParallel add to every name."""


def bare_names(names: Iterable[str]) -> dict[str, str]:
    """Map names without the prefixes of wrappers to the names as given.

    ``_orig_mod`` of `torch.compile` is removed wherever it is, a leading ``module`` only if all names have it: it may
    also be an attribute of the network.
    """
    bare = {_uncompiled(name): name for name in names}
    while bare and all(name.startswith(_WRAPPER) for name in bare):
        bare = {name.removeprefix(_WRAPPER): full for name, full in bare.items()}
    return bare


def match_names(names: Iterable[str], available: Iterable[str]) -> dict[str, str]:
    """Find each of `names` in `available`, where either may have prefixes of wrappers that the other lacks.

    Returns:
        Maps names to available names, without the names that are not found.
    """
    names, full = list(names), bare_names(available)
    best: dict[str, str] = {}
    most = max((name.count(_WRAPPER) for name in [*names, *full.values()]), default=0)
    for missing in sorted(range(-most, most + 1), key=abs):  # a wrapper adds its prefix to all names alike
        found = {name: full[each] for name in names if (each := _shifted(_uncompiled(name), missing)) in full}
        if len(found) > len(best):
            best = found
    return best


def computed_weights(network: nn.Module) -> dict[str, list[str]]:
    """Find weights that a layer computes at each forward pass, and the names of the parameters behind them.

    Such are the weights of `weight_norm`, `spectral_norm`, `torch.nn.utils.prune` and all other parametrizations. They
    cannot be set: the next forward pass overwrites them.
    """
    computed = {}
    for name, module in network.named_modules():
        prefix = f"{name}." if name else ""
        own = [each for each, _ in module.named_parameters(recurse=False)]
        for attribute, value in vars(module).items():
            sources = [f"{prefix}{each}" for each in own if each.startswith(f"{attribute}_")]
            if isinstance(value, Tensor) and sources:
                computed[f"{prefix}{attribute}"] = sources
        if parametrize.is_parametrized(module):
            for attribute, parametrization in module.parametrizations.items():
                start = f"{prefix}parametrizations.{attribute}."
                originals = [each for each, _ in parametrization.named_parameters(recurse=False)]
                computed[f"{prefix}{attribute}"] = [f"{start}{each}" for each in originals]
    return computed


def enumerate_names(names: Iterable[str], most: int = 10) -> str:
    """Write names in a sentence, at most `most` of them."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if names[most:] else "")


def _uncompiled(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _shifted(name: str, missing: int) -> str | None:
    """Add prefixes of wrappers, or remove them if `missing` is negative; None if there are too few."""
    if missing >= 0:
        return _WRAPPER * missing + name
    return name.removeprefix(_WRAPPER * -missing) if name.startswith(_WRAPPER * -missing) else None
