"""Image folders of the user: `<root>/<part>/<class>/<image>`, with JPEG or PNG files of one size."""

import contextlib
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lth_diet.data.dataset import Split
from lth_diet.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
MAX_SIDE = 1024  # pixels; a file of a few bytes may claim to be of any size
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")


def file_size(path: Path) -> int:
    """Return the size of a regular file in bytes.

    Raises:
        UserError: If it is not a regular file: reading from a pipe may block forever.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is not a regular file; expected a JPEG or PNG file")
    return status.st_size


def decode(root: str) -> tuple[Split, Split, list[str]]:
    """Return the training set (train/ and valid/ merged), test set and class names.

    Raises:
        UserError: If a file cannot be decoded, or its size or number of channels differs from the first image's.
    """
    train, test = (list_images(Path(root), parts) for parts in (("train", "valid"), ("test",)))
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
        with _ignore_warnings(), Image.open(path, formats=("PNG", "JPEG")) as image:
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


@contextlib.contextmanager
def _ignore_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of large images, which are rejected
        yield


def _describe_shape(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]} pixels, {'grayscale' if shape[2] == 1 else 'color'}"


def list_images(root: Path, parts: tuple[str, ...]) -> list[tuple[str, Path]]:
    """List (class name, path) of every image in `root/<part>/<class>/`, sorted within each part.

    Raises:
        UserError: If the folder of the first part does not exist, or no part has an image.
    """
    if not (root / parts[0]).is_dir():
        raise UserError(f"{root} has no folder {parts[0]}/; expected train/<class>/ and test/<class>/")
    listing = [(path.parent.name, path) for part in parts for path in image_files(root / part)]
    if not listing:
        raise UserError(f"{root / parts[0]} has no images; expected one folder per class with JPEG or PNG files")
    return listing


def image_files(part: Path) -> Iterator[Path]:
    """Iterate over the images in `part/<class>/`, sorted by class and name; none if `part` does not exist."""
    for folder in sorted(part.iterdir()) if part.is_dir() else ():
        if folder.is_dir():
            yield from sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
