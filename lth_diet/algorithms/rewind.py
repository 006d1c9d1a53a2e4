"""Rewind: weight rewinding to step t_r."""

import copy
import warnings
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import torch
from composer import Algorithm, Event, Logger, State, Time, Timestamp, TimeUnit
from composer.utils import dist
from torch import Tensor

from lth_diet.algorithms.bare_network import bare_network
from lth_diet.algorithms.subset_sampling import SubsetSampling
from lth_diet.algorithms.times import parse_time
from lth_diet.networks.parameters import match_names


class Rewind(Algorithm):
    """Saves the state of a network at step t_r and starts later training runs from it, at step t_r.

    The first run saves a copy of the state (parameters and buffers, including BatchNorm statistics) at ``to``. Every
    later run loads this state when it starts, and sets Composer's timestamp and the learning rate schedulers to ``to``.
    It therefore trains from ``to`` to ``max_duration``, and milestones are absolute steps (Algorithm 1 of the paper;
    Frankle et al. 2020a). If the first run ends before ``to``, a warning says so, and later runs do not start.

    The optimizer is not rewound: give each Trainer a new one to start with empty momentum, and a new scheduler; a
    warning says if they are not new. A run that resumes from a checkpoint is not rewound; it must have the same ``to``
    and state. Composer's own schedulers lag one batch behind the timestamp, as they always do; PyTorch's do not.
    List Rewind before Algorithms that use the clock or the weights when training starts, such as `SubsetSampling` and
    Composer's EMA.

    Runs on ``Event.FIT_START``, ``BATCH_END``, ``EPOCH_END`` and ``FIT_END``.

    Args:
        to: Step t_r in batches, as an int or a time string such as ``"400ba"``, or in epochs, such as ``"2ep"``. Must
            be at least 0. A given state at an epoch needs a loader with a length.
        state: State to start from, of which a copy is made. Its names may have or lack the prefixes of wrappers (see
            `ApplyMask`). None saves the state of the first run at ``to``.
        step_schedulers_every_batch: Whether schedulers are stepped every batch (True) or every epoch (False). Must be
            the value that the Trainer uses, which is checked after the first batch. The Trainer's default for PyTorch
            schedulers is False: pass ``step_schedulers_every_batch`` to the Trainer, too.

    Raises:
        ValueError: If ``to`` is not a number of batches or epochs. When training starts, if nothing is left to train
            after ``to``, no state was saved, or a run without a state resumes after ``to``. After the first batch, if
            the Trainer steps schedulers at other times.

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
        self, to: int | str | Time, state: Mapping[str, Tensor] | None = None, step_schedulers_every_batch: bool = True
    ):
        self.to = parse_time("to", to, (TimeUnit.BATCH, TimeUnit.EPOCH))
        self.state = None if state is None else _copy(state)
        self.step_schedulers_every_batch = step_schedulers_every_batch
        self._saved_at: tuple[int, int] | None = None  # batch and sample of the first run
        self._missed_at: int | None = None  # batch at which a run ended that saved no state
        self._warned = False
        self._scheduler_steps: list[int] | None = None  # before the first batch

    def match(self, event: Event, state: State) -> bool:
        if event in (Event.BATCH_END, Event.EPOCH_END):
            return self._scheduler_steps is not None or (self.state is None and self._is_at_step(state.timestamp))
        return event == Event.FIT_START or (event == Event.FIT_END and self.state is None)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START:
            if self.state is None:
                self._start_first_run(state)
            elif state.timestamp.batch == 0:
                self._rewind(state)
            self._scheduler_steps = _scheduler_steps(state) if self.to.value > 0 else None
        elif event == Event.FIT_END:
            self._missed_at = int(state.timestamp.batch)
            self._warn_of_end(f"ended at batch {self._missed_at}")
        else:
            self._check_schedulers(state)
            if self.state is None and self._is_at_step(state.timestamp):
                self._save(state)

    def _is_at_step(self, clock: Timestamp) -> bool:
        return clock.get(self.to.unit) == self.to and (self.to.unit == TimeUnit.BATCH or clock.batch_in_epoch == 0)

    def _start_first_run(self, state: State) -> None:
        clock, end = state.timestamp, state.max_duration
        if self._missed_at is not None and clock.batch == 0:
            raise ValueError(
                f"nothing to rewind to: the first training ended at batch {self._missed_at}, before to={self.to}; "
                "train it longer with a new Rewind"
            )
        self._warned = False
        if self._is_at_step(clock):
            self._save(state)
        elif clock.get(self.to.unit) >= self.to:
            raise ValueError(
                f"training resumes at batch {int(clock.batch)}, after to={self.to}, but the checkpoint has no state of "
                "Rewind; resume from an earlier checkpoint, or give Rewind a state"
            )
        elif end.unit == self.to.unit and end < self.to:
            self._warn_of_end(f"ends at {end}")

    def _warn_of_end(self, end: str) -> None:
        if not self._warned:
            warnings.warn(f"Rewind saves no state: training {end}, before to={self.to}", stacklevel=2)
        self._warned = True

    def _save(self, state: State) -> None:
        self.state = _copy(bare_network(state.model).state_dict())
        self._saved_at, self._missed_at = (int(state.timestamp.batch), int(state.timestamp.sample)), None

    def _rewind(self, state: State) -> None:
        if any(isinstance(algorithm, SubsetSampling) and algorithm.restricts for algorithm in state.algorithms):
            raise ValueError("SubsetSampling starts before Rewind has set the clock; list Rewind first")
        clock = self._clock(state)
        if clock >= state.max_duration:
            raise ValueError(
                f"nothing is left to train: Rewind starts at to={self.to}, and training ends at {state.max_duration}"
            )
        if any(optimizer.state for optimizer in state.optimizers) or any(_scheduler_steps(state)):
            warnings.warn(
                "the optimizer or a scheduler has been used before, and Rewind does not rewind its state; give each "
                "Trainer a new optimizer and scheduler",
                stacklevel=2,
            )
        network = bare_network(state.model)
        names = match_names(self.state, network.state_dict())
        network.load_state_dict({names.get(name, name): value for name, value in self.state.items()})
        state.timestamp = clock
        with warnings.catch_warnings():  # PyTorch warns of scheduler.step() before optimizer.step()
            warnings.simplefilter("ignore")
            for scheduler in state.schedulers:
                for _ in range(int(clock.batch if self.step_schedulers_every_batch else clock.epoch)):
                    scheduler.step()

    def _clock(self, state: State) -> Timestamp:
        """Composer's timestamp at `to`."""
        loader, ranks = state.dataloader, dist.get_world_size()
        length = None if state.dataloader_len is None else int(state.dataloader_len)
        batch_size = _batch_size(loader)
        batch, sample = self._saved_at or (None, None)
        if self.to.unit == TimeUnit.BATCH:
            batch = self.to.value
            epoch, batch_in_epoch = divmod(batch, length) if length else (0, batch)
        else:
            epoch, batch_in_epoch = self.to.value, 0
            if batch is None and length is None:
                raise ValueError(f"the loader has no length, so Rewind needs batches; got to={self.to}")
            batch = epoch * length if batch is None else batch
        if state.max_duration.unit == TimeUnit.TOKEN or (
            state.max_duration.unit == TimeUnit.SAMPLE and sample is None and batch_size is None
        ):
            raise ValueError(f"Rewind cannot set the clock to to={self.to} in the unit of {state.max_duration}")
        if sample is None:
            sample = ranks * _count_samples(loader, length, batch_size or 0, batch)
        return state.timestamp.copy(
            epoch=epoch,
            epoch_in_iteration=epoch,
            batch=batch,
            batch_in_epoch=batch_in_epoch,
            sample=sample,
            sample_in_epoch=ranks * batch_in_epoch * (batch_size or 0),
        )

    def _check_schedulers(self, state: State) -> None:
        """Check after the first batch that the Trainer steps the schedulers as expected."""
        before, self._scheduler_steps = self._scheduler_steps, None
        if before and (before != _scheduler_steps(state)) != self.step_schedulers_every_batch:
            expected, found = ("every batch", "every epoch")[:: 1 if self.step_schedulers_every_batch else -1]
            raise ValueError(
                f"Rewind expects schedulers that step {expected}, but the Trainer steps them {found}; give Rewind and "
                "the Trainer the same step_schedulers_every_batch"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state, "to": str(self.to), "saved_at": self._saved_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("to", str(self.to)) != str(self.to):
            raise ValueError(f"Rewind has to={self.to}; the checkpoint was saved with {state['to']}")
        if self.state is not None and not _equal(self.state, state["state"]):
            raise ValueError("Rewind has another state than the training that saved the checkpoint; use a new Rewind")
        self.state, self._saved_at = state["state"], state.get("saved_at")


def _copy(state: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().cpu().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
        for name, value in state.items()
    }


def _equal(a: Mapping[str, Any], b: Mapping[str, Any] | None) -> bool:
    """Compare tensors; other values are not compared."""
    return (
        b is not None
        and a.keys() == b.keys()
        and all(torch.equal(value, b[name].cpu()) for name, value in a.items() if isinstance(value, Tensor))
    )


def _scheduler_steps(state: State) -> list[int]:
    return [scheduler.last_epoch for scheduler in state.schedulers if hasattr(scheduler, "last_epoch")]


def _batch_size(loader: Iterable) -> int | None:
    return getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)


def _count_samples(loader: Iterable, length: int | None, batch_size: int, batches: int) -> int:
    """Count the samples of this rank in a number of batches; the last batch of an epoch may be smaller."""
    sampler = getattr(loader, "sampler", None)
    if not length or not isinstance(sampler, Sized):
        return batches * batch_size
    epochs, rest = divmod(batches, length)
    return epochs * min(len(sampler), length * batch_size) + rest * batch_size
