"""Mask: which weights remain, with counts, comparison, saving and loading.

`lth_diet.algorithms.ApplyMask` applies a mask during training.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lth_diet.errors import UserError


def prunable(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the prunable parameters by name: the weights of Conv2d and Linear, no biases and no BatchNorm."""
    return {
        f"{name}.weight" if name else "weight": module.weight
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


class Mask(Mapping[str, Tensor]):
    """A boolean tensor for each prunable parameter, True where the weight remains.

    Args:
        tensors: Maps parameter names to boolean tensors, which are moved to the CPU.

    Raises:
        ValueError: If a tensor is not boolean.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        for name, tensor in tensors.items():
            if tensor.dtype != torch.bool:
                raise ValueError(f"mask {name} has dtype {tensor.dtype}; expected torch.bool")
        self._tensors = {name: tensor.cpu() for name, tensor in tensors.items()}

    @classmethod
    def dense(cls, network: nn.Module) -> "Mask":
        """Return the mask of an unpruned network, all True."""
        return cls({name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in prunable(network).items()})

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

    def table(self) -> pd.DataFrame:
        """Return one row per layer, with columns layer, shape, total, remaining and density."""
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

    def validate(self, network: nn.Module) -> None:
        """Check that the names and shapes are those of the network's prunable weights.

        Raises:
            ValueError: If they are not; the message names the tensor.
        """
        weights = prunable(network)
        for name in [*self, *weights]:
            if name not in weights:
                raise ValueError(f"the mask has {name}, which is not a prunable weight of the network")
            if name not in self:
                raise ValueError(f"the network has {name}, which is missing from the mask")
            if self[name].shape != weights[name].shape:
                found, expected = tuple(self[name].shape), tuple(weights[name].shape)
                raise ValueError(f"the mask of {name} has shape {found}; expected {expected}, the shape of the weight")

    def is_zero_outside(self, weights: Mapping[str, Tensor]) -> bool:
        """Return whether every pruned weight is zero."""
        return all(not weights[name][~remains].any() for name, remains in self.items())

    def to_bytes(self, metadata: Mapping[str, str] | None = None) -> bytes:
        """Serialize to safetensors, with the counts, the order of the tensors and `metadata` in the header."""
        header = {"remaining": self.remaining, "total": self.total, "order": list(self), **(metadata or {})}
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
                invalid = [name for name in header["order"] if not re.fullmatch(r"\w+(\.\w+)*", name)]
                if invalid:
                    raise ValueError(f"{invalid[0]!r} is not a parameter name")
                mask = cls({name: file.get_tensor(name) for name in header["order"]})
                if mask.remaining != header["remaining"]:
                    raise ValueError("its number of remaining weights differs from the header")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a mask ({error}); expected a file written by Mask.save") from None
        return mask
