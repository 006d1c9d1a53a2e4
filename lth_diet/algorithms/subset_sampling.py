"""SubsetSampling: trains on a subset of the examples until a given time."""

from collections.abc import Iterable, Sequence, Sized

import torch
from composer import Algorithm, Event, Logger, State, Time, TimeUnit
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler, Subset


class SubsetSampling(Algorithm):
    """Trains on a subset of the examples until a given time, then on all examples (the paper's section 3).

    While the subset is in use, an epoch is one pass over the subset. A small subset is repeated for as many epochs as
    it takes to reach ``until``; a shuffling loader reshuffles it every epoch.

    With a PyTorch DataLoader, training switches to all examples at the first epoch boundary at or after ``until``,
    because Composer creates one iterator per epoch. With a loader whose attribute ``indices`` (None for all examples)
    takes effect at the next batch, such as `lth_diet.data.loader.Loader`, it switches exactly at ``until``.

    Runs on ``Event.FIT_START``, ``EPOCH_START`` and ``BEFORE_DATALOADER``.

    Args:
        indices: Indices of the subset in the training dataset.
        until: Time of the switch, as an int (batches) or a time string in batches or epochs, such as ``"400ba"``.

    Raises:
        ValueError: If ``until`` has another unit. When training starts, if the loader or its sampler cannot be
            restricted to a subset.

    Example:
        >>> import torch
        >>> from composer import Trainer
        >>> from composer.models import ComposerClassifier
        >>> from lth_diet.algorithms import SubsetSampling
        >>> network = torch.nn.Linear(4, 2)
        >>> data = torch.utils.data.TensorDataset(torch.randn(32, 4), torch.randint(2, (32,)))
        >>> trainer = Trainer(
        ...     model=ComposerClassifier(network, num_classes=2),
        ...     train_dataloader=torch.utils.data.DataLoader(data, batch_size=8, shuffle=True),
        ...     max_duration="8ba",  # two epochs of 16 examples, then one of all 32
        ...     optimizers=torch.optim.SGD(network.parameters(), lr=0.1),
        ...     algorithms=[SubsetSampling(range(16), until="4ba")],
        ...     progress_bar=False,
        ... )
        >>> trainer.fit()
        >>> int(trainer.state.timestamp.epoch)
        3
    """

    def __init__(self, indices: Sequence[int], until: int | str):
        self.indices = [int(index) for index in indices]
        self.until = Time.from_input(until, TimeUnit.BATCH)
        if self.until.unit not in (TimeUnit.BATCH, TimeUnit.EPOCH):
            raise ValueError(f"until {until!r}; expected batches or epochs, such as '400ba' or '2ep'")
        self._full_loader: Iterable | None = None
        self._full_length = -1

    def match(self, event: Event, state: State) -> bool:
        if event == Event.FIT_START:
            return True
        if self._full_loader is None or event not in (Event.EPOCH_START, Event.BEFORE_DATALOADER):
            return False
        return (event == Event.EPOCH_START or _has_indices(self._full_loader)) and self._has_ended(state)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START:
            if not self._has_ended(state, at_epoch_start=not _has_indices(state.dataloader)):
                self._full_loader = state.dataloader
                full_length = len(self._full_loader) if isinstance(self._full_loader, Sized) else None
                length = None if state.dataloader_len is None else int(state.dataloader_len)
                # differs from the loader's length if the Trainer has train_subset_num_batches
                self._full_length = -1 if length in (None, full_length) else length
                self._set_dataloader(state, self._restrict(self._full_loader), -1)
        else:
            if _has_indices(self._full_loader):
                self._full_loader.indices = None
            self._set_dataloader(state, self._full_loader, self._full_length)
            self._full_loader = None

    def _has_ended(self, state: State, at_epoch_start: bool = False) -> bool:
        """Return whether `until` has been reached now or, with `at_epoch_start`, when the current epoch started."""
        now = state.timestamp.get(self.until.unit)
        if at_epoch_start and self.until.unit == TimeUnit.BATCH:
            now = now - state.timestamp.batch_in_epoch
        return now >= self.until

    def _restrict(self, loader: Iterable) -> Iterable:
        if _has_indices(loader):
            loader.indices = self.indices
            return loader
        return _subset_dataloader(loader, self.indices)

    @staticmethod
    def _set_dataloader(state: State, loader: Iterable, length: int) -> None:
        state.set_dataloader(loader, state.dataloader_label or "train", length)


def _has_indices(loader: Iterable) -> bool:
    """Return whether the loader's examples can be changed at any batch."""
    return hasattr(loader, "indices")


def _subset_dataloader(loader: Iterable, indices: list[int]) -> DataLoader:
    """Return a DataLoader over a subset with the settings of `loader`."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, torch.utils.data.IterableDataset):
        raise ValueError(f"SubsetSampling does not support a {type(loader).__name__} without an attribute `indices`")
    subset, sampler = Subset(loader.dataset, indices), loader.sampler
    options = {}
    if isinstance(sampler, DistributedSampler):
        options["sampler"] = DistributedSampler(
            subset, sampler.num_replicas, sampler.rank, sampler.shuffle, sampler.seed, sampler.drop_last
        )
    elif isinstance(sampler, RandomSampler) and not sampler.replacement:
        options["sampler"] = RandomSampler(subset, generator=sampler.generator)
    elif not isinstance(sampler, SequentialSampler):
        raise ValueError(f"SubsetSampling does not support a DataLoader with a {type(sampler).__name__}")
    if loader.batch_size is None or type(loader.batch_sampler) is not torch.utils.data.BatchSampler:
        raise ValueError("SubsetSampling does not support a DataLoader with a custom batch sampler")
    return DataLoader(
        subset,
        loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
        pin_memory_device=loader.pin_memory_device,
        **options,
    )
