"""Loaders that make batches on the device from uint8 images.

The data order depends on (order seed, epoch) and the augmentation on (augmentation seed, step). The batch at a step is
a pure function of the seeds, the step and the indices in use, so training resumes at any step without replaying earlier
batches.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lth_diet.data.dataset import Dataset, Split
from lth_diet.data.seeds import generator

Batch = tuple[Tensor, Tensor]


class _Normalize:
    """Computes (x / 255 - mean) / std with one multiplication and one addition."""

    def __init__(self, dataset: Dataset, device: torch.device | str):
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (dataset.mean, dataset.std))
        width = dataset.train.images.shape[2]
        # repeated over a row of pixels: broadcasting vectors of three numbers is slow
        self.scale = (1 / (255 * std)).float().repeat(width).to(device)
        self.shift = (-mean / std).float().repeat(width).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        """Convert uint8 (B, H, W, C) to float32 (B, C, H, W) in channels-last memory format."""
        rows = torch.addcmul(self.shift, images.flatten(2).float(), self.scale)
        return rows.view(images.shape).permute(0, 3, 1, 2)


class Loader:
    """Augmented training batches, for Composer's `train_dataloader`.

    An epoch visits the examples in use without replacement, in a new order, and drops the last incomplete batch.
    Images are zero-padded by an eighth of their height (4 pixels at 32 x 32), randomly cropped, flipped horizontally
    with probability 1/2 if `flip`, and normalized.

    Iteration starts at step `current_step()` and ends with the epoch. To follow Composer's clock, set
    `loader.current_step = lambda: int(trainer.state.timestamp.batch)` and pass `spin_dataloaders=False` to the
    Trainer.

    Args:
        dataset: Its training images are copied to `device`, once for all loaders of a process (on the CPU they stay
            memory-mapped from the cache).
        batch_size: Images per batch, over all ranks.
        order_seed: Seed of the data order, purpose "order" in `lth_diet.data.seeds`.
        augmentation_seed: Seed of crops and flips, purpose "augmentation".
        device: Device on which batches are made.
        rank, ranks: Index of this rank and number of ranks. Each rank makes every `ranks`-th image of a batch.
        flip: Whether images are flipped; None: if `Dataset.flip` allows it.

    Attributes:
        batch_size: Images per batch on this rank.
        num_examples: Number of examples of the training split.
        indices: Indices of the examples in use, or None for all. May be set at any time; acts on the next batch.
        current_step: Function without arguments that returns the step at which iteration starts.

    Raises:
        ValueError: If `batch_size` is not divisible by `ranks`, or the examples do not fill a batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        order_seed: int,
        augmentation_seed: int,
        device: torch.device | str = "cpu",
        rank: int = 0,
        ranks: int = 1,
        flip: bool | None = None,
    ):
        if batch_size % ranks:
            raise ValueError(f"batch_size {batch_size} is not divisible by {ranks} ranks")
        self.images, self.labels = _on_device(dataset.train, device)
        self.global_batch_size, self.batch_size = batch_size, batch_size // ranks
        self._rank_slice = slice(rank, None, ranks)
        self.order_seed, self.augmentation_seed = order_seed, augmentation_seed
        self.flip = dataset.flip if flip is None else flip
        self.padding = self.images.shape[1] // 8
        self.current_step: Callable[[], int] = lambda: 0
        self._normalize = _Normalize(dataset, device)
        self.num_examples = len(self.labels)
        self.indices = None

    def __repr__(self) -> str:
        examples = f"{len(self._examples):,} of {len(self.labels):,} examples"
        return f"Loader({examples}, batch_size={self.batch_size}, device={str(self.images.device)!r})"

    @property
    def indices(self) -> Sequence[int] | None:
        return self._indices

    @indices.setter
    def indices(self, indices: Sequence[int] | None) -> None:
        examples = np.arange(len(self.labels)) if indices is None else np.asarray(indices)
        if len(examples) < self.global_batch_size:
            raise ValueError(f"{len(examples)} examples do not fill a batch of {self.global_batch_size}")
        self._indices, self._examples, self._epoch_order = indices, examples, None

    def __len__(self) -> int:
        """Number of batches per epoch."""
        return len(self._examples) // self.global_batch_size

    def __iter__(self) -> Iterator[Batch]:
        step = self.current_step()
        while True:
            yield self.batch(step)
            step += 1
            if step % len(self) == 0:
                return

    def examples(self, step: int) -> np.ndarray:
        """Return the indices of the examples in batch `step`, over all ranks, shape (global batch size,)."""
        epoch, batch_in_epoch = divmod(step, len(self))
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            self._epoch_order = epoch, generator(self.order_seed, epoch).permutation(self._examples)
        start = batch_in_epoch * self.global_batch_size
        return self._epoch_order[1][start : start + self.global_batch_size]

    def augmentation(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the top and left edges of the crops (0 to 2 x padding) in batch `step`, and which ones are flipped."""
        random = generator(self.augmentation_seed, step)
        top, left = random.integers(0, 2 * self.padding + 1, (2, self.global_batch_size))
        return top, left, random.integers(0, 2, self.global_batch_size).astype(bool) & self.flip

    def batch(self, step: int) -> Batch:
        """Return this rank's images, float32 (B, C, H, W), and labels, int64 (B,), of batch `step`."""
        numbers = np.stack([self.examples(step), *self.augmentation(step)])[:, self._rank_slice]
        numbers = torch.from_numpy(numbers).to(self.images.device, non_blocking=True)
        examples, top, left, flipped = numbers
        images = crop(self.images.index_select(0, examples), self.padding, top, left, flipped.bool())
        return self._normalize(images), self.labels[examples]


def crop(images: Tensor, padding: int, top: Tensor, left: Tensor, flipped: Tensor) -> Tensor:
    """Zero-pad images, crop windows of the original size and flip some of them horizontally.

    Args:
        images: Images, (B, H, W, C).
        padding: Pixels added on each side.
        top, left: Edges of each window in the padded image, (B,), 0 to 2 x padding.
        flipped: Which windows to flip, boolean (B,).

    Returns:
        Windows of the shape and type of `images`.
    """
    count, height, width, channels = images.shape
    padded = images.new_zeros(2, count, height + 2 * padding, width + 2 * padding, channels)
    inside = padded[:, :, padding : padding + height, padding : padding + width]
    inside[0], inside[1] = images, images.flip(2)
    left = torch.where(flipped, 2 * padding - left, left)
    image = flipped * count + torch.arange(count, device=images.device)
    rows = (image * padded.shape[2] + top)[:, None] + torch.arange(height, device=images.device)
    row_starts = (rows * padded.shape[3] + left[:, None]).flatten()
    # gathering whole rows of pixels is a plain copy, faster than any other kind of indexing
    return padded.flatten().unfold(0, width * channels, channels).index_select(0, row_starts).view(images.shape)


class EvaluationLoader:
    """All images of a split in order, normalized, for Composer's `eval_dataloader`.

    Args:
        dataset: Dataset whose mean and standard deviation normalize the images.
        split: Images and labels to iterate over. The images are copied to `device` as those of `Loader`.
        batch_size: Maximum number of images per batch, over all ranks, unless a rank would get none. Batch sizes differ
            by at most one image.
        device: Device on which batches are made.
        rank, ranks: Index of this rank and number of ranks. Each rank makes every `ranks`-th image of a batch.

    Raises:
        ValueError: If there are fewer images than ranks: the loss of no image is NaN.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        batch_size: int = 500,
        device: torch.device | str = "cpu",
        rank: int = 0,
        ranks: int = 1,
    ):
        if len(split.labels) < ranks:
            raise ValueError(f"{len(split.labels)} images do not suffice for {ranks} ranks")
        self.images, self.labels = _on_device(split, device)
        self.batch_size = batch_size
        self._ranks = ranks
        self._rank_slice = slice(rank, None, ranks)
        self._most_batches = max(len(self.labels) // ranks, 1)
        self._normalize = _Normalize(dataset, device)

    def __repr__(self) -> str:
        device = str(self.images.device)
        return f"EvaluationLoader({len(self.labels):,} examples, batch_size={self.batch_size}, device={device!r})"

    def __len__(self) -> int:
        """Number of batches."""
        return min(-(-len(self.labels) // self.batch_size), len(self.labels) // self._ranks)

    def __iter__(self) -> Iterator[Batch]:
        for batch in torch.arange(len(self.labels), device=self.labels.device).tensor_split(len(self)):
            share = batch[self._rank_slice]
            yield self._normalize(self.images[share]), self.labels[share]


def _on_device(split: Split, device: torch.device | str) -> tuple[Tensor, Tensor]:
    return _shared_images(split.images, torch.device(device)), torch.from_numpy(split.labels).to(device)


_copies: dict[tuple[int, torch.device], Tensor] = {}  # by id of the array


def _shared_images(images: np.ndarray, device: torch.device) -> Tensor:
    """The copy of an array on a device, which is made once and freed with the array; on the CPU, the array itself."""
    if device.type == "cpu":
        return torch.from_numpy(images)
    key = id(images), device
    if key not in _copies:
        _copies[key] = torch.from_numpy(images).to(device)
        weakref.finalize(images, _copies.pop, key, None)
    return _copies[key]
