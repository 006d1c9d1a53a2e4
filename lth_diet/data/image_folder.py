"""Your own images: one folder per class."""

import contextlib
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lth_diet.data.dataset import Split
from lth_diet.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
MAX_SIDE = 1024  # pixels: a file of a few bytes may claim any number
_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")  # that convert to 8 bits without loss of range


def file_size(path: Path) -> int:
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):  # to read a pipe may take for ever
        raise UserError(f"{path} is no file; allowed: JPEG and PNG files")
    return about.st_size


def decode(root: str) -> tuple[Split, Split, list[str]]:
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
                raise UserError(f"{path}: {found}; allowed: {expected}, as {train[0][1].name} is")
            images.append(image)
        labels = [class_names.index(label) for label, _ in listing]
        splits.append(Split(np.stack(images), np.array(labels)))
    return splits[0], splits[1], class_names


def _read_image(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with _silent(), Image.open(path, formats=("PNG", "JPEG")) as image:
            if max(image.size) > MAX_SIDE:
                raise UserError(f"{path}: {image.size[0]} x {image.size[1]} pixels; allowed: up to {MAX_SIDE} a side")
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


def _describe_shape(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]} pixels, {'grey' if shape[2] == 1 else 'colour'}"


def list_images(root: Path, parts: tuple[str, ...]) -> list[tuple[str, Path]]:
    """(class name, path) of every image below `root/part/<class>/`, sorted; only parts[0] has to exist."""
    if not (root / parts[0]).is_dir():
        raise UserError(f"{root} holds no folder {parts[0]}/; allowed: a folder of train/<class>/ and test/<class>/")
    listing = [(path.parent.name, path) for part in parts for path in image_files(root / part)]
    if not listing:
        raise UserError(f"{root / parts[0]} holds no image; allowed: a folder a class with JPEG or PNG files")
    return listing


def image_files(part: Path) -> Iterator[Path]:
    for folder in sorted(part.iterdir()) if part.is_dir() else ():
        if folder.is_dir():
            yield from sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
