"""Image folders of the user: `<root>/<part>/<class>/<image>`, with JPEG or PNG files of one size."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lth_diet.data.dataset import DatasetInfo, ImageFile, Split
from lth_diet.data.file_hashes import hash_files
from lth_diet.data.image_file import DECODER_VERSION, MIN_SIDE, read_pixels
from lth_diet.data.image_layout import PARTS, Layout
from lth_diet.errors import UserError
from lth_diet.files import sha256_of


def info(root: str) -> DatasetInfo:
    """Return the number of training images, and a fingerprint of the names and contents of all images.

    Raises:
        UserError: If the images are not in the expected layout.
        OSError: If a file or folder cannot be read.
    """
    layout = Layout(Path(root))
    layout.check()
    found = [image for part in PARTS for image in layout.images[part]]
    hashes = hash_files(Path(root), {name: status for _, name, status in found})
    images = tuple(ImageFile(name, class_name, hashes[name]) for class_name, name, _ in found)
    options = json.dumps({"decoder": DECODER_VERSION})
    return DatasetInfo(
        train_size=len(images) - len(layout.images["test"]),
        classes=len({image.class_name for image in images}),
        channels=_count_channels(Path(root) / images[0].name),
        fingerprint=_hash([options, *(f"{image.name}\0{image.sha256}" for image in images)]),
        old_fingerprint=_hash([f"{name} {status.st_size}" for _, name, status in found]),
        images=images,
        warnings=(*layout.warnings(), *(f"{root}: {text}" for text in _describe_duplicates(images))),
    )


def _describe_duplicates(images: Sequence[ImageFile]) -> list[str]:
    """One sentence each for test images that are also training images, and images that are in several classes."""
    same: dict[str, list[ImageFile]] = {}
    for image in images:
        same.setdefault(image.sha256, []).append(image)
    leaks, conflicts = [], []
    for copies in same.values():
        first = copies[0]
        leaks += [(each, first) for each in copies if _is_test(each) and not _is_test(first)]  # test/ comes last
        conflicts += [(each, first) for each in copies if each.class_name != first.class_name]
    sentences = []
    if leaks:
        are = f"{len(leaks):,} test image{'s are' if len(leaks) > 1 else ' is'} also in train/ or valid/"
        sentences.append(f"{are} ({leaks[0][0].name} is {leaks[0][1].name}), so test accuracies are too high")
    if conflicts:
        are = f"{len(conflicts):,} image{'s are' if len(conflicts) > 1 else ' is'} also in another class"
        sentences.append(f"{are} ({conflicts[0][0].name} is {conflicts[0][1].name})")
    return sentences


def _is_test(image: ImageFile) -> bool:
    return image.name.startswith("test/")


def _count_channels(path: Path) -> int:
    """Channels of an image, which those of all images must equal; 3 if it cannot be read, which `decode` reports."""
    try:
        with open(path, "rb") as file:
            return read_pixels(file, path, MIN_SIDE).shape[2]
    except UserError:
        return 3


def _hash(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()[:16]


def decode(root: str, images: Sequence[ImageFile], size: int | None = None) -> tuple[Split, Split, list[str]]:
    """Return the training set (train/ and valid/ merged), test set and class names.

    Args:
        root: The folder.
        images: Its images, as `info` found them.
        size: Scale all images to this many pixels per side; None keeps them.

    Raises:
        UserError: If a file changed, cannot be decoded, or differs from the first one in size or number of channels.
        OSError: If a file cannot be read.
    """
    class_names = sorted({image.class_name for image in images})
    splits: list[Split] = []
    for is_test in (False, True):
        mine = [image for image in images if _is_test(image) == is_test]
        decoded = None
        for index, image in enumerate(mine):
            pixels = _read(Path(root) / image.name, image, size)
            shape = splits[0].images.shape[1:] if splits else pixels.shape
            if decoded is None:
                decoded = np.empty((len(mine), *shape), np.uint8)
            if pixels.shape != decoded.shape[1:]:
                found, expected = _describe_shape(pixels.shape), _describe_shape(decoded.shape[1:])
                if pixels.shape[:2] != decoded.shape[1:3]:
                    hint = "; set dataset.size=32 to scale all images to one size"
                else:
                    hint = "; convert one kind to the other"
                raise UserError(f"{Path(root) / image.name}: {found}; expected {expected}, like {images[0].name}{hint}")
            decoded[index] = pixels
        splits.append(Split(decoded, np.array([class_names.index(image.class_name) for image in mine])))
    return splits[0], splits[1], class_names


def _read(path: Path, image: ImageFile, size: int | None) -> np.ndarray:
    with open(path, "rb") as file:
        if sha256_of(file) != image.sha256:
            raise UserError(f"{path} changed while the images were read; rerun the command when it is complete")
        return read_pixels(file, path, size)


def _describe_shape(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]} pixels, {'grayscale' if shape[2] == 1 else 'color'}"


def describe_changes(before: Mapping[str, str], after: Mapping[str, str]) -> str:
    """Count the images that changed, were added or were removed, and name one of each: `1 changed (train/ant/a.png)`.

    Args:
        before: SHA-256 of each image, by name.
        after: The same, later.
    """
    changes = {
        "changed": [name for name in after if name in before and after[name] != before[name]],
        "added": [name for name in after if name not in before],
        "removed": [name for name in before if name not in after],
    }
    return ", ".join(
        f"{len(names):,} {change} ({'such as ' * (len(names) > 1)}{names[0]})"
        for change, names in changes.items()
        if names
    )
