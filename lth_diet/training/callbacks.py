"""Composer Callbacks that write the training curve and the checkpoints of a phase."""

import contextlib
import json
import math
import re
import time
from collections.abc import Callable
from typing import Any, BinaryIO

import torch
from composer import Callback, Logger, State
from composer.utils import checkpoint, dist

from lth_diet.algorithms.bare_network import bare_network
from lth_diet.config.schema import Intervals
from lth_diet.data.loader import Loader
from lth_diet.errors import TrainingError, add_path_to_errors
from lth_diet.files import partial_path, replace
from lth_diet.runs.environment import Environment
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.training.progress import Progress

CHECKPOINT_SECONDS = 10.0
"""Seconds between two checkpoints, and before the first one. A fast GPU takes a second for a thousand batches."""
SYNC_SECONDS = 30.0
"""Seconds between two updates of MLflow within a phase, at least."""

_FILE_ERROR = re.compile("inline_container|PytorchStreamWriter|unexpected pos|iostream")
"""In the RuntimeError that PyTorch raises when a file cannot be written, as on a full disk."""


def measure(state: State) -> dict[str, float]:
    """Test accuracy (%) and loss of the last evaluation."""
    metrics = state.eval_metrics["test"]
    return {
        "test_accuracy_percent": round(100 * float(metrics["MulticlassAccuracy"].compute()), 4),
        "test_loss": float(metrics["CrossEntropy"].compute()),
    }


class _Recorder(Callback):
    """Writes the training curve: mean loss since the last row, learning rate, evaluations.

    Losses stay on the device until a row, a checkpoint or an evaluation needs them.

    Attributes:
        curve: The open file of the training curve; None on ranks other than 0.
    """

    def __init__(self, phase: PhaseDirectory, loader: Loader, intervals: Intervals, progress: Progress):
        self.path = phase.path / "curve.jsonl"
        self.folder = phase.path
        self.loader = loader
        self.intervals = intervals
        self.progress = progress
        self.curve: BinaryIO | None = None
        self.unread: list[tuple[int, float, torch.Tensor]] = []
        self.losses = 0.0
        self.batches = 0
        self.lr = 0.0

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self.lr = state.optimizers[0].param_groups[0]["lr"]
        self.unread.append((int(state.timestamp.batch) + 1, self.lr, state.loss.detach()))

    def batch_end(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        if step % self.intervals.log == 0:
            self.read_losses()
            self._append(step, {"train_loss": self.losses / self.batches, "learning_rate": self.lr})
            self.losses, self.batches = 0.0, 0
        self.progress.step(step)

    def read_losses(self) -> None:
        """Add the losses since the last read, averaged over the ranks.

        Raises:
            TrainingError: If a loss is not finite.
        """
        if not self.unread:
            return
        steps, rates, losses = zip(*self.unread, strict=True)
        self.unread = []
        values = torch.stack(losses).double()
        dist.all_reduce(values)
        for step, lr, loss in zip(steps, rates, (values / dist.get_world_size()).tolist(), strict=True):
            if not math.isfinite(loss):
                raise TrainingError(
                    f"{self.folder}: the loss is {loss} at step {step} with learning rate {lr:g}, on batch {step - 1} "
                    f"of order seed {self.loader.order_seed} and augmentation seed {self.loader.augmentation_seed}; "
                    "try a lower train.lr or pretrain.lr"
                )
            self.losses += loss
            self.batches += 1

    def eval_start(self, state: State, logger: Logger) -> None:
        self.read_losses()
        if dist.get_world_size() > 1:  # BatchNorm statistics differ between ranks; rank 0's are saved
            for buffer in bare_network(state.model).buffers():
                dist.broadcast(buffer, src=0)

    def eval_end(self, state: State, logger: Logger) -> None:
        step, measured = int(state.timestamp.batch), measure(state)
        if not math.isfinite(measured["test_loss"]):
            raise TrainingError(
                f"{self.folder}: the test loss is {measured['test_loss']} after step {step} with learning rate "
                f"{self.lr:g}; try a lower train.lr or pretrain.lr"
            )
        self._append(step, measured)

    def _append(self, step: int, metrics: dict[str, float]) -> None:
        row = {"step": step, "timestamp": time.time_ns() // 1_000_000, **metrics}
        if self.curve:
            with add_path_to_errors(self.path):
                self.curve.write(json.dumps(row).encode() + b"\n")
                self.curve.flush()

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.batches = state["losses"], state["batches"]


class _Checkpointer(Callback):
    """Saves Composer's checkpoints, but not after the last step: the result of the phase follows it.

    A checkpoint is due at multiples of an interval, `CHECKPOINT_SECONDS` after the last one or the start of the phase.
    """

    def __init__(
        self,
        phase: PhaseDirectory,
        interval: int,
        recorder: _Recorder,
        sync: Callable[[], None],
        environment: Environment,
    ):
        self.phase = phase
        self.interval = interval
        self.recorder = recorder
        self.sync = sync
        self.environment = environment
        self.saved = self.synced = time.monotonic()

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        if step % self.interval == 0 and step < state.max_duration.value and self._is_due(state):
            self.recorder.read_losses()  # weights from a loss that is not finite are never saved
            self._save(state, step)
            self.saved = time.monotonic()
            if dist.get_global_rank() == 0:
                self.phase.upload()
                if time.monotonic() - self.synced >= SYNC_SECONDS:
                    self.sync()
                    self.synced = time.monotonic()

    def _is_due(self, state: State) -> bool:
        """Decide by the clock of rank 0."""
        due = time.monotonic() - self.saved >= CHECKPOINT_SECONDS
        if dist.get_world_size() == 1:
            return due
        decision = state.device.tensor_to_device(torch.tensor(due, dtype=torch.uint8))
        dist.broadcast(decision, src=0)
        return bool(decision.item())

    def _save(self, state: State, step: int) -> None:
        path = self.phase.checkpoint_path(step)
        part = path.with_name(f"{partial_path(path).name}.pt")  # Composer takes other suffixes for compression
        literal = str(part).replace("{", "{{").replace("}", "}}")
        try:
            checkpoint.save_checkpoint(state, literal)
            if dist.get_global_rank() == 0:
                replace(part, path)
                self.phase.commit_checkpoint(step, self.environment)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                part.unlink()
            if not isinstance(error, OSError) and not _FILE_ERROR.search(str(error)):
                raise
            reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
            raise TrainingError(
                f"{path} cannot be written ({reason}); rerun the same command to resume once there is room"
            ) from None
