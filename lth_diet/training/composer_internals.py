"""Composer's Trainer with less work per step, and every private name of Composer that is used."""

import datetime
import os
from typing import Any

import torch
from composer import Event, Trainer
from composer.core import event as events
from composer.core.precision import get_precision_context
from composer.devices import DeviceGPU
from composer.utils import dist


class LeanTrainer(Trainer):
    """Composer's Trainer, whose host does not wait for the device at every step.

    A kernel is launched while the one before it runs, unless the host reads a number from the device in between.
    Composer reads four a step: the loss, once for the optimizer, which has no use for it, and once to log it, while
    `_Recorder` reads it at an interval; and the sizes of the batch, which one rank knows (see also
    `SingleRankGPU`). It also copies each batch, for metrics of the training, which are not asked for here.

    At each of the 13 events of a step its engine also checks that there is a dataloader, orders the Algorithms, even if
    there is one or none, compares the event with all others by name, and words log messages, even if nobody reads them:
    half a millisecond a step.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        order = self.engine._compile
        self.engine._compile = lambda algorithms, event: order(algorithms, event) if algorithms[1:] else algorithms
        self.engine._assert_dataloader_and_duration_set = lambda state, event: None
        events._BEFORE_EVENTS, events._AFTER_EVENTS = map(frozenset, (events._BEFORE_EVENTS, events._AFTER_EVENTS))
        if not os.environ.get("ENGINE_DEBUG"):
            self.engine._debug_log = lambda event, message: None

    def _train_batch(self, use_grad_scaling: bool) -> dict[str, torch.Tensor]:
        """The step of a network that is neither split into microbatches nor sharded, and whose loss is not scaled."""
        state, run = self.state, self.engine.run_event
        run(Event.BEFORE_TRAIN_BATCH)
        for optimizer in state.optimizers:
            optimizer.zero_grad()
        state.batch = state.device.batch_to_device(state.batch)
        run(Event.BEFORE_FORWARD)
        with get_precision_context(state.precision):
            state.outputs = state.model(state.batch)
        run(Event.AFTER_FORWARD)
        run(Event.BEFORE_LOSS)
        with get_precision_context(state.precision):
            state.loss = self._original_model.loss(state.outputs, state.batch)
        run(Event.AFTER_LOSS)
        run(Event.BEFORE_BACKWARD)
        state.loss.backward()
        run(Event.AFTER_BACKWARD)
        run(Event.AFTER_TRAIN_BATCH)
        for optimizer in state.optimizers:
            optimizer.step()
        self.first_train_batch_complete = True
        return {}

    def _accumulate_time_across_ranks(
        self, num_samples: int, num_tokens: int, batch_time: datetime.timedelta
    ) -> tuple[int, int, datetime.timedelta]:
        if dist.get_world_size() > 1:
            return super()._accumulate_time_across_ranks(num_samples, num_tokens, batch_time)
        return num_samples, num_tokens, batch_time


class SingleRankGPU(DeviceGPU):
    """A GPU of one rank: single numbers, which Composer sends there to sum them over ranks, stay where they are."""

    def tensor_to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return super().tensor_to_device(tensor) if tensor.dim() else tensor
