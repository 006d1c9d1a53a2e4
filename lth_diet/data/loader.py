"""Loaders that make batches on the device from uint8 images.

The data order depends on (order seed, epoch) and the augmentation on (augmentation seed, step). The batch at a step is
a pure function of the seeds, the step and the indices in use, so training resumes at any step without replaying earlier
batches.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lth_diet.data.crops import Crops, Normalize
from lth_diet.data.dataset import Dataset, Split
from lth_diet.data.seeds import generator

Batch = tuple[Tensor, Tensor]


class _TrainingLoader:
    """Iterates over `batch(step)` until the epoch of `len(self)` batches ends, and makes batches for R replicates."""

    def __init__(self, dataset: Dataset, device: torch.device | str, replicates: int = 1):
        self.images, self.labels = _on_device(dataset.train, device)
        self.num_examples = len(self.labels)
        self.padding = self.images.shape[1] // 8
        self.current_step: Callable[[], int] = lambda: 0
        self._dataset, self._replicates = dataset, replicates
        self._crops = Crops(*self.images.shape[1:3], self.padding)
        self._normalize = Normalize(dataset, device, replicates)

    def __iter__(self) -> Iterator[Batch]:
        step = self.current_step()
        while True:
            yield self.batch(step)
            step += 1
            if step % len(self) == 0:
                return

    def _make(self, *numbers: np.ndarray) -> Batch:
        """Return the images, (B, R x C, H, W), and labels, (B x R,), of crops with the numbers of `Crops.plan`."""
        plan = self._to_device(torch.from_numpy(self._crops.plan(*numbers)))
        images, examples = self._crops.take(self.images, plan, self._replicates)
        return self._normalize(images), self.labels.index_select(0, examples)

    def _to_device(self, numbers: Tensor) -> Tensor:
        if self.images.device.type == "cpu":
            return numbers
        # PyTorch reuses pinned memory only after the copies from it that it knows of
        return numbers.pin_memory().to(self.images.device, non_blocking=True)


class Loader(_TrainingLoader):
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
        super().__init__(dataset, device)
        self.global_batch_size, self.batch_size = batch_size, batch_size // ranks
        self._rank_slice = slice(rank, None, ranks)
        self.order_seed, self.augmentation_seed = order_seed, augmentation_seed
        self.flip = dataset.flip if flip is None else flip
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
        if not self.flip:
            return top, left, np.zeros(self.global_batch_size, bool)
        return top, left, random.integers(0, 2, self.global_batch_size).astype(bool)

    def crops(self, step: int) -> tuple[np.ndarray, ...]:
        """Return the examples and the augmentation of this rank's batch `step`, each (B,); see `Crops.plan`."""
        return tuple(array[self._rank_slice] for array in (self.examples(step), *self.augmentation(step)))

    def batch(self, step: int) -> Batch:
        """Return this rank's images, float32 (B, C, H, W), and labels, int64 (B,), of batch `step`."""
        return self._make(*self.crops(step))


class StackedLoader(_TrainingLoader):
    """Augmented training batches of R replicates that train as one network (`lth_diet.networks.stack`).

    A batch holds the batches of R loaders, which have the same images and labels: images are concatenated along the
    channels, so that replicate r has channels r x C to (r + 1) x C - 1, and labels are (B, R). It takes as many
    operators on the device as a batch of one loader. To iterate, set `current_step` as for `Loader`; that of `loaders`
    is not used.

    Args:
        loaders: Loaders of the same data, batch size, device and ranks, which differ in their seeds and indices.

    Attributes:
        loaders: The R loaders.
        batch_size: Images per batch, replicate and rank.
        num_examples: Number of examples of the training split.
        indices: Indices of the examples in use, R rows of the same length, or None for all. May be set at any time;
            acts on the next batch.
        current_step: Function without arguments that returns the step at which iteration starts.

    Raises:
        ValueError: If there is no loader, or the loaders do not fit together.
    """

    def __init__(self, loaders: Sequence[Loader]):
        if not loaders:
            raise ValueError("a StackedLoader needs at least one Loader")
        first, *others = self.loaders = tuple(loaders)
        for name, values in _properties(first).items():
            for index, other in enumerate(others, 1):
                if not _is_same(values, _properties(other)[name]):
                    raise ValueError(f"loaders 0 and {index} of the stack have different {name}; expected the same")
        super().__init__(first._dataset, first.images.device, len(self.loaders))
        self.batch_size = first.batch_size

    def __repr__(self) -> str:
        return f"StackedLoader({len(self.loaders)} x {self.loaders[0]!r})"

    @property
    def indices(self) -> Sequence[Sequence[int]] | None:
        rows = [loader.indices for loader in self.loaders]
        return None if all(row is None for row in rows) else rows

    @indices.setter
    def indices(self, indices: Sequence[Sequence[int]] | None) -> None:
        rows = [None] * len(self.loaders) if indices is None else list(indices)
        if len(rows) != len(self.loaders):
            raise ValueError(f"indices have {len(rows)} rows; expected {len(self.loaders)}, one per loader")
        if indices is not None and len(lengths := {len(row) for row in rows}) > 1:
            raise ValueError(f"rows of indices have lengths {sorted(lengths)}; expected rows of the same length")
        for loader, row in zip(self.loaders, rows, strict=True):
            loader.indices = row

    def __len__(self) -> int:
        """Number of batches per epoch."""
        return len(self.loaders[0])

    def batch(self, step: int) -> Batch:
        """Return this rank's images, float32 (B, R x C, H, W), and labels, int64 (B, R), of batch `step`."""
        crops = zip(*(loader.crops(step) for loader in self.loaders), strict=True)
        images, labels = self._make(*(np.stack(numbers, axis=1) for numbers in crops))
        return images, labels.view(-1, len(self.loaders))


def _properties(loader: Loader) -> dict[str, Any]:
    """What the loaders of a stack have in common."""
    dataset = loader._dataset
    return {
        "images": dataset.train.images,
        "labels": dataset.train.labels,
        "means or standard deviations": (dataset.mean, dataset.std),
        "batch sizes": loader.global_batch_size,
        "devices": loader.images.device,
        "ranks": loader._rank_slice,
        "numbers of indices": len(loader._examples),
    }


def _is_same(a: Any, b: Any) -> bool:
    return a is b or (np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b)


class EvaluationLoader:
    """All images of a split in order, normalized, for Composer's `eval_dataloader`.

    Args:
        dataset: Dataset whose mean and standard deviation normalize the images.
        split: Images and labels to iterate over. The images are copied to `device` as those of `Loader`.
        batch_size: Maximum number of images per batch, over all ranks, unless a rank would get none. Batch sizes differ
            by at most one image.
        device: Device on which batches are made.
        rank, ranks: Index of this rank and number of ranks. Each rank makes every `ranks`-th image of a batch.
        copies: Number R of replicates in the network (`lth_diet.networks.stack`). For more than one, images are
            repeated R times along the channels, float32 (B, R x C, H, W), and labels are int64 (B, R).

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
        copies: int = 1,
    ):
        if len(split.labels) < ranks:
            raise ValueError(f"{len(split.labels)} images do not suffice for {ranks} ranks")
        self.images, self.labels = _on_device(split, device)
        self.batch_size = batch_size
        self._ranks = ranks
        self._rank_slice = slice(rank, None, ranks)
        self._copies = copies
        self._normalize = Normalize(dataset, device, copies)

    def __repr__(self) -> str:
        device = str(self.images.device)
        return f"EvaluationLoader({len(self.labels):,} examples, batch_size={self.batch_size}, device={device!r})"

    def __len__(self) -> int:
        """Number of batches."""
        return min(-(-len(self.labels) // self.batch_size), len(self.labels) // self._ranks)

    def __iter__(self) -> Iterator[Batch]:
        for batch in torch.arange(len(self.labels), device=self.labels.device).tensor_split(len(self)):
            share = batch[self._rank_slice]
            images, labels = self.images[share], self.labels[share]
            if self._copies > 1:
                images, labels = images.repeat(1, 1, 1, self._copies), labels[:, None].repeat(1, self._copies)
            yield self._normalize(images), labels


def _on_device(split: Split, device: torch.device | str) -> tuple[Tensor, Tensor]:
    return _shared(split.images, torch.device(device)), _shared(split.labels, torch.device(device))


_copies: dict[tuple[int, torch.device], Tensor] = {}  # by id of the array


def _shared(array: np.ndarray, device: torch.device) -> Tensor:
    """The copy of an array on a device, which is made once and freed with the array; on the CPU, the array itself."""
    if device.type == "cpu":
        return torch.from_numpy(array)
    key = id(array), device
    if key not in _copies:
        _copies[key] = torch.from_numpy(array).to(device)
        weakref.finalize(array, _copies.pop, key, None)
    return _copies[key]
