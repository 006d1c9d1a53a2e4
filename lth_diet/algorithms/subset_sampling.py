from collections.abc import Iterable, Sequence, Sized

import torch
from composer import Algorithm, Event, Logger, State, Time, TimeUnit
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler, Subset


class SubsetSampling(Algorithm):
    """Trains on some of the examples until a given time, then on all (the data diet of the paper, section 3).

    Passes over a subset that is smaller than the steps ask for are repeated, each in a new order.

    With an ordinary DataLoader the subset is released at the first epoch boundary at or after ``until``, an epoch
    being one pass over the subset while it lasts: Composer makes one iterator an epoch. A loader with a settable
    attribute ``indices`` (None: all examples) that acts on the next batch, such as `lth_diet.loader.Loader`, is
    released exactly at ``until``.

    Runs on ``Event.FIT_START``, ``EPOCH_START`` and ``BEFORE_DATALOADER``.

    Args:
        indices: Positions in the training data set.
        until: An int (batches) or Composer time string in batches or epochs, such as ``"400ba"``.

    Raises:
        ValueError: If ``until`` has another unit; at the start of training, if the loader's sampler is one that
            cannot be rebuilt for a subset.

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
        ...     max_duration="8ba",  # two passes over 16 examples, then one over all 32
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
            raise ValueError(f"SubsetSampling until {until!r}; allowed: batches or epochs, such as '400ba' or '2ep'")
        self._all: Iterable | None = None
        self._all_length = -1

    def match(self, event: Event, state: State) -> bool:
        if event == Event.FIT_START:
            return True
        if self._all is None or event not in (Event.EPOCH_START, Event.BEFORE_DATALOADER):
            return False
        return (event == Event.EPOCH_START or _is_exact(self._all)) and self._is_over(state)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START:
            if not self._is_over(state, in_epoch=not _is_exact(state.dataloader)):
                self._all = state.dataloader
                whole = len(self._all) if isinstance(self._all, Sized) else None
                length = None if state.dataloader_len is None else int(state.dataloader_len)
                self._all_length = -1 if length in (None, whole) else length  # the Trainer's train_subset_num_batches
                self._use(state, self._restricted(self._all), -1)
        else:
            if _is_exact(self._all):
                self._all.indices = None
            self._use(state, self._all, self._all_length)
            self._all = None

    def _is_over(self, state: State, in_epoch: bool = False) -> bool:
        """Whether `until` had come, now or (`in_epoch`) when the present epoch began."""
        now = state.timestamp.get(self.until.unit)
        if in_epoch and self.until.unit == TimeUnit.BATCH:
            now = now - state.timestamp.batch_in_epoch
        return now >= self.until

    def _restricted(self, loader: Iterable) -> Iterable:
        if _is_exact(loader):
            loader.indices = self.indices
            return loader
        return _over_subset(loader, self.indices)

    @staticmethod
    def _use(state: State, loader: Iterable, length: int) -> None:
        state.set_dataloader(loader, state.dataloader_label or "train", length)


def _is_exact(loader: Iterable) -> bool:
    return hasattr(loader, "indices")


def _over_subset(loader: Iterable, indices: list[int]) -> DataLoader:
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, torch.utils.data.IterableDataset):
        raise ValueError(f"SubsetSampling cannot restrict a {type(loader).__name__} without an attribute `indices`")
    subset, sampler = Subset(loader.dataset, indices), loader.sampler
    options = {}
    if isinstance(sampler, DistributedSampler):
        options["sampler"] = DistributedSampler(
            subset, sampler.num_replicas, sampler.rank, sampler.shuffle, sampler.seed, sampler.drop_last
        )
    elif isinstance(sampler, RandomSampler) and not sampler.replacement:
        options["sampler"] = RandomSampler(subset, generator=sampler.generator)
    elif not isinstance(sampler, SequentialSampler):
        raise ValueError(f"SubsetSampling cannot restrict a DataLoader with a {type(sampler).__name__}")
    if loader.batch_size is None or type(loader.batch_sampler) is not torch.utils.data.BatchSampler:
        raise ValueError("SubsetSampling cannot restrict a DataLoader with a batch sampler of its own")
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
