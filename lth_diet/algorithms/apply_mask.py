"""ApplyMask: keeps pruned weights at zero during training."""

import math
import types
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from composer import Algorithm, Event, Logger, State
from torch import Tensor

from lth_diet.networks.parameters import bare_names, computed_weights, enumerate_names, match_names

_EVENTS = frozenset(
    {
        Event.FIT_START,
        Event.BATCH_START,
        Event.AFTER_BACKWARD,
        Event.BATCH_END,
        Event.EVAL_START,
        Event.PREDICT_START,
    }
)


class ApplyMask(Algorithm):
    """Keeps pruned weights at exactly zero during training (m ⊙ w in Algorithm 1 of the paper).

    Pruned weights are zero in every forward pass, evaluation and checkpoint. Gradients are masked right after each
    backward pass, so gradient clipping sees masked gradients, and the momentum of pruned weights stays zero. Works
    together with Composer's own algorithms in any order. With EMA, the averages of pruned weights are zero too.

    Checkpoints contain the mask. A Trainer that loads one without this algorithm continues dense: its pruned weights
    start at zero and are trained.

    Runs on ``Event.FIT_START``, ``BATCH_START``, ``AFTER_BACKWARD``, ``BATCH_END``, ``EVAL_START`` and
    ``PREDICT_START``.

    Args:
        mask: Maps names of parameters to tensors or arrays of the parameter's shape that are 1 (True) where the weight
            remains and 0 elsewhere. Names may have or lack the prefixes that ComposerClassifier,
            DistributedDataParallel (``module.``) and torch.compile (``_orig_mod.``) add. Parameters without a mask are
            not changed. None takes the mask of the checkpoint that the Trainer loads.

    Raises:
        ValueError: If the mask keeps no weight or has other values. When a checkpoint is loaded, if it has a different
            mask. At the first event, if there is no mask, the mask names a parameter that the model does not have, a
            mask has a different shape than its parameter, or the Trainer has several ApplyMask.
        TypeError: If the mask is not a mapping of names.

    Example:
        >>> import torch
        >>> from composer import Trainer
        >>> from composer.models import ComposerClassifier
        >>> from lth_diet.algorithms import ApplyMask
        >>> network = torch.nn.Linear(4, 2)
        >>> mask = {"weight": network.weight.abs() > network.weight.abs().median()}
        >>> images, labels = torch.randn(32, 4), torch.randint(2, (32,))
        >>> data = torch.utils.data.TensorDataset(images, labels)
        >>> trainer = Trainer(
        ...     model=ComposerClassifier(network, num_classes=2),
        ...     train_dataloader=torch.utils.data.DataLoader(data, batch_size=8),
        ...     max_duration="2ep",
        ...     optimizers=torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9),
        ...     algorithms=[ApplyMask(mask)],
        ...     progress_bar=False,
        ... )
        >>> trainer.fit()
        >>> bool((network.weight[~mask["weight"]] == 0).all())
        True
    """

    def __init__(self, mask: Mapping[str, Tensor] | None = None):
        self.mask = mask

    @property
    def mask(self) -> Mapping[str, Tensor] | None:
        """Copy of the masks, boolean tensors on the CPU.

        Assign to it to train with another mask from the next event on. Weights that return start at zero.
        """
        if self._mask is None:
            return None
        return types.MappingProxyType({name: tensor.clone() for name, tensor in self._mask.items()})

    @mask.setter
    def mask(self, mask: Mapping[str, Tensor] | None) -> None:
        self._mask = None if mask is None else _boolean_masks(mask)
        self._model: torch.nn.Module | None = None
        self._weights: list[Tensor] = []
        self._factors: list[Tensor] = []

    def match(self, event: Event, state: State) -> bool:
        return event in _EVENTS

    @torch.no_grad()
    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START or self._model is not state.model:
            self._bind(state)
        if event == Event.AFTER_BACKWARD:
            pairs = [(w.grad, f) for w, f in zip(self._weights, self._factors, strict=True) if w.grad is not None]
            if pairs:
                _multiply(*map(list, zip(*pairs, strict=True)))
        else:
            _multiply(self._weights, self._factors)

    def state_dict(self) -> dict[str, Any]:
        if self._mask is None:
            return super().state_dict()
        shapes = {name: tuple(tensor.shape) for name, tensor in self._mask.items()}
        bits = np.packbits(np.concatenate([tensor.numpy().ravel() for tensor in self._mask.values()]))
        return super().state_dict() | {"mask": {"shapes": shapes, "bits": torch.from_numpy(bits)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "mask" not in state:  # of a version that saved none
            return
        shapes = state["mask"]["shapes"]
        sizes = [math.prod(shape) for shape in shapes.values()]
        bits = np.unpackbits(state["mask"]["bits"].cpu().numpy(), count=sum(sizes)).astype(bool)
        parts = torch.from_numpy(bits).split(sizes)
        saved = {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
        if self._mask is None:
            self.mask = saved
            return
        names = match_names(self._mask, saved)
        different = [
            name for name, mask in self._mask.items() if name not in names or not torch.equal(mask, saved[names[name]])
        ]
        different += [name for name in saved if name not in names.values()]
        if different:
            raise ValueError(
                f"the checkpoint has a different mask, in {enumerate_names(different)}; use ApplyMask() to continue "
                "with its mask, or load_weights_only=True to start from its weights with another"
            )

    def _bind(self, state: State) -> None:
        if sum(isinstance(algorithm, ApplyMask) for algorithm in state.algorithms) > 1:
            raise ValueError("the Trainer has several ApplyMask; use one, with the masks of all parameters")
        if self._mask is None:
            raise ValueError(
                "ApplyMask has no mask, and no checkpoint with a mask was loaded; use ApplyMask(mask), such as "
                'ApplyMask(Mask.load("mask.safetensors"))'
            )
        parameters = dict(state.model.named_parameters(remove_duplicate=False))
        names = match_names(self._mask, parameters)
        for name, mask in self._mask.items():
            if name not in names:
                computed = computed_weights(state.model)
                for weight in match_names([name], computed).values():
                    raise ValueError(
                        f"the mask has {name}, which the model computes from {' and '.join(computed[weight])} at each "
                        "forward pass (weight_norm, spectral_norm, torch.nn.utils.prune or another parametrization); "
                        "remove the parametrization, or mask these parameters"
                    )
                raise ValueError(
                    f"the mask has {name}, which is not in the model; the model has "
                    f"{enumerate_names(bare_names(parameters))}"
                )
            found, expected = tuple(mask.shape), tuple(parameters[names[name]].shape)
            if found != expected:
                raise ValueError(f"the mask of {name} has shape {found}; expected {expected}")
        empty = [name for name, mask in self._mask.items() if not mask.any()]
        if empty:
            warnings.warn(f"the mask prunes every weight of {enumerate_names(empty)}", stacklevel=2)
        self._model = state.model
        self._weights = [parameters[names[name]] for name in self._mask]
        self._factors = [
            mask.to(weight.device, weight.dtype).contiguous(memory_format=_memory_format(weight))
            for mask, weight in zip(self._mask.values(), self._weights, strict=True)
        ]


def _multiply(tensors: list[Tensor], factors: list[Tensor]) -> None:
    multiply = getattr(torch, "_foreach_mul_", None)  # one kernel for many tensors
    if multiply:
        multiply(tensors, factors)
    else:
        for tensor, factor in zip(tensors, factors, strict=True):
            tensor.mul_(factor)


def _boolean_masks(mask: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not isinstance(mask, Mapping):
        raise TypeError(f"a mask maps names of parameters to tensors; got a {type(mask).__name__}")
    masks = {}
    for name, value in mask.items():
        try:
            tensor = torch.as_tensor(value).detach().cpu()
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"the mask of {name} is a {type(value).__name__}; expected a tensor or array") from None
        masks[name] = tensor != 0
        if not bool((tensor == masks[name]).all()):
            raise ValueError(f"the mask of {name} has values other than 0 and 1; use weight != 0 for a mask of weights")
    if not any(bool(tensor.any()) for tensor in masks.values()):
        raise ValueError("the mask keeps no weight" if masks else "the mask is empty: it names no parameter")
    return masks


def _memory_format(weight: Tensor) -> torch.memory_format:
    channels_last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
