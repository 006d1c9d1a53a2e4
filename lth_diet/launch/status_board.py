"""Exchange of statuses between the ranks of a launch."""

import contextlib
import datetime
import json
import re
import signal
import socket
import time
from typing import Any

from lth_diet.errors import UserError
from lth_diet.launch.processes import START_OR_UNSET, ProcessInfo

_START_TIMEOUT = datetime.timedelta(minutes=5)  # on one machine, where all ranks wait for the same data
_TIMEOUT = datetime.timedelta(hours=1)
_USUAL_START = datetime.timedelta(seconds=10)  # of the ranks on one machine, one after the other


def _wait_for_server(host: str, port: int, timeout: datetime.timedelta) -> None:
    """Wait until rank 0 listens, at most for `timeout`: the attempts of the store are up to a second apart."""
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout.total_seconds()):
            return
        time.sleep(0.02)


class StatusBoard:
    """Lets ranks publish their status and wait for each other, whether or not they train as one world.

    Args:
        process: This rank. Rank 0 hosts the store.
        start_timeout: How long to wait for all ranks to start; None: longer if another machine may still prepare data.

    Raises:
        UserError: If the ranks do not all start in time, as where variables of another launch are left over.
    """

    def __init__(self, process: ProcessInfo, start_timeout: datetime.timedelta | None = None):
        self.process = process
        self._status, self._lost = "", False
        if process.world_size > 1:
            from torch.distributed import DistError, TCPStore

            host, port, ranks = process.address, process.port, process.world_size
            if start_timeout is None:
                start_timeout = _START_TIMEOUT if process.local_world_size == ranks else _TIMEOUT
            if process.rank:
                _wait_for_server(host, port, min(_USUAL_START, start_timeout))
            try:
                # use_libuv: that server (PyTorch 2.7) closes the connection if a message ends where its buffer ends
                self.store = TCPStore(host, port, ranks, process.rank == 0, timeout=start_timeout, use_libuv=False)
            except DistError as error:
                reason = str(error).splitlines()[0]
                if re.search("timed? ?out", reason, re.IGNORECASE):
                    reason = f"the {ranks} ranks have not all started within {start_timeout.total_seconds():g} seconds"
                raise UserError(
                    f"WORLD_SIZE={ranks}, MASTER_ADDR={host} and MASTER_PORT={port} in the environment: {reason}; "
                    f"{START_OR_UNSET}"
                ) from None
            self.store.set_timeout(_TIMEOUT)

    def gather(self, text: str) -> list[str]:
        """Return the texts of all ranks, by rank, on rank 0; on other ranks, nothing. Call it once."""
        if self.process.rank:
            self.store.set(f"gathered_{self.process.rank}", text)
            return []
        return [text, *(self.store.get(f"gathered_{rank}").decode() for rank in range(1, self.process.world_size))]

    def publish(self, status: Any) -> None:
        """Replace the status of this rank with a new one, any JSON value.

        Raises:
            DistError: If rank 0 cannot be reached. Later calls do nothing, so that this rank can report it and exit.
        """
        self._status = json.dumps(status)
        if self.process.rank and not self._lost:
            try:
                self.store.set(f"status_{self.process.rank}", self._status)
            except Exception:
                self._lost = True
                raise

    def read(self) -> dict[int, Any]:
        """Return the status of each rank that has published one. Rank 0 only."""
        texts = {0: self._status} if self._status else {}
        for rank in range(1, self.process.world_size):
            if self.store.check([f"status_{rank}"]):
                texts[rank] = self.store.get(f"status_{rank}").decode()
        return {rank: json.loads(text) for rank, text in texts.items()}

    def init_process_group(self) -> None:
        """Initialize the process group of all ranks."""
        from torch.distributed import PrefixStore

        if self.process.world_size > 1:
            world = PrefixStore("world", self.store)
            rank, ranks = self.process.rank, self.process.world_size
            self.process.init_process_group(store=world, rank=rank, world_size=ranks, timeout=_TIMEOUT)

    def destroy_process_group(self) -> None:
        """Free what the process group of all ranks holds. Every rank calls it, after the last collective."""
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()

    def wait_for_others(self) -> None:
        """Wait on rank 0 until every other rank is at the barrier, which rank 0 can then hold closed."""
        if self.process.rank == 0:
            self._wait_for([f"here_{rank}" for rank in range(1, self.process.world_size)])

    def barrier(self) -> None:
        """Wait until every rank has arrived, at the end of a launch. Rank 0, which hosts the store, leaves last.

        A rank that failed waits here too: the launcher terminates all ranks when one exits with an error. Every rank
        ignores SIGTERM before the first one leaves. A rank that cannot reach rank 0 leaves at once.
        """
        if self.process.world_size > 1 and not self._lost:
            self._meet("here")
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._meet("finished")
            if self.process.rank:
                self.store.set(f"gone_{self.process.rank}", "")
            else:
                self._wait_for([f"gone_{rank}" for rank in range(1, self.process.world_size)])

    def _meet(self, where: str) -> None:
        self.store.set(f"{where}_{self.process.rank}", "")
        self._wait_for([f"{where}_{rank}" for rank in range(self.process.world_size)])

    def _wait_for(self, keys: list[str]) -> None:
        while keys and not self.store.check(keys):
            time.sleep(0.1)
