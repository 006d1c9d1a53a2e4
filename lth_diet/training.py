"""The only place that builds, and closes, a Composer Trainer."""

import atexit
import contextlib
import dataclasses
import datetime
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from composer import Algorithm, Callback, Evaluator, Event, Logger, State, Trainer
from composer.core import Engine
from composer.core import event as events
from composer.core.precision import get_precision_context
from composer.devices import DeviceGPU
from composer.models import ComposerClassifier
from composer.utils import checkpoint, dist
from torch.distributed.checkpoint.state_dict import _get_fqns
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from lth_diet.algorithms.network import bare_network
from lth_diet.config import Config, Intervals
from lth_diet.display import Progress
from lth_diet.errors import naming
from lth_diet.loader import EvaluationLoader, Loader
from lth_diet.phases import Phase

TELL_SECONDS = 30.0
"""Between two calls for MLflow: on a fast GPU a checkpoint is due every second."""


class TrainingError(Exception):
    """Training cannot go on; the sentence says where it stopped and why."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Steps from `first` (where Rewind sets the clock) to `last`; the rate drops at absolute milestones."""

    first: int
    last: int
    lr: float
    milestones: Sequence[int] = ()


def device() -> str:
    """Composer's name of this process's device: "gpu" where there is one, else "cpu"."""
    return "gpu" if torch.cuda.is_available() else "cpu"


def train(
    model: ComposerClassifier,
    loader: Loader,
    evaluation: EvaluationLoader,
    schedule: Schedule,
    algorithms: Sequence[Algorithm],
    phase: Phase,
    config: Config,
    progress: Progress,
    on_checkpoint: Callable[[], None],
) -> dict[str, Any]:
    """Train a phase, from its last checkpoint if there is one, and measure it after its last step.

    Args:
        model: Trained in place.
        loader: Its clock is set to the Trainer's.
        evaluation: Test images.
        schedule: Steps and learning rate.
        algorithms: Composer Algorithms, in order.
        phase: Where curve and checkpoints go.
        config: For momentum, weight decay, precision and intervals.
        progress: Told of every batch.
        on_checkpoint: Called after a checkpoint, if `TELL_SECONDS` have gone by since the last time.

    Returns:
        test_accuracy_percent, test_loss, steps, seconds (of this attempt), timestamp (ms).

    Raises:
        TrainingError: If the loss is not finite, a checkpoint cannot be written or the network cannot be compiled.
    """
    resume = phase.checkpoint()
    if dist.get_global_rank() == 0:
        phase.cut_curve(resume[1] if resume else -1)
    optimizer = SGD(
        model.parameters(),
        lr=schedule.lr,
        momentum=config.train.momentum,
        weight_decay=config.train.weight_decay,
    )
    recorder = _Recorder(phase, loader, config.intervals, progress)
    began = time.monotonic()
    with _plain_path(resume) as load_path:
        trainer = _Trainer(
            model=model,
            train_dataloader=loader,
            eval_dataloader=Evaluator(
                label="test", dataloader=evaluation, eval_interval=_evaluate_every(config.intervals.evaluate)
            ),
            max_duration=f"{schedule.last}ba",
            optimizers=optimizer,
            # PyTorch's scheduler counts steps itself, so that a milestone has no lag behind Composer's clock
            schedulers=MultiStepLR(optimizer, list(schedule.milestones), config.train.gamma),
            step_schedulers_every_batch=True,
            algorithms=list(algorithms),
            callbacks=[recorder, _Checkpointer(phase, config.intervals.checkpoint, on_checkpoint)],
            device=_GPU() if device() == "gpu" and dist.get_world_size() == 1 else device(),
            precision=_precision(config),
            deterministic_mode=config.deterministic,
            compile_config=_compile_options() if config.compile else None,
            seed=config.seed,
            spin_dataloaders=False,  # the loader jumps to the clock's step
            load_path=str(load_path) if load_path else None,
            load_progress_bar=False,
            progress_bar=False,
        )
    try:
        loader.clock = lambda: int(trainer.state.timestamp.batch)
        progress.step_from(resume[1] if resume else schedule.first, schedule.last)
        with _compiling(phase) if config.compile else contextlib.nullcontext():
            trainer.fit()
        return {
            **_measured(trainer.state),
            "steps": schedule.last - schedule.first,
            "seconds": round(time.monotonic() - began, 3),
            "timestamp": time.time_ns() // 1_000_000,
        }
    finally:
        loader.clock = lambda: 0
        trainer.engine.close()  # Trainer.close also waits for the other ranks, of which one may have failed
        atexit.unregister(Engine._close)  # it would keep model and state alive until the process ends
        _get_fqns.cache_clear()  # so would PyTorch's names of the parameters of every model that was saved


@contextlib.contextmanager
def _plain_path(resume: tuple[Path, int] | None) -> Iterator[Path | None]:
    """A path to the checkpoint for Composer, which reads paths as URLs and format strings: #, ? and { have meaning."""
    if resume is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "checkpoint.pt"
        link.symlink_to(resume[0].resolve())
        yield link


def _precision(config: Config) -> str:
    automatic = "bf16" if device() == "gpu" else "fp32"
    return {"fp32": "fp32", "bf16": "amp_bf16"}[automatic if config.precision == "auto" else config.precision]


def _compile_options() -> dict[str, str]:
    return {"mode": "reduce-overhead"} if device() == "gpu" else {}


@contextlib.contextmanager
def _compiling(phase: Phase) -> Iterator[None]:
    from torch._dynamo.exc import TorchDynamoException  # takes a second

    try:
        yield
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"{phase.path}: PyTorch {torch.__version__} cannot compile this network on this machine ({reason}); "
            "try another number of threads, or compile=false"
        ) from None


def _measured(state: State) -> dict[str, float]:
    """What the last evaluation found."""
    metrics = state.eval_metrics["test"]
    return {
        "test_accuracy_percent": round(100 * float(metrics["MulticlassAccuracy"].compute()), 4),
        "test_loss": float(metrics["CrossEntropy"].compute()),
    }


def _evaluate_every(interval: int) -> Callable[[State, Event], bool]:
    def is_due(state: State, event: Event) -> bool:
        step = int(state.timestamp.batch)
        inside = event == Event.BATCH_END and step < state.max_duration.value
        return event == Event.FIT_END or (inside and interval > 0 and step % interval == 0)

    return is_due


class _Trainer(Trainer):
    """Composer's Trainer, whose host does not wait for the device at every step.

    A kernel is launched while the one before it runs, unless the host reads a number from the device in between.
    Composer reads four a step: the loss, once for the optimizer, which has no use for it, and once to log it, while
    `_Recorder` reads it at an interval; and the sizes of the batch, which one rank knows (see also `_GPU`). It also
    copies each batch, for metrics of the training, which are not asked for here.

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


class _GPU(DeviceGPU):
    """A GPU of one rank: single numbers, which Composer sends there to sum them over ranks, stay where they are."""

    def tensor_to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return super().tensor_to_device(tensor) if tensor.dim() else tensor


class _Recorder(Callback):
    """Appends to the phase's curve: mean loss since the last row, the learning rate used, evaluations.

    Losses stay on the device until a row, a checkpoint or an evaluation needs them; then all are read, and refused if
    one is not finite.
    """

    def __init__(self, phase: Phase, loader: Loader, intervals: Intervals, progress: Progress):
        self.path = phase.path / "curve.jsonl"
        self.name = phase.path
        self.loader = loader
        self.intervals = intervals
        self.progress = progress
        self.unread: list[tuple[int, float, torch.Tensor]] = []
        self.losses = 0.0
        self.batches = 0
        self.lr = 0.0

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self.lr = state.optimizers[0].param_groups[0]["lr"]
        self.unread.append((int(state.timestamp.batch) + 1, self.lr, state.loss.detach()))

    def batch_end(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        if step % self.intervals.log == 0 or step % self.intervals.checkpoint == 0:
            self._read()
        if step % self.intervals.log == 0:
            self._append(step, {"train_loss": self.losses / self.batches, "learning_rate": self.lr})
            self.losses, self.batches = 0.0, 0
        self.progress.step(step)

    def _read(self) -> None:
        """Add up the losses of the steps since the last time, of all ranks."""
        if not self.unread:
            return
        steps, rates, losses = zip(*self.unread, strict=True)
        self.unread = []
        values = torch.stack(losses).double()
        dist.all_reduce(values)
        for step, lr, loss in zip(steps, rates, (values / dist.get_world_size()).tolist(), strict=True):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"{self.name}: the loss is {loss} at step {step} with learning rate {lr:g}, on batch {step - 1} "
                    f"of order seed {self.loader.order_seed} and augmentation seed {self.loader.augmentation_seed}; "
                    "try a lower train.lr or pretrain.lr"
                )
            self.losses += loss
            self.batches += 1

    def eval_start(self, state: State, logger: Logger) -> None:
        self._read()
        if dist.get_world_size() > 1:  # each rank's BatchNorm has seen its own images; rank 0's is what is saved
            for buffer in bare_network(state.model).buffers():
                dist.broadcast(buffer, src=0)

    def eval_end(self, state: State, logger: Logger) -> None:
        step, measured = int(state.timestamp.batch), _measured(state)
        if not math.isfinite(measured["test_loss"]):
            raise TrainingError(
                f"{self.name}: the test loss is {measured['test_loss']} after step {step} with learning rate "
                f"{self.lr:g}; try a lower train.lr or pretrain.lr"
            )
        self._append(step, measured)

    def _append(self, step: int, metrics: dict[str, float]) -> None:
        row = {"step": step, "timestamp": time.time_ns() // 1_000_000, **metrics}
        if dist.get_global_rank() == 0:
            with naming(self.path), open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.batches = state["losses"], state["batches"]


class _Checkpointer(Callback):
    """Saves Composer's checkpoint at an interval; a phase's last step is not one of them: its result follows."""

    def __init__(self, phase: Phase, interval: int, on_checkpoint: Callable[[], None]):
        self.phase = phase
        self.interval = interval
        self.on_checkpoint = on_checkpoint
        self.told = time.monotonic()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        if step % self.interval == 0 and step < state.max_duration.value:
            path = self.phase.checkpoint_path(step)
            literal = str(path).replace("{", "{{").replace("}", "}}")
            try:
                checkpoint.save_checkpoint(state, literal)
                if dist.get_global_rank() == 0:
                    self.phase.commit_checkpoint(step)
            except (OSError, RuntimeError) as error:  # PyTorch's own error of a full disk is a RuntimeError
                with contextlib.suppress(OSError):
                    path.unlink()
                reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
                raise TrainingError(
                    f"{path} cannot be written ({reason}); the same command goes on once there is room"
                ) from None
            if dist.get_global_rank() == 0:
                self.phase.share()
                self.on_checkpoint()
