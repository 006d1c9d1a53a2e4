"""Image folders of the user: `<root>/<part>/<class>/<image>`, with JPEG or PNG files of one size."""

import hashlib
import stat
import warnings
from pathlib import Path

import numpy as np

from lth_diet.data.dataset import DatasetInfo, Split
from lth_diet.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
MAX_SIDE = 1024  # pixels; a file of a few bytes may claim to be of any size
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")


def info(root: str) -> DatasetInfo:
    """Return the number of training images, and a fingerprint of the names and sizes of all images.

    Raises:
        UserError: If the images are not in the expected layout.
    """
    train, test = list_images(Path(root))
    classes = {label for label, _ in train}
    if classes != {label for label, _ in test}:
        unmatched = sorted(classes.symmetric_difference(label for label, _ in test))
        raise UserError(f"{root}: class {unmatched[0]!r} is not in both train/ and test/; expected the same classes")
    if len(classes) < 2:
        raise UserError(f"{root} has only one class, {next(iter(classes))!r}; expected at least two")
    files = []
    for _, path in train + test:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading from a pipe may block forever
            raise UserError(f"{path} is not a regular file; expected a JPEG or PNG file")
        files.append(f"{path.relative_to(root)} {status.st_size}")
    fingerprint = hashlib.sha256("\n".join(files).encode(errors="surrogateescape")).hexdigest()[:16]
    return DatasetInfo(len(train), fingerprint, len(classes))


def decode(root: str) -> tuple[Split, Split, list[str]]:
    """Return the training set (train/ and valid/ merged), test set and class names.

    Raises:
        UserError: If a file cannot be decoded, or its size or number of channels differs from the first image's.
    """
    train, test = list_images(Path(root))
    class_names = sorted({label for label, _ in train})
    shape = None
    splits = []
    for listing in (train, test):
        images = []
        for _, path in listing:
            image = _read_image(path)
            shape = shape or image.shape
            if image.shape != shape:
                found, expected = _describe_shape(image.shape), _describe_shape(shape)
                raise UserError(f"{path}: {found}; expected {expected}, like {train[0][1].name}")
            images.append(image)
        labels = [class_names.index(label) for label, _ in listing]
        splits.append(Split(np.stack(images), np.array(labels)))
    return splits[0], splits[1], class_names


def _read_image(path: Path) -> np.ndarray:
    """Decode a file to uint8 of shape (H, W, C), with one channel for Pillow's mode L and three for others."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images, which are rejected
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                if max(image.size) > MAX_SIDE:
                    width, height = image.size
                    raise UserError(f"{path}: {width} x {height} pixels; expected at most {MAX_SIDE} per side")
                if image.mode not in _EIGHT_BIT_MODES:
                    raise UserError(f"{path}: pixels of mode {image.mode}; expected 8 bits per channel")
                image = image if image.mode == "L" else image.convert("RGB")
                pixels = np.asarray(image)
    except UserError:
        raise
    except Exception as error:  # Pillow raises many types of exceptions for a damaged file
        raise UserError(f"{path}: not a readable image ({error}); expected a complete JPEG or PNG file") from None
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _describe_shape(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]} pixels, {'grayscale' if shape[2] == 1 else 'color'}"


def list_images(root: Path) -> tuple[list[tuple[str, Path]], list[tuple[str, Path]]]:
    """List (class name, path) of every training image (train/, then valid/) and of every test image.

    Images are in `root/<part>/<class>/` and are sorted by class and name within a part.

    Raises:
        UserError: If train/ or test/ does not exist, or has no image.
    """
    return _list_parts(root, "train", "valid"), _list_parts(root, "test")


def _list_parts(root: Path, *parts: str) -> list[tuple[str, Path]]:
    if not (root / parts[0]).is_dir():
        raise UserError(f"{root} has no folder {parts[0]}/; expected train/<class>/ and test/<class>/")
    folders = [path for part in parts if (root / part).is_dir() for path in sorted((root / part).iterdir())]
    images = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]
    listing = [(path.parent.name, path) for path in images if path.suffix.lower() in IMAGE_SUFFIXES]
    if not listing:
        raise UserError(f"{root / parts[0]} has no images; expected one folder per class with JPEG or PNG files")
    return listing
