"""Rewind: weight rewinding to step t_r."""

import warnings
from collections.abc import Mapping
from typing import Any

from composer import Algorithm, Event, Logger, State, Time, TimeUnit
from composer.utils import dist
from torch import Tensor

from lth_diet.algorithms.bare_network import bare_network


class Rewind(Algorithm):
    """Saves the state of a network at step t_r and starts later training runs from it, at step t_r.

    The first run saves a copy of the state (parameters and buffers, including BatchNorm statistics) after ``to``
    batches. Every later run loads this state when it starts, and sets Composer's timestamp and the learning rate
    schedulers to step ``to``. It therefore trains from ``to`` to ``max_duration``, and milestones are absolute steps
    (Algorithm 1 of the paper; Frankle et al. 2020a).

    The optimizer is not rewound: give each Trainer a new one to start with empty momentum. A run that resumes from a
    checkpoint is not rewound. Composer's own schedulers lag one batch behind the timestamp, as they always do;
    PyTorch's do not.

    Runs on ``Event.FIT_START`` and ``BATCH_END``.

    Args:
        to: Step t_r in batches, as an int or a time string such as ``"400ba"``. Must be at least 0.
        state: State to start from, with the names of the bare network (see `ApplyMask`). None saves the state of the
            first run at ``to``.
        step_schedulers_every_batch: Whether schedulers are stepped every batch (True) or every epoch (False). Must be
            the value that the Trainer uses; otherwise the learning rate is rewound to a wrong step. The Trainer's
            default for PyTorch schedulers is False: pass ``step_schedulers_every_batch`` to the Trainer, too.

    Raises:
        ValueError: If ``to`` is not a number of batches.

    Example:
        >>> import torch
        >>> from composer import Trainer
        >>> from composer.models import ComposerClassifier
        >>> from lth_diet.algorithms import Rewind
        >>> network = torch.nn.Linear(4, 2)
        >>> data = torch.utils.data.TensorDataset(torch.randn(32, 4), torch.randint(2, (32,)))
        >>> rewind = Rewind("3ba")
        >>> for run in range(2):  # the second run starts from the state of the first after three batches
        ...     trainer = Trainer(
        ...         model=ComposerClassifier(network, num_classes=2),
        ...         train_dataloader=torch.utils.data.DataLoader(data, batch_size=8),
        ...         max_duration="8ba",
        ...         optimizers=torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9),
        ...         algorithms=[rewind],
        ...         progress_bar=False,
        ...     )
        ...     trainer.fit()
        >>> sorted(rewind.state)
        ['bias', 'weight']
    """

    def __init__(
        self, to: int | str, state: Mapping[str, Tensor] | None = None, step_schedulers_every_batch: bool = True
    ):
        time = Time.from_input(to, TimeUnit.BATCH)
        if time.unit != TimeUnit.BATCH or time.value < 0:
            raise ValueError(f"cannot rewind to {to!r}; expected a number of batches, such as 400 or '400ba'")
        self.to = int(time.value)
        self.state = state
        self.step_schedulers_every_batch = step_schedulers_every_batch

    def match(self, event: Event, state: State) -> bool:
        if event == Event.FIT_START:
            return state.timestamp.batch == 0 and (self.state is not None or self.to == 0)
        return event == Event.BATCH_END and self.state is None and state.timestamp.batch == self.to

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if self.state is None:
            current = bare_network(state.model).state_dict()
            self.state = {name: tensor.detach().cpu().clone() for name, tensor in current.items()}
        else:
            bare_network(state.model).load_state_dict(self.state)
            self._set_timestamp(state)

    def _set_timestamp(self, state: State) -> None:
        """Set Composer's timestamp and the schedulers to step `to`."""
        epoch, batch_in_epoch = divmod(self.to, int(state.dataloader_len)) if state.dataloader_len else (0, self.to)
        batch_size = (getattr(state.dataloader, "batch_size", None) or 0) * dist.get_world_size()
        state.timestamp = state.timestamp.copy(
            epoch=epoch,
            epoch_in_iteration=epoch,
            batch=self.to,
            batch_in_epoch=batch_in_epoch,
            sample=self.to * batch_size,
            sample_in_epoch=batch_in_epoch * batch_size,
        )
        with warnings.catch_warnings():  # PyTorch warns of scheduler.step() before optimizer.step()
            warnings.simplefilter("ignore")
            for scheduler in state.schedulers:
                for _ in range(self.to if self.step_schedulers_every_batch else epoch):
                    scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state}

    def load_state_dict(self, state: dict[str, Any], strict: bool = False) -> None:
        self.state = state["state"]
