"""The processes of a launch: ranks, the replicates that each trains, and their ends."""

import contextlib
import ctypes
import dataclasses
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lth_diet.errors import UserError, print_error
from lth_diet.training import devices

Item = TypeVar("Item")
LAUNCHER_VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "BASE_RANK", "MASTER_ADDR", "MASTER_PORT"
)  # fmt: skip
"""Environment variables that `composer` sets, or reads as defaults of its options."""

_VARIABLES = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 0, "MASTER_PORT": 0}
START_OR_UNSET = "use composer -n to start several ranks, or unset these variables"
_REPORT_TIMEOUT = 60.0  # seconds in which the first rank starts and validates its input
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None)  # looked up at import: unsafe in a forked process
_PR_SET_PDEATHSIG = 1


def exit_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent exits for any reason (Linux only).

    Args:
        parent: Process id of the parent. This process exits at once if the parent is gone already.
    """
    if _PRCTL is not None:
        _PRCTL(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def report_invalid_input(error: UserError | OSError) -> int:
    """Print an error of the input once per node and return the exit status, 2.

    All ranks validate the same input, and the launcher terminates the others as soon as one exits. So ranks other than
    the first of their node wait to be terminated. They print their error only if rank 0 has none.
    """
    with contextlib.suppress(UserError):  # an invalid variable of the launcher
        process = ProcessInfo.from_environment()
        if process.local_rank:
            process.exit_with_launcher()
            process.wait_for_first_rank()
    return print_error(error)


@dataclasses.dataclass(frozen=True)
class ProcessInfo:
    """Rank of this process and address of rank 0, from the launcher's environment variables."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int

    @classmethod
    def from_environment(cls) -> "ProcessInfo":
        """Read RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Without them, this is the only process.

        Raises:
            UserError: If a variable is not a number, or no launcher can have set them, as where they are left over.
        """
        number = {}
        for key, default in _VARIABLES.items():
            try:
                number[key] = int(os.environ.get(key, default))
            except ValueError:
                raise UserError(
                    f"{key} = {os.environ[key]!r} in the environment: must be a number, as a launcher sets it"
                ) from None
        world = number["WORLD_SIZE"]
        local_world = number["LOCAL_WORLD_SIZE"] if "LOCAL_WORLD_SIZE" in os.environ else world
        ranks_fit = 0 <= number["RANK"] < world and 0 <= number["LOCAL_RANK"] < local_world <= world
        if not ranks_fit or (world > 1 and not number["MASTER_PORT"]):
            found = ", ".join(f"{key}={os.environ[key]}" for key in _VARIABLES if key in os.environ)
            raise UserError(f"{found} in the environment: no launcher sets these together; {START_OR_UNSET}")
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        return cls(number["RANK"], number["WORLD_SIZE"], number["LOCAL_RANK"], address, number["MASTER_PORT"])

    @property
    def local_world_size(self) -> int:
        """Number of ranks on this machine."""
        text = os.environ.get("LOCAL_WORLD_SIZE", "")
        return int(text) if text.isdecimal() else self.world_size

    @property
    def launch(self) -> str:
        """Name of this launch, which its ranks on one node share, and no other launch has."""
        if self.world_size == 1:
            return f"{os.getpid()} {time.time_ns()}"
        started = ""  # process ids repeat in containers
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            started = boot + Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[19]
        return f"{socket.gethostname()} {os.getppid()} {started} {self.address}:{self.port}"

    def exit_with_launcher(self) -> None:
        """Exit when the launcher is killed. A rank that outlived it would keep its replicates locked."""
        if "WORLD_SIZE" in os.environ:
            exit_with_parent()

    def wait_for_first_rank(self) -> None:
        """Wait until rank 0 has accepted its input and listens for the other ranks, for a minute at most."""
        end = time.monotonic() + _REPORT_TIMEOUT
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                socket.create_connection((self.address, self.port), timeout=1).close()
                return
            time.sleep(0.1)

    def shard(self, items: Sequence[Item]) -> list[Item]:
        """Return this rank's share of some items."""
        return list(items[self.rank :: self.world_size])

    def detach(self) -> None:
        """Make this process a single-process world. Call it before Composer is imported."""
        one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "NODE_RANK": "0"}
        os.environ.update(one)
        for key in ("MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(key, None)

    def init_process_group(self, **world: Any) -> None:
        """Initialize a process group, which Composer then uses, on this rank's device."""
        from torch import distributed

        if devices.is_gpu():
            distributed.init_process_group("nccl", device_id=devices.torch_device(), **world)
        else:
            distributed.init_process_group("gloo", **world)

    @contextlib.contextmanager
    def as_single_process(self) -> Iterator[None]:
        """Make this process a single-process world on its own device inside the context."""
        from torch import distributed

        one = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        before = {key: os.environ.get(key) for key in one}
        self.init_process_group(store=distributed.HashStore(), rank=0, world_size=1)
        os.environ.update(one)
        try:
            yield
        finally:
            distributed.destroy_process_group()
            os.environ.update({key: value for key, value in before.items() if value is not None})
            for key in (key for key, value in before.items() if value is None):
                del os.environ[key]
