"""Trains one phase: the only place that builds a Composer Trainer."""

import contextlib
import dataclasses
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from composer import Algorithm, Evaluator, Event, State
from composer.models import ComposerClassifier
from composer.utils import dist
from torch.optim import SGD
from torch.optim.lr_scheduler import MultiStepLR

from lth_diet.config.schema import Config
from lth_diet.data.loader import EvaluationLoader, Loader, StackedLoader
from lth_diet.errors import TrainingError
from lth_diet.runs.block import BlockPhase
from lth_diet.runs.environment import merge
from lth_diet.training import composer_internals, device_faults, devices
from lth_diet.training.callbacks import NobodyTrains, _Checkpointer, _Recorder, measure
from lth_diet.training.progress import Progress


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Steps and learning rate of a phase.

    Attributes:
        start_step: The step where training starts; `Rewind` sets Composer's clock to it.
        end_step: The step where training ends.
        lr: Learning rate up to the first milestone.
        milestones: Absolute steps at which the learning rate is multiplied by `train.gamma`.
    """

    start_step: int
    end_step: int
    lr: float
    milestones: Sequence[int] = ()


def train(
    model: ComposerClassifier,
    loader: Loader | StackedLoader,
    evaluation: EvaluationLoader,
    schedule: Schedule,
    algorithms: Sequence[Algorithm],
    block: BlockPhase,
    config: Config,
    progress: Progress,
    sync: Callable[[], None],
) -> dict[int, dict[str, Any]]:
    """Train a phase, starting from its last checkpoint if there is one, and evaluate it after its last step.

    Args:
        model: Trained in place: one network, or a stack of as many as the block has members.
        loader: Training batches. Iteration starts at the step of the Trainer's clock.
        evaluation: Test images.
        schedule: Steps and learning rate.
        algorithms: Composer Algorithms, in order.
        block: The directories of training curves and checkpoints. Members may fail, and no longer train then.
        config: For momentum, weight decay, precision and intervals.
        progress: Receives progress after every batch.
        sync: Called after a checkpoint, at most once in `SYNC_SECONDS`.

    Returns:
        By member that has trained: test_accuracy_percent, test_loss, steps, seconds (of all steps, divided by the
        number of members), timestamp (ms since 1970), environment.

    Raises:
        TrainingError: If the loss is not finite, a checkpoint cannot be written or does not restore the state of an
            Algorithm, callback, optimizer or scheduler, or the network cannot be compiled.
    """
    resume = block.checkpoint()
    environment = merge(block.leader.environment() if resume else {}, devices.environment(config))
    optimizer = SGD(
        model.parameters(),
        lr=schedule.lr,
        momentum=config.train.momentum,
        weight_decay=config.train.weight_decay,
        **_sgd_kernel(),
    )
    # PyTorch's scheduler acts on the milestone itself; Composer's schedulers act one batch later
    scheduler = MultiStepLR(optimizer, list(schedule.milestones), config.train.gamma)
    recorder = _Recorder(block, model, loader, config, progress)
    with _plain_path(resume) as load_path, _restore_errors(block, [optimizer, scheduler, recorder, *algorithms]):
        trainer = composer_internals.LeanTrainer(
            model=model,
            train_dataloader=loader,
            eval_dataloader=Evaluator(
                label="test", dataloader=evaluation, eval_interval=_evaluate_every(config.intervals.evaluate)
            ),
            max_duration=f"{schedule.end_step}ba",
            optimizers=optimizer,
            schedulers=scheduler,
            step_schedulers_every_batch=True,
            algorithms=list(algorithms),
            callbacks=[recorder, _Checkpointer(block, config.intervals.checkpoint, recorder, sync, environment)],
            device=composer_internals.training_device(),
            precision={"fp32": "fp32", "bf16": "amp_bf16"}[devices.precision(config.precision)],
            deterministic_mode=config.deterministic,
            compile_config=_compile_config() if config.compile else None,
            seed=config.seed,
            spin_dataloaders=False,  # the loader starts at the clock's step
            load_path=str(load_path) if load_path else None,
            load_progress_bar=False,
            progress_bar=False,
        )
    for group in optimizer.param_groups:  # a checkpoint has the kernel of the device that saved it
        group.update(_sgd_kernel())
    try:
        loader.current_step = lambda: int(trainer.state.timestamp.batch)
        progress.start_training(resume[1] if resume else schedule.start_step, schedule.end_step)
        with contextlib.ExitStack() as stack:
            for member in block.training if dist.get_global_rank() == 0 else ():
                curve = block.phases[member].open_curve(resume[1] if resume else -1)
                recorder.curves[member] = stack.enter_context(curve)
            if config.compile:
                stack.enter_context(_compile_errors(block))
            with contextlib.suppress(NobodyTrains):
                trainer.fit()
        common = {
            "steps": schedule.end_step - schedule.start_step,
            "seconds": round(recorder.seconds / len(block), 3),
            "timestamp": time.time_ns() // 1_000_000,
            "environment": environment,
        }
        suffix = len(block) > 1
        return {k: {**measure(trainer.state, k if suffix else None), **common} for k in block.training}
    finally:
        loader.current_step = lambda: 0
        composer_internals.close(trainer)


@contextlib.contextmanager
def _plain_path(resume: tuple[Path, int] | None) -> Iterator[Path | None]:
    """A path to the checkpoint without #, ? or {, which Composer would interpret as part of a URL or format string."""
    if resume is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "checkpoint.pt"
        link.symlink_to(resume[0].resolve())
        yield link


@contextlib.contextmanager
def _restore_errors(block: BlockPhase, objects: Sequence[Any]) -> Iterator[None]:
    """Turns Composer's warning that a checkpoint lacks the state of an object, and invalid states, into an error.

    Composer finds states in a checkpoint by class name. A training that silently resumes without its momentum or its
    learning rate gives a wrong result.
    """
    stateless = Algorithm.load_state_dict
    names = {type(each).__qualname__ for each in objects if type(each).load_state_dict is not stateless}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=rf"({'|'.join(names)}) is not in the state_dict")
        try:
            yield
        except (UserWarning, ValueError) as error:
            if block.checkpoint() is None:
                raise
            raise TrainingError(
                f"{block.name}: the checkpoint does not restore the training ({str(error).splitlines()[0]}); "
                f"delete {block.name} and rerun the same command to train it again"
            ) from None


def _sgd_kernel() -> dict[str, bool]:
    """One kernel for all weights on a GPU: PyTorch's default there takes four, and on the CPU one loop per weight."""
    return {"fused": devices.is_gpu(), "foreach": False}


def _compile_config() -> dict[str, str]:
    return {"mode": "reduce-overhead"} if devices.is_gpu() else {}


@contextlib.contextmanager
def _compile_errors(block: BlockPhase) -> Iterator[None]:
    try:
        from torch._dynamo.exc import TorchDynamoException  # the import takes a second
    except ImportError:
        yield
        return
    try:
        yield
    except TorchDynamoException as error:
        if device_faults.is_device_fault(error):
            raise
        reason = str(error).strip().splitlines()[0]
        remedy = "use" if devices.is_gpu() else "try another number of threads or"
        raise TrainingError(
            f"{block.name}: PyTorch {torch.__version__} cannot compile this network on this machine ({reason}); "
            f"{remedy} compile=false"
        ) from None


def _evaluate_every(interval: int) -> Callable[[State, Event], bool]:
    def is_due(state: State, event: Event) -> bool:
        step = int(state.timestamp.batch)
        inside = event == Event.BATCH_END and step < state.max_duration.value
        return event == Event.FIT_END or (inside and interval > 0 and step % interval == 0)

    return is_due
