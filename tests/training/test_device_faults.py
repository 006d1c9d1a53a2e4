"""Which errors are faults of a GPU, and which are the experiment's own."""

import types

import pytest
import torch
from torch import distributed

from lth_diet.errors import DeviceError, TrainingError
from lth_diet.training import device_faults

GIB = 2**30
FAULTS = [
    "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported at some other call",
    "CUDA error: uncorrectable ECC error encountered",
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA driver error: unknown error",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "Unable to find a valid cuDNN algorithm to run convolution",
    "GET was unable to find an engine to execute this computation",
    "Triton Error [CUDA]: an illegal memory access was encountered",
    'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":830',
    "CUDA unknown error - this may be due to an incorrectly set up environment",
    "backend='inductor' raised:\nRuntimeError: CUDA error: unspecified launch failure\n\nSet TORCHDYNAMO_VERBOSE=1",
]
CONNECTIONS = [
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:317, remote process exited",
    "NCCL Error 6: remote process exited or there was a network error",
    "NCCL communicator was aborted on rank 1.",
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:20882",
]
OTHERS = [
    RuntimeError("Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"),
    RuntimeError("Deterministic behavior was enabled, but this operation uses CuBLAS and you have CUDA >= 10.2."),
    RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation"),
    RuntimeError("Cannot re-initialize CUDA in forked subprocess."),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x4 and 5x3)"),
    ValueError("CUDA error: not one that PyTorch raises"),
    TrainingError("the loss is nan"),
]


@pytest.mark.parametrize("text", FAULTS)
def test_an_error_of_cuda_or_its_libraries_is_a_fault_of_the_gpu_in_one_line(text):
    error = device_faults.explain(RuntimeError(text))
    assert isinstance(error, DeviceError) and device_faults.is_device_fault(RuntimeError(text))
    assert "GPU of " in str(error) and " failed (" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("error", [*map(RuntimeError, CONNECTIONS), distributed.DistBackendError("socket timeout")])
def test_a_lost_connection_to_another_rank_is_a_fault(error):
    assert device_faults.is_device_fault(error)
    assert str(device_faults.explain(error)) == f"the connection between ranks failed ({error})"


@pytest.mark.parametrize("error", OTHERS)
def test_an_error_of_the_experiment_or_the_code_is_not_a_fault(error):
    assert not device_faults.is_device_fault(error)
    assert device_faults.explain(error) is error


@pytest.fixture
def memory(monkeypatch):
    """Sets the memory of the GPU in GiB: in all, of this process, of others."""

    def use(total, own, others):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: ((total - own - others) * GIB, total * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: own * GIB)

    return use


@pytest.mark.parametrize(
    ("own", "others", "kind", "advice"),
    [
        (78, 1, TrainingError, "reduce train.batch_size or model.width"),
        (2, 1, TrainingError, "reduce train.batch_size or model.width"),  # of one allocation beyond the GPU
        (39, 40, DeviceError, "start fewer processes per GPU"),
        (70, 9, DeviceError, "start fewer processes per GPU"),
        (1, 79, DeviceError, "start fewer processes per GPU"),
    ],
)
def test_out_of_memory_is_a_fault_if_other_processes_use_the_gpu(memory, own, others, kind, advice):
    memory(80, own, others)
    for error in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("backend='inductor' raised:\nOutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."),
    ):
        explained = device_faults.explain(error)
        assert type(explained) is kind
        assert f"({own}.0 of 80.0 GiB used by this process, {others}.0 by others); " in str(explained)
        assert advice in str(explained)


def test_out_of_memory_on_a_gpu_that_does_not_answer_is_a_fault(monkeypatch):
    def fail():
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert isinstance(device_faults.explain(torch.OutOfMemoryError("CUDA out of memory.")), DeviceError)


def test_the_index_of_the_gpu_and_its_host_are_named(monkeypatch):
    monkeypatch.setattr(device_faults.devices, "torch_device", lambda: torch.device("cuda", 3))
    monkeypatch.setattr(device_faults, "socket", types.SimpleNamespace(gethostname=lambda: "node-7"))
    error = device_faults.explain(RuntimeError("CUDA error: unspecified launch failure\nmore"))
    assert str(error) == "GPU 3 of node-7 failed (CUDA error: unspecified launch failure)"
