"""The processes of one launch: who this one is, which replicates are its own, and what the ranks tell each other."""

import contextlib
import ctypes
import dataclasses
import os
import signal
from collections.abc import Iterator, Sequence
from typing import TypeVar

from lth_diet.errors import UserError

Item = TypeVar("Item")
_VARIABLES = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": 0}
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None)  # looked up now: a forked process may not
_PR_SET_PDEATHSIG = 1


def exit_with_parent(parent: int | None = None) -> None:
    """Have the system kill this process when the one that started it ends, however it ends (Linux only).

    Args:
        parent: Its process id, to end at once if it is gone already.
    """
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """What the launcher's environment says of this process."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int

    @classmethod
    def from_environment(cls) -> "ProcessInfo":
        """Of this process.

        Raises:
            UserError: If a variable is not a number.
        """
        number = {}
        for key, default in _VARIABLES.items():
            try:
                number[key] = int(os.environ.get(key, default))
            except ValueError:
                raise UserError(f"{key}: {os.environ[key]!r} is not allowed; allowed: what a launcher sets") from None
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        return cls(number["RANK"], number["WORLD_SIZE"], number["LOCAL_RANK"], address, number["MASTER_PORT"])

    def exit_with_launcher(self) -> None:
        """Ranks that outlive a killed launcher would hold their replicates against the next launch."""
        if "WORLD_SIZE" in os.environ:
            exit_with_parent()

    def shard(self, items: Sequence[Item]) -> list[Item]:
        """This rank's share."""
        return list(items[self.rank :: self.world_size])

    def detach(self) -> None:
        """Make this process a world of one, with one device, before Composer is imported."""
        import torch

        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
        if devices:
            os.environ["CUDA_VISIBLE_DEVICES"] = devices[self.local_rank % len(devices)]
        one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NODE_RANK": "0"}
        os.environ.update(one)
        for key in ("MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(key, None)

    @contextlib.contextmanager
    def as_single_process(self) -> Iterator[None]:
        """For a while this process is a world of one, on its own device; then it can join the others."""
        import torch
        from torch import distributed

        one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        before = {key: os.environ.get(key) for key in one}
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(self.local_rank)
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
        os.environ.update(one)
        try:
            yield
        finally:
            distributed.destroy_process_group()
            os.environ.update({key: value for key, value in before.items() if value is not None})
            for key in (key for key, value in before.items() if value is None):
                del os.environ[key]
