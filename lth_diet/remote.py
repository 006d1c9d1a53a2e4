"""Runs on an object store: folders that are worked in here, and their copies there, which all nodes share.

runs: s3://bucket/prefix      any URL that fsspec knows, of a store that refuses to create an object that is there

A store has neither rename nor locks. So a process works in its node's cache, on a mirror of the runs, and what it may
change is one folder at a time, which it holds: the directory of a replicate, the folder of a network, or what else is
in a run directory or folder of scores. When it takes hold, its mirror of that folder becomes what is on the store. What
lasts is uploaded: checkpoints and finished phases, a file that names others after those, so that a process may be
killed between any two uploads. (One that is stopped in the middle of an upload, and woken after another took over, ends
before the next; but the store may take that one, and if it is of a curve, whose times differ, verify tells of it.)

<folder>/.lease-<n>           on the store: the n-th hold; its holder rewrites it all the time, and says when it ends
<folder>/.remote.json         in the mirror: what of it is as on the store

python -m lth_diet.remote pull s3://bucket/prefix runs      a copy, for what reads folders of runs
"""

import argparse
import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from lth_diet import phases
from lth_diet.datasets import cache_home
from lth_diet.errors import Parser, UserError, tell
from lth_diet.phases import AnotherProcessError, held, write_atomically

Versions = dict[str, str]
"""Name of an object to what changes with its content."""
T = TypeVar("T")

_RECORD = ".remote.json"
_HELD_BY_THEMSELVES = re.compile(r"(replicate|network)_[0-9]+")
_NAMING_OTHERS = ("checkpoint.json", "result.json", "manifest.json")
_VERSION = ("ETag", "etag", "mtime", "created", "size")
_SMALL = (".json", ".jsonl")
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "PermissionError")


class Store:
    """What is below a URL.

    Once it has been reached, an outage is waited out for as long as no lease can run out.

    Args:
        url: Without a / at its end.

    Raises:
        UserError: If fsspec does not know it, or lacks a package for it.
    """

    def __init__(self, url: str):
        import fsspec  # takes a quarter of a second

        self.url = url
        if "@" in url:
            raise UserError("runs: a URL with an @ is not allowed; credentials come from the environment")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            allowed = "allowed: a folder, or a URL such as s3://bucket/prefix"
            raise UserError(f"runs: {url!r} cannot be used ({error}); {allowed}") from None
        self._reached = False

    def list(self, folder: str) -> Versions:
        """All objects below a folder, whose names are relative to it."""
        root = self._path(folder)
        found = self._call(self._fs.find, root, detail=True)
        return {
            path.removeprefix(root).lstrip("/"): repr([about.get(key) for key in _VERSION])
            for path, about in found.items()
            if path != root
        }

    def read(self, name: str) -> bytes | None:
        """An object's content; None if it is not there."""
        try:
            return self._call(self._fs.cat_file, self._path(name), passes=FileNotFoundError)
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        self._call(self._fs.pipe_file, self._path(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Whether this process made the object; False if it was there."""
        create = functools.partial(self._call, self._fs.pipe_file, self._path(name), content, mode="create")
        try:
            create(passes=OSError)
        except OSError:  # each store has its own for an object that is there, which one sent twice is, too
            if self.read(name) is None:
                create()
        return self.read(name) == content

    def upload(self, path: Path, name: str) -> None:
        self._call(self._fs.put_file, str(path), self._path(name))

    def download(self, name: str, path: Path) -> None:
        """Replace a file; nothing happens if there is no such object any more."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part-{secrets.token_hex(8)}")
        try:
            self._call(self._fs.get_file, self._path(name), str(part), passes=FileNotFoundError)
            part.replace(path)
        except FileNotFoundError:
            part.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._call(self._fs.rm_file, self._path(name), passes=FileNotFoundError)

    def check(self) -> None:
        """Make sure that objects can be made here, each once.

        Raises:
            UserError: If not.
        """
        name = f".probe-{secrets.token_hex(8)}"
        try:
            self.write(name, b"1")
            again = self.create(name, b"2")
            self.delete(name)
        except OSError as error:
            raise UserError(f"runs: {self.url!r} cannot be written ({error.strerror})") from None
        if again:
            raise UserError(
                f"runs: {self.url!r} is of a store that creates an object over another, where nodes cannot keep out of "
                "each other's way; allowed: one with conditional writes (If-None-Match), such as S3"
            )

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _call(self, method: Callable[..., T], *args: Any, passes: type[OSError] | tuple = (), **options: Any) -> T:
        end = time.monotonic() + (phases.LEASE_SECONDS / 2 if self._reached else 0)
        pause = 0.1
        while True:
            try:
                result = method(*args, **options)
                self._reached = True
                return result
            except passes:
                raise
            except Exception as error:  # each store has its own, and words that may tell what is secret
                kind = type(error).__name__
                if kind in _NO_CREDENTIALS:
                    reason = "access is denied; credentials come from the environment, such as AWS_ACCESS_KEY_ID"
                elif isinstance(error, FileNotFoundError):
                    reason = "there is no such bucket or folder"
                elif time.monotonic() < end:
                    time.sleep(pause)
                    pause = min(2 * pause, 5.0)
                    continue
                else:
                    reason = f"it cannot be reached ({kind})"
            raise OSError(5, reason, self.url)


class Place:
    """A folder that one process at a time works in, and its copy if the runs are on a store.

    Args:
        path: May not exist yet.
        store: Of the runs; None: other nodes see the folder itself.
        name: Of the copy on the store.
    """

    def __init__(self, path: Path, store: Store | None = None, name: str = ""):
        self.path = path
        self._store = store
        self._name = name
        self._lease: _Lease | None = None

    def __truediv__(self, name: str) -> "Place":
        return Place(self.path / name, self._store, f"{self._name}/{name}".lstrip("/"))

    def resolve(self) -> "Place":
        """The same, wherever this process is told from."""
        return Place(self.path.resolve(), self._store, self._name)

    def __str__(self) -> str:
        """What a person calls it."""
        return f"{self._store.url}/{self._name}".rstrip("/") if self._store else str(self.path)

    @property
    def mirrored(self) -> bool:
        """Whether what counts is on a store."""
        return self._store is not None

    def check(self) -> None:
        """As `Store.check`, if there is a store."""
        if self._store:
            self._store.check()

    @contextlib.contextmanager
    def held(self, patience: float) -> Iterator[None]:
        """Keep out other processes, on all nodes, as `phases.held` does; begin with what the others left on the store.

        A process of another node that holds it and dies is succeeded after `LEASE_SECONDS`; one of this node at once.
        """
        with held(self.path, patience):
            if not self._store:
                yield
                return
            with _Lease(self._store, self._name, str(self), self._node()).held(patience) as self._lease:
                try:
                    self._pull(self._there())
                    yield
                finally:
                    self._lease = None

    def push(self) -> None:
        """Make the copy what the folder is, which this process has to hold; a file that names others comes last."""
        if not self._store:
            return
        assert self._lease, f"{self} is not held"
        self._lease.check()
        record, here = self._record(), self._here()
        changed = [name for name, stat in here.items() if record.get(name, [None])[1:] != stat]
        for name in sorted(changed, key=lambda name: (name.endswith(_NAMING_OTHERS), here[name])):
            self._store.upload(self.path / name, f"{self._name}/{name}")
        gone = record.keys() - here.keys()
        for name in sorted(gone, key=lambda name: not name.endswith(_NAMING_OTHERS)):
            self._store.delete(f"{self._name}/{name}")
        if changed or gone:
            there = self._there()
            self._keep({name: [there.get(name), *here[name]] if name in changed else record[name] for name in here})

    def tell(self, name: str) -> None:
        """Upload one file of a folder that need not be held."""
        if self._store:
            self._store.upload(self.path / name, f"{self._name}/{name}")

    def bring(self, name: str) -> None:
        """Download what `tell` uploaded."""
        if self._store:
            self._store.download(f"{self._name}/{name}", self.path / name)

    def fetch(self) -> None:
        """Make the folder what its copy is; to hold it has done so."""
        if self._store and not self._lease:
            with held(self.path, -1):
                self._pull(self._there())

    def refresh(self) -> None:
        """Bring here how far others are, in this folder and in those in it: configurations, results, curves.

        What a process of this node works in is newer here than there, and left alone.
        """
        if not self._store:
            return
        below: dict[str, Versions] = {"": {}}
        for name, version in self._store.list(self._name).items():
            first, _, rest = name.partition("/")
            if _HELD_BY_THEMSELVES.fullmatch(first):
                below.setdefault(first, {})[rest] = version
            else:
                below[""][name] = version
        for inner in self.path.glob("*_*"):
            if _HELD_BY_THEMSELVES.fullmatch(inner.name):
                below.setdefault(inner.name, {})
        for folder, there in below.items():
            place = self / folder if folder else self
            there = {name: version for name, version in there.items() if _lasts(name)}
            if place._differs(there):
                with contextlib.suppress(AnotherProcessError), held(place.path, 0):
                    place._pull(place._there(), _SMALL)

    def _differs(self, there: Versions) -> bool:
        record = self._record()
        known = {name: [*record.get(name, [])[:1]] for name in self._here() if name.endswith(_SMALL)}
        return known != {name: [version] for name, version in there.items() if name.endswith(_SMALL)}

    def _pull(self, there: Versions, kinds: str | tuple[str, ...] = "") -> None:
        """Download what differs and remove what is not there, of files whose names end so."""
        record, here = self._record(), self._here()
        for name in sorted(there, key=lambda name: (name.endswith(_NAMING_OTHERS), name)):
            if name.endswith(kinds) and record.get(name) != [there[name], *here.get(name, [])]:
                self._store.download(f"{self._name}/{name}", self.path / name)
                stat = self._stat(self.path / name)
                record[name] = [there[name], *stat]
        for name in here.keys() - there.keys():
            if name.endswith(kinds):
                (self.path / name).unlink(missing_ok=True)
        if record or here:
            self._keep({name: known for name, known in record.items() if name in there and known[1:]})

    def _there(self) -> Versions:
        return {name: version for name, version in self._store.list(self._name).items() if _lasts(name)}

    def _here(self) -> dict[str, list[int]]:
        found = {path.relative_to(self.path).as_posix(): path for path in self.path.rglob("*")}
        return {name: self._stat(path) for name, path in found.items() if _lasts(name) and path.is_file()}

    def _stat(self, path: Path) -> list[int]:
        """Time and size of a file, to tell whether it was changed; nothing if it is not there."""
        with contextlib.suppress(FileNotFoundError):
            return [path.stat().st_mtime_ns, path.stat().st_size]
        return []

    def _record(self) -> dict[str, list]:
        """Name to version on the store and to time and size here, of what was the same when it was last looked at."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.path / _RECORD).read_text())
        return {}

    def _keep(self, record: dict[str, list]) -> None:
        write_atomically(self.path / _RECORD, json.dumps(record))

    def _node(self) -> str:
        """A name for this node's mirror: two processes that hold the same folder in it are not alive at a time."""
        path = self.path.joinpath(*[".."] * len(PurePosixPath(self._name).parts)) / ".node"
        if not path.exists():
            write_atomically(path, secrets.token_hex(8))
        return path.read_text()


def _lasts(name: str) -> bool:
    """Whether a file belongs to the folder that it is named from, and not to a process or to a folder in it."""
    return _is_plain(name) and not _HELD_BY_THEMSELVES.fullmatch(name.partition("/")[0])


def _is_plain(name: str) -> bool:
    """Whether a name leads to a file below a folder, and not to one that is hidden."""
    return not any(part.startswith((".", "/")) for part in PurePosixPath(name).parts)


class _Lease:
    """The hold of one process on a folder of a store. Only `create` decides between two who want it."""

    def __init__(self, store: Store, folder: str, title: str, node: str):
        self.store, self.folder, self.title = store, folder, title
        self.about = {"node": node, "host": socket.gethostname(), "process": os.getpid(), "is": secrets.token_hex(8)}
        self.number = self.renewals = 0
        self._stop = threading.Event()

    @contextlib.contextmanager
    def held(self, patience: float) -> Iterator["_Lease"]:
        self._acquire(patience)
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
            phases.end(self.title, "a newer lease")

    def _acquire(self, patience: float) -> None:
        began = changed = time.monotonic()
        seen = first = self._look()
        while True:
            number, about = seen
            now = time.monotonic()
            if not about or about["node"] == self.about["node"] or now - changed > phases.LEASE_SECONDS:
                self.number = number + 1
                if self.store.create(self._object(self.number), self._content()):
                    break
            elif patience == 0 or (0 <= patience < now - began and seen != first):
                raise AnotherProcessError(
                    f"{self.title} is being trained by another process (process {about['process']} on "
                    f"{about['host']}); wait for it, or end it"
                )
            time.sleep(phases.LEASE_SECONDS / 60)
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
        while not self._stop.wait(phases.LEASE_SECONDS / 12):
            began = time.monotonic()
            try:
                self.check()
                self.renewals += 1
                self.store.write(self._object(self.number), self._content())
                renewed = began
            except OSError as error:
                if time.monotonic() - renewed > phases.LEASE_SECONDS:
                    phases.end(self.title, error.strerror)

    def _content(self) -> bytes:
        return json.dumps({**self.about, "renewals": self.renewals}).encode()

    def _newest(self) -> int:
        return max(self._numbers(), default=0)

    def _numbers(self) -> list[int]:
        found = (re.fullmatch(r"\.lease-([0-9]{1,9})", name) for name in self.store.list(self.folder))
        return [int(match[1]) for match in found if match]

    def _object(self, number: int) -> str:
        return f"{self.folder}/.lease-{number}"


def place(runs: str) -> Place:
    """Where the runs of a configuration are: a folder, or a URL and this node's mirror of it.

    Raises:
        UserError: If it is a URL that cannot be used.
    """
    if "://" not in runs:
        return Place(Path(runs))
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    key = hashlib.sha256(f"{endpoint} {runs.rstrip('/')}".encode()).hexdigest()[:16]
    return Place(cache_home() / "runs" / key, _store(runs.rstrip("/"), endpoint))


@functools.cache
def _store(url: str, endpoint: str) -> Store:
    return Store(url)


def pull(url: str, folder: Path) -> int:
    """Copy what is below a URL to a folder, without leases; returns the number of files."""
    store = Store(url.rstrip("/"))
    names = [name for name in store.list("") if _is_plain(name)]
    for name in sorted(names, key=lambda name: (name.endswith(_NAMING_OTHERS), name)):
        store.download(name, folder / name)
    return len(names)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m lth_diet.remote", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("pull",))
    parser.add_argument("url", help="of runs, or of one run directory")
    parser.add_argument("folder", type=Path, help="is made if it is not there")
    try:
        arguments = parser.parse_args(argv)
        print(f"{arguments.folder}: {pull(arguments.url, arguments.folder)} files")
    except (UserError, OSError) as error:
        return tell(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
