"""Dataset and Split: images, labels, per-channel statistics and class names."""

import dataclasses
from typing import NamedTuple

import numpy as np

NATIVE_SIZES = {"cifar10": 32, "cifar100": 32, "cinic10": 32, "digits": 8}
"""Pixels per side of the images of each dataset; those of an image folder may have any size."""


def flips_by_default(name: str) -> bool:
    """Whether a horizontally flipped image of a dataset keeps its class. Digits do not."""
    return name != "digits"


class ImageFile(NamedTuple):
    """A file of an image folder: its path relative to the folder, its class, and the SHA-256 of its content."""

    name: str
    class_name: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What is known of a dataset before it is decoded.

    Attributes:
        train_size: Number of training examples.
        fingerprint: Identifies the examples; part of the run id of an image folder.
        classes: Number of classes.
        channels: Number of channels.
        old_fingerprint: Fingerprint that earlier versions gave an image folder: of names and sizes, not contents.
        images: Files of an image folder: training images, then test images, in the order of the examples.
        warnings: One sentence for each kind of file that is not used, and for classes that look wrong.
    """

    train_size: int
    fingerprint: str
    classes: int
    channels: int = 3
    old_fingerprint: str | None = None
    images: tuple[ImageFile, ...] = dataclasses.field(default=(), repr=False)
    warnings: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Split:
    """Images, uint8 of shape (N, H, W, C), and labels, int64 of shape (N,)."""

    images: np.ndarray
    labels: np.ndarray

    def __repr__(self) -> str:
        return f"Split({' x '.join(map(str, self.images.shape))})"


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A decoded dataset.

    `mean` and `std` are per channel, over the training set, with pixels scaled to 0 to 1.
    """

    name: str
    train: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]

    @property
    def flip(self) -> bool:
        """Whether a horizontally flipped image keeps its class."""
        return flips_by_default(self.name)
