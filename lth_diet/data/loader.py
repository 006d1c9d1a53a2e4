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
_OUTSIDE = -(2**40)  # of the image: plus any index of a pixel, still negative


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
        self._crops = Crops(*self.images.shape[1:3], self.padding)
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
        numbers = [array[self._rank_slice] for array in (self.examples(step), *self.augmentation(step))]
        images, examples = self._crops.take(self.images, self._to_device(torch.from_numpy(self._crops.plan(*numbers))))
        return self._normalize(images), self.labels.index_select(0, examples)

    def _to_device(self, numbers: Tensor) -> Tensor:
        if self.images.device.type == "cpu":
            return numbers
        # PyTorch reuses pinned memory only after the copies from it that it knows of
        return numbers.pin_memory().to(self.images.device, non_blocking=True)


class Crops:
    """Crops of zero-padded images, some of them flipped, as one gather of pixels with few operators on the device.

    Args:
        height, width: Size of the images and of the crops, in pixels.
        padding: Pixels added on each side.
    """

    def __init__(self, height: int, width: int, padding: int):
        def windows(size: int) -> np.ndarray:
            pixels = np.arange(2 * padding + 1)[:, None] + np.arange(size) - padding
            return np.where((pixels >= 0) & (pixels < size), pixels, _OUTSIDE)

        self.height, self.width = height, width
        self._rows = windows(height) * width
        self._columns = np.stack([windows(width), windows(width)[:, ::-1]])

    def plan(self, images: np.ndarray, top: np.ndarray, left: np.ndarray, flipped: np.ndarray) -> np.ndarray:
        """Return the numbers that `take` needs, int64, for B crops.

        Args:
            images: Index of the image of each crop, (B,).
            top, left: Edges of each crop in the padded image, (B,), 0 to 2 x padding.
            flipped: Which crops to flip horizontally, boolean (B,).
        """
        rows = images[:, None] * (self.height * self.width) + self._rows[top]
        return np.concatenate([images, rows.ravel(), self._columns[flipped.astype(int), left].ravel()])

    def take(self, images: Tensor, plan: Tensor) -> tuple[Tensor, Tensor]:
        """Return the crops of `images`, (B, H, W, C), and the indices of their images, (B,)."""
        count = len(plan) // (1 + self.height + self.width)
        indices, rows, columns = plan.split([count, count * self.height, count * self.width])
        pixels = rows.view(count, self.height, 1) + columns.view(count, 1, self.width)
        outside = pixels < 0
        crops = images.flatten(0, 2).index_select(0, pixels.clamp_(min=0).flatten())
        return crops.view(*pixels.shape, -1).masked_fill_(outside[..., None], 0), indices


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
