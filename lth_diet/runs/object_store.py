"""Object stores: objects below a URL that fsspec can open."""

import contextlib
import functools
import re
import secrets
import time
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from lth_diet import files
from lth_diet.errors import UserError

Versions = dict[str, str]
"""Version of each object by name: a string that changes when the object's content does."""
T = TypeVar("T")
MANIFESTS = ("checkpoint.json", "result.json", "manifest.json")
"""Files that refer to other files: uploaded and downloaded after them, deleted before them."""
Objects = dict[str, tuple[str, str]]
"""Object and version of each file by its name."""
COMPLETE = ".complete"
"""Object that makes a generation of a folder the one that counts."""
LOCKED_SEPARATELY = re.compile(r"(replicate|network)_[0-9]+")
"""Names of folders that are locked separately from the folder they are in."""
_GENERATION = re.compile(r"((?:.*/)?)\.generation-([0-9]{1,9})/(.+)")
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

    Raises:
        UserError: If there are none.
    """
    store = ObjectStore(url.rstrip("/"))
    objects = {name: found for name, (found, _) in current_objects(store.list("")).items() if is_safe_name(name)}
    if not objects:
        raise UserError(f"{url}: no files; expected the runs of a training, such as s3://bucket/runs")
    for name in sorted(objects, key=lambda name: (name.endswith(MANIFESTS), name)):
        store.download(objects[name], folder / name)
    return len(objects)


def generation_name(number: int, name: str) -> str:
    """Name of an object in a generation of a folder; generation 0 has plain names."""
    return f".generation-{number}/{name}" if number else name


def newest_generation(listing: Iterable[str], folder: str = "") -> int:
    """Number of the generation of a folder that counts."""
    found = (match for match in map(_GENERATION.fullmatch, listing) if match)
    return max((int(match[2]) for match in found if match[1] == folder and match[3] == COMPLETE), default=0)


def current_objects(listing: Versions) -> Objects:
    """The objects that count, by the names of the files.

    A process that takes over a lock copies the folder to a new generation, `<folder>/.generation-<n>/`, so that what
    the last holder still writes to the old one does not count.
    """
    found = {name: _GENERATION.fullmatch(name) for name in listing}
    folders = {match[1]: newest_generation(listing, match[1]) for match in found.values() if match}
    objects = {}
    for name, match in found.items():
        if match and int(match[2]) == folders[match[1]] > 0 and match[3] != COMPLETE:
            objects[match[1] + match[3]] = name, listing[name]
        elif not match and not any(number and _is_inside(name, folder) for folder, number in folders.items()):
            objects[name] = name, listing[name]
    return objects


def old_objects(listing: Iterable[str], generation: int) -> list[str]:
    """Objects of a folder in generations before this one, which do not count any more."""
    numbers = {name: int(match[2]) if (match := _GENERATION.fullmatch(name)) else 0 for name in listing}
    safe = [name for name in listing if numbers[name] or (is_safe_name(name) and _is_inside(name, ""))]
    return [name for name in safe if numbers[name] < generation]


def _is_inside(name: str, folder: str) -> bool:
    """Whether a name is in a folder, and not in a folder in it that is locked separately."""
    rest = name.removeprefix(folder)
    return name.startswith(folder) and not LOCKED_SEPARATELY.fullmatch(rest.partition("/")[0])


def is_safe_name(name: str) -> bool:
    """Whether a relative name stays inside its folder and is not hidden."""
    return not any(part.startswith((".", "/")) for part in PurePosixPath(name).parts)
