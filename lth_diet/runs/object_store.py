"""Objects below a URL that fsspec can open."""

import contextlib
import functools
import secrets
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from lth_diet import files
from lth_diet.errors import UserError

Versions = dict[str, str]
"""Name of an object to what changes with its content."""
T = TypeVar("T")
NAMING_OTHERS = ("checkpoint.json", "result.json", "manifest.json")
_VERSION = ("ETag", "etag", "mtime", "created", "size")
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "PermissionError")


class ObjectStore:
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
        end = time.monotonic() + (files.LEASE_SECONDS / 2 if self._reached else 0)
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


def is_plain(name: str) -> bool:
    """Whether a name leads to a file below a folder, and not to one that is hidden."""
    return not any(part.startswith((".", "/")) for part in PurePosixPath(name).parts)


def pull(url: str, folder: Path) -> int:
    """Copy what is below a URL to a folder, without leases; returns the number of files."""
    store = ObjectStore(url.rstrip("/"))
    names = [name for name in store.list("") if is_plain(name)]
    for name in sorted(names, key=lambda name: (name.endswith(NAMING_OTHERS), name)):
        store.download(name, folder / name)
    return len(names)
