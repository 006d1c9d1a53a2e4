"""Hooks in the trainings of a process, which record what it does with the device."""

import collections
import gc
import inspect
import os
import resource
import signal
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from composer import Algorithm, Event
from torch.utils._python_dispatch import TorchDispatchMode

from lth_diet.training import callbacks, devices, trainer

_FIRST_STEPS = 3
"""Steps at the beginning of a training that may wait for the device: libraries initialize themselves."""


class Hooks:
    """Hooks in the trainings of this process, and what they saw.

    Args:
        options: HOOKS of probe.py.

    Attributes:
        trainings: One entry per training.
        waits: Number of waits for the device inside steps, by place in the code.
        guarded_steps: Steps that were watched for waits.
    """

    def __init__(self, options: dict[str, Any]):
        self.options = options
        self.trainings: list[dict[str, Any]] = []
        self.waits: collections.Counter[str] = collections.Counter()
        self.guarded_steps = 0

    def patch(self) -> None:
        """Add the hooks to every training from now on, and save checkpoints however fast the training is."""
        callbacks.CHECKPOINT_SECONDS = 0.0
        original, signature = trainer.train, inspect.signature(trainer.train)

        def train(*args: Any, **kwargs: Any) -> dict[int, dict[str, Any]]:
            bound = signature.bind(*args, **kwargs).arguments
            phase, schedule, intervals = bound["block"].leader, bound["schedule"], bound["config"].intervals
            entry = {"phase": phase.name, "before": memory()}
            self.trainings.append(entry)
            added: list[Algorithm] = []
            if self.options.get("kill", [None])[0] == phase.name:
                added.append(_Kill(self.options["kill"][1]))
            if self.options.get("fault", [None])[0] == phase.name:
                added.append(_Fault(self.options["fault"][1]))
            if "sync" in self.options:
                periods = (intervals.log, intervals.checkpoint, intervals.evaluate or schedule.end_step)
                is_row = lambda step: any(step % period == 0 for period in (*periods, schedule.end_step))
                added.append(_Watch(self, schedule.start_step + _FIRST_STEPS, is_row))
            bound["algorithms"] = [*bound["algorithms"], *added]
            results = original(**bound)
            entry |= {"after": memory(), "seconds": sum(result["seconds"] for result in results.values())}
            return results

        trainer.train = train

    def record(self) -> dict[str, Any]:
        """What this process did."""
        is_gpu = devices.is_gpu()
        return {
            "device": torch.cuda.current_device() if is_gpu else "cpu",
            "description": vars(devices.describe()),
            "gpus": [_use_of(index) for index in range(torch.cuda.device_count())] if is_gpu else [],
            "trainings": self.trainings,
            "waits": dict(self.waits.most_common()),
            "guarded_steps": self.guarded_steps,
        }


def _use_of(index: int) -> dict[str, Any]:
    """What this process did with a GPU: its id, allocated bytes, and whether there is a context."""
    has_context = getattr(torch._C, "_cuda_hasPrimaryContext", lambda index: None)
    allocated = torch.cuda.max_memory_allocated(index) if torch.cuda.is_initialized() else 0
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    return {"uuid": str(uuid), "allocated": allocated, "context": has_context(index)}


def memory() -> dict[str, Any]:
    """Memory of the device and of this process in bytes, and image tensors of this process by device."""
    gc.collect()
    found = {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "images": _images()}
    if devices.is_gpu():
        torch.cuda.synchronize()
        free, total = torch.cuda.mem_get_info()
        found |= {"free": free, "total": total, "allocated": torch.cuda.memory_allocated()}
    return found


def _images() -> dict[str, int]:
    """Bytes of the live tensors that hold images (uint8, four dimensions), on the CPU and on GPUs."""
    storages = {}
    for each in gc.get_objects():
        if type(each) is torch.Tensor and each.dtype == torch.uint8 and each.dim() == 4:
            storage = each.untyped_storage()
            where = "cpu" if each.device.type == "cpu" else "gpu"
            storages[where, storage.data_ptr()] = storage.nbytes()
    totals: collections.Counter[str] = collections.Counter()
    for (where, _), size in storages.items():
        totals[where] += size
    return dict(totals)


class _At(Algorithm):
    """Acts once, after a number of steps."""

    def __init__(self, step: int):
        self.step = step

    def match(self, event: Event, state: Any) -> bool:
        return event == Event.BATCH_START and int(state.timestamp.batch) == self.step


class _Kill(_At):
    """Kills this process."""

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class _Fault(_At):
    """Breaks the GPU's context of this process, as an error of the hardware does: an index is out of bounds."""

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        one = torch.zeros(1, device=devices.torch_device())
        one[torch.ones(1, dtype=torch.long, device=one.device)].sum()


class _Watch(Algorithm):
    """Watches training for waits for the device, except in the first steps and when a row is written after a step.

    Composer's Algorithms act before its callbacks at the end of a batch, so the row is written outside the watch.
    """

    def __init__(self, hooks: Hooks, after: int, is_row: Callable[[int], bool]):
        self.hooks, self.after, self.is_row = hooks, after, is_row
        self.guard = _SyncDebug(hooks) if devices.is_gpu() else _Reads(hooks)
        self.inside = False

    def match(self, event: Event, state: Any) -> bool:
        return event in (Event.BATCH_START, Event.BATCH_END)

    def apply(self, event: Event, state: Any, logger: Any) -> None:
        step = int(state.timestamp.batch)  # completed steps
        if event == Event.BATCH_START and step >= self.after:
            self.hooks.guarded_steps += 1
            if not self.inside:
                self.guard.__enter__()
                self.inside = True
        elif event == Event.BATCH_END and self.inside and self.is_row(step):
            self.guard.__exit__(None, None, None)
            self.inside = False


class _SyncDebug:
    """CUDA's debug mode for synchronization."""

    def __init__(self, hooks: Hooks):
        self.hooks = hooks

    def __enter__(self) -> None:
        if self.hooks.options["sync"] == "warn":
            warnings.filterwarnings("always", message=".*synchronizing CUDA operation")
            warnings.showwarning = lambda *_: self.hooks.waits.update([_place()])
        torch.cuda.set_sync_debug_mode(self.hooks.options["sync"])

    def __exit__(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


class _Reads(TorchDispatchMode):
    """Reads of single numbers from tensors."""

    def __init__(self, hooks: Hooks):
        super().__init__()
        self.hooks = hooks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.ops.aten._local_scalar_dense.default:
            self.hooks.waits.update([_place()])
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """The innermost lines of this project and of Composer on the stack."""
    frames = [frame for frame in traceback.extract_stack() if Path(frame.filename) != Path(__file__)]
    ours = [frame for frame in frames if any(part in frame.filename for part in ("/lth_diet/", "/composer/"))]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed((ours or frames)[-2:]))
