"""cifar10, cifar100, cinic10, image_folder, digits: decoded once into a memory-mapped cache of uint8 images.

To add a data set: write `_decode_<name>`, enter it in `_DECODERS` and `_SIZES`, and name it in `config.Dataset`.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock

from lth_diet.errors import UserError, expecting

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_LONGEST_SIDE = 1024  # pixels: a file of a few bytes may claim any number
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")  # that convert to 8 bits without loss of range

# Per-channel mean and standard deviation over the training set, in units of 0 to 1 (the paper's data sets).
_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "cinic10": ((0.4789, 0.4723, 0.4305), (0.2421, 0.2383, 0.2587)),
}
# Sizes of training and test set, and number of classes, of what is not a folder of the user's.
_SIZES = {
    "cifar10": (50_000, 10_000, 10),
    "cifar100": (50_000, 10_000, 100),
    "cinic10": (180_000, 90_000, 10),  # train and valid merged, as in the paper
    "digits": (1442, 355, 10),
}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of a data set before it is decoded."""

    train_size: int
    test_size: int
    classes: int
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Split:
    """Images, uint8 of shape (N, H, W, C), and labels, int64 of shape (N,)."""

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A decoded data set; mean and std are per channel, in units of 0 to 1, over the training set."""

    name: str
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]

    def with_labels(self, labels: np.ndarray) -> "Dataset":
        """The same images with other training labels, int64 of shape (N,)."""
        return dataclasses.replace(self, train=Split(self.train.images, labels))

    @property
    def flip(self) -> bool:
        """Whether a mirrored image still is of its class."""
        return self.name != "digits"


@functools.cache
def facts(name: str, root: str) -> Facts:
    """Sizes and fingerprint of a data set, without decoding it.

    Raises:
        UserError: If an image folder is missing or is not laid out as one.
    """
    try:
        return _facts(name, root)
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; allowed: files that can be read") from None


def _facts(name: str, root: str) -> Facts:
    if name == "image_folder":
        train, test = (_listing(Path(root), parts) for parts in (("train", "valid"), ("test",)))
        classes = {label for label, _ in train}
        if classes != {label for label, _ in test}:
            odd = sorted(classes.symmetric_difference(label for label, _ in test))
            raise UserError(f"class {odd[0]!r} is not in both train/ and test/; allowed: the same classes in each")
        if len(classes) < 2:
            raise UserError(f"{root} has one class, {next(iter(classes))!r}; allowed: two or more")
        described = [f"{path.relative_to(root)} {_bytes(path)}" for _, path in train + test]
        fingerprint = hashlib.sha256("\n".join(described).encode(errors="surrogateescape")).hexdigest()[:16]
        return Facts(len(train), len(test), len(classes), fingerprint)
    if name not in _SIZES:  # of scores made elsewhere
        raise UserError(f"data set {name!r} is not known; allowed: {', '.join(_DECODERS)}")
    return Facts(*_SIZES[name], fingerprint=name)


def _bytes(path: Path) -> int:
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):  # to read a pipe may take for ever
        raise UserError(f"{path} is no file; allowed: JPEG and PNG files")
    return about.st_size


def load(name: str, root: str) -> Dataset:
    """Open a data set's cache; build it first if there is none (once, however many processes ask).

    Args:
        name: A data set that `config.Dataset` allows.
        root: Where its files are, or are downloaded to.

    Raises:
        UserError: If files are missing, cannot be had, or are not images of one size.
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
                f"{folder}: the cache of {name} cannot be written ({error.strerror or error}); allowed: a place with "
                "room, such as another one in LTH_DIET_CACHE"
            ) from None
    with expecting(folder, f"the cache of {name} as it was written; delete it to build it again"):
        about = json.loads((folder / "about.json").read_text())
        # mode "c" (copy on write) maps the file as "r" does, and lets torch take the array without a copy or a warning
        keys = ("train_x", "train_y", "test_x", "test_y")
        arrays = {key: np.load(folder / f"{key}.npy", mmap_mode="c") for key in keys}
        return Dataset(
            name,
            Split(arrays["train_x"], arrays["train_y"]),
            Split(arrays["test_x"], arrays["test_y"]),
            tuple(about["mean"]),
            tuple(about["std"]),
            tuple(about["class_names"]),
        )


def cache_home() -> Path:
    """Where this node keeps what can be made or had again."""
    home = os.environ.get("LTH_DIET_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "lth_diet"
    return Path(home).expanduser()


def _cache_folder(name: str, root: str) -> Path:
    key = facts(name, root).fingerprint
    if name == "image_folder":  # a file rewritten at the same size keeps the fingerprint; its time changes
        times = [path.stat().st_mtime_ns for part in ("train", "valid", "test") for path in _files(Path(root) / part)]
        key += "-" + hashlib.sha256(repr(times).encode()).hexdigest()[:8]
    return cache_home() / (name if key == name else f"{name}-{key}")


def _build(name: str, root: str, folder: Path) -> None:
    for stale in folder.parent.glob(f"{folder.name}.part-*"):  # of a builder that was killed: we hold the lock
        shutil.rmtree(stale)
    train, test, class_names = _DECODERS[name](root)
    mean, std = _STATISTICS.get(name) or _statistics(train.images)
    part = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    try:
        part.mkdir()
        for key, split in (("train", train), ("test", test)):
            np.save(part / f"{key}_x.npy", split.images)
            np.save(part / f"{key}_y.npy", split.labels.astype(np.int64))
        about = {"mean": mean, "std": std, "class_names": class_names}
        (part / "about.json").write_text(json.dumps(about))
        part.rename(folder)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    # from histograms: exact, and no floating-point copy of the images
    counts = np.stack([np.bincount(images[..., c].ravel(), minlength=256) for c in range(images.shape[-1])])
    values = np.arange(256) / 255
    mean = counts @ values / counts.sum(1)
    std = np.sqrt(counts @ values**2 / counts.sum(1) - mean**2)
    return tuple(mean.tolist()), tuple(np.maximum(std, 1 / 255).tolist())


def _decode_digits(root: str) -> tuple[Split, Split, list[str]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = digits.target
    # every fifth example of each class, in the order of the data, is for testing
    place = np.array([np.sum(labels[:i] == label) for i, label in enumerate(labels)])
    test = place % 5 == 4
    return Split(images[~test], labels[~test]), Split(images[test], labels[test]), [str(i) for i in range(10)]


def _decode_cifar(kind: str, root: str) -> tuple[Split, Split, list[str]]:
    from torchvision import datasets as torchvision_datasets  # imports torch: only when there is no cache yet

    try:
        parts = [getattr(torchvision_datasets, kind)(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        with contextlib.suppress(OSError):
            Path(root).rmdir()  # if the attempt made it, and left it empty
        raise UserError(
            f"dataset.root: {root!r} does not hold {kind} and the download failed ({reason}); allowed: a folder with "
            f"the extracted {parts_name(kind)}, or a network that reaches its source"
        ) from None
    train, test = (Split(np.asarray(part.data), np.asarray(part.targets)) for part in parts)
    return train, test, parts[0].classes


def parts_name(kind: str) -> str:
    """The folder that the official archive of a CIFAR data set extracts to."""
    return {"CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python"}[kind]


def _decode_cinic10(root: str) -> tuple[Split, Split, list[str]]:
    from lth_diet import cinic10

    path = cinic10.archive(Path(root))
    *train, class_names = cinic10.read(path, ("train", "valid"))
    *test, _ = cinic10.read(path, ("test",))
    return Split(*train), Split(*test), class_names


def _decode_image_folder(root: str) -> tuple[Split, Split, list[str]]:
    train, test = (_listing(Path(root), parts) for parts in (("train", "valid"), ("test",)))
    class_names = sorted({label for label, _ in train})
    shape = None
    splits = []
    for listing in (train, test):
        images = []
        for _, path in listing:
            image = _read_image(path)
            shape = shape or image.shape
            if image.shape != shape:
                raise UserError(f"{path}: {_size(image.shape)}; allowed: {_size(shape)}, as {train[0][1].name} is")
            images.append(image)
        labels = [class_names.index(label) for label, _ in listing]
        splits.append(Split(np.stack(images), np.array(labels)))
    return splits[0], splits[1], class_names


def _read_image(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with _silent(), Image.open(path, formats=("PNG", "JPEG")) as image:
            if max(image.size) > _LONGEST_SIDE:
                raise UserError(
                    f"{path}: {image.size[0]} x {image.size[1]} pixels; allowed: up to {_LONGEST_SIDE} a side"
                )
            if image.mode not in _MODES:
                raise UserError(f"{path}: pixels of mode {image.mode}; allowed: 8 bits a channel")
            image = image if image.mode == "L" else image.convert("RGB")
            pixels = np.asarray(image)
    except UserError:
        raise
    except Exception as error:  # Pillow raises nearly anything for a damaged file
        raise UserError(f"{path}: not a readable image ({error}); allowed: whole JPEG and PNG files") from None
    return pixels if pixels.ndim == 3 else pixels[..., None]


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that an image is large is refused, not warned of
        yield


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]} pixels, {'grey' if shape[2] == 1 else 'colour'}"


def _listing(root: Path, parts: tuple[str, ...]) -> list[tuple[str, Path]]:
    """(class name, path) of every image below `root/part/<class>/`, sorted; only parts[0] has to exist."""
    if not (root / parts[0]).is_dir():
        raise UserError(f"{root} holds no folder {parts[0]}/; allowed: a folder of train/<class>/ and test/<class>/")
    listing = [(path.parent.name, path) for part in parts for path in _files(root / part)]
    if not listing:
        raise UserError(f"{root / parts[0]} holds no image; allowed: a folder a class with JPEG or PNG files")
    return listing


def _files(part: Path) -> Iterator[Path]:
    for folder in sorted(part.iterdir()) if part.is_dir() else ():
        if folder.is_dir():
            yield from sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


_DECODERS = {
    "cifar10": functools.partial(_decode_cifar, "CIFAR10"),
    "cifar100": functools.partial(_decode_cifar, "CIFAR100"),
    "cinic10": _decode_cinic10,
    "digits": _decode_digits,
    "image_folder": _decode_image_folder,
}
