"""Composer's Trainer with less work per step. Uses private names: CONTRIBUTING.md lists them with their tests."""

import atexit
import datetime
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from composer import Event, Trainer
from composer.core import Engine
from composer.core import event as events
from composer.core.precision import get_precision_context
from composer.devices import Device, DeviceCPU, DeviceGPU
from composer.models import ComposerModel
from composer.trainer.trainer import TrainerMode
from composer.utils import collect_env, dist
from torch.distributed.checkpoint import state_dict
from torch.nn.parallel import DistributedDataParallel

from lth_diet.training import devices


class LeanTrainer(Trainer):
    """Composer's Trainer without host work that this project does not need; every event still runs.

    A GPU runs one kernel while the host launches the next, unless the host reads a number from the GPU in between.
    Composer reads six numbers per step: the loss for the optimizer, the loss for the log, two sizes and the time of the
    batch, and whether a rank has no more batches. Here `_Recorder` reads losses at an interval, and all ranks have
    equally many batches of one size. Composer also copies each batch for training metrics, which are not used here.

    At each of the 13 events of a step, Composer's engine checks for a dataloader, sorts the Algorithms even if there
    is at most one, and looks the event up in two lists. Together these cost 0.6 of 5.2 ms of a step on the digits
    (AMD EPYC, one thread).
    """

    def __init__(self, *, model: ComposerModel, precision: str, **options: Any):
        collect_env.get_cpu_model = devices.cpu_name  # Composer's takes 1.3 s: it measures the clock of the CPU
        if precision == "amp_bf16" and not devices.is_gpu():  # Composer accepts fp32 only
            model.forward, precision = _autocast(model.forward), "fp32"
        forward = model.forward
        super().__init__(model=model, precision=precision, **options)
        self.original_model = model
        if options.get("compile_config") is not None:  # evaluation would be compiled separately, for a few batches
            model.eval_forward = lambda batch, outputs=None: forward(batch)
        if isinstance(self.state.model, DistributedDataParallel):
            self.state.model.broadcast_buffers = False  # `_Recorder` does, before each evaluation
        sort = getattr(self.engine, "_compile", None)
        if sort:
            self.engine._compile = lambda algorithms, event: sort(algorithms, event) if algorithms[1:] else algorithms
        self.engine._assert_dataloader_and_duration_set = lambda state, event: None
        events._BEFORE_EVENTS = frozenset(getattr(events, "_BEFORE_EVENTS", ()))
        events._AFTER_EVENTS = frozenset(getattr(events, "_AFTER_EVENTS", ()))

    def _train_batch(self, use_grad_scaling: bool) -> dict[str, torch.Tensor]:
        """One step without microbatches, sharding or loss scaling."""
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
            state.loss = self.original_model.loss(state.outputs, state.batch)
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
        return num_samples * dist.get_world_size(), num_tokens, batch_time

    def _iter_dataloader(self, trainer_mode: TrainerMode) -> Iterator[Any]:
        training = trainer_mode == TrainerMode.TRAIN
        batches = itertools.islice(self.state.dataloader, int(self.state.dataloader_len))
        while True:
            if training:
                self.engine.run_event(Event.BEFORE_DATALOADER)
            batch = next(batches, None)
            if batch is None:
                return
            yield batch


def _autocast(forward: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
    """Have a forward pass compute in bf16 on the CPU. Its outputs are in single precision, for the loss and metrics."""

    @functools.wraps(forward)
    def in_bf16(batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return forward(batch).float()

    return in_bf16


def training_device() -> Device:
    """Composer's object for the device of this process."""
    device = devices.torch_device()
    if device.type == "cpu":
        return DeviceCPU()
    return DeviceGPU(device.index)


def close(trainer: Trainer) -> None:
    """Close a Trainer and free its model.

    `Trainer.close` waits for the other ranks, one of which may have failed. Composer's exit hook would keep model and
    state alive until the process ends, and so would PyTorch's cache of the parameter names of every saved model.
    """
    trainer.engine.close()
    atexit.unregister(getattr(Engine, "_close", None))
    getattr(getattr(state_dict, "_get_fqns", None), "cache_clear", lambda: None)()  # not cached in torch 2.11
