"""SubsetSampling: trains on a subset of the examples until a given time."""

import hashlib
import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from composer import Algorithm, Event, Logger, State, Time, TimeUnit
from composer.utils import dist
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from lth_diet.algorithms.times import parse_time


class SubsetSampling(Algorithm):
    """Trains on a subset of the examples until a given time, then on all examples (the paper's section 3).

    While the subset is in use, an epoch is one pass over the subset. A small subset is repeated for as many epochs as
    it takes to reach ``until``; a shuffling loader reshuffles it every epoch. Give the Trainer's ``max_duration`` and
    schedules in batches: epochs of the subset are shorter.

    With a PyTorch DataLoader, training switches to all examples at the first epoch boundary at or after ``until``,
    because Composer creates one iterator per epoch. With a loader whose attribute ``indices`` (None for all examples)
    takes effect at the next batch, such as `lth_diet.data.loader.Loader`, it switches exactly at ``until``. A warning
    says so if training ends before the switch. When training ends, the loader has all examples again.

    A loader of several replicates that train as one network, such as `lth_diet.data.loader.StackedLoader`, needs one
    subset per replicate, all of one size. It has an attribute ``loaders``, one per replicate, and takes R rows of
    indices.

    A run that resumes from a checkpoint must have the same subset and ``until``. If a Trainer also has `Rewind`, list
    `Rewind` first.

    Runs on ``Event.FIT_START``, ``EPOCH_START``, ``BEFORE_DATALOADER`` and ``FIT_END``.

    Args:
        indices: Distinct indices, from 0 to N - 1, of the subset in the training dataset of N examples, as a list,
            array, tensor or pandas Series; or a boolean mask of N values. The index of a Series is ignored. R rows of
            them, each of at least two, for a loader of R replicates.
        until: Time of the switch, as an int (batches) or a time string in batches, epochs or samples, such as
            ``"400ba"``.

    Raises:
        ValueError: If ``indices`` or ``until`` is invalid. When training starts, if the indices do not fit the dataset
            or the number of replicates, differ between the ranks or do not fill a batch, or the loader cannot be
            restricted to a subset: it must have all examples of a dataset with a length, in order, shuffled or with a
            DistributedSampler.

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

    def __init__(self, indices: Iterable[int | bool] | Iterable[Iterable[int | bool]], until: int | str | Time):
        array = _to_array(indices)
        self._mask_length = array.shape[-1] if array.dtype == bool else None
        self.indices: list[int] | list[list[int]] = (_selected(array) if array.dtype == bool else array).tolist()
        self._is_stacked = array.ndim == 2
        for prefix, row in self._rows():
            _check_indices(row, prefix)
        self.until = parse_time("until", until, (TimeUnit.BATCH, TimeUnit.EPOCH, TimeUnit.SAMPLE))
        self._full_loader: Iterable | None = None
        self._full_length = -1
        self._subset_loader: Iterable | None = None
        self._warned = False

    def _rows(self) -> list[tuple[str, list[int]]]:
        """The indices of each replicate, with the beginning of an error that concerns them."""
        if not self._is_stacked:
            return [("", self.indices)]
        return [(f"row {number} of the indices: ", row) for number, row in enumerate(self.indices)]

    @property
    def restricts(self) -> bool:
        """Whether the subset is in use."""
        return self._full_loader is not None

    def match(self, event: Event, state: State) -> bool:
        if event in (Event.FIT_START, Event.FIT_END):
            return True
        if not self.restricts or event not in (Event.EPOCH_START, Event.BEFORE_DATALOADER):
            return False
        return (event == Event.EPOCH_START or _has_indices(self._full_loader)) and self._has_ended(state)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.FIT_START:
            self._reset(state)
            self._start(state)
        elif self.restricts:
            if event == Event.FIT_END:
                self._check_end(state)
            self._switch(state)

    def _start(self, state: State) -> None:
        loader = state.dataloader
        if sum(isinstance(algorithm, SubsetSampling) for algorithm in state.algorithms) > 1:
            raise ValueError("the Trainer has two SubsetSampling; expected one")
        self._check_examples(loader)
        if self.until.value == 0:
            warnings.warn(f"SubsetSampling has no effect: until={self.until}", stacklevel=2)
        if self._has_ended(state, at_epoch_start=not _has_indices(loader)):
            return
        length, full_length = state.dataloader_len, _length(loader)
        # differs from the loader's length if the Trainer has train_subset_num_batches
        self._full_length = -1 if length is None or length == full_length else int(length)
        subset_loader = self._restrict(loader)
        subset_length = _length(subset_loader)
        if subset_length == 0:
            raise ValueError(
                f"a subset of {np.shape(self.indices)[-1]} examples does not fill a batch; use a larger subset, a "
                "smaller batch or drop_last=False"
            )
        if 0 < self._full_length < (subset_length or 0):
            subset_length = self._full_length
        if not _has_indices(loader) and subset_length < state.timestamp.batch_in_epoch:
            return  # the clock is in an epoch of all examples, to which Rewind has set it
        self._full_loader, self._subset_loader = loader, subset_loader
        self._set_dataloader(state, subset_loader, -1 if subset_length is None else subset_length)
        self._check_duration(state, subset_length)

    def _reset(self, state: State) -> None:
        """Return to all examples if an earlier training was interrupted."""
        if self.restricts and state.dataloader is self._subset_loader:
            self._switch(state)
        elif self.restricts and _has_indices(self._full_loader):
            self._full_loader.indices = None
        self._full_loader = self._subset_loader = None

    def _switch(self, state: State) -> None:
        """Return to all examples."""
        if _has_indices(self._full_loader):
            self._full_loader.indices = None
        self._set_dataloader(state, self._full_loader, self._full_length)
        self._full_loader = self._subset_loader = None

    def _has_ended(self, state: State, at_epoch_start: bool = False) -> bool:
        """Return whether `until` has been reached now or, with `at_epoch_start`, when the current epoch started."""
        clock, unit = state.timestamp, self.until.unit
        now = clock.get(unit)
        if at_epoch_start and unit != TimeUnit.EPOCH:
            now = now - (clock.batch_in_epoch if unit == TimeUnit.BATCH else clock.sample_in_epoch)
        return now >= self.until

    def _check_examples(self, loader: Iterable) -> None:
        """Check that the indices fit the dataset of the loader and are the same on all ranks."""
        if not _has_indices(loader):
            _check_supported(loader)
        self._check_replicates(loader)
        count = len(loader.dataset) if isinstance(loader, DataLoader) else getattr(loader, "num_examples", None)
        if count is not None:
            if self._mask_length not in (None, count):
                raise ValueError(f"the boolean mask has {self._mask_length} values; expected {count}, one per example")
            for prefix, row in self._rows():
                if max(row) >= count:
                    raise ValueError(
                        f"{prefix}index {max(row)} is out of range for the {count} examples of the dataset"
                    )
        if len(set(dist.all_gather_object(self._digest()))) > 1:
            raise ValueError("the ranks have different subsets; draw the indices from the same seed on every rank")

    def _check_replicates(self, loader: Iterable) -> None:
        """Check that there is one row of indices for each replicate of the loader."""
        kind, loaders = type(loader).__name__, getattr(loader, "loaders", None) if _has_indices(loader) else None
        if loaders is None:
            if self._is_stacked:
                raise ValueError(
                    f"the indices have shape {np.shape(self.indices)}, one row per replicate, but the {kind} has no "
                    "attribute `loaders`; expected one dimension, or a loader of replicates such as StackedLoader"
                )
        elif not self._is_stacked or len(self.indices) != len(loaders):
            raise ValueError(
                f"the indices have shape {np.shape(self.indices)}, but the {kind} has {len(loaders)} replicates; "
                f"expected {len(loaders)} rows, one per replicate"
            )

    def _restrict(self, loader: Iterable) -> Iterable:
        if not _has_indices(loader):
            return _subset_dataloader(loader, self.indices)
        if loader.indices is not None:
            raise ValueError(
                f"the attribute `indices` of the {type(loader).__name__} is in use already; set it to None, or leave "
                "SubsetSampling out"
            )
        loader.indices = self.indices
        return loader

    def _check_duration(self, state: State, epoch_length: int | None) -> None:
        """Warn if training ends before the switch, as far as this is known when it starts."""
        clock = state.timestamp
        epoch_start = int(clock.batch - clock.batch_in_epoch)

        def to_batch(time: Time) -> int | None:
            if time.unit == TimeUnit.EPOCH and epoch_length is not None:
                return epoch_start + (time.value - int(clock.epoch)) * epoch_length
            return time.value if time.unit == TimeUnit.BATCH else None

        end, switch = to_batch(state.max_duration), to_batch(self.until)
        self._warned = False
        if end is None or switch is None or end == switch:
            return
        if not _has_indices(state.dataloader):  # the epoch boundary at or after `until`
            switch = epoch_start - (epoch_start - switch) // epoch_length * epoch_length
        if end <= switch:
            self._warn_of_end(f"at {state.max_duration}", f"at batch {switch}")

    def _check_end(self, state: State) -> None:
        """Warn if training has ended before the switch and `_check_duration` could not know."""
        at_boundary = _has_indices(state.dataloader) or state.timestamp.batch_in_epoch == 0
        on_time = state.timestamp.get(self.until.unit) == self.until
        if not self._warned and not (self._has_ended(state) and (at_boundary or on_time)):
            self._warn_of_end(f"at batch {int(state.timestamp.batch)}", "later")

    def _warn_of_end(self, end: str, switch: str) -> None:
        self._warned = True
        warnings.warn(
            f"training ends {end} without training on all examples: SubsetSampling(until={self.until}) switches to "
            f"them {switch}",
            stacklevel=2,
        )

    @staticmethod
    def _set_dataloader(state: State, loader: Iterable, length: int) -> None:
        state.set_dataloader(loader, state.dataloader_label or "train", length)

    def _digest(self) -> str:
        shape = str(np.shape(self.indices)).encode() if self._is_stacked else b""
        return hashlib.sha256(np.array(self.indices).tobytes() + shape).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"until": str(self.until), "sha256": self._digest()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("sha256", self._digest()) != self._digest():
            raise ValueError("SubsetSampling has other indices than the training that saved the checkpoint")
        if state.get("until", str(self.until)) != str(self.until):
            raise ValueError(f"SubsetSampling has until={self.until}; the checkpoint was saved with {state['until']}")


def _to_array(indices: Any) -> np.ndarray:
    """Return indices or a boolean mask as an array of integers or booleans, shape (length,) or (R, length)."""
    if isinstance(indices, tuple) and len(indices) == 1 and np.ndim(indices[0]) == 1:  # of np.where or torch.where
        (indices,) = indices
    expected = "expected the integer indices of the examples, or a boolean mask"
    try:
        if isinstance(indices, str | bytes | Mapping):
            raise TypeError
        if isinstance(indices, torch.Tensor):
            indices = indices.detach().cpu()
        elif not hasattr(indices, "__array__"):
            indices = list(indices)
        array = np.asarray(indices)
        array = np.array(array.tolist()) if array.dtype == object else array  # of pandas' nullable types
    except (TypeError, ValueError):
        rows = indices if isinstance(indices, list) else []
        if len(lengths := {len(row) for row in rows if hasattr(row, "__len__")}) > 1:
            raise ValueError(f"rows of indices have lengths {sorted(lengths)}; expected the same length") from None
        raise ValueError(f"indices are of type {type(indices).__name__}; {expected}") from None
    for row in (indices, *indices) if isinstance(indices, list) else ():
        if isinstance(row, list) and len({isinstance(index, bool | np.bool_) for index in row}) > 1:
            raise ValueError(f"indices mix integers and booleans; {expected}")
    has_rows = array.ndim == 2 and len(array) > 0 and array.shape[1] != 1  # one column is of np.argwhere
    if array.ndim != 1 and not has_rows:
        raise ValueError(f"indices have shape {array.shape}; expected one dimension, such as indices.flatten()")
    if array.size and array.dtype != bool and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"indices are of type {array.dtype}; {expected}")
    return array


def _selected(mask: np.ndarray) -> np.ndarray:
    """Return the indices that a mask selects in each row."""
    counts = np.unique(np.count_nonzero(mask, axis=-1))
    if len(counts) > 1:
        raise ValueError(
            f"the rows of the boolean mask select {counts[0]} to {counts[-1]} examples; expected the same number in "
            "each row"
        )
    return np.nonzero(mask)[-1].reshape(*mask.shape[:-1], -1)


def _check_indices(indices: list[int], prefix: str) -> None:
    if not indices:
        raise ValueError(f"{prefix}the subset is empty; expected at least one example")
    if min(indices) < 0:
        raise ValueError(f"{prefix}index {min(indices)} is negative; expected 0 to N - 1")
    values, counts = np.unique(indices, return_counts=True)
    if counts.max() > 1:
        raise ValueError(
            f"{prefix}index {values[counts.argmax()]} occurs {counts.max()} times; expected distinct indices, or a "
            "mask of booleans"
        )


def _has_indices(loader: Iterable) -> bool:
    """Return whether the loader's examples can be changed at any batch."""
    return hasattr(loader, "indices")


def _length(loader: Iterable) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _check_supported(loader: Iterable) -> None:
    """Check that a DataLoader over a subset can replace the loader without any other change."""
    kind = type(loader)
    if not isinstance(loader, DataLoader) or (kind.__iter__, kind.__len__) != (DataLoader.__iter__, DataLoader.__len__):
        reason = f"a {kind.__name__} without an attribute `indices`; expected a PyTorch DataLoader"
    elif isinstance(loader.dataset, IterableDataset) or _length(loader.dataset) is None:
        reason = f"a {type(loader.dataset).__name__}, whose examples have no indices; expected a dataset with a length"
    elif loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        reason = "a DataLoader with a custom batch sampler; expected one with batch_size"
    else:
        sampler, count = loader.sampler, len(loader.dataset)
        drawn = _length(sampler.dataset if isinstance(sampler, DistributedSampler) else sampler)
        standard = type(sampler) in (SequentialSampler, RandomSampler, DistributedSampler)
        if standard and drawn == count and not getattr(sampler, "replacement", False):
            return
        reason = (
            f"a DataLoader whose {type(sampler).__name__} may not draw each of the {count} examples once; expected "
            "shuffle=True, shuffle=False or a DistributedSampler"
        )
    raise ValueError(f"SubsetSampling does not support {reason}")


def _subset_dataloader(loader: DataLoader, indices: list[int]) -> DataLoader:
    """Return a DataLoader over a subset with the settings of `loader`."""
    subset, sampler = Subset(loader.dataset, indices), loader.sampler
    options = {name: getattr(loader, name) for name in inspect.signature(DataLoader).parameters if name in vars(loader)}
    options |= {"dataset": subset, "sampler": SequentialSampler(subset), "batch_sampler": None}
    if isinstance(sampler, DistributedSampler):
        options["sampler"] = DistributedSampler(
            subset, sampler.num_replicas, sampler.rank, sampler.shuffle, sampler.seed, sampler.drop_last
        )
    elif isinstance(sampler, RandomSampler):
        options["sampler"] = RandomSampler(subset, generator=sampler.generator)
    return DataLoader(**options, multiprocessing_context=loader.multiprocessing_context)
