"""Datasets by name, each decoded once to a cache of uint8 images that all processes memory-map.

To add a dataset, write a module with `decode(root)` that returns the training set, the test set and the class names,
add it to `_decode` and `_INFO`, and add its name to `Dataset` in `config/schema.py`.
"""

import functools
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
from filelock import FileLock

from lth_diet.data import image_folder
from lth_diet.data.dataset import Dataset, DatasetInfo, Split
from lth_diet.errors import UserError, raise_if_corrupt
from lth_diet.files import cache_folder

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
    try:
        return image_folder.info(root)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None


def load(name: str, root: str) -> Dataset:
    """Load a dataset from the cache, which is built on the first call; only one process builds it.

    Args:
        name: Name of the dataset, as in `config.schema.Dataset`.
        root: Folder of its files. CIFAR and CINIC-10 are downloaded to it if they are missing.

    Returns:
        The dataset, with memory-mapped arrays.

    Raises:
        UserError: If files are missing, cannot be downloaded or decoded, or the cache cannot be written or read.
    """
    folder = _cache_folder(name, root)
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not folder.exists():
                    _build(name, root, folder)
        except OSError as error:
            raise UserError(
                f"{folder}: the cache of {name} cannot be written ({error.strerror or error}); free some disk space or "
                "set LTH_DIET_CACHE to another folder"
            ) from None
    with raise_if_corrupt(folder, f"the cache of {name}; delete it to rebuild it"):
        about = json.loads((folder / "about.json").read_text())
        train, test = _map_split(folder, "train"), _map_split(folder, "test")
        return Dataset(name, train, test, tuple(about["mean"]), tuple(about["std"]), tuple(about["class_names"]))


def _map_split(folder: Path, part: str) -> Split:
    # "c" (copy on write): torch warns of the read-only arrays that "r" returns
    return Split(*(np.load(folder / f"{part}_{array}.npy", mmap_mode="c") for array in ("x", "y")))


def _cache_folder(name: str, root: str) -> Path:
    key = info(name, root).fingerprint
    if name == "image_folder":  # the fingerprint misses an image that was rewritten with the same size
        train, test = image_folder.list_images(Path(root))
        modification_times = [path.stat().st_mtime_ns for _, path in train + test]
        key += "-" + hashlib.sha256(repr(modification_times).encode()).hexdigest()[:8]
    return cache_folder() / (name if key == name else f"{name}-{key}")


def _build(name: str, root: str, folder: Path) -> None:
    """Decode a dataset to `folder`, atomically. The caller holds the lock."""
    for stale in folder.parent.glob(f"{folder.name}.part-*"):  # left by a process that was killed
        shutil.rmtree(stale)
    train, test, class_names = _decode(name, root)
    mean, std = _STATISTICS.get(name) or _statistics(train.images)
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    try:
        part.mkdir()
        for key, split in (("train", train), ("test", test)):
            np.save(part / f"{key}_x.npy", split.images)
            np.save(part / f"{key}_y.npy", split.labels.astype(np.int64))
        (part / "about.json").write_text(json.dumps({"mean": mean, "std": std, "class_names": class_names}))
        part.rename(folder)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _decode(name: str, root: str) -> tuple[Split, Split, list[str]]:
    from lth_diet.data import cifar, cinic10, digits  # imports requests and Pillow, which are slow

    decoders = {
        "cifar10": functools.partial(cifar.decode, "CIFAR10"),
        "cifar100": functools.partial(cifar.decode, "CIFAR100"),
        "cinic10": cinic10.decode,
        "digits": digits.decode,
        "image_folder": image_folder.decode,
    }
    return decoders[name](root)


def _statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation per channel; histograms avoid a floating-point copy of the images."""
    counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])])
    values = np.arange(256) / 255
    mean = counts @ values / counts.sum(1)
    std = np.sqrt(counts @ values**2 / counts.sum(1) - mean**2)
    return tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist())
