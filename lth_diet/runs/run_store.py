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

python -m lth_diet pull s3://bucket/prefix runs      a copy, for what reads folders of runs
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from lth_diet.files import LockedError, cache_folder, lock, write_atomically
from lth_diet.runs.object_store import NAMING_OTHERS, ObjectStore, Versions, is_plain
from lth_diet.runs.store_lease import StoreLease

_RECORD = ".remote.json"
_HELD_BY_THEMSELVES = re.compile(r"(replicate|network)_[0-9]+")
_SMALL = (".json", ".jsonl")


class RunStore:
    """A folder that one process at a time works in, and its copy if the runs are on a store.

    Args:
        path: May not exist yet.
        store: Of the runs; None: other nodes see the folder itself.
        name: Of the copy on the store.
    """

    def __init__(self, path: Path, store: ObjectStore | None = None, name: str = ""):
        self.path = path
        self._store = store
        self._name = name
        self._lease: StoreLease | None = None

    def __truediv__(self, name: str) -> "RunStore":
        return RunStore(self.path / name, self._store, f"{self._name}/{name}".lstrip("/"))

    def resolve(self) -> "RunStore":
        """The same, wherever this process is told from."""
        return RunStore(self.path.resolve(), self._store, self._name)

    def __str__(self) -> str:
        """What a person calls it."""
        return f"{self._store.url}/{self._name}".rstrip("/") if self._store else str(self.path)

    @property
    def is_remote(self) -> bool:
        """Whether what counts is on a store."""
        return self._store is not None

    def check(self) -> None:
        """As `Store.check`, if there is a store."""
        if self._store:
            self._store.check()

    @contextlib.contextmanager
    def lock(self, timeout: float) -> Iterator[None]:
        """Keep out other processes, on all nodes, as `phases.held` does; begin with what the others left on the store.

        A process of another node that holds it and dies is succeeded after `LEASE_SECONDS`; one of this node at once.
        """
        with lock(self.path, timeout):
            if not self._store:
                yield
                return
            with StoreLease(self._store, self._name, str(self), self._node()).lock(timeout) as self._lease:
                try:
                    self._pull(self._there())
                    yield
                finally:
                    self._lease = None

    def upload(self) -> None:
        """Make the copy what the folder is, which this process has to hold; a file that names others comes last."""
        if not self._store:
            return
        assert self._lease, f"{self} is not held"
        self._lease.check()
        record, here = self._record(), self._here()
        changed = [name for name, stat in here.items() if record.get(name, [None])[1:] != stat]
        for name in sorted(changed, key=lambda name: (name.endswith(NAMING_OTHERS), here[name])):
            self._store.upload(self.path / name, f"{self._name}/{name}")
        gone = record.keys() - here.keys()
        for name in sorted(gone, key=lambda name: not name.endswith(NAMING_OTHERS)):
            self._store.delete(f"{self._name}/{name}")
        if changed or gone:
            there = self._there()
            self._keep({name: [there.get(name), *here[name]] if name in changed else record[name] for name in here})

    def upload_file(self, name: str) -> None:
        """Upload one file of a folder that need not be held."""
        if self._store:
            self._store.upload(self.path / name, f"{self._name}/{name}")

    def download_file(self, name: str) -> None:
        """Download what `tell` uploaded."""
        if self._store:
            self._store.download(f"{self._name}/{name}", self.path / name)

    def pull(self) -> None:
        """Make the folder what its copy is; to hold it has done so."""
        if self._store and not self._lease:
            with lock(self.path, -1):
                self._pull(self._there())

    def refresh_index(self) -> None:
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
            there = {name: version for name, version in there.items() if _is_shared(name)}
            if place._differs(there):
                with contextlib.suppress(LockedError), lock(place.path, 0):
                    place._pull(place._there(), _SMALL)

    def _differs(self, there: Versions) -> bool:
        record = self._record()
        known = {name: [*record.get(name, [])[:1]] for name in self._here() if name.endswith(_SMALL)}
        return known != {name: [version] for name, version in there.items() if name.endswith(_SMALL)}

    def _pull(self, there: Versions, kinds: str | tuple[str, ...] = "") -> None:
        """Download what differs and remove what is not there, of files whose names end so."""
        record, here = self._record(), self._here()
        for name in sorted(there, key=lambda name: (name.endswith(NAMING_OTHERS), name)):
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
        return {name: version for name, version in self._store.list(self._name).items() if _is_shared(name)}

    def _here(self) -> dict[str, list[int]]:
        found = {path.relative_to(self.path).as_posix(): path for path in self.path.rglob("*")}
        return {name: self._stat(path) for name, path in found.items() if _is_shared(name) and path.is_file()}

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


def _is_shared(name: str) -> bool:
    """Whether a file belongs to the folder that it is named from, and not to a process or to a folder in it."""
    return is_plain(name) and not _HELD_BY_THEMSELVES.fullmatch(name.partition("/")[0])


def open_run_store(runs: str) -> RunStore:
    """Where the runs of a configuration are: a folder, or a URL and this node's mirror of it.

    Raises:
        UserError: If it is a URL that cannot be used.
    """
    if "://" not in runs:
        return RunStore(Path(runs))
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    key = hashlib.sha256(f"{endpoint} {runs.rstrip('/')}".encode()).hexdigest()[:16]
    return RunStore(cache_folder() / "runs" / key, _object_store(runs.rstrip("/"), endpoint))


@functools.cache
def _object_store(url: str, endpoint: str) -> ObjectStore:
    return ObjectStore(url)
