"""Datasets by name, each decoded once to a cache of uint8 images that all processes memory-map.

To add a dataset, write a module with `decode(root)` that returns the training set, the test set and the class names,
add it to `_decode` and `_INFO`, and to `NATIVE_SIZES` in `data/dataset.py`, and add its name to `Dataset` in
`config/schema.py`.
"""

import contextlib
import functools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from lth_diet.data import image_folder
from lth_diet.data.dataset import Dataset, DatasetInfo, Split
from lth_diet.data.image_file import scale_images
from lth_diet.errors import UserError, raise_if_corrupt
from lth_diet.files import cache_folder, read_json, sha256, write_json

# Per-channel mean and standard deviation over the training set, with pixels scaled to 0 to 1; others are computed.
_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "cinic10": ((0.4789, 0.4723, 0.4305), (0.2421, 0.2383, 0.2587)),
}
_INFO = {
    "cifar10": DatasetInfo(50_000, "cifar10", classes=10),
    "cifar100": DatasetInfo(50_000, "cifar100", classes=100),
    "cinic10": DatasetInfo(180_000, "cinic10", classes=10),  # train and valid merged, as in the paper
    "digits": DatasetInfo(1442, "digits", classes=10, channels=1),
}
_ARRAYS = ("train_x.npy", "train_y.npy", "test_x.npy", "test_y.npy")
_prepared: set[Path] = set()  # caches that this process has verified or built


@functools.cache
def info(name: str, root: str) -> DatasetInfo:
    """Return the size and fingerprint of a dataset without decoding it.

    Args:
        name: Name of the dataset, as in `config.schema.Dataset`.
        root: Folder of its files. Only an image folder is read.

    Raises:
        UserError: If an image folder is missing, unreadable or not in the expected layout.
    """
    if name != "image_folder":
        return _INFO[name]
    with _name_unreadable_files():
        return image_folder.info(root)


def warnings(name: str, root: str) -> list[str]:
    """Return one sentence for each kind of file in an image folder that is not used, and for odd classes.

    Args:
        name: Name of the dataset, as in `config.schema.Dataset`.
        root: Folder of its files.

    Raises:
        UserError: As `info`.
    """
    return list(info(name, root).warnings)


def load(name: str, root: str, size: int | None = None) -> Dataset:
    """Load a dataset from the cache, which is prepared first unless this process has done so.

    Args:
        name: Name of the dataset, as in `config.schema.Dataset`.
        root: Folder of its files. CIFAR and CINIC-10 are downloaded to it if they are missing.
        size: Scale all images to this many pixels per side; None keeps them.

    Returns:
        The dataset, with memory-mapped arrays that all callers in a process share: copy them before changing them.

    Raises:
        UserError: As `prepare`, or if the cache cannot be read.
    """
    folder = _cache_folder(name, root, size)
    if folder not in _prepared:
        warning = prepare(name, root, size=size)
        if warning:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    with raise_if_corrupt(folder, f"the cache of {name}; delete it to rebuild it"):
        about = read_json(folder / "about.json", {"mean": list, "std": list, "class_names": list})
        train, test = _map_split(folder, "train"), _map_split(folder, "test")
        return Dataset(name, train, test, tuple(about["mean"]), tuple(about["std"]), tuple(about["class_names"]))


def prepare(name: str, root: str, launch: str | None = None, size: int | None = None) -> str | None:
    """Verify the checksums of a dataset's cache, and build it if it is missing or damaged; only one process does so.

    Args:
        name: Name of the dataset, as in `config.schema.Dataset`.
        root: Folder of its files.
        launch: Name that the processes of a launch share on a node: only the first one verifies. None: this process
            verifies.
        size: As of `load`.

    Returns:
        A sentence if the cache had to be replaced; all processes of the launch get it.

    Raises:
        UserError: If files are missing, cannot be downloaded or decoded, or the cache cannot be written.
    """
    folder = _cache_folder(name, root, size)
    verified = Path(f"{folder}.verified")
    warning = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            done = _read_verified(verified)
            if launch is not None and done.get("launch") == launch and folder.exists():
                warning = done.get("warning")
            else:
                warning = _replace_if_damaged(name, root, size, folder)
                write_json(verified, {"launch": launch, "warning": warning})
    except OSError as error:
        if _find_damage(folder):  # a whole cache may be on a disk that is full or read-only
            raise UserError(
                f"{folder}: the cache of {name} cannot be written ({error.strerror or error}); free some disk space or "
                "set LTH_DIET_CACHE to another folder"
            ) from None
    _prepared.add(folder)
    return warning


def cached_fingerprints() -> list[str]:
    """Fingerprints of the image folders that are in the cache."""
    return sorted({path.parent.name.split("-")[1] for path in cache_folder().glob("image_folder-*/files.json")})


def changes_since(fingerprint: str, root: str) -> str | None:
    """Describe how an image folder differs from an earlier state of it that is in the cache.

    Args:
        fingerprint: Fingerprint of the earlier state.
        root: The folder.

    Returns:
        Such as "1 changed (train/ant/0.png)"; None if they seem to be different folders: they are at other paths, and
        fewer than half of the images are the same.
    """
    now = {image.name: image.sha256 for image in info("image_folder", root).images}
    try:
        cached = [*cache_folder().glob(f"image_folder-{fingerprint}*/files.json")]
        before = read_json(cached[0], {"root": str, "files": dict})
    except (UserError, IndexError):
        return None
    same = sum(now.get(name) == sha256 for name, sha256 in before["files"].items())
    is_earlier_state = before["root"] == str(Path(root).resolve()) or 2 * same >= len(before["files"])
    return image_folder.describe_changes(before["files"], now) if is_earlier_state else None


@contextlib.contextmanager
def _name_unreadable_files() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None


def _map_split(folder: Path, part: str) -> Split:
    paths = [folder / f"{part}_{array}.npy" for array in ("x", "y")]
    return Split(*(_map(path, status.st_ino, status.st_mtime_ns) for path in paths for status in [path.stat()]))


@functools.lru_cache(maxsize=len(_ARRAYS))
def _map(path: Path, inode: int, modified: int) -> np.ndarray:
    """Memory-map a file, once for all callers as long as it is the same file and unmodified."""
    return np.load(path, mmap_mode="c")  # copy on write: torch warns of the read-only arrays that "r" returns


def _cache_folder(name: str, root: str, size: int | None) -> Path:
    fingerprint = info(name, root).fingerprint
    parts = [name] * (fingerprint != name) + [fingerprint] + [f"{size}px"] * (size is not None)
    return cache_folder() / "-".join(parts)


def _read_verified(path: Path) -> dict[str, Any]:
    with contextlib.suppress(UserError):
        return read_json(path, {"launch": str | None, "warning": str | None})
    return {}


def _replace_if_damaged(name: str, root: str, size: int | None, folder: Path) -> str | None:
    """Build a cache if it is missing or damaged. Returns a sentence if it was damaged. The caller holds the lock."""
    damage = _find_damage(folder)
    if damage is None:
        return None
    if not folder.exists():
        _build(name, root, size, folder)
        return None
    try:
        _build(name, root, size, folder)
    except UserError as error:
        raise UserError(f"the cache {folder} {damage} and cannot be rebuilt: {error}") from None
    return f"the cache {folder} {damage}; it was rebuilt"


def _find_damage(folder: Path) -> str | None:
    """Verify the checksums of a cache. Returns what is wrong with it: "is missing", ...; None if it is whole."""
    if not folder.exists():
        return "is missing"
    try:
        about = json.loads((folder / "about.json").read_text())
        if "sha256" not in about:
            return "has no checksums"
        expected = read_json(folder / "about.json", {"sha256": dict})["sha256"]
        damaged = [name for name in _ARRAYS if sha256(folder / name) != expected.get(name)]
    except (OSError, ValueError, TypeError, RecursionError, UserError):
        return "is damaged"
    return f"is damaged (the checksum of {damaged[0]} is wrong)" if damaged else None


def _build(name: str, root: str, size: int | None, folder: Path) -> None:
    """Decode a dataset to `folder`, atomically. The caller holds the lock."""
    for stale in folder.parent.glob(f"{folder.name}.part-*"):  # left by a process that was killed
        shutil.rmtree(stale)
    train, test, class_names = _decode(name, root, size)
    mean, std = (_STATISTICS.get(name) if size is None else None) or _statistics(train.images)
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    try:
        part.mkdir()
        for key, split in (("train", train), ("test", test)):
            np.save(part / f"{key}_x.npy", split.images)
            np.save(part / f"{key}_y.npy", split.labels.astype(np.int64))
        if name == "image_folder":
            files = {image.name: image.sha256 for image in info(name, root).images}
            write_json(part / "files.json", {"root": str(Path(root).resolve()), "files": files})
        about = {"mean": mean, "std": std, "class_names": class_names}
        write_json(part / "about.json", {**about, "sha256": {array: sha256(part / array) for array in _ARRAYS}})
        if folder.exists():
            folder.rename(part.with_name(f"{part.name}-damaged"))
        part.rename(folder)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        raise
    shutil.rmtree(part.with_name(f"{part.name}-damaged"), ignore_errors=True)


def _decode(name: str, root: str, size: int | None) -> tuple[Split, Split, list[str]]:
    from lth_diet.data import cifar, cinic10, digits  # imports requests and Pillow, which are slow

    decoders = {
        "cifar10": functools.partial(cifar.decode, "CIFAR10"),
        "cifar100": functools.partial(cifar.decode, "CIFAR100"),
        "cinic10": cinic10.decode,
        "digits": digits.decode,
    }
    with _name_unreadable_files():
        if name == "image_folder":
            return image_folder.decode(root, info(name, root).images, size)
        train, test, class_names = decoders[name](root)
    if size is not None:
        train, test = (Split(scale_images(split.images, size), split.labels) for split in (train, test))
    return train, test, class_names


def _statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation per channel; histograms avoid a floating-point copy of the images."""
    counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])])
    values = np.arange(256) / 255
    mean = counts @ values / counts.sum(1)
    std = np.sqrt(counts @ values**2 / counts.sum(1) - mean**2)
    return tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist())
