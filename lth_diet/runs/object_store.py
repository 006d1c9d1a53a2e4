"""Object stores: objects below a URL that fsspec can open."""

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
"""Version of each object by name: a string that changes when the object's content does."""
T = TypeVar("T")
MANIFESTS = ("checkpoint.json", "result.json", "manifest.json")
"""Files that refer to other files: uploaded and downloaded after them, deleted before them."""
_VERSION_KEYS = ("ETag", "etag", "mtime", "created", "size")
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "PermissionError")


class ObjectStore:
    """Objects below a URL.

    The first call fails at once if the store cannot be reached. Later calls retry for half of `files.LEASE_SECONDS`, so
    that no lease expires in the meantime.

    Args:
        url: URL without a trailing slash.

    Raises:
        UserError: If fsspec does not support the URL or lacks a package for it.
    """

    def __init__(self, url: str):
        import fsspec  # takes a quarter of a second

        self.url = url
        if "@" in url:
            raise UserError("runs: a URL must not contain @; set credentials in the environment")
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            expected = "expected a folder, or a URL such as s3://bucket/prefix"
            raise UserError(f"runs = {url!r}: cannot be used ({error}); {expected}") from None
        self._reached = False

    def list(self, folder: str) -> Versions:
        """List all objects below a folder, by their names relative to it."""
        root = self._path(folder)
        found = self._call(self._fs.find, root, detail=True)
        return {
            path.removeprefix(root).lstrip("/"): repr([info.get(key) for key in _VERSION_KEYS])
            for path, info in found.items()
            if path != root
        }

    def read(self, name: str) -> bytes | None:
        """Content of an object, or None if it does not exist."""
        try:
            return self._call(self._fs.cat_file, self._path(name), reraise=FileNotFoundError)
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        self._call(self._fs.pipe_file, self._path(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Create an object, unless it exists.

        Returns:
            Whether this process created it.
        """
        create = functools.partial(self._call, self._fs.pipe_file, self._path(name), content, mode="create")
        try:
            create(reraise=OSError)
        except OSError:  # the object exists (each store has its own error), perhaps from a retry of this request
            if self.read(name) is None:
                create()
        return self.read(name) == content

    def upload(self, path: Path, name: str) -> None:
        self._call(self._fs.put_file, str(path), self._path(name))

    def download(self, name: str, path: Path) -> None:
        """Replace a file by an object, unless the object has been deleted."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = files.partial_path(path)
        try:
            self._call(self._fs.get_file, self._path(name), str(part), reraise=FileNotFoundError)
            files.replace(part, path)
        except FileNotFoundError:
            part.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._call(self._fs.rm_file, self._path(name), reraise=FileNotFoundError)

    def check(self) -> None:
        """Check that objects can be created, and that a second creation fails.

        Raises:
            UserError: If not.
        """
        name = f".probe-{secrets.token_hex(8)}"
        try:
            self.write(name, b"1")
            overwritten = self.create(name, b"2")
            self.delete(name)
        except OSError as error:
            raise UserError(f"runs = {self.url!r}: cannot be written ({error.strerror})") from None
        if overwritten:
            raise UserError(
                f"runs = {self.url!r}: this store overwrites existing objects, so nodes cannot lock their work; "
                "expected a store with conditional writes (If-None-Match), such as S3"
            )

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/")

    def _call(self, method: Callable[..., T], *args: Any, reraise: type[OSError] | tuple = (), **options: Any) -> T:
        end = time.monotonic() + (files.LEASE_SECONDS / 2 if self._reached else 0)
        pause = 0.1
        while True:
            try:
                result = method(*args, **options)
                self._reached = True
                return result
            except reraise:
                raise
            except Exception as error:  # each store raises its own, whose message may contain secrets
                kind = type(error).__name__
                if kind in _NO_CREDENTIALS:
                    reason = "access denied; set credentials in the environment, such as AWS_ACCESS_KEY_ID"
                elif isinstance(error, FileNotFoundError):
                    reason = "no such bucket or folder"
                elif time.monotonic() < end:
                    time.sleep(pause)
                    pause = min(2 * pause, 5.0)
                    continue
                else:
                    reason = f"the object store cannot be reached ({kind})"
            raise OSError(5, reason, self.url)


def pull(url: str, folder: Path) -> int:
    """Copy the objects below a URL to a folder, without locks.

    Returns:
        Number of files.
    """
    store = ObjectStore(url.rstrip("/"))
    names = [name for name in store.list("") if is_safe_name(name)]
    for name in sorted(names, key=lambda name: (name.endswith(MANIFESTS), name)):
        store.download(name, folder / name)
    return len(names)


def is_safe_name(name: str) -> bool:
    """Whether a relative name stays inside its folder and is not hidden."""
    return not any(part.startswith((".", "/")) for part in PurePosixPath(name).parts)
