"""Faults of a GPU or of the connection between ranks, which are not the experiment's: another attempt can succeed.

CUDA reports an error of a kernel wherever the host next waits for the GPU, and no later call of the process succeeds.
"""

import contextlib
import re
import socket

import torch
from torch.distributed import DistError

from lth_diet.errors import DeviceError, TrainingError
from lth_diet.training import devices

_GPU = re.compile(
    r"\b(CUDA( driver)?|cuDNN( Frontend)?|cuBLAS|cuSOLVER|cuSPARSE|cuFFT|NVML) error\b|Triton Error \[CUDA\]"
    r"|\b(CUDNN|CUBLAS|CUSOLVER|CUSPARSE|CUFFT)_STATUS_|\bNVML_SUCCESS\b|\berror from cuda"
    r"|\bCUDA (unknown error|driver initialization failed)|\bfind (a valid cuDNN algorithm|an engine) to\b",
    re.IGNORECASE,
)
_CONNECTION = re.compile(r"\bNCCL (error|communicator)\b|\bnccl\w+Error\b|\bgloo/", re.IGNORECASE)
_MEMORY = re.compile(r"\bCUDA out of memory\b")
_OTHERS = 0.1, 2**30  # share and bytes of a GPU's memory: more than the CUDA context and work space of this process


def is_device_fault(error: Exception) -> bool:
    """Whether an error comes from a GPU, its memory or the connection between ranks, also as reported by a compiler."""
    return _is_out_of_memory(error) or _fault(error) is not None


def explain(error: Exception) -> Exception:
    """Return the error to report for one raised in training.

    Out of memory is the experiment's own error if other processes use less than a tenth of the GPU, or less than 1 GiB,
    because another attempt would end in the same way. Otherwise it is a fault like any other.

    Returns:
        DeviceError for a fault; TrainingError for memory that the experiment needs and no GPU of this size has;
        `error` itself if it is neither.
    """
    if _is_out_of_memory(error):
        return _explain_memory(error)
    fault = _fault(error)
    return error if fault is None else DeviceError(fault)


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, RuntimeError) and bool(
        isinstance(error, torch.OutOfMemoryError) or _MEMORY.search(str(error))
    )


def _fault(error: Exception) -> str | None:
    """The fault in a sentence; None if the error is something else."""
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    if reason := _line(_CONNECTION, text) or (_line(re.compile(""), text) if isinstance(error, DistError) else ""):
        return f"the connection between ranks failed ({reason})"
    if reason := _line(_GPU, text):
        return f"{_gpu()} failed ({reason})"
    return None


def _line(pattern: re.Pattern, text: str) -> str:
    """The first line that matches; empty if none does."""
    return next((line.strip() for line in text.splitlines() if pattern.search(line)), "")


def _gpu() -> str:
    index = None
    with contextlib.suppress(RuntimeError):  # no call to CUDA succeeds after some faults
        index = devices.gpu_number()
    return f"{'the GPU' if index is None else f'GPU {index}'} of {socket.gethostname()}"


def _explain_memory(error: Exception) -> Exception:
    try:
        free, total = torch.cuda.mem_get_info()
        own = torch.cuda.memory_reserved()
    except RuntimeError:
        return DeviceError(f"{_gpu()} is out of memory ({_line(_MEMORY, str(error))})")
    others = total - free - own
    numbers = f"{own / 2**30:.1f} of {total / 2**30:.1f} GiB used by this process, {others / 2**30:.1f} by others"
    if others >= max(_OTHERS[0] * total, _OTHERS[1]):
        return DeviceError(
            f"{_gpu()} is out of memory ({numbers}); if this happens again, start fewer processes per GPU "
            "(gpus_per_run of a sweep, composer -n)"
        )
    return TrainingError(
        f"{_gpu()} is out of memory ({numbers}); reduce train.batch_size or model.width, or use a GPU with more memory"
    )
