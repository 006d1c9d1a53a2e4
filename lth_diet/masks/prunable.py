"""Which parameters of a network are prunable."""

import collections
import fnmatch
import warnings
from collections.abc import Iterable, Mapping

from torch import nn
from torch.nn.parameter import is_lazy

from lth_diet.networks.parameters import bare_names, computed_weights, enumerate_names

PRUNABLE_LAYERS: tuple[type[nn.Module], ...] = (
    *(nn.Linear, nn.Bilinear, nn.MultiheadAttention),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell),
)
"""Layers that multiply their input by weights."""

_NORMALIZATION = (nn.LayerNorm, nn.RMSNorm)
"""Normalization whose parameters may have several dimensions."""


def prunable(
    network: nn.Module,
    layers: type[nn.Module] | Iterable[type[nn.Module]] = PRUNABLE_LAYERS,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
) -> dict[str, nn.Parameter]:
    """Return the prunable parameters by name.

    By default, these are the weights of Linear, Bilinear, all convolutions, RNN, LSTM, GRU and MultiheadAttention, but
    no biases, normalization and embeddings. A warning names other parameters with two or more dimensions, which stay
    dense. A tensor that several layers share counts once, under its first name, and is prunable if it is a weight of
    one of `layers`.

    Args:
        network: Any network. Prefixes that wrappers add (``module.``, ``_orig_mod.``) are not part of the names.
        layers: Types of layers, whose own parameters with two or more dimensions are prunable, except biases.
        include: More prunable parameters: names of parameters or modules, or patterns with ``*``.
        exclude: Parameters that are not prunable, named in the same way.

    Raises:
        ValueError: If no parameter is prunable, `include` or `exclude` has a name that the network lacks, a prunable
            weight is computed from other parameters, as by ``weight_norm``, or has no shape yet (lazy layers).
        TypeError: If `layers` has something else than types of layers.
    """
    types = (layers,) if isinstance(layers, type) else tuple(layers)
    for each in types:
        if not (isinstance(each, type) and issubclass(each, nn.Module)):
            raise TypeError(f"layers has {each!r}; expected types such as torch.nn.Linear (include takes names)")
    parameters, computed = dict(network.named_parameters(remove_duplicate=False)), computed_weights(network)
    bare = {full: name for name, full in bare_names([*parameters, *computed]).items()}
    owners = {full: network.get_submodule(full.rpartition(".")[0]) for full in bare}
    included, excluded = _matching(include, bare), _matching(exclude, bare)
    for full, sources in computed.items():
        if full in excluded:
            excluded |= set(sources) - included
        elif full in included or (isinstance(owners[full], types) and not _is_bias(full)):
            raise ValueError(
                f"{bare[full]} is computed from {' and '.join(bare[each] for each in sources)} at each forward pass "
                "(weight_norm, spectral_norm, torch.nn.utils.prune or another parametrization), so a mask of it has no "
                f"effect; remove the parametrization or use exclude={bare[full]!r}"
            )
    names = collections.defaultdict(list)  # several for a tensor that layers share
    for full, parameter in parameters.items():
        names[parameter].append(full)
    found, dense = {}, []
    for parameter, aliases in names.items():
        weights = [full for full in aliases if is_lazy(parameter) or (parameter.dim() >= 2 and not _is_bias(full))]
        if not excluded.isdisjoint(aliases):
            continue
        if not included.isdisjoint(aliases) or any(isinstance(owners[full], types) for full in weights):
            found[bare[aliases[0]]] = parameter
        elif any(not isinstance(owners[full], _NORMALIZATION) for full in weights):
            dense.append(f"{bare[aliases[0]]} ({type(owners[aliases[0]]).__name__})")
    if not found:
        raise ValueError(
            "the network has no prunable weights; choose some of its parameters with layers or include: "
            f"{enumerate_names(bare[full] for full in parameters) or 'it has none'}"
        )
    for name, parameter in found.items():
        if is_lazy(parameter):
            raise ValueError(f"{name} has no shape yet; pass a batch through the network first")
    if dense and types == PRUNABLE_LAYERS:
        warnings.warn(f"not pruned: {enumerate_names(dense)}; name them in include or in exclude", stacklevel=2)
    return found


def _matching(patterns: str | Iterable[str], bare: Mapping[str, str]) -> set[str]:
    """Full names that match patterns of bare names."""
    matching = set()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        found = {
            full
            for full, name in bare.items()
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")
        }
        if not found:
            raise ValueError(f"no parameter is named {pattern!r}; the network has {enumerate_names(bare.values())}")
        matching |= found
    return matching


def _is_bias(name: str) -> bool:
    return "bias" in name.rpartition(".")[2]
