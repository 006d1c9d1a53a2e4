from collections.abc import Mapping

import torch
from composer import Algorithm, Event, Logger, State
from torch import Tensor

from lth_diet.algorithms.network import bare_network

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
    """Keeps pruned weights at exactly zero while a network trains (the m ⊙ w of the paper's Algorithm 1).

    Masked weights are zero in every forward pass, at every evaluation and in every checkpoint. Their gradients are
    masked right after each backward pass, so that gradient clipping sees masked gradients and the optimizer's
    momentum of a pruned weight stays zero. It works beside Composer's own algorithms in any order: under EMA the
    averaged weights are zero too.

    Runs on ``Event.FIT_START``, ``BATCH_START``, ``AFTER_BACKWARD``, ``BATCH_END``, ``EVAL_START`` and
    ``PREDICT_START``.

    Args:
        mask: Parameter name to a tensor of the parameter's shape, nonzero (True) where the weight is left. Names are
            those of the bare network: a leading ``module.``, as ComposerClassifier and DistributedDataParallel add
            it, is left out. Parameters that are not named are not masked.

    Raises:
        ValueError: At the first event, if the mask names a parameter that the model lacks or of another shape.

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
                raise ValueError(f"the mask has {name}, which the model lacks; it has {', '.join(parameters)}")
            if mask.shape != parameters[name].shape:
                shapes = f"{tuple(mask.shape)}, the parameter {tuple(parameters[name].shape)}"
                raise ValueError(f"the mask of {name} has the shape {shapes}")
        self._model = state.model
        self._weights = [parameters[name] for name in self.mask]
        self._factors = [
            (mask != 0).to(weight.device, weight.dtype).contiguous(memory_format=_format(weight))
            for mask, weight in zip(self.mask.values(), self._weights, strict=True)
        ]


def _format(weight: Tensor) -> torch.memory_format:
    channels_last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
