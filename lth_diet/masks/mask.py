"""Mask: which weights remain, with counts, comparison, saving and loading.

`lth_diet.algorithms.ApplyMask` applies a mask during training.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lth_diet.errors import UserError
from lth_diet.masks.prunable import prunable
from lth_diet.networks.parameters import enumerate_names, match_names

if TYPE_CHECKING:
    import pandas as pd


class Mask(Mapping[str, Tensor]):
    """A boolean tensor for each prunable parameter, True where the weight remains.

    Args:
        tensors: Maps names of parameters to boolean tensors or arrays, which are copied to the CPU.

    Raises:
        ValueError: If there are no weights, a tensor is not boolean or a name cannot be one of a parameter.
        TypeError: If `tensors` is not a mapping.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        if not isinstance(tensors, Mapping):
            raise TypeError(f"a mask maps names of parameters to boolean tensors; got a {type(tensors).__name__}")
        self._tensors = {_checked_name(name): _boolean(name, tensor) for name, tensor in tensors.items()}
        if not self.total:
            raise ValueError("the mask has no weights")

    @classmethod
    def dense(cls, network: nn.Module, **selection: Any) -> "Mask":
        """Return the mask of an unpruned network, all True.

        Args:
            network: Any network.
            selection: `layers`, `include` and `exclude` of `prunable`, which choose the weights.
        """
        weights = prunable(network, **selection)
        return cls({name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in weights.items()})

    def __repr__(self) -> str:
        return f"Mask({len(self)} tensors, {self.remaining:,} of {self.total:,} weights remain)"

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return list(self) == list(other) and all(torch.equal(self[name], other[name]) for name in self)

    __hash__ = None

    @property
    def remaining(self) -> int:
        """Number of remaining weights."""
        return sum(int(tensor.sum()) for tensor in self.values())

    @property
    def total(self) -> int:
        """Number of weights, remaining or pruned."""
        return sum(tensor.numel() for tensor in self.values())

    @property
    def density(self) -> float:
        """Remaining weights as a fraction of all prunable weights, 0 to 1."""
        return self.remaining / self.total

    def table(self) -> "pd.DataFrame":
        """Return one row per layer, with columns layer, shape, total, remaining and density."""
        import pandas as pd  # takes a quarter of a second

        rows = [
            {
                "layer": name,
                "shape": " x ".join(map(str, tensor.shape)),
                "total": tensor.numel(),
                "remaining": int(tensor.sum()),
                "density": float(tensor.double().mean()),
            }
            for name, tensor in self.items()
        ]
        return pd.DataFrame(rows)

    @property
    def empty_layers(self) -> list[str]:
        """Names of the parameters of which no weight remains."""
        return [name for name, tensor in self.items() if not tensor.any()]

    def validate(self, network: nn.Module, **selection: Any) -> None:
        """Check that the names and shapes are those of the network's prunable weights.

        Args:
            network: Any network.
            selection: `layers`, `include` and `exclude` of `prunable`.

        Raises:
            ValueError: If they are not; the message names the tensor.
        """
        weights = prunable(network, **selection)
        names = match_names(self, weights)
        for name in self:
            if name not in names:
                raise ValueError(f"the mask has {name}, which is not a prunable weight of the network")
            found, expected = tuple(self[name].shape), tuple(weights[names[name]].shape)
            if found != expected:
                raise ValueError(f"the mask of {name} has shape {found}; expected {expected}, the shape of the weight")
        missing = [name for name in weights if name not in names.values()]
        if missing:
            raise ValueError(
                f"the network has {enumerate_names(missing)}, which the mask lacks; to keep all weights of these, use "
                "Mask({**Mask.dense(network), **mask})"
            )

    def is_zero_outside(self, weights: Mapping[str, Tensor]) -> bool:
        """Return whether every pruned weight is zero."""
        return all(not weight[~self[name]].any() for name, weight in self.select(weights).items())

    def select(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of the mask's names, on the CPU.

        Args:
            weights: Maps names to tensors, such as a `state_dict`. Wrappers may have added prefixes to its names or to
                those of the mask.

        Raises:
            ValueError: If a weight is missing or has another shape than its mask.
            TypeError: If `weights` is not a mapping.
        """
        if not isinstance(weights, Mapping):
            raise TypeError(f"expected weights by name, such as network.state_dict(); got a {type(weights).__name__}")
        names = match_names(self, weights)
        selected = {}
        for name, mask in self.items():
            if name not in names:
                raise ValueError(f"the mask has {name}, which is not among the weights: {enumerate_names(weights)}")
            selected[name] = torch.as_tensor(weights[names[name]]).detach().cpu()
            if selected[name].shape != mask.shape:
                found, expected = tuple(mask.shape), tuple(selected[name].shape)
                raise ValueError(f"the mask of {name} has shape {found}; expected {expected}, the shape of the weight")
        return selected

    def to_bytes(self, metadata: Mapping[str, str] | None = None) -> bytes:
        """Serialize to safetensors, with the counts, the order of the tensors and `metadata` in the header.

        Raises:
            ValueError: If `metadata` has a key of the header: remaining, total or order.
        """
        header = {"remaining": self.remaining, "total": self.total, "order": list(self)}
        for key in header.keys() & (metadata or {}).keys():
            raise ValueError(f"metadata has the key {key!r}, which the mask itself writes; use another")
        header |= metadata or {}
        # one key only: safetensors writes several in random order, and equal masks should give equal files
        return save({name: tensor.contiguous() for name, tensor in self.items()}, {"mask": json.dumps(header)})

    def save(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write the mask to a safetensors file; see `to_bytes`."""
        Path(path).write_bytes(self.to_bytes(metadata))

    @classmethod
    def load(cls, path: str | Path) -> "Mask":
        """Read a mask written by `save`.

        Raises:
            UserError: If the file is missing, damaged or not a mask.
        """
        try:
            with safe_open(path, "pt") as file:
                header = json.loads(file.metadata()["mask"])
                mask = cls({name: file.get_tensor(name) for name in header["order"]})
                if mask.remaining != header["remaining"]:
                    raise ValueError("its number of remaining weights differs from the header")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a mask ({error}); expected a file written by Mask.save") from None
        return mask


def _checked_name(name: Any) -> str:
    valid = isinstance(name, str) and name.isprintable() and all(name.split(".")) and name != "__metadata__"
    if not valid:  # safetensors reserves __metadata__
        raise ValueError(f"{name!r} is not a parameter name")
    return name


def _boolean(name: str, value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"mask {name} is a {type(value).__name__}; expected a boolean tensor or array") from None
    if tensor.dtype != torch.bool:
        raise ValueError(f"mask {name} has dtype {tensor.dtype}; expected torch.bool, such as weight != 0")
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
