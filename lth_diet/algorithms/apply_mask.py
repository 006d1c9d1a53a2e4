"""ApplyMask: keeps pruned weights at zero during training."""

from collections.abc import Mapping

import torch
from composer import Algorithm, Event, Logger, State
from torch import Tensor

from lth_diet.algorithms.bare_network import bare_network

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

    Runs on ``Event.FIT_START``, ``BATCH_START``, ``AFTER_BACKWARD``, ``BATCH_END``, ``EVAL_START`` and
    ``PREDICT_START``.

    Args:
        mask: Maps parameter names to tensors of the parameter's shape that are nonzero (True) where the weight
            remains. Names are those of the bare network, without the ``module.`` prefix that ComposerClassifier and
            DistributedDataParallel add. Parameters without a mask are not changed.

    Raises:
        ValueError: At the first event, if the mask names a parameter that the model does not have, or a mask has a
            different shape than its parameter.

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

    def __init__(self, mask: Mapping[str, Tensor]):
        self.mask = mask
        self._model: torch.nn.Module | None = None
        self._weights: list[Tensor] = []
        self._factors: list[Tensor] = []

    def match(self, event: Event, state: State) -> bool:
        return event in _EVENTS

    @torch.no_grad()
    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START or self._model is not state.model:
            self._bind(state)
        if not self._weights:
            return
        if event == Event.AFTER_BACKWARD:
            pairs = [(w.grad, f) for w, f in zip(self._weights, self._factors, strict=True) if w.grad is not None]
            if pairs:
                torch._foreach_mul_(*map(list, zip(*pairs, strict=True)))
        else:
            torch._foreach_mul_(self._weights, self._factors)

    def _bind(self, state: State) -> None:
        parameters = dict(bare_network(state.model).named_parameters())
        for name, mask in self.mask.items():
            if name not in parameters:
                raise ValueError(
                    f"the mask has {name}, which is not in the model; the model has {', '.join(parameters)}"
                )
            if mask.shape != parameters[name].shape:
                found, expected = tuple(mask.shape), tuple(parameters[name].shape)
                raise ValueError(f"the mask of {name} has shape {found}; expected {expected}")
        self._model = state.model
        self._weights = [parameters[name] for name in self.mask]
        self._factors = [
            (mask != 0).to(weight.device, weight.dtype).contiguous(memory_format=_memory_format(weight))
            for mask, weight in zip(self.mask.values(), self._weights, strict=True)
        ]


def _memory_format(weight: Tensor) -> torch.memory_format:
    channels_last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
