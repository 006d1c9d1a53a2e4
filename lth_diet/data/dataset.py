"""Dataset and Split: images, labels, per-channel statistics and class names."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """Sizes and fingerprint of a dataset, known before it is decoded."""

    train_size: int
    test_size: int
    classes: int
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Split:
    """Images, uint8 of shape (N, H, W, C), and labels, int64 of shape (N,)."""

    images: np.ndarray
    labels: np.ndarray

    def __repr__(self) -> str:
        return f"Split({len(self.images):,} images of {' x '.join(map(str, self.images.shape[1:]))})"


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

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, train={self.train}, test={self.test}, {len(self.class_names)} classes)"

    def with_labels(self, labels: np.ndarray) -> "Dataset":
        """Return the same images with other training labels, int64 of shape (N,)."""
        return dataclasses.replace(self, train=Split(self.train.images, labels))

    @property
    def flip(self) -> bool:
        """Whether a horizontally flipped image keeps its class. Digits do not."""
        return self.name != "digits"
