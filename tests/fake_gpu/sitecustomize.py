"""Gives every process with this folder in PYTHONPATH FAKE_GPUS GPUs, for which the meta device stands; see metagpu.py.

Weights on it have no values, so checkpoints are empty files, and a training cannot resume from them.
"""

import importlib.util
import os
import sys
import types
from pathlib import Path


def _patch_torch(torch):
    current = [0]

    def count():
        return 0 if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "99") else int(os.environ["FAKE_GPUS"])

    fakes = {
        "is_available": lambda: count() > 0,
        "device_count": count,
        "current_device": lambda: current[0],
        "set_device": lambda index: current.__setitem__(0, int(index)),
        "get_device_name": lambda *args: "Meta H100",
        "get_device_capability": lambda *args: (9, 0),
        "get_device_properties": lambda index: types.SimpleNamespace(uuid=f"GPU-{index}"),
        "is_bf16_supported": lambda *args, **options: True,
        "get_arch_list": lambda: ["sm_90"],
        "mem_get_info": lambda *args: (70 << 30, 80 << 30),
        "memory_allocated": lambda *args: 1 << 20,
        "max_memory_allocated": lambda index=0: int(index == current[0]),
        "memory_stats": lambda *args: {},
        "is_initialized": lambda: True,
        "init": lambda: None,
        "synchronize": lambda *args: None,
        "empty_cache": lambda: None,
        "set_sync_debug_mode": lambda mode: None,
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda *args: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *args, **options: None,
        "nccl": types.SimpleNamespace(version=lambda: (2, 26, 2)),
    }
    for name, fake in fakes.items():
        setattr(torch.cuda, name, fake)
    torch._C._cuda_hasPrimaryContext = lambda index: index == current[0]


def _patch_devices(devices):
    import torch

    devices.torch_device = lambda: torch.device("meta" if devices.count_gpus() else "cpu")


def _patch_callbacks(callbacks):
    from lth_diet.training import devices

    if devices.is_gpu():
        callbacks.checkpoint.save_checkpoint = lambda state, path: Path(path).write_bytes(b"")


def _patch_trainer(trainer):
    import torch
    from metagpu import meta_gpu

    from lth_diet.training import devices

    if devices.is_gpu():
        names = torch.cuda.get_device_name, torch.cuda.get_device_capability
        trainer.fake = meta_gpu()  # until the process ends
        trainer.fake.__enter__()
        torch.cuda.get_device_name, torch.cuda.get_device_capability = names


class _Patcher:
    """Patches modules as soon as they are imported."""

    patches = {  # noqa: RUF012
        "torch": _patch_torch,
        "lth_diet.training.devices": _patch_devices,
        "lth_diet.training.callbacks": _patch_callbacks,
        "lth_diet.training.trainer": _patch_trainer,
    }

    def find_spec(self, name, path=None, target=None):
        if name not in self.patches:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.patches[name](module)

        spec.loader.exec_module = exec_module
        return spec


if "FAKE_GPUS" in os.environ:
    sys.meta_path.insert(0, _Patcher())
