"""A lease on a folder of an object store, which has no locks."""

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
    """The hold of one process on a folder of a store. Only `create` decides between two who want it."""

    def __init__(self, store: ObjectStore, folder: str, title: str, node: str):
        self.store, self.folder, self.title = store, folder, title
        self.about = {"node": node, "host": socket.gethostname(), "process": os.getpid(), "is": secrets.token_hex(8)}
        self.number = self.renewals = 0
        self._stop = threading.Event()

    @contextlib.contextmanager
    def lock(self, timeout: float) -> Iterator["StoreLease"]:
        self._acquire(timeout)
        thread = threading.Thread(target=self._renew, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()
            with contextlib.suppress(OSError):  # it runs out
                self.store.write(self._object(self.number), b"{}")

    def check(self) -> None:
        """End this process if another has taken over."""
        if self._newest() != self.number:
            files.exit_without_lock(self.title, "a newer lease")

    def _acquire(self, timeout: float) -> None:
        began = changed = time.monotonic()
        seen = first = self._look()
        while True:
            number, about = seen
            now = time.monotonic()
            if not about or about["node"] == self.about["node"] or now - changed > files.LEASE_SECONDS:
                self.number = number + 1
                if self.store.create(self._object(self.number), self._content()):
                    break
            elif timeout == 0 or (0 <= timeout < now - began and seen != first):
                raise LockedError(
                    f"{self.title} is being trained by another process (process {about['process']} on "
                    f"{about['host']}); wait for it, or end it"
                )
            time.sleep(files.LEASE_SECONDS / 60)
            before, seen = seen, self._look()
            changed = changed if seen == before else time.monotonic()
        for number in self._numbers():
            if number < self.number:
                self.store.delete(self._object(number))

    def _look(self) -> tuple[int, dict[str, Any]]:
        """The newest lease, and what it says: nothing, if it has ended."""
        number = self._newest()
        try:
            about = json.loads(self.store.read(self._object(number)) or "{}")
            return number, about if {"node", "host", "process"} <= {*about} else {}
        except (ValueError, TypeError):
            raise UserError(f"{self.title}/.lease-{number} was not written by lth_diet; delete it") from None

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._stop.wait(files.LEASE_SECONDS / 12):
            began = time.monotonic()
            try:
                self.check()
                self.renewals += 1
                self.store.write(self._object(self.number), self._content())
                renewed = began
            except OSError as error:
                if time.monotonic() - renewed > files.LEASE_SECONDS:
                    files.exit_without_lock(self.title, error.strerror)

    def _content(self) -> bytes:
        return json.dumps({**self.about, "renewals": self.renewals}).encode()

    def _newest(self) -> int:
        return max(self._numbers(), default=0)

    def _numbers(self) -> list[int]:
        found = (re.fullmatch(r"\.lease-([0-9]{1,9})", name) for name in self.store.list(self.folder))
        return [int(match[1]) for match in found if match]

    def _object(self, number: int) -> str:
        return f"{self.folder}/.lease-{number}"
