"""Locks a folder of an object store with a lease, since object stores have no locks."""

import contextlib
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from lth_diet import files
from lth_diet.errors import UserError
from lth_diet.files import LockedError
from lth_diet.runs.object_store import ObjectStore


class StoreLease:
    """A lock on a folder of an object store: the newest object `.lease-<n>`, which its owner keeps rewriting.

    If two processes request the same lease, `ObjectStore.create` succeeds for only one of them.

    Args:
        store: The object store.
        folder: Name of the folder in the store.
        title: Name of the folder in error messages.
        node: Id of this node. A process takes over a lease held by its own node immediately.

    Attributes:
        number: Number of the lease. A lease with a lower number never holds again.
        is_takeover: Whether the last holder did not release its lease.
    """

    def __init__(self, store: ObjectStore, folder: str, title: str, node: str):
        self.store, self.folder, self.title = store, folder, title
        self._owner = {"node": node, "host": socket.gethostname(), "process": os.getpid(), "is": secrets.token_hex(8)}
        self._renewals = 0
        self.number = 0
        self.is_takeover = False
        self._stop = threading.Event()

    @contextlib.contextmanager
    def lock(self, timeout: float) -> Iterator["StoreLease"]:
        """Hold the lease and renew it in a thread; arguments and errors are those of `files.lock`."""
        self._acquire(timeout)
        thread = threading.Thread(target=self._renew, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()
            with contextlib.suppress(OSError):  # the lease expires by itself
                self.store.write(self._object(self.number), b"{}")

    def check(self) -> None:
        """Exit this process if another one has taken over the lease."""
        if self._newest() != self.number:
            files.exit_without_lock(self.title, "a newer lease")

    def _acquire(self, timeout: float) -> None:
        start = changed = time.monotonic()
        seen = first = self._read_newest()
        while True:
            number, owner = seen
            now = time.monotonic()
            if not owner or owner["node"] == self._owner["node"] or now - changed > files.LEASE_SECONDS:
                self.number, self.is_takeover = number + 1, bool(owner)
                created = self.store.create(self._object(self.number), self._content())
                if created and self._newest() == self.number:  # newer if this process was stopped before `create`
                    break
            elif timeout == 0 or (0 <= timeout < now - start and seen != first):
                raise LockedError(
                    f"{self.title} is being trained by another process (process {owner['process']} on "
                    f"{owner['host']}); wait for it, or stop it"
                )
            time.sleep(files.LEASE_SECONDS / 60)
            before, seen = seen, self._read_newest()
            changed = changed if seen == before else time.monotonic()
        for number in self._numbers():
            if number < self.number:
                self.store.delete(self._object(number))

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._stop.wait(files.LEASE_SECONDS / 12):
            start = time.monotonic()
            try:
                self.check()
                self._renewals += 1
                self.store.write(self._object(self.number), self._content())
                renewed = start
            except OSError as error:
                if time.monotonic() - renewed > files.LEASE_SECONDS:
                    files.exit_without_lock(self.title, error.strerror)

    def _read_newest(self) -> tuple[int, dict[str, Any]]:
        """Number and owner of the newest lease; the owner is empty once the lease has been released."""
        number = self._newest()
        try:
            owner = json.loads(self.store.read(self._object(number)) or "{}")
            return number, owner if {"node", "host", "process"} <= {*owner} else {}
        except (ValueError, TypeError):
            raise UserError(f"{self.title}/.lease-{number} was not written by lth_diet; delete it") from None

    def _newest(self) -> int:
        return max(self._numbers(), default=0)

    def _numbers(self) -> list[int]:
        found = (re.fullmatch(r"\.lease-([0-9]{1,9})", name) for name in self.store.list(self.folder))
        return [int(match[1]) for match in found if match]

    def _object(self, number: int) -> str:
        return f"{self.folder}/.lease-{number}"

    def _content(self) -> bytes:
        return json.dumps({**self._owner, "renewals": self._renewals}).encode()
