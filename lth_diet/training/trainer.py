"""The only place that builds, and closes, a Composer Trainer."""

import atexit
import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from composer import Algorithm, Evaluator, Event, State
from composer.core import Engine
from composer.models import ComposerClassifier
from composer.utils import dist
from torch.distributed.checkpoint.state_dict import _get_fqns
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from lth_diet.config.schema import Config
from lth_diet.data.loader import EvaluationLoader, Loader
from lth_diet.errors import TrainingError
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.training import composer_internals
from lth_diet.training.callbacks import _Checkpointer, _Recorder, measure
from lth_diet.training.progress import Progress


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Steps from `start_step` (where Rewind sets the clock) to `end_step`; the rate drops at absolute milestones."""

    start_step: int
    end_step: int
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
    phase: PhaseDirectory,
    config: Config,
    progress: Progress,
    sync: Callable[[], None],
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
        sync: Called after a checkpoint, if `TELL_SECONDS` have gone by since the last time.

    Returns:
        test_accuracy_percent, test_loss, steps, seconds (of this attempt), timestamp (ms).

    Raises:
        TrainingError: If the loss is not finite, a checkpoint cannot be written or the network cannot be compiled.
    """
    resume = phase.checkpoint()
    if dist.get_global_rank() == 0:
        phase.truncate_curve(resume[1] if resume else -1)
    optimizer = SGD(
        model.parameters(),
        lr=schedule.lr,
        momentum=config.train.momentum,
        weight_decay=config.train.weight_decay,
    )
    recorder = _Recorder(phase, loader, config.intervals, progress)
    began = time.monotonic()
    with _plain_path(resume) as load_path:
        trainer = composer_internals.LeanTrainer(
            model=model,
            train_dataloader=loader,
            eval_dataloader=Evaluator(
                label="test", dataloader=evaluation, eval_interval=_evaluate_every(config.intervals.evaluate)
            ),
            max_duration=f"{schedule.end_step}ba",
            optimizers=optimizer,
            # PyTorch's scheduler counts steps itself, so that a milestone has no lag behind Composer's clock
            schedulers=MultiStepLR(optimizer, list(schedule.milestones), config.train.gamma),
            step_schedulers_every_batch=True,
            algorithms=list(algorithms),
            callbacks=[recorder, _Checkpointer(phase, config.intervals.checkpoint, sync)],
            device=composer_internals.SingleRankGPU() if device() == "gpu" and dist.get_world_size() == 1 else device(),
            precision=_precision(config),
            deterministic_mode=config.deterministic,
            compile_config=_compile_config() if config.compile else None,
            seed=config.seed,
            spin_dataloaders=False,  # the loader jumps to the clock's step
            load_path=str(load_path) if load_path else None,
            load_progress_bar=False,
            progress_bar=False,
        )
    try:
        loader.current_step = lambda: int(trainer.state.timestamp.batch)
        progress.start_training(resume[1] if resume else schedule.start_step, schedule.end_step)
        with _compile_errors(phase) if config.compile else contextlib.nullcontext():
            trainer.fit()
        return {
            **measure(trainer.state),
            "steps": schedule.end_step - schedule.start_step,
            "seconds": round(time.monotonic() - began, 3),
            "timestamp": time.time_ns() // 1_000_000,
        }
    finally:
        loader.current_step = lambda: 0
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


def _compile_config() -> dict[str, str]:
    return {"mode": "reduce-overhead"} if device() == "gpu" else {}


@contextlib.contextmanager
def _compile_errors(phase: PhaseDirectory) -> Iterator[None]:
    from torch._dynamo.exc import TorchDynamoException  # takes a second

    try:
        yield
    except TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0]
        raise TrainingError(
            f"{phase.path}: PyTorch {torch.__version__} cannot compile this network on this machine ({reason}); "
            "try another number of threads, or compile=false"
        ) from None


def _evaluate_every(interval: int) -> Callable[[State, Event], bool]:
    def is_due(state: State, event: Event) -> bool:
        step = int(state.timestamp.batch)
        inside = event == Event.BATCH_END and step < state.max_duration.value
        return event == Event.FIT_END or (inside and interval > 0 and step % interval == 0)

    return is_due
