"""The only place that builds, and closes, a Composer Trainer."""

import atexit
import contextlib
import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from composer import Algorithm, Callback, Evaluator, Event, Logger, State, Trainer
from composer.core import Engine
from composer.models import ComposerClassifier
from composer.utils import checkpoint, dist
from torch.distributed.checkpoint.state_dict import _get_fqns
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from lth_diet.algorithms.network import bare_network
from lth_diet.config import Config
from lth_diet.display import Progress
from lth_diet.loader import EvaluationLoader, Loader
from lth_diet.phases import Phase


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
        on_checkpoint: Called after each checkpoint.

    Returns:
        test_accuracy_percent, test_loss, steps, seconds (of this attempt), timestamp (ms).

    Raises:
        TrainingError: If the loss is not finite.
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
    recorder = _Recorder(phase, loader, config.intervals.log, progress)
    began = time.monotonic()
    with _plain_path(resume) as load_path:
        trainer = Trainer(
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
            device=device(),
            precision=_precision(config),
            deterministic_mode=config.deterministic,
            seed=config.seed,
            spin_dataloaders=False,  # the loader jumps to the clock's step
            load_path=str(load_path) if load_path else None,
            load_progress_bar=False,
            progress_bar=False,
        )
    try:
        loader.clock = lambda: int(trainer.state.timestamp.batch)
        progress.step_from(resume[1] if resume else schedule.first, schedule.last)
        trainer.fit()
        return {
            **_measured(trainer.state),
            "steps": schedule.last - schedule.first,
            "seconds": round(time.monotonic() - began, 3),
            "timestamp": time.time_ns() // 1_000_000,
        }
    finally:
        loader.clock = lambda: 0
        trainer.close()
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


class _Recorder(Callback):
    """Appends to the phase's curve: mean loss since the last row, the learning rate used, evaluations."""

    def __init__(self, phase: Phase, loader: Loader, interval: int, progress: Progress):
        self.path = phase.path / "curve.jsonl"
        self.name = phase.path
        self.loader = loader
        self.interval = interval
        self.progress = progress
        self.losses = 0.0
        self.batches = 0
        self.lr = 0.0

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self.lr = state.optimizers[0].param_groups[0]["lr"]

    def batch_end(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        loss = state.total_loss_dict["loss/train/total"]
        if not math.isfinite(loss):
            raise TrainingError(
                f"{self.name}: the loss is {loss} at step {step} with learning rate {self.lr:g}, on batch {step - 1} "
                f"of order seed {self.loader.order_seed} and augmentation seed {self.loader.augmentation_seed}; "
                "try a lower train.lr or pretrain.lr"
            )
        self.losses += loss
        self.batches += 1
        if step % self.interval == 0:
            self._append(step, {"train_loss": self.losses / self.batches, "learning_rate": self.lr})
            self.losses, self.batches = 0.0, 0
        self.progress.step(step)

    def eval_start(self, state: State, logger: Logger) -> None:
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
            with open(self.path, "a") as file:
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

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        if step % self.interval == 0 and step < state.max_duration.value:
            literal = str(self.phase.checkpoint_path(step)).replace("{", "{{").replace("}", "}}")
            try:
                checkpoint.save_checkpoint(state, literal)
            except (OSError, RuntimeError) as error:  # PyTorch's own error of a full disk is a RuntimeError
                self.phase.checkpoint_path(step).unlink(missing_ok=True)
                reason = str(error).splitlines()[0]
                raise TrainingError(
                    f"{self.phase.path}: the checkpoint of step {step} cannot be written ({reason}); make room, and "
                    "the same command goes on"
                ) from None
            if dist.get_global_rank() == 0:
                self.phase.commit_checkpoint(step)
                self.on_checkpoint()
