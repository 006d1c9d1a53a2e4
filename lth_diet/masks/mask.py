"""Which weights are left: masks, their density, global magnitude pruning, save and load."""

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
    """The tensors that are pruned: the weight of every Conv2d and Linear, never a bias or BatchNorm."""
    return {
        f"{name}.weight" if name else "weight": module.weight
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


class Mask(Mapping[str, Tensor]):
    """A boolean tensor for each prunable weight, True where the weight is left.

    Args:
        tensors: Parameter name to boolean tensor; kept on the CPU.

    Raises:
        ValueError: If a tensor is not boolean.
    """

    def __init__(self, tensors: Mapping[str, Tensor]):
        for name, tensor in tensors.items():
            if tensor.dtype != torch.bool:
                raise ValueError(f"mask {name} is {tensor.dtype}; allowed: torch.bool")
        self._tensors = {name: tensor.cpu() for name, tensor in tensors.items()}

    @classmethod
    def dense(cls, network: nn.Module) -> "Mask":
        """The mask that prunes nothing."""
        return cls({name: torch.ones(weight.shape, dtype=torch.bool) for name, weight in prunable(network).items()})

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
        """Weights left."""
        return sum(int(tensor.sum()) for tensor in self.values())

    @property
    def total(self) -> int:
        """Weights there are, left or pruned."""
        return sum(tensor.numel() for tensor in self.values())

    @property
    def density(self) -> float:
        """Weights left as a fraction of all prunable weights, 0 to 1."""
        return self.remaining / self.total

    def table(self) -> pd.DataFrame:
        """One row a layer: name, shape, total, remaining, density."""
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
        """Raise a ValueError that names the tensor if this is not a mask of `network`."""
        weights = prunable(network)
        for name in [*self, *weights]:
            if name not in weights:
                raise ValueError(f"the mask has {name}, which is no prunable weight of the network")
            if name not in self:
                raise ValueError(f"the network has {name}, which the mask lacks")
            if self[name].shape != weights[name].shape:
                mine, its = tuple(self[name].shape), tuple(weights[name].shape)
                raise ValueError(f"the mask of {name} has the shape {mine}, the network's weight {its}")

    def is_zero_outside(self, weights: Mapping[str, Tensor]) -> bool:
        """Whether every weight that is pruned is zero."""
        return all(not weights[name][~left].any() for name, left in self.items())

    def to_bytes(self, metadata: Mapping[str, str] | None = None) -> bytes:
        """This mask as a safetensors file, with its counts, order (and `metadata`) in the header."""
        about = {"remaining": self.remaining, "total": self.total, "order": list(self), **(metadata or {})}
        # one key: safetensors writes several in random order, and equal masks are to be equal files
        return save({name: tensor.contiguous() for name, tensor in self.items()}, {"mask": json.dumps(about)})

    def save(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
        """Write `to_bytes` to a file."""
        Path(path).write_bytes(self.to_bytes(metadata))

    @classmethod
    def load(cls, path: str | Path) -> "Mask":
        """Read what `save` wrote.

        Raises:
            UserError: If the file is missing, damaged or not a mask.
        """
        try:
            with safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["mask"])
                strange = [name for name in about["order"] if not re.fullmatch(r"\w+(\.\w+)*", name)]
                if strange:
                    raise ValueError(f"{strange[0]!r} names no tensor of a network")
                mask = cls({name: file.get_tensor(name) for name in about["order"]})
                if mask.remaining != about["remaining"]:
                    raise ValueError("its count of weights left is not that of its header")
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a mask ({error}); allowed: a safetensors file that Mask.save wrote") from None
        return mask
