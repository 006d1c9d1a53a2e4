import ctypes
import multiprocessing
import os
import resource
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import TINY

import recipes.sweep
from lth_diet.config import loading
from lth_diet.errors import UserError
from lth_diet.launch import checks, command_line
from lth_diet.launch.processes import ProcessInfo
from lth_diet.sweep import scheduler
from lth_diet.sweep.grid import Sweep
from lth_diet.training import devices
from recipes import imp, score


class Cuda:
    """Stands for PyTorch's view of the GPUs; notes each call with the value of CUDA_VISIBLE_DEVICES."""

    def __init__(self, monkeypatch, count, capability=(9, 0), warning=None):
        self.count, self.warning = count, warning
        self.calls, self.current = [], 0
        answers = {
            "device_count": lambda: self.count,
            "current_device": lambda: self.current,
            "get_device_name": lambda: f"GPU {self.current}",
            "get_device_capability": lambda: capability,
            "set_device": lambda index: setattr(self, "current", index),
            "is_available": self.is_available,
            "mem_get_info": lambda device: (60 << 30, 80 << 30),
        }
        for name, answer in answers.items():
            monkeypatch.setattr(torch.cuda, name, self.noting(name, answer))

    def noting(self, name, answer):
        def call(*arguments):
            self.calls.append((name, os.environ.get(devices.VISIBLE)))
            return answer(*arguments)

        return call

    def is_available(self):
        if self.warning:
            warnings.warn(self.warning, UserWarning, stacklevel=1)
        return self.count > 0


@pytest.fixture
def rank_three(monkeypatch):
    """Environment of the last of four ranks on one machine."""
    values = {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 3, "LOCAL_WORLD_SIZE": 4, "MASTER_PORT": 1}
    for key, value in values.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.delenv(devices.VISIBLE, raising=False)


@pytest.mark.parametrize("recipe", [imp, score])
@pytest.mark.parametrize("precision", ["auto", "fp32", "bf16"])
@pytest.mark.parametrize(("visible", "chosen"), [(None, 3), ("4,5,6,7", 3), ("MIG-a,MIG-b,MIG-c,MIG-d", 0)])
def test_a_rank_has_its_own_gpu_before_anything_else_asks_cuda(
    tiny, monkeypatch, rank_three, recipe, precision, visible, chosen
):
    class Reached(Exception):
        pass

    def board(process):
        raise Reached

    if visible:
        monkeypatch.setenv(devices.VISIBLE, visible)
    mig = visible is not None and "MIG" in visible
    cuda = Cuda(monkeypatch, 1 if mig else 4)
    monkeypatch.setattr(command_line, "StatusBoard", board)
    with pytest.raises(Reached):
        recipe.main(["-f", str(tiny("easy")), f"precision={precision}", "replicates=4", "scores.networks=4"])
    assert cuda.current == chosen and devices.torch_device() == torch.device("cuda", chosen)
    first = [name for name, _ in cuda.calls].index("set_device")
    assert {name for name, _ in cuda.calls[:first]} <= {"is_available", "device_count"}  # independent of the device
    assert {seen for _, seen in cuda.calls} == {"MIG-d" if mig else visible}


def test_ranks_beyond_the_number_of_gpus_share_them(monkeypatch):
    cuda = Cuda(monkeypatch, 2)
    monkeypatch.delenv(devices.VISIBLE, raising=False)
    chosen = []
    for rank in range(5):
        devices.select(rank)
        chosen.append(cuda.current)
    assert chosen == [0, 1, 0, 1, 0]


def test_nccl_ranks_beyond_the_number_of_gpus_are_rejected(tiny, monkeypatch, rank_three):
    Cuda(monkeypatch, 2)
    config = loading.load_config(tiny(), ["parallelism=data"])
    with pytest.raises(
        UserError, match="^command line: 4 ranks for 2 GPUs on this machine; use composer -n 2 or fewer"
    ):
        checks.check_device(config, ProcessInfo.from_environment())


@pytest.mark.parametrize(
    ("visible", "count", "warning", "sentence"),
    [
        ("0", 0, None, "CUDA_VISIBLE_DEVICES = '0', but PyTorch cannot use a GPU (Found no NVIDIA driver"),
        ("0", 0, "Error 802: system not yet initialized", "PyTorch cannot use a GPU (Error 802: system not yet init"),
        ("0,1,2,3", 1, None, "CUDA_VISIBLE_DEVICES = '0,1,2,3' in the environment: names 4 GPUs, but PyTorch finds 1"),
        (None, 0, "driver is too old", "nvidia0 exists, but PyTorch cannot use a GPU (driver is too old)"),
    ],
)
def test_a_gpu_that_is_there_or_asked_for_and_cannot_be_used_is_an_error_with_the_reason(
    tmp_path, monkeypatch, visible, count, warning, sentence
):
    Cuda(monkeypatch, count, warning=warning)
    monkeypatch.setattr(torch._C, "_cuda_init", no_driver)
    monkeypatch.setattr(devices, "_DRIVER_FILE", tmp_path / "nvidia0")
    (tmp_path / "nvidia0").touch()
    if visible is None:
        monkeypatch.delenv(devices.VISIBLE, raising=False)
    else:
        monkeypatch.setenv(devices.VISIBLE, visible)
    with pytest.raises(UserError) as error:
        devices.count_gpus()
    assert sentence in str(error.value)


def no_driver():
    raise RuntimeError("Found no NVIDIA driver on your system.\nMore.")


@pytest.mark.parametrize("visible", ["", " ", "-1", ",0"])
def test_hidden_gpus_are_not_asked_for_and_the_launch_says_what_hides_them(tiny, tmp_path, monkeypatch, visible):
    cuda = Cuda(monkeypatch, 0)
    monkeypatch.setattr(devices, "_DRIVER_FILE", tmp_path)
    monkeypatch.setenv(devices.VISIBLE, visible)
    assert devices.count_gpus() == 0 and not cuda.calls
    config = loading.load_config(tiny())
    assert devices.summary()["name"].endswith(f"; CUDA_VISIBLE_DEVICES = {visible!r})")
    assert devices.environment(config)["precision"] == "fp32"


@pytest.mark.parametrize(
    ("capability", "automatic"), [((7, 0), "fp32"), ((7, 5), "fp32"), ((8, 0), "bf16"), ((12, 0), "bf16")]
)
def test_bf16_is_for_gpus_with_bf16_arithmetic(tiny, monkeypatch, capability, automatic):
    Cuda(monkeypatch, 1, capability)
    monkeypatch.delenv(devices.VISIBLE, raising=False)
    process = ProcessInfo(0, 1, 0, "", 0)
    found = devices.environment(loading.load_config(tiny()))
    assert found["precision"] == automatic and found["capability"] == "{}.{}".format(*capability)
    config = loading.load_config(tiny(), ["precision=bf16"])
    if automatic == "fp32":
        expected = r"^precision = 'bf16': must be auto or fp32 on this device \(GPU 0\): it has compute capability 7"
        with pytest.raises(UserError, match=expected):
            checks.check_device(config, process)
    else:
        checks.check_device(config, process)


SWEEP_GPUS = [("", 2), ("gpus=1", 1), ("gpus=0", 0), ("gpus_per_run=0", 0)]


@pytest.mark.parametrize(("settings", "gpus"), SWEEP_GPUS)
def test_a_local_sweep_uses_the_gpus_that_it_asks_for(grid, monkeypatch, settings, gpus):
    Cuda(monkeypatch, 2)
    monkeypatch.delenv(devices.VISIBLE, raising=False)
    sweep = Sweep(grid(), ["gpus_per_run=1", *settings.split()])
    assert scheduler._local_gpus(sweep.settings) == gpus


def test_a_sweep_that_asks_for_more_gpus_than_the_machine_has_is_rejected(grid, capsys, monkeypatch):
    Cuda(monkeypatch, 1)
    monkeypatch.delenv(devices.VISIBLE, raising=False)
    assert recipes.sweep.main(["-f", str(grid()), "gpus_per_run=1", "gpus=4"]) == 2
    assert "error: gpus = 4: must be at most 1, the GPUs of this machine" in capsys.readouterr().err


def test_no_import_asks_cuda(place):
    (place / "a.yaml").write_text(TINY.format(arm="easy"))
    program = (
        "import torch; torch._C._cuda_getDeviceCount = torch._C._cuda_init = lambda: print('asked')\n"
        "import lth_diet.imp, lth_diet.scoring, lth_diet.launch.command_line, lth_diet.sweep.scheduler, recipes.sweep"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (0, ""), process.stderr


@pytest.mark.parametrize(
    ("flags", "has_bf16"), [("fpu avx512f avx512bw", False), ("fpu avx512_bf16", True), ("amx_tile amx_bf16", True)]
)
def test_a_cpu_has_bf16_if_linux_lists_the_instructions_but_auto_stays_fp32(tiny, monkeypatch, flags, has_bf16):
    text = f"processor : 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n\nprocessor : 1\nflags : none\n"
    monkeypatch.setattr(devices.Path, "read_text", lambda path: text)
    monkeypatch.setattr(devices, "_read_cpu", devices._read_cpu.__wrapped__)  # without its cache
    device = devices.describe()
    assert (device.name, device.has_bf16, devices.precision("auto")) == ("Some CPU", has_bf16, "fp32")
    monkeypatch.setattr(devices, "describe", lambda: device)
    config, process = loading.load_config(tiny(), ["precision=bf16"]), ProcessInfo(0, 1, 0, "", 0)
    if has_bf16:
        checks.check_device(config, process)
    else:
        expected = r"on this device \(Some CPU\): it has neither avx512_bf16 nor amx_bf16$"
        with pytest.raises(UserError, match=expected):
            checks.check_device(config, process)


def select_and_count_page_faults(faults):
    """Puts page faults of a second array of 64 MiB, after an equal one was freed."""
    libc = ctypes.CDLL(None)
    for number in devices._MALLOPT.values():
        libc.mallopt(number, 131072)  # whatever earlier tests have set
    libc.malloc_trim(0)
    devices.select(0)
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        b"x" * (64 << 20)
    faults.put(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is of glibc")
@pytest.mark.parametrize("is_set", [False, True], ids=["unset", "set by the user"])
def test_memory_freed_on_the_cpu_is_reused_unless_the_environment_says_when(monkeypatch, is_set):
    monkeypatch.setenv(devices.VISIBLE, "")
    for variable in devices._MALLOPT:
        monkeypatch.setenv(variable, "131072") if is_set else monkeypatch.delenv(variable, raising=False)
    fork = multiprocessing.get_context("fork")
    faults = fork.SimpleQueue()
    process = fork.Process(target=select_and_count_page_faults, args=(faults,))
    process.start()
    process.join(60)
    pages = (64 << 20) // resource.getpagesize()
    assert process.exitcode == 0 and (faults.get() > 0.9 * pages) is is_set
