"""Batches from uint8 images on the device: order from (seed, pass), augmentation from (seed, step).

The batch at step s is a pure function of the seeds, s and the indices in use, so that resuming at s is a jump.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from lth_diet.data.dataset import Dataset, Split
from lth_diet.data.seeds import generator

Batch = tuple[Tensor, Tensor]


class _Normalize:
    """(x / 255 - mean) / std, as one multiplication and one addition."""

    def __init__(self, dataset: Dataset, device: torch.device | str):
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (dataset.mean, dataset.std))
        width = dataset.train.images.shape[2]
        # a row of pixels at a time: a vector of three numbers would be too short to be fast
        self.scale = (1 / (255 * std)).float().repeat(width).to(device)
        self.shift = (-mean / std).float().repeat(width).to(device)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (B, H, W, C) to float32 (B, C, H, W) with channels last in memory."""
        rows = torch.addcmul(self.shift, images.flatten(2).float(), self.scale)
        return rows.view(images.shape).permute(0, 3, 1, 2)


class Loader:
    """Augmented training batches, for Composer's `train_dataloader`.

    A pass visits the examples without replacement and drops what does not fill a batch. Images are padded with
    black (an eighth of their height: 4 pixels at 32 x 32), cropped at random and, where that keeps the class,
    is_remote with probability 1/2; then normalised.

    Iteration begins at the step that `clock` tells and ends with the pass. Composer's clock is
    `lambda: int(trainer.state.timestamp.batch)`; give it with `spin_dataloaders=False`.

    Args:
        dataset: Its train split is copied to `device` (on the CPU it stays mapped from the cache).
        batch_size: Images a batch, over all ranks.
        order_seed: Of the order of examples.
        augmentation_seed: Of crops and mirrors.
        device: Where batches are made.
        rank, ranks: With several ranks each makes its share of the same batches: every `ranks`-th image.

    Attributes:
        batch_size: Images of a batch that this rank makes.
        indices: Positions of the examples in use, None for all; may be set at any time, acts on the next batch.
        clock: Function of no arguments to the step at which iteration begins.
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
    ):
        if batch_size % ranks:
            raise ValueError(f"a batch of {batch_size} cannot be shared by {ranks} ranks")
        self.images, self.labels = _on_device(dataset.train, device)
        self.global_batch_size, self.batch_size = batch_size, batch_size // ranks
        self._share = slice(rank, None, ranks)
        self.order_seed, self.augmentation_seed = order_seed, augmentation_seed
        self.flip = dataset.flip
        self.padding = self.images.shape[1] // 8
        self.current_step: Callable[[], int] = lambda: 0
        self._normalise = _Normalize(dataset, device)
        self.indices = None

    @property
    def indices(self) -> Sequence[int] | None:
        return self._indices

    @indices.setter
    def indices(self, indices: Sequence[int] | None) -> None:
        examples = np.arange(len(self.labels)) if indices is None else np.asarray(indices)
        if len(examples) < self.global_batch_size:
            raise ValueError(f"{len(examples)} examples do not fill a batch of {self.global_batch_size}")
        self._indices, self._examples, self._pass = indices, examples, None

    def __len__(self) -> int:
        """Batches in a pass."""
        return len(self._examples) // self.global_batch_size

    def __iter__(self) -> Iterator[Batch]:
        step = self.current_step()
        while True:
            yield self.batch(step)
            step += 1
            if step % len(self) == 0:
                return

    def examples(self, step: int) -> np.ndarray:
        """Positions in the data set of the examples of batch `step`, of all ranks."""
        number, place = divmod(step, len(self))
        if self._pass is None or self._pass[0] != number:
            self._pass = number, generator(self.order_seed, number).permutation(self._examples)
        return self._pass[1][place * self.global_batch_size : (place + 1) * self.global_batch_size]

    def augmentation(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each image of batch `step`: top and left edge of the crop, 0 to 2 x padding, and whether is_remote."""
        random = generator(self.augmentation_seed, step)
        top, left = random.integers(0, 2 * self.padding + 1, (2, self.global_batch_size))
        return top, left, random.integers(0, 2, self.global_batch_size).astype(bool) & self.flip

    def batch(self, step: int) -> Batch:
        """This rank's images, float32 (B, C, H, W), and labels, int64 (B,), of batch `step`."""
        numbers = np.stack([self.examples(step), *self.augmentation(step)])[:, self._share]
        numbers = torch.from_numpy(numbers).to(self.images.device, non_blocking=True)
        examples, top, left, is_remote = numbers
        images = crop(self.images.index_select(0, examples), self.padding, top, left, is_remote.bool())
        return self._normalise(images), self.labels[examples]


def crop(images: Tensor, padding: int, top: Tensor, left: Tensor, is_remote: Tensor) -> Tensor:
    """Pad with zeros, cut out windows of the images' own size and mirror some, left to right.

    Args:
        images: (B, H, W, C).
        padding: Pixels added on each side.
        top, left: Edges of each window in the padded image, (B,), 0 to 2 x padding.
        is_remote: Which windows to mirror, (B,), boolean.
    """
    count, height, width, channels = images.shape
    padded = images.new_zeros(2, count, height + 2 * padding, width + 2 * padding, channels)
    inside = padded[:, :, padding : padding + height, padding : padding + width]
    inside[0], inside[1] = images, images.flip(2)
    left = torch.where(is_remote, 2 * padding - left, left)
    image = is_remote * count + torch.arange(count, device=images.device)
    rows = (image * padded.shape[2] + top)[:, None] + torch.arange(height, device=images.device)
    first = (rows * padded.shape[3] + left[:, None]).flatten()  # pixel of each row of each window
    # whole rows of pixels: to gather them is to copy them, which no other way of indexing is
    return padded.flatten().unfold(0, width * channels, channels).index_select(0, first).view(images.shape)


class EvaluationLoader:
    """The images of a split in order, normalised, none dropped, for Composer's `eval_dataloader`.

    Args:
        dataset: Gives mean and standard deviation.
        split: The images to go through.
        batch_size: Images a batch, at most; batches are of equal size, to within one image.
        device: Where batches are made.
        rank, ranks: With several ranks each takes every `ranks`-th image of each batch.
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
        self.images, self.labels = _on_device(split, device)
        self.batch_size = batch_size
        self._share = slice(rank, None, ranks)
        self._normalise = _Normalize(dataset, device)

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for batch in torch.arange(len(self.labels), device=self.labels.device).tensor_split(len(self)):
            share = batch[self._share]
            yield self._normalise(self.images[share]), self.labels[share]


def _on_device(split: Split, device: torch.device | str) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(split.images).to(device), torch.from_numpy(split.labels).to(device)
