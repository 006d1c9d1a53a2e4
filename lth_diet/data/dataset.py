"""Dataset and Split: images, labels, per-channel statistics and class names."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What is known of a dataset before it is decoded.

    The images of a folder are taken to have three channels; one that is grayscale has fewer weights in the network.
    """

    train_size: int
    fingerprint: str
    classes: int
    channels: int = 3


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
        """Whether a horizontally flipped image keeps its class. Digits do not."""
        return self.name != "digits"
