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
from composer.models import ComposerModel
from composer.utils import checkpoint, dist

from lth_diet.algorithms.bare_network import bare_network
from lth_diet.config.schema import Config
from lth_diet.data.loader import Loader, StackedLoader
from lth_diet.errors import TrainingError, add_path_to_errors
from lth_diet.files import partial_path, replace
from lth_diet.runs.block import BlockPhase
from lth_diet.runs.environment import Environment
from lth_diet.training import devices
from lth_diet.training.progress import Progress

CHECKPOINT_SECONDS = 10.0
"""Seconds between two checkpoints, and before the first one. A fast GPU takes a second for a thousand batches."""
SYNC_SECONDS = 30.0
"""Seconds between two updates of MLflow within a phase, at least."""

_FILE_ERROR = re.compile("inline_container|PytorchStreamWriter|unexpected pos|iostream")
"""In the RuntimeError that PyTorch raises when a file cannot be written, as on a full disk."""


def measure(state: State, member: int | None = None) -> dict[str, float]:
    """Test accuracy (%) and loss of the last evaluation, of a member of a stack or of a single network."""
    metrics, suffix = state.eval_metrics["test"], "" if member is None else f"_{member}"
    return {
        "test_accuracy_percent": round(100 * float(metrics[f"MulticlassAccuracy{suffix}"].compute()), 4),
        "test_loss": float(metrics[f"CrossEntropy{suffix}"].compute()),
    }


class NobodyTrains(Exception):
    """The last member of a block that trained has failed."""


class _Recorder(Callback):
    """Writes the training curves: mean loss since the last row, learning rate, evaluations.

    Losses stay on the device until a row, a checkpoint or an evaluation needs them.

    Attributes:
        curves: The open files of the training curves by member of the block; empty on ranks other than 0.
    """

    def __init__(
        self,
        block: BlockPhase,
        model: ComposerModel,
        loader: Loader | StackedLoader,
        config: Config,
        progress: Progress,
    ):
        self.block = block
        self.model = model
        self.loaders = loader.loaders if isinstance(loader, StackedLoader) else (loader,)
        self.config = config
        self.progress = progress
        self.curves: dict[int, BinaryIO] = {}
        self.unread: list[tuple[int, float, torch.Tensor]] = []
        self.losses = [0.0] * len(block)
        self.batches = 0
        self.lr = 0.0
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time that the training has taken, without what was trained again after a kill."""
        return time.monotonic() - self.began

    def after_train_batch(self, state: State, logger: Logger) -> None:
        self.lr = state.optimizers[0].param_groups[0]["lr"]
        losses = state.loss.detach().view(1) if len(self.block) == 1 else self.model.losses
        self.unread.append((int(state.timestamp.batch) + 1, self.lr, losses))

    def batch_end(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        if step % self.config.intervals.log == 0:
            self.read_losses()
            for member in self.block.training:
                mean = self.losses[member] / self.batches
                self._append(member, step, {"train_loss": mean, "learning_rate": self.lr})
            self.losses, self.batches = [0.0] * len(self.block), 0
        self.progress.step(step)

    def read_losses(self) -> None:
        """Add the losses since the last read, averaged over the ranks.

        Raises:
            TrainingError: If a loss is not finite, and the other members cannot go on without this one.
        """
        if not self.unread:
            return
        steps, rates, losses = zip(*self.unread, strict=True)
        self.unread = []
        values = torch.stack(losses).double()
        dist.all_reduce(values)
        for step, lr, each in zip(steps, rates, (values / dist.get_world_size()).tolist(), strict=True):
            for member in list(self.block.training):
                if not math.isfinite(each[member]):
                    loader = self.loaders[member]
                    self._fail(
                        member,
                        f"the loss is {each[member]} at step {step} with learning rate {lr:g}, on batch {step - 1} of "
                        f"order seed {loader.order_seed} and augmentation seed {loader.augmentation_seed}; try a lower "
                        "train.lr or pretrain.lr",
                    )
                self.losses[member] += each[member]
            self.batches += 1

    def eval_start(self, state: State, logger: Logger) -> None:
        self.read_losses()
        if dist.get_world_size() > 1:  # BatchNorm statistics differ between ranks; rank 0's are saved
            for buffer in bare_network(state.model).buffers():
                dist.broadcast(buffer, src=0)

    def eval_end(self, state: State, logger: Logger) -> None:
        step = int(state.timestamp.batch)
        for member in list(self.block.training):
            measured = measure(state, member if len(self.block) > 1 else None)
            if not math.isfinite(measured["test_loss"]):
                self._fail(
                    member,
                    f"the test loss is {measured['test_loss']} after step {step} with learning rate {self.lr:g}; try a "
                    "lower train.lr or pretrain.lr",
                )
            else:
                self._append(member, step, measured)

    def _fail(self, member: int, reason: str) -> None:
        reason = f"{self.block.phases[member].path}: {reason}"
        if devices.is_gpu() and len(self.block) > 1:  # kernels for groups of few channels multiply the next one by zero
            remedy = ", or stack=1" if self.config.stack > 1 else ""
            raise TrainingError(
                f"{reason}{remedy}: on a GPU, numbers that are not finite can reach the other networks of a stack, so "
                "this ends all of them"
            )
        if not self.block.can_go_on_without(member, reason):
            raise TrainingError(reason)
        if self.block.done:
            raise NobodyTrains

    def _append(self, member: int, step: int, metrics: dict[str, float]) -> None:
        row = {"step": step, "timestamp": time.time_ns() // 1_000_000, **metrics}
        if member in self.curves:
            with add_path_to_errors(self.block.phases[member].path / "curve.jsonl"):
                self.curves[member].write(json.dumps(row).encode() + b"\n")
                self.curves[member].flush()

    def state_dict(self) -> dict[str, Any]:
        losses = self.losses if len(self.block) > 1 else self.losses[0]
        return {"losses": losses, "batches": self.batches, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        losses = state["losses"]
        self.losses = losses if isinstance(losses, list) else [losses]
        self.batches = state["batches"]
        self.began -= state.get("seconds", 0.0)  # earlier versions did not save it


class _Checkpointer(Callback):
    """Saves Composer's checkpoints, but not after the last step: the result of the phase follows it.

    A checkpoint is due at multiples of an interval, `CHECKPOINT_SECONDS` after the last one or the start of the phase.
    """

    def __init__(
        self,
        block: BlockPhase,
        interval: int,
        recorder: _Recorder,
        sync: Callable[[], None],
        environment: Environment,
    ):
        self.block = block
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
                self.block.upload()
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
        path = self.block.leader.checkpoint_path(step)
        part = path.with_name(f"{partial_path(path).name}.pt")  # Composer takes other suffixes for compression
        literal = str(part).replace("{", "{{").replace("}", "}}")
        try:
            checkpoint.save_checkpoint(state, literal)
            if dist.get_global_rank() == 0:
                replace(part, path)
                self.block.commit_checkpoint(step, self.environment)
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                part.unlink()
            if not isinstance(error, OSError) and not _FILE_ERROR.search(str(error)):
                raise
            reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
            raise TrainingError(
                f"{path} cannot be written ({reason}); rerun the same command to resume once there is room"
            ) from None
