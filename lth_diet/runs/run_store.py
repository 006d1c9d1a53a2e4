"""Runs on an object store, shared by all nodes.

runs: s3://bucket/prefix      any URL that fsspec supports, of a store with conditional writes

The object store is the source of truth. It has neither renames nor locks, so each node works in a local mirror, and a
process locks the folder that it changes: the directory of a replicate, the directory of a scoring network, or the rest
of a run directory or scores directory. Locking a folder first downloads its state from the store. Checkpoints and
finished phases are uploaded, manifests after the files that they refer to, so that a process may be killed between any
two uploads. A process that was suspended in the middle of an upload and lost its lock exits before the next upload, but
the store still accepts that one. So a process that takes over a lock first copies the folder to a new generation; from
then on only that generation counts.

<folder>/.lease-<n>           on the store: the n-th lock, which its holder keeps rewriting until it releases the lock
<folder>/.generation-<n>/     on the store: the files, once the n-th lock was taken over; those of the highest n count
<folder>/.remote.json         in the mirror: version of each file that is identical on the store

python -m lth_diet pull s3://bucket/prefix runs      copies runs to a folder, for tools that read run directories
"""

import contextlib
import functools
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from lth_diet.files import LockedError, cache_folder, lock, remove, write_atomically
from lth_diet.runs.object_store import (
    COMPLETE,
    LOCKED_SEPARATELY,
    MANIFESTS,
    Objects,
    ObjectStore,
    Versions,
    current_objects,
    generation_name,
    is_safe_name,
    newest_generation,
    old_objects,
)
from lth_diet.runs.store_lease import StoreLease

_SYNC_STATE = ".remote.json"
_INDEX_SUFFIXES = (".json", ".jsonl")


class RunStore:
    """A folder that one process at a time works in, and its copy on an object store, if the runs are on one.

    Without an object store, the methods that copy files do nothing.

    Args:
        path: The local folder, which may not exist yet.
        store: Object store of the runs; None if all nodes share the local folder.
        name: Name of the folder on the object store.
    """

    def __init__(self, path: Path, store: ObjectStore | None = None, name: str = ""):
        self.path = path
        self._store = store
        self._name = name
        self._lease: StoreLease | None = None
        self._generation = 0

    def __truediv__(self, name: str) -> "RunStore":
        return RunStore(self.path / name, self._store, f"{self._name}/{name}".lstrip("/"))

    def __str__(self) -> str:
        """URL or path, as the user knows it."""
        return f"{self._store.url}/{self._name}".rstrip("/") if self._store else str(self.path)

    def resolve(self) -> "RunStore":
        """The same store with an absolute path."""
        return RunStore(self.path.resolve(), self._store, self._name)

    @property
    def is_remote(self) -> bool:
        """Whether the runs are on an object store."""
        return self._store is not None

    def check(self) -> None:
        """Check that the object store can be used; see `ObjectStore.check`."""
        if self._store:
            self._store.check()

    @contextlib.contextmanager
    def lock(self, timeout: float) -> Iterator[None]:
        """Lock the folder against processes on all nodes and download its state; see `files.lock`.

        If the holder dies, a process on the same node takes over at once, on another node after `LEASE_SECONDS`.
        """
        with lock(self.path, timeout):
            if not self._store:
                yield
                return
            with StoreLease(self._store, self._name, str(self), self._node_id()).lock(timeout) as self._lease:
                try:
                    self._download(self._list_remote())
                    self._choose_generation(self._lease)
                    yield
                finally:
                    self._lease = None

    def upload(self) -> None:
        """Upload the changes of the folder, manifests last; the caller must hold its lock."""
        if not self._store:
            return
        assert self._lease, f"{self} is not locked"
        self._lease.check()
        state, local = self._read_state(), self._list_local()
        changed = [name for name, stat in local.items() if state.get(name, [None])[1:] != stat]
        for name in sorted(changed, key=lambda name: (name.endswith(MANIFESTS), local[name])):
            self._store.upload(self.path / name, self._object(name))
        deleted = state.keys() - local.keys()
        for name in sorted(deleted, key=lambda name: not name.endswith(MANIFESTS)):
            self._store.delete(self._object(name))
        if changed or deleted:
            versions = {name: version for name, (_, version) in self._list_remote().items()}
            self._write_state(
                {name: [versions.get(name), *local[name]] if name in changed else state[name] for name in local}
            )

    def _choose_generation(self, lease: StoreLease) -> None:
        """Begin a new generation of the folder on the store if its lock was taken over; delete older ones."""
        listing = self._store.list(self._name)
        self._generation = lease.number if lease.is_takeover else newest_generation(listing)
        if lease.is_takeover:
            lease.check()
            local = self._list_local()
            for name in sorted(local, key=lambda name: (name.endswith(MANIFESTS), local[name])):
                self._store.upload(self.path / name, self._object(name))
            self._store.write(self._object(COMPLETE), b"")
            versions = {name: version for name, (_, version) in self._list_remote().items()}
            self._write_state({name: [versions.get(name), *local[name]] for name in local})
        for name in old_objects(listing, self._generation):
            self._store.delete(f"{self._name}/{name}")

    def _object(self, name: str) -> str:
        return f"{self._name}/{generation_name(self._generation, name)}"

    def upload_file(self, name: str) -> None:
        """Upload one file of a folder that is never locked, such as a log."""
        if self._store:
            self._store.upload(self.path / name, f"{self._name}/{name}")

    def download_file(self, name: str) -> None:
        """Download one file of a folder that is never locked."""
        if self._store:
            self._store.download(f"{self._name}/{name}", self.path / name)

    def pull(self) -> None:
        """Make the folder identical to its copy on the object store; a locked folder already is."""
        if self._store and not self._lease:
            with lock(self.path, -1):
                self._download(self._list_remote())

    def refresh_index(self) -> None:
        """Download the configurations, results and curves of this folder and of the folders in it.

        Folders that a process of this node has locked are skipped: their local state is newer.
        """
        if not self._store:
            return
        listings: dict[str, Versions] = {"": {}}
        for name, version in self._store.list(self._name).items():
            first, _, rest = name.partition("/")
            if LOCKED_SEPARATELY.fullmatch(first):
                listings.setdefault(first, {})[rest] = version
            else:
                listings[""][name] = version
        for inner in self.path.glob("*_*"):
            if LOCKED_SEPARATELY.fullmatch(inner.name):
                listings.setdefault(inner.name, {})
        for name, listing in listings.items():
            folder = self / name if name else self
            if folder._index_differs(_select(listing)):
                with contextlib.suppress(LockedError), lock(folder.path, 0):
                    folder._download(folder._list_remote(), _INDEX_SUFFIXES)

    def _index_differs(self, remote: Objects) -> bool:
        state = self._read_state()
        known = {name: [*state.get(name, [])[:1]] for name in self._list_local() if name.endswith(_INDEX_SUFFIXES)}
        return known != {name: [version] for name, (_, version) in remote.items() if name.endswith(_INDEX_SUFFIXES)}

    def _download(self, remote: Objects, suffixes: str | tuple[str, ...] = "") -> None:
        """Download files that differ and delete those that do not exist remotely, of names with these suffixes."""
        state, local = self._read_state(), self._list_local()
        for name in sorted(remote, key=lambda name: (name.endswith(MANIFESTS), name)):
            found, version = remote[name]
            if name.endswith(suffixes) and state.get(name) != [version, *local.get(name, [])]:
                self._store.download(f"{self._name}/{found}", self.path / name)
                state[name] = [version, *self._stat(self.path / name)]
        for name in local.keys() - remote.keys():
            if name.endswith(suffixes):
                remove(self.path / name)
        if state or local:
            self._write_state({name: entry for name, entry in state.items() if name in remote and entry[1:]})

    def _list_remote(self) -> Objects:
        return _select(self._store.list(self._name))

    def _list_local(self) -> dict[str, list[int]]:
        paths = {path.relative_to(self.path).as_posix(): path for path in self.path.rglob("*")}
        return {name: self._stat(path) for name, path in paths.items() if _belongs_to_folder(name) and path.is_file()}

    def _stat(self, path: Path) -> list[int]:
        """Modification time (ns) and size (bytes) of a file; empty if it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            return [path.stat().st_mtime_ns, path.stat().st_size]
        return []

    def _read_state(self) -> dict[str, list]:
        """Remote version, local modification time and size of each file, as of the last time both copies were equal."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.path / _SYNC_STATE).read_text())
        return {}

    def _write_state(self, state: dict[str, list]) -> None:
        write_atomically(self.path / _SYNC_STATE, json.dumps(state))

    def _node_id(self) -> str:
        """Id of this node's mirror, in which local locks already exclude other processes."""
        path = self.path.joinpath(*[".."] * len(PurePosixPath(self._name).parts)) / ".node"
        if not path.exists():
            write_atomically(path, secrets.token_hex(8))
        return path.read_text()


def open_run_store(runs: str) -> RunStore:
    """Open the runs of a configuration: a folder, or a URL with this node's mirror of it.

    Raises:
        UserError: If the URL cannot be used.
    """
    if "://" not in runs:
        return RunStore(Path(runs))
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    key = hashlib.sha256(f"{endpoint} {runs.rstrip('/')}".encode()).hexdigest()[:16]
    return RunStore(cache_folder() / "runs" / key, _open_object_store(runs.rstrip("/"), endpoint))


@functools.cache
def _open_object_store(url: str, endpoint: str) -> ObjectStore:
    return ObjectStore(url)


def _select(listing: Versions) -> Objects:
    """The objects of a folder that count."""
    return {name: found for name, found in current_objects(listing).items() if _belongs_to_folder(name)}


def _belongs_to_folder(name: str) -> bool:
    """Whether a file is neither hidden nor in a subfolder that is locked separately."""
    return is_safe_name(name) and not LOCKED_SEPARATELY.fullmatch(name.partition("/")[0])
