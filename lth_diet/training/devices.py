"""The device of this process: a GPU, or the CPU where there is none or none is wanted."""

import contextlib
import ctypes
import dataclasses
import functools
import os
import platform
import socket
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lth_diet.config.schema import Config
from lth_diet.errors import UserError
from lth_diet.runs.environment import Environment, code_hash, versions

if TYPE_CHECKING:
    import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""Environment variable with the GPUs that may be used; empty: none."""

BF16_FEATURES = ("avx512_bf16", "amx_bf16")
"""Instruction sets of CPUs that make bf16 faster than fp32."""

_MALLOPT = {"MALLOC_TRIM_THRESHOLD_": -1, "MALLOC_MMAP_THRESHOLD_": -3}
"""Numbers of glibc's mallopt, by the environment variables that set the same."""

_DRIVER_FILE = Path("/dev/nvidia0")
_USE_CPU = f"repair the GPU, or set {VISIBLE}= (empty) to train on the CPU"


@dataclasses.dataclass(frozen=True)
class Device:
    """Description of a device.

    Attributes:
        name: Name of the GPU or CPU, such as `NVIDIA H100 80GB HBM3`.
        capability: Compute capability of the GPU, such as `9.0`, or the instruction set that PyTorch uses on the CPU,
            such as `AVX512`.
        is_gpu: Whether it is a GPU.
        has_bf16: Whether it has bf16 arithmetic; elsewhere PyTorch emulates it, many times slower.
    """

    name: str
    capability: str
    is_gpu: bool
    has_bf16: bool


def select(local_rank: int) -> int:
    """Choose the GPU of this process, if there is one: ranks beyond the number of GPUs share them.

    Call it before anything else initializes CUDA. Without a GPU, freed memory stays with this process from then on.

    Returns:
        The number of GPUs among which the ranks of this machine choose.

    Raises:
        UserError: If a GPU is there or was asked for, but PyTorch cannot use it.
    """
    import torch

    names, choices = _visible(), 0
    if _is_mig(names):
        os.environ[VISIBLE] = names[local_rank % len(names)]
        choices = len(names)
    if count := count_gpus():
        torch.cuda.set_device(local_rank % count)
    else:
        _keep_freed_memory()
    return choices or count


def _keep_freed_memory() -> None:
    """Have glibc reuse freed memory, up to 2 GiB at once, unless the environment sets when it does not.

    It returns arrays of more than 32 MiB to Linux, which clears each page of the next one again: with larger outputs of
    layers this takes a third of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for variable, number in _MALLOPT.items():
        if mallopt and variable not in os.environ:
            mallopt(number, 2**31 - 1)


def count_gpus() -> int:
    """Number of GPUs that PyTorch can use; 0 if there is none or `CUDA_VISIBLE_DEVICES` hides them.

    Raises:
        UserError: If a GPU is there or was asked for, but PyTorch cannot use it.
    """
    names = _visible()
    if names == []:
        return 0
    import torch

    with warnings.catch_warnings(record=True) as caught:  # PyTorch warns of an unusable driver
        warnings.simplefilter("always")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count and _is_mig(names):
        return len(names)
    if count >= len(names or ()) and (count or not _DRIVER_FILE.exists()):
        return count
    asked = f"{_DRIVER_FILE} exists" if names is None else f"{VISIBLE} = {os.environ[VISIBLE]!r}"
    if count:
        raise UserError(f"{asked} in the environment: names {len(names or ())} GPUs, but PyTorch finds {count}")
    reason = " ".join(str(caught[0].message).split()) if caught else _why_none()
    raise UserError(f"{asked}, but PyTorch cannot use a GPU ({reason.rstrip('.')}); {_USE_CPU}")


def expects_gpu() -> bool | None:
    """Whether a launch on this machine trains on GPUs, as far as it is known without torch; None if it is not."""
    if _visible() == []:
        return False
    return True if _DRIVER_FILE.exists() else None


def _visible() -> list[str] | None:
    """The GPUs of `CUDA_VISIBLE_DEVICES`, which CUDA reads up to the first invalid one; None if it is not set."""
    value = os.environ.get(VISIBLE)
    if value is None:
        return None
    names = [name.strip() for name in value.split(",")]
    ends = [index for index, name in enumerate(names) if not name or name.startswith("-")]
    return names[: ends[0]] if ends else names


def _is_mig(names: list[str] | None) -> bool:
    """Whether the GPUs are MIG devices, of which a process can use one only: the first that is visible."""
    return bool(names) and names[0].startswith("MIG-")


def _why_none() -> str:
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "no reason given"


def torch_device() -> "torch.device":
    """The device on which this process trains."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def is_gpu() -> bool:
    """Whether this process trains on a GPU."""
    return torch_device().type != "cpu"


def memory() -> tuple[int, int]:
    """Free and total memory of the GPU of this process, in bytes."""
    import torch

    return torch.cuda.mem_get_info(torch_device())


def describe() -> Device:
    """Describe the device of this process."""
    import torch

    if is_gpu():
        major, minor = torch.cuda.get_device_capability()
        return Device(torch.cuda.get_device_name(), f"{major}.{minor}", True, major >= 8)
    name, features = _read_cpu()
    return Device(name, torch.backends.cpu.get_cpu_capability(), False, not features.isdisjoint(BF16_FEATURES))


def gpu_number() -> str | None:
    """Number or UUID of this process's GPU on its machine, as in `CUDA_VISIBLE_DEVICES`; None on the CPU."""
    index, names = torch_device().index, _visible()
    if index is None:
        return None
    return names[index] if names and index < len(names) else str(index)


def summary() -> dict[str, str | None]:
    """What a launch prints of this process: host, number of the GPU (None: CPU), name of the device."""
    device = describe()
    hidden = f"; {VISIBLE} = {os.environ[VISIBLE]!r}" if _visible() == [] else ""
    return {
        "host": socket.gethostname(),
        "index": gpu_number(),
        "name": device.name if device.is_gpu else f"CPU ({device.name}{hidden})",
    }


def precision(setting: str) -> str:
    """What the setting `precision` means on this device: `fp32` or `bf16`."""
    device = describe()
    return ("bf16" if device.is_gpu and device.has_bf16 else "fp32") if setting == "auto" else setting


def environment(config: Config) -> Environment:
    """What this process trains with, beyond the configuration."""
    device, packages = describe(), versions()
    return {
        "device": device.name,
        "capability": device.capability,
        "precision": precision(config.precision),
        "torch": packages["torch"],
        "composer": packages["composer"],
        "code": code_hash(),
    }


def cpu_name() -> str:
    """Name of the processor model, such as `AMD EPYC`."""
    return _read_cpu()[0]


@functools.cache
def _read_cpu() -> tuple[str, frozenset[str]]:
    """Name of the processor model, and its instruction sets as far as Linux names them."""
    found = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    name = found.get("model name") or platform.processor() or platform.machine()
    return name, frozenset(found.get("flags", "").split())
