"""The meta device stands for a GPU, on a machine that has none.

Real trainings run on it: Composer's Trainer, IMP and Scoring. Tensors of the meta device have a shape but no values, so
everything that is read from it is zero, and a training takes as long as its dispatcher. Autocast does not act on it.

    with meta_gpu() as gpu:
        imp.IMP(config, [replicate], progress, track).run()
    assert gpu.reads == []

`gpu.images` keeps what is between two places apart: `[copy for copy in gpu.copies if copy.is_of_images]`.
"""

import contextlib
import dataclasses
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from composer.devices import DeviceGPU
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lth_diet.data import loader as loaders
from lth_diet.data.loader import Loader, StackedLoader
from lth_diet.training import composer_internals, devices

META = torch.device("meta")
ATEN = torch.ops.aten
_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_OURS = ("/lth_diet/", "/composer/", "/torchmetrics/")


@dataclasses.dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        step: Step of the batch that was made last in this training; None outside of trainings.
        op: Operator of PyTorch, such as `aten._local_scalar_dense`.
        where: Innermost lines of lth_diet, Composer and torchmetrics, such as `trainer.py:3636 < callbacks.py:80`.
    """

    step: int | None
    op: str
    where: str


@dataclasses.dataclass(frozen=True)
class Copy(Event):
    """A copy between the host and the GPU.

    Attributes:
        source, target: Types of devices.
        pinned: Whether it is from pinned memory of the host. A copy that does not block and is not pinned may wait.
    """

    source: str
    target: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocking: bool
    pinned: bool

    @property
    def is_of_images(self) -> bool:
        return self.dtype == torch.uint8 and len(self.shape) == 4


class MetaGPU(TorchDispatchMode):
    """Records what an operator does with the GPU.

    Attributes:
        reads: Operators whose result, or its shape, the host needs: it waits for all that was launched before.
        copies: Copies between host and GPU, except those of numbers without a dimension from the host.
        mixtures: Operators on tensors of both, which fail on a GPU.
        trainings: Number of trainings so far.
        ops: Operators dispatched to the GPU, without views and allocations, by (training, step) and name. A list of
            tensors in a `_foreach` or `_fused` operator counts once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[Event] = []
        self.copies: list[Copy] = []
        self.mixtures: list[Event] = []
        self.ops: dict[tuple[int, int | None], Counter[str]] = {}
        self.trainings = 0
        self.step: int | None = None

    def launches(self, step: int | None, training: int = 1) -> int:
        """Number of operators dispatched to the GPU in a step of a training, the first one being 1."""
        return self.ops[training, step].total()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_gpu = [tensor for tensor in tensors if tensor.device == META]
        if on_gpu or torch.device(kwargs.get("device") or "cpu") == META:
            name = str(func).removesuffix(".default")
            if not func.is_view and "empty" not in name:
                self.ops.setdefault((self.trainings, self.step), Counter())[name] += 1
            if func in (ATEN._to_copy.default, ATEN.copy_.default):
                return self._copy(func, args, kwargs)
            if _is_read(func, args):
                self.reads.append(self._event(Event, func))
                assert len(self.reads) < 1000, f"a loop that ends by a value on the GPU? {self.reads[-1]}"
                return _on_host(func, args, kwargs)
            if func == ATEN._fused_sgd_.default:  # has no kernel for the meta device
                return None
            if any(tensor.device != META and tensor.dim() for tensor in tensors):
                self.mixtures.append(self._event(Event, func))
        return func(*args, **kwargs)

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        new = func == ATEN._to_copy.default
        if new:
            source, target = args[0], torch.device(kwargs.get("device") or args[0].device)
            blocking = not kwargs.get("non_blocking", False)
        else:
            source, target = args[1], args[0].device
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if source.device != target and (source.dim() or source.device == META):
            pinned = getattr(source, "is_pinned_for_test", False)
            values = source.device.type, target.type, tuple(source.shape), source.dtype, blocking, pinned
            self.copies.append(self._event(Copy, func, *values))
        if source.device == META and target != META:
            return _on_host(func, args, kwargs) if new else args[0].zero_()
        return func(*args, **kwargs)

    def _event(self, kind: type, func: Any, *values: Any) -> Any:
        stack = [
            frame for frame in reversed(traceback.extract_stack()) if any(part in frame.filename for part in _OURS)
        ]
        lines = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in stack[:3]]
        return kind(self.step, str(func).removesuffix(".default"), " < ".join(lines), *values)


def _is_read(func: Any, args: Any) -> bool:
    if func == ATEN.index.Tensor:  # its shape depends on values only if it has a mask
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return not _READS.isdisjoint(func.tags)


def _on_host(func: Any, args: Any, kwargs: Any) -> Any:
    """Apply an operator to zeros on the host in place of tensors on the GPU; tensors that it returns are of the GPU."""

    def to_host(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device != META:
            return tensor
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu").zero_()

    result = func(*tree_map_only(torch.Tensor, to_host, args), **tree_map_only(torch.Tensor, to_host, kwargs))
    if func in (ATEN._to_copy.default, ATEN.copy_.default):
        return result
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(META), result)


@contextlib.contextmanager
def meta_gpu() -> Iterator[MetaGPU]:
    """Make the meta device the GPU of this process inside the context, and record what is done with it."""
    gpu = MetaGPU()
    swap = torch.__future__.get_swap_module_params_on_conversion()
    with pytest.MonkeyPatch.context() as patch:

        def init(device, device_id=None, *, allow_tf32=True):
            device._device = META

        def batch(kind):
            def make(loader, step, original=kind.batch):
                gpu.step = step
                return original(loader, step)

            return make

        def fit(trainer, *args, original=composer_internals.LeanTrainer.fit, **kwargs):
            gpu.trainings += 1
            try:
                return original(trainer, *args, **kwargs)
            finally:
                gpu.step = None

        def pin_memory(tensor):
            pinned = tensor.clone()
            pinned.is_pinned_for_test = True
            return pinned

        patch.setattr(torch.Tensor, "pin_memory", pin_memory)
        patch.setattr(DeviceGPU, "__init__", init)
        patch.setattr(devices, "torch_device", lambda: META)
        patch.setattr(torch.cuda, "get_device_name", lambda *args: "meta")
        patch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
        patch.setattr(torch.cuda, "mem_get_info", lambda *args: (80 << 30, 80 << 30))
        patch.setattr(loaders, "_copies", {})  # an empty GPU
        for kind in (Loader, StackedLoader):
            patch.setattr(kind, "batch", batch(kind))
        patch.setattr(composer_internals.LeanTrainer, "fit", fit)
        for kind in ("foreach", "fused"):  # where PyTorch uses these optimizers: on the meta device as on CUDA
            name = f"_get_{kind}_kernels_supported_devices"
            supported = [*getattr(torch.utils._foreach_utils, name)(), "meta"]
            for module in ("torch.utils._foreach_utils", "torch.optim.optimizer"):
                patch.setattr(sys.modules[module], name, lambda supported=supported: supported)
        torch.__future__.set_swap_module_params_on_conversion(True)  # `.to(META)` keeps the parameters of optimizers
        try:
            with gpu:
                yield gpu
        finally:
            torch.__future__.set_swap_module_params_on_conversion(swap)
