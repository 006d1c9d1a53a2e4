"""Hides the GPUs of a machine from the tests, because most of them compare bits of the CPU; import it before torch.

Tests marked `gpu` use the fixture `gpu`: processes that they start see the GPUs. Without a GPU they are skipped.
"""

import ctypes
import os
import subprocess
import sys

import pytest

VISIBLE = "CUDA_VISIBLE_DEVICES"
_ORIGINAL = "LTH_DIET_TEST_GPUS"  # the value to restore; the workers of pytest-xdist inherit it
_UNSET = "unset"

os.environ.setdefault(_ORIGINAL, os.environ.get(VISIBLE, _UNSET))
os.environ[VISIBLE] = ""


@pytest.fixture
def gpu(monkeypatch):
    """Show the GPUs to the processes that a test starts, as they are outside the tests."""
    if os.environ[_ORIGINAL] == _UNSET:
        monkeypatch.delenv(VISIBLE)
    else:
        monkeypatch.setenv(VISIBLE, os.environ[_ORIGINAL])
    if reason := _why_none():
        pytest.skip(reason)


def _why_none():
    """Why PyTorch can use no GPU in a new process; empty if it can."""
    try:
        ctypes.CDLL("libcuda.so.1")  # answers at once where there is no driver
    except OSError:
        return "there is no driver of a GPU (libcuda.so.1)"
    count = "import torch; raise SystemExit(not torch.cuda.is_available())"
    return "PyTorch cannot use a GPU" if subprocess.run([sys.executable, "-c", count]).returncode else ""
