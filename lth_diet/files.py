"""Crash-safe files: atomic writes, JSON with checksums, and locks between processes and hosts."""

import contextlib
import errno
import hashlib
import json
import os
import reprlib
import secrets
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from filelock import SoftFileLease, Timeout

from lth_diet.errors import UserError, add_path_to_errors

LEASE_SECONDS = 60.0
"""Seconds without a renewal after which a lock expires."""
_fences: dict[Path, Path] = {}
"""Each folder that this process has locked, and its fence; see `lock`."""
_GONE = (errno.ENOENT, errno.ESTALE)  # the second on NFS


class LockedError(UserError):
    """Another process has locked the folder."""


@contextlib.contextmanager
def lock(folder: Path, timeout: float) -> Iterator[None]:
    """Lock a folder against other processes, on this host and on hosts that share its file system.

    The lock is a lease that a background thread renews. If its holder dies, a process on the same host takes it over
    at once. A process on another host takes it over after seeing no renewal for `LEASE_SECONDS` by its own clock; so
    does any process if the holder is stopped. A holder that finds its lease lost exits at once, as if killed.

    A holder that was stopped may wake in the middle of a write. So each holder has a fence, the folder
    `.holder-<token>`, which the next holder removes before it reads anything. `write_atomically`, `replace` and
    `remove` change a locked folder only by renames from or into the fence, which fail once it is gone. A stopped
    holder on this host is also killed.

    Args:
        folder: Folder to lock; created if it does not exist.
        timeout: Seconds to wait for a holder that renews its lease; -1 waits without limit. With 0 the lock is tried
            once, without waiting to see whether the holder is alive.

    Raises:
        LockedError: If another process still holds the lock after `timeout`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / ".lease"
    lease = SoftFileLease(
        path,
        lease_duration=LEASE_SECONDS,
        heartbeat_interval=LEASE_SECONDS / 12,
        on_compromise=lambda compromise: exit_without_lock(str(path.parent), compromise.reason),
    )
    start, renewed_at = time.monotonic(), _renewed_at(path)

    def holder_is_alive_after_timeout() -> bool:
        return 0 <= timeout < time.monotonic() - start and _renewed_at(path) != renewed_at

    try:
        held = lease.acquire(timeout=0 if timeout == 0 else -1, cancel_check=holder_is_alive_after_timeout)
    except Timeout:
        holder = f" (process {lease.owner.pid} on {lease.owner.hostname})" if lease.owner else ""
        raise LockedError(f"{folder} is being trained by another process{holder}; wait for it, or stop it") from None
    with held, _fence(path.parent, lease):
        yield


@contextlib.contextmanager
def _fence(folder: Path, lease: SoftFileLease) -> Iterator[None]:
    """Create the fence of a new holder, and remove those of processes that did not release the lock."""
    fence = folder / f".holder-{lease.token}"
    fence.mkdir()
    try:
        owner = _own_lease(folder, lease)  # after mkdir: whoever takes the lease over later sees this fence
        _fences[folder] = fence
        with contextlib.suppress(FileNotFoundError):
            (fence / ".process.json").write_text(json.dumps(owner))
        for other in folder.glob(".holder-*"):
            if other != fence:
                _end_holder(other, owner)
                _through(fence, other, None)
        yield
    finally:
        _fences.pop(folder, None)
        shutil.rmtree(fence, ignore_errors=True)


def _own_lease(folder: Path, lease: SoftFileLease) -> dict[str, Any]:
    """Process, host and start time of this process as its lease has them; exits if the lease is lost."""
    for _ in range(40):  # a process that checks whether a lease has expired moves it for a moment
        if (owner := lease.owner) and owner.token == lease.token:
            return {"pid": owner.pid, "host": owner.hostname, "start": owner.start}
        time.sleep(0.05)
    exit_without_lock(str(folder), "owner-changed")


def _end_holder(fence: Path, this: dict[str, Any]) -> None:
    """Kill the process of a fence if it is on this host, stopped, and still the one that made the fence."""
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError, AttributeError):
        holder = json.loads((fence / ".process.json").read_text())
        boot, ticks = divmod(holder["start"], 2**64)  # as filelock writes it
        if holder["pid"] == this["pid"] or (holder["host"], boot) != (this["host"], this["start"] >> 64) or not boot:
            return
        process = os.pidfd_open(holder["pid"])  # another process that gets this id later is not meant
        try:
            state, *fields = Path(f"/proc/{holder['pid']}/stat").read_bytes().rpartition(b")")[2].split()
            if state in (b"T", b"t") and int(fields[18]) == ticks:
                signal.pidfd_send_signal(process, signal.SIGKILL)
                print(
                    f"warning: {fence.parent} was locked by process {holder['pid']}, which was suspended; it was "
                    "killed, and this process takes over",
                    file=sys.stderr,
                    flush=True,
                )
        finally:
            os.close(process)


def replace(source: Path, target: Path) -> None:
    """Rename a file to `target`. If `target` is in a folder that this process locked and lost, exit instead."""
    _change(source, target)


def remove(path: Path) -> None:
    """Remove a file if it exists. If it is in a folder that this process locked and lost, exit instead."""
    _change(path, None)


def _change(source: Path, target: Path | None) -> None:
    folder = (target or source).parent.resolve()
    fence = next((_fences[each] for each in (folder, *folder.parents) if each in _fences), None)
    if fence:
        _through(fence, source, target)
    elif target:
        source.replace(target)
    else:
        source.unlink(missing_ok=True)


def _through(fence: Path, source: Path, target: Path | None) -> None:
    """Rename a file or folder into the fence, and from there to `target`; None removes it."""
    inside = fence / secrets.token_hex(8)
    try:
        source.rename(inside)
        if target:
            inside.replace(target)
    except OSError as error:
        if error.errno in _GONE and not fence.exists():
            with contextlib.suppress(OSError):
                if target:
                    source.unlink()
            exit_without_lock(str(fence.parent), "its lock was removed")
        if error.errno != errno.ENOENT or target:
            raise
        return  # there was nothing to remove
    if target is None:
        shutil.rmtree(inside) if inside.is_dir() else inside.unlink(missing_ok=True)


def _renewed_at(lease: Path) -> int | None:
    with contextlib.suppress(OSError):
        return lease.stat().st_mtime_ns
    return None


def exit_without_lock(folder: str, reason: str) -> NoReturn:
    """Exit at once, because this process has lost the lock of a folder."""
    message = f"error: {folder} may have been taken over by another process ({reason}); this one exits"
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def remove_partial_files(folder: Path) -> None:
    """Remove the temporary files of killed writers below a folder; the caller must hold its lock."""
    for part in folder.rglob(".*.part-*"):
        remove(part)


def partial_path(path: Path) -> Path:
    """A new name next to a file, under which to write its next content."""
    return path.with_name(f".{path.name}.part-{secrets.token_hex(8)}")


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that a killed process leaves either its old content or the new.

    Raises:
        OSError: If the file cannot be written, with its name; its old content is then unchanged.
    """
    open_atomically(path, content).close()


def open_atomically(path: Path, content: bytes | str) -> BinaryIO:
    """Write a file like `write_atomically`, and return it open for more, whatever replaces it under its name.

    Raises:
        OSError: If the file cannot be written, with its name; its old content is then unchanged.
    """
    part, file = partial_path(path), None
    try:
        with add_path_to_errors(path):
            file = os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb")
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
            replace(part, path)
            return file
    except BaseException:
        with contextlib.suppress(OSError):  # the error of the write counts; closing may fail with it again
            if file:
                file.close()
        with contextlib.suppress(OSError):
            part.unlink()  # frees space on a full disk
        raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file with its own checksum, atomically."""
    write_atomically(path, json.dumps({**content, "checksum": _checksum(content)}, indent=2))


def read_json(path: Path, types: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a JSON file that `write_json` wrote.

    Args:
        path: Path of the file.
        types: Types of the required keys. A key whose type includes None may be missing.

    Raises:
        UserError: If the file cannot be read, does not match its checksum, or a value is missing or of another type.
    """
    try:
        content = json.loads(path.read_text())
        if content.pop("checksum") != _checksum(content):
            raise ValueError
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged or was not written by lth_diet") from None
    for key, kind in (types or {}).items():
        value = content.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            found = reprlib.repr(value) if key in content else "missing"
            raise UserError(f"{path}: {key} is {found}, expected {getattr(kind, '__name__', kind)}")
    return content


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with open(path, "rb") as file:
        return sha256_of(file)


def sha256_of(file: BinaryIO) -> str:
    """SHA-256 of the rest of an open file, in hexadecimal digits."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def cache_folder() -> Path:
    """Folder of this host for data that can be computed or downloaded again."""
    home = os.environ.get("LTH_DIET_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lth_diet"
    return Path(home).expanduser()
