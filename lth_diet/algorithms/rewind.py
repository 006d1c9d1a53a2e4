import warnings
from collections.abc import Mapping
from typing import Any

from composer import Algorithm, Event, Logger, State, Time, TimeUnit
from composer.utils import dist
from torch import Tensor

from lth_diet.algorithms.network import bare_network


class Rewind(Algorithm):
    """Weight rewinding: keeps a network's state at step t_r and starts later trainings from it, at step t_r.

    While it holds no state, it takes a copy (parameters and buffers, so BatchNorm's statistics too) when ``to``
    batches have been trained. Once it holds one, a training that begins is put back: the state is loaded, and
    Composer's clock and the learning rate schedule start at ``to``, so that the training goes from ``to`` to
    ``max_duration`` and milestones are absolute steps (paper, Algorithm 1; Frankle et al. 2020a). The optimizer is
    left alone: give each Trainer a new one for momentum to start empty. A training that is resumed in its middle is
    not touched.

    Composer's own schedulers lag a batch behind its clock, here as everywhere; PyTorch's do not.

    Runs on ``Event.FIT_START`` and ``BATCH_END``.

    Args:
        to: t_r in batches, as an int or ``"400ba"``.
        state: A state kept earlier, by the bare network's names (see `ApplyMask`); None to take it at ``to``.
        step_schedulers_every_batch: Say False if PyTorch schedulers are stepped every epoch, which is the Trainer's
            default for them.

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
        >>> for training in range(2):  # the second begins where the first was after three batches
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
            raise ValueError(f"Rewind to {to!r}; allowed: a number of batches, such as 400 or '400ba'")
        self.to = int(time.value)
        self.state = state
        self.step_schedulers_every_batch = step_schedulers_every_batch

    def match(self, event: Event, state: State) -> bool:
        if event == Event.FIT_START:
            return state.timestamp.batch == 0 and (self.state is not None or self.to == 0)
        return event == Event.BATCH_END and self.state is None and state.timestamp.batch == self.to

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if self.state is None:
            kept = bare_network(state.model).state_dict()
            self.state = {name: tensor.detach().cpu().clone() for name, tensor in kept.items()}
        else:
            bare_network(state.model).load_state_dict(self.state)
            self._set_clock(state)

    def _set_clock(self, state: State) -> None:
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
        with warnings.catch_warnings():  # PyTorch expects optimizer.step() before scheduler.step()
            warnings.simplefilter("ignore")
            for scheduler in state.schedulers:
                for _ in range(self.to if self.step_schedulers_every_batch else epoch):
                    scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state}

    def load_state_dict(self, state: dict[str, Any], strict: bool = False) -> None:
        self.state = state["state"]
