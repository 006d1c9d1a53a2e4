"""SHA-256 of the files of a folder, remembered in the cache folder: only new and changed files are read."""

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from filelock import FileLock

from lth_diet.errors import UserError
from lth_diet.files import cache_folder, read_json, sha256, write_json

Stamp = tuple[int, int, int, int]
_UNSETTLED_NS = 2 * 10**9  # a file may change again within one tick of its clock, of up to 2 s


def hash_files(root: Path, statuses: Mapping[str, os.stat_result]) -> dict[str, str]:
    """Return the SHA-256 of each file, in hexadecimal digits. Concurrent processes read each file once.

    A file is read if its size, modification time, change time or inode differ from those remembered. Without a
    writable cache folder nothing is remembered.

    Args:
        root: The folder.
        statuses: Status of each file, by its path relative to the folder.

    Raises:
        OSError: If a file cannot be read.
    """
    key = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    memory = cache_folder() / "file_hashes" / f"{key}.json"
    stamps = {name: _stamp(status) for name, status in statuses.items()}
    hashes = _recall(memory, stamps)
    if len(hashes) == len(stamps):
        return hashes
    with _try_lock(memory) as locked:
        hashes = _recall(memory, stamps) if locked else hashes
        missing = [name for name in stamps if name not in hashes]
        now = time.time_ns()
        hashes |= {name: sha256(root / name) for name in missing}
        settled = {name: stamp for name, stamp in stamps.items() if max(stamp[1:3]) < now - _UNSETTLED_NS}
        if locked and not settled.keys().isdisjoint(missing):
            with contextlib.suppress(OSError):
                write_json(memory, {"files": {name: [hashes[name], *stamp] for name, stamp in settled.items()}})
    return hashes


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _recall(memory: Path, stamps: Mapping[str, Stamp]) -> dict[str, str]:
    with contextlib.suppress(UserError):
        known = read_json(memory, {"files": dict})["files"]
        return {name: known[name][0] for name, stamp in stamps.items() if known.get(name, ())[1:] == [*stamp]}
    return {}


@contextlib.contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    """Lock a file against other processes. Yields whether it is locked: it is not if the folder cannot be written."""
    with contextlib.ExitStack() as stack:
        locked = False
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(f"{path}.lock"))
            locked = True
        yield locked
