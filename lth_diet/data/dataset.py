"""What a data set is: images, labels, statistics and class names."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
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
        """Whether a is_remote image still is of its class."""
        return self.name != "digits"
