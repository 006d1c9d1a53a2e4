import inspect
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from composer import DataSpec, Time
from composer.models import ComposerClassifier
from forks.client import Process
from helpers import Spy, warnings_of
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lth_diet.algorithms import SubsetSampling
from lth_diet.data.dataset import Dataset, Split
from lth_diet.data.loader import Loader, StackedLoader

SUBSET = list(range(0, 48, 3))  # 16 of 48 examples: two batches of 8
REMAINS = np.isin(np.arange(48), SUBSET)


def tiny_classifier():
    return ComposerClassifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 48)), num_classes=48)


@pytest.fixture
def trainer(trainer):
    """Build a Composer Trainer of a network of one layer."""
    return lambda *arguments, **options: trainer(*arguments, **({"model": tiny_classifier()} | options))


@pytest.fixture
def indexed():
    """48 examples whose first pixel is their index."""
    images = torch.zeros(48, 3, 8, 8)
    images[:, 0, 0, 0] = torch.arange(48)
    return TensorDataset(images, torch.zeros(48, dtype=torch.long))


def indices_of(state):
    return sorted(state.batch[0][:, 0, 0, 0].int().tolist())


def seen_by(trainer, loader, until, steps, **options):
    spy = Spy(batch_start=indices_of)
    trainer([SubsetSampling(SUBSET, until)], loader=loader, steps=steps, callbacks=[spy], **options).fit()
    return spy.seen["batch_start"]


@pytest.mark.parametrize("shuffle", [True, False])
def test_dataloader_yields_epochs_of_the_subset_and_then_of_all_examples(trainer, indexed, shuffle):
    seen = seen_by(trainer, DataLoader(indexed, batch_size=8, shuffle=shuffle), "4ba", 10)
    for epoch in range(2):
        assert sorted(seen[2 * epoch] + seen[2 * epoch + 1]) == SUBSET
    assert sorted(sum(seen[4:], [])) == list(range(48))


def test_dataloader_switches_at_the_first_epoch_boundary_after_the_time(trainer, indexed):
    seen = seen_by(trainer, DataLoader(indexed, batch_size=8), "3ba", 10)
    assert all(set(batch) <= set(SUBSET) for batch in seen[:4])
    assert sorted(sum(seen[4:], [])) == list(range(48))


def test_time_may_be_in_epochs(trainer, indexed):
    seen = seen_by(trainer, DataLoader(indexed, batch_size=8), "3ep", 8)
    assert [set(batch) <= set(SUBSET) for batch in seen] == [True] * 6 + [False] * 2


def resettable_loader(order=1):
    split = Split(np.zeros((48, 8, 8, 3), np.uint8), np.arange(48))
    data = Dataset("cifar10", split, split, (0.0,) * 3, (1.0,) * 3, ())
    return Loader(data, 8, order_seed=order, augmentation_seed=2)


ROWS = [SUBSET, [index + 1 for index in SUBSET]]  # of two replicates


def stacked_loader(count=2):
    return StackedLoader([resettable_loader(order) for order in range(count)])


def stacked_classifier():
    """A model that classifies the first of two replicates by the images of both."""
    classifier = ComposerClassifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(384, 48)), num_classes=48)
    loss = classifier.loss
    classifier.loss = lambda outputs, batch: loss(outputs, (batch[0], batch[1][:, 0]))
    classifier.get_metrics = lambda is_train=False: {}
    return classifier


@pytest.mark.parametrize("until", [3, 4])
def test_each_replicate_of_a_stack_has_its_row_until_the_time(trainer, until):
    loader, unrestricted = stacked_loader(), stacked_loader()
    spy = Spy(before_forward=lambda state: state.batch[1].T.tolist())
    options = {"callbacks": [spy], "spin_dataloaders": False, "model": stacked_classifier()}
    fit = trainer([SubsetSampling(ROWS, until)], loader=loader, steps=9, **options)
    loader.current_step = lambda: int(fit.state.timestamp.batch)
    fit.fit()
    seen = spy.seen["before_forward"]
    for replicate, subset in enumerate(ROWS):
        assert sorted(seen[0][replicate] + seen[1][replicate]) == subset
        assert all(set(labels[replicate]) <= set(subset) for labels in seen[:until])
    assert seen[until:] == [unrestricted.batch(step)[1].T.tolist() for step in range(until, 9)]
    assert loader.indices is None


@pytest.mark.parametrize("indices", [ROWS, np.array(ROWS), torch.tensor(ROWS), [torch.tensor(row) for row in ROWS]])
def test_rows_of_every_type_are_one_subset_per_replicate(indices):
    assert SubsetSampling(indices, 2).indices == ROWS


def test_masks_of_rows_select_the_same_examples():
    masks = [np.isin(np.arange(48), row) for row in ROWS]
    assert SubsetSampling(masks, 2).indices == SubsetSampling(np.array(masks), 2).indices == ROWS


@pytest.mark.parametrize(
    ("indices", "loader", "sentence"),
    [
        (ROWS, resettable_loader, r"shape \(2, 16\), one row per replicate, but the Loader has no attribute `loaders`"),
        (ROWS, lambda: stacked_loader(3), r"shape \(2, 16\), but the StackedLoader has 3 replicates; expected 3 rows"),
        (SUBSET, stacked_loader, r"shape \(16,\), but the StackedLoader has 2 replicates; expected 2 rows"),
        ([SUBSET, range(33, 49)], stacked_loader, "row 1 of the indices: index 48 is out of range for the 48 examples"),
        (np.ones((2, 47), bool), stacked_loader, "mask has 47 values; expected 48"),
        ([range(7)] * 2, stacked_loader, "7 examples do not fill a batch of 8"),
    ],
)
def test_rows_that_do_not_fit_the_loader_raise(trainer, indices, loader, sentence):
    with pytest.raises(ValueError, match=sentence):
        trainer([SubsetSampling(indices, 2)], loader=loader()).fit()


def test_rows_in_use_already_raise(trainer):
    loader = stacked_loader()
    loader.indices = ROWS
    with pytest.raises(ValueError, match="the attribute `indices` of the StackedLoader is in use already"):
        trainer([SubsetSampling(ROWS, 2)], loader=loader).fit()


def labels_of(state):
    return state.batch[1].tolist()


@pytest.mark.parametrize("until", [3, 4, 5])
def test_loader_with_indices_switches_exactly_at_the_time(trainer, until):
    loader, unrestricted = resettable_loader(), resettable_loader()
    spy = Spy(before_forward=labels_of)
    fit = trainer([SubsetSampling(SUBSET, until)], loader=loader, steps=9, callbacks=[spy], spin_dataloaders=False)
    loader.current_step = lambda: int(fit.state.timestamp.batch)
    fit.fit()
    seen = spy.seen["before_forward"]
    assert all(set(labels) <= set(SUBSET) for labels in seen[:until])
    assert seen[until:] == [unrestricted.batch(step)[1].tolist() for step in range(until, 9)]


def test_resumed_run_is_restricted_only_before_the_time(trainer, indexed, place):
    def loader():
        return DataLoader(indexed, batch_size=8)

    uninterrupted = seen_by(
        trainer,
        loader(),
        "4ba",
        10,
        save_folder="saved",
        save_interval="1ba",
        save_filename="{batch}.pt",
        save_num_checkpoints_to_keep=-1,
    )
    for step in (1, 2, 3, 4, 6):
        assert seen_by(trainer, loader(), "4ba", 10, load_path=f"saved/{step}.pt") == uninterrupted[step:]


def test_resumed_run_completes_an_epoch_of_the_subset_that_extends_past_the_time(trainer, indexed, place):
    def loader():
        return DataLoader(indexed, batch_size=4)  # four batches per epoch of the subset

    uninterrupted = seen_by(
        trainer, loader(), "2ba", 8, save_folder="saved", save_interval="3ba", save_filename="{batch}.pt"
    )
    assert seen_by(trainer, loader(), "2ba", 8, load_path="saved/3.pt") == uninterrupted[3:]


def test_distributed_sampler_keeps_its_rank(trainer, indexed):
    loader = DataLoader(indexed, batch_size=4, sampler=DistributedSampler(indexed, 2, 1, shuffle=False))
    seen = seen_by(trainer, loader, "2ba", 2)
    assert sorted(sum(seen, [])) == SUBSET[1::2]


@pytest.mark.parametrize(
    "indices",
    [
        range(0, 48, 3),
        (index for index in SUBSET),
        np.array(SUBSET, np.uint8),
        torch.tensor(SUBSET),
        list(torch.tensor(SUBSET)),
        pd.Index(SUBSET),
        REMAINS,
        REMAINS.tolist(),
        torch.tensor(REMAINS),
        pd.Series(REMAINS, index=range(47, -1, -1)),
        pd.Series(REMAINS, dtype="boolean"),
        np.where(REMAINS),
        torch.where(torch.tensor(REMAINS)),
    ],
    ids=lambda indices: type(indices).__name__,
)
def test_indices_and_masks_of_every_type_select_the_same_examples(indices):
    assert SubsetSampling(indices, 2).indices == SUBSET


@pytest.mark.parametrize(
    ("indices", "sentence"),
    [
        ([], "the subset is empty"),
        (np.zeros(48, bool), "the subset is empty"),
        ([1, 2, 1], "index 1 occurs 2 times; expected distinct indices, or a mask of booleans"),
        (REMAINS.astype(int), "index 0 occurs 32 times; expected distinct indices, or a mask of booleans"),
        ([3, -1], "index -1 is negative"),
        ([1.0, 2.5], "of type float64; expected the integer indices"),
        (torch.rand(48), "of type float32"),
        (["1", "2"], "of type <U1"),
        ([True, 2], "mix integers and booleans"),
        (pd.array([True, None]), "of type object"),
        (np.argwhere(REMAINS), r"have shape \(16, 1\); expected one dimension, such as indices.flatten\(\)"),
        ([[1], [2, 3]], r"rows of indices have lengths \[1, 2\]; expected the same length"),
        ([1, [2, 3]], "of type list; expected"),
        (np.zeros((2, 3, 4), int), r"have shape \(2, 3, 4\)"),
        ([[1, 2], [3, -1]], "row 1 of the indices: index -1 is negative"),
        ([[1, 1], [3, 4]], "row 0 of the indices: index 1 occurs 2 times"),
        (np.zeros((2, 48), bool), "row 0 of the indices: the subset is empty"),
        ([[True, False], [True, True]], "rows of the boolean mask select 1 to 2 examples; expected the same number"),
        ([[True, 0], [True, 0]], "mix integers and booleans"),
        ([[0.5, 1], [1, 2]], "of type float64"),
        (7, "of type int; expected"),
        ("12", "of type str; expected"),
        ({1: 0.5}, "of type dict; expected"),
        (None, "of type NoneType; expected"),
    ],
)
def test_invalid_indices_raise(indices, sentence):
    with pytest.raises(ValueError, match=sentence):
        SubsetSampling(indices, 2)


@pytest.mark.parametrize("kind", ["DataLoader", "Loader"])
@pytest.mark.parametrize(
    ("indices", "sentence"),
    [
        ([*range(16), 48], "index 48 is out of range for the 48 examples"),
        (REMAINS[:-1], "the boolean mask has 47 values; expected 48, one per example"),
    ],
)
def test_indices_that_do_not_fit_the_dataset_raise(trainer, indexed, kind, indices, sentence):
    loader = DataLoader(indexed, batch_size=8) if kind == "DataLoader" else resettable_loader()
    with pytest.raises(ValueError, match=sentence):
        trainer([SubsetSampling(indices, 2)], loader=loader).fit()


@pytest.mark.parametrize("kind", ["DataLoader", "DistributedSampler", "Loader"])
def test_subset_that_does_not_fill_a_batch_raises(trainer, indexed, kind):
    loaders = {
        "DataLoader": DataLoader(indexed, batch_size=8, drop_last=True),
        "DistributedSampler": DataLoader(indexed, 8, sampler=DistributedSampler(indexed, 2, 0), drop_last=True),
        "Loader": resettable_loader(),
    }
    with pytest.raises(ValueError, match=r"\b7 examples do(es)? not fill a batch"):
        trainer([SubsetSampling(range(7), 2)], loader=loaders[kind]).fit()


def test_subset_that_does_not_fill_a_batch_is_one_smaller_batch_without_drop_last(trainer, indexed):
    spy = Spy(batch_start=indices_of)
    trainer([SubsetSampling(range(7), 2)], loader=DataLoader(indexed, batch_size=8), steps=2, callbacks=[spy]).fit()
    assert spy.seen["batch_start"] == [list(range(7))] * 2


@pytest.mark.parametrize("until", ["4ba", np.int64(4), Time(4, "ba"), "2ep", Time(2, "ep"), "32sp"])
def test_time_may_be_in_batches_epochs_or_samples(trainer, indexed, until):
    seen = seen_by(trainer, DataLoader(indexed, batch_size=8), until, 6)
    assert [set(batch) <= set(SUBSET) for batch in seen] == [True] * 4 + [False] * 2


@pytest.mark.parametrize("until", ["0.5dur", "3sec", "7tok", "never", "400", -1, "-1ep", 1.5, None])
def test_time_in_another_unit_raises(until):
    with pytest.raises(ValueError, match=re.escape(f"until={until!r}; expected a number of batches")):
        SubsetSampling([1], until)


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(3, 8, 8), 0


class Endless(DataLoader):
    def __iter__(self):
        return itertools.cycle(super().__iter__())


UNSUPPORTED = {
    "a list without an attribute `indices`": lambda data: list(DataLoader(data, batch_size=8)),
    "a Endless without an attribute `indices`": lambda data: Endless(data, batch_size=8),
    "a Stream, whose examples have no indices": lambda data: DataLoader(Stream(), batch_size=8),
    "whose WeightedRandomSampler": lambda data: DataLoader(data, 8, sampler=WeightedRandomSampler([1.0] * 48, 48)),
    "whose SubsetRandomSampler": lambda data: DataLoader(data, 8, sampler=SubsetRandomSampler(range(48))),
    "whose RandomSampler may": lambda data: DataLoader(data, 8, sampler=RandomSampler(data, replacement=True)),
    "whose RandomSampler may not": lambda data: DataLoader(data, 8, sampler=RandomSampler(data, num_samples=40)),
    "whose SequentialSampler may not": lambda data: DataLoader(data, 8, sampler=SequentialSampler(range(40))),
    "whose DistributedSampler may not": lambda data: DataLoader(data, 8, sampler=DistributedSampler(range(40), 1, 0)),
    "custom batch sampler": lambda data: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 8, False)),
    "custom batch sampler; expected one with batch_size": lambda data: DataLoader(
        data, batch_size=None, sampler=BatchSampler(SequentialSampler(data), 8, False)
    ),
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_loader_that_a_subset_would_change_otherwise_raises(trainer, indexed, reason):
    fit = trainer([SubsetSampling(SUBSET, 2)], loader=UNSUPPORTED[reason](indexed), device_train_microbatch_size=8)
    with pytest.raises(ValueError, match=f"SubsetSampling does not support .*{reason}"):
        fit.fit()


def test_loader_whose_indices_are_in_use_raises(trainer):
    loader = resettable_loader()
    loader.indices = range(8, 48)
    with pytest.raises(ValueError, match="the attribute `indices` of the Loader is in use already"):
        trainer([SubsetSampling(SUBSET, 2)], loader=loader).fit()
    assert loader.indices == range(8, 48)


def test_two_subsets_in_a_trainer_raise(trainer, indexed):
    loader = DataLoader(indexed, batch_size=8)
    with pytest.raises(ValueError, match="two SubsetSampling"):
        trainer([SubsetSampling(SUBSET, 2), SubsetSampling(range(8), 4)], loader=loader).fit()


def collate(examples):
    return torch.utils.data.default_collate(examples)


@pytest.mark.parametrize("shuffle", [True, False])
def test_settings_of_the_dataloader_stay(trainer, indexed, shuffle):
    loader = DataLoader(
        indexed,
        batch_size=5,
        shuffle=shuffle,
        num_workers=1,
        collate_fn=collate,
        drop_last=True,
        timeout=100,
        worker_init_fn=print,
        multiprocessing_context="fork",
        generator=torch.Generator().manual_seed(3),
        prefetch_factor=3,
        persistent_workers=True,
    )
    spy = Spy(batch_start=lambda state: state.dataloader)
    data = DataSpec(loader, get_num_samples_in_batch=lambda batch: 7)
    fit = trainer([SubsetSampling(SUBSET, 1)], loader=data, steps=4, callbacks=[spy])
    fit.fit()
    subset, *_, last = spy.seen["batch_start"]
    changed = {"dataset", "shuffle", "sampler", "batch_sampler", "multiprocessing_context"}
    for name in set(inspect.signature(DataLoader).parameters) - changed:
        assert getattr(subset, name) == getattr(loader, name), name
    assert subset.multiprocessing_context.get_start_method() == "fork"
    assert type(subset.sampler) is type(loader.sampler)
    assert getattr(subset.sampler, "generator", None) is getattr(loader.sampler, "generator", None)
    assert last is loader
    assert fit.state.timestamp.sample == 4 * 7


@pytest.mark.parametrize(
    ("until", "duration", "switch"),
    [
        (
            "20ba",
            "10ba",
            "at 10ba without training on all examples: SubsetSampling(until=20ba) switches to them at batch 20",
        ),
        ("3ba", "4ba", "at batch 4"),  # the epoch of the subset ends with the training
        ("5ba", "5ba", None),
        ("4ba", "4ba", None),
        ("4ba", "2ep", None),
        ("2ep", "4ba", None),
        ("2ep", "5ba", None),
        ("3ep", "5ba", "at batch 6"),
        ("20ba", "3ep", "at batch 20"),
        ("4ba", "3ep", None),
        ("32sp", "4ba", None),
        (
            "33sp",
            "4ba",
            "at batch 4 without training on all examples: SubsetSampling(until=33sp) switches to them later",
        ),
        ("3ba", "32sp", None),
        ("3ba", "24sp", None),
        ("4ba", "24sp", "later"),
        ("0ba", "1ba", "SubsetSampling has no effect: until=0ba"),
    ],
)
def test_warning_says_that_all_examples_are_never_used(trainer, indexed, until, duration, switch):
    fit = trainer([SubsetSampling(SUBSET, until)], loader=DataLoader(indexed, batch_size=8))
    found = warnings_of(fit, "SubsetSampling", duration=duration)
    assert len(found) == (switch is not None)
    assert switch is None or found[0].endswith(switch)


@pytest.mark.parametrize(("until", "warned"), [(3, False), (4, False), (5, True), ("2ep", False), ("3ep", True)])
def test_warning_says_that_a_loader_with_indices_never_switches(trainer, until, warned):
    loader = resettable_loader()
    fit = trainer([SubsetSampling(SUBSET, until)], loader=loader, steps=4)
    assert bool(warnings_of(fit, "SubsetSampling")) == warned


@pytest.mark.parametrize("kind", ["DataLoader", "Loader"])
def test_loader_has_all_examples_after_the_end_and_the_subset_in_the_next_fit(trainer, indexed, kind):
    loader = DataLoader(indexed, batch_size=8) if kind == "DataLoader" else resettable_loader()
    spy = Spy(batch_start=lambda state: len(state.dataloader))
    fit = trainer([SubsetSampling(SUBSET, 4)], loader=loader, callbacks=[spy])
    for _ in range(4):
        fit.fit(duration="2ba")
        assert fit.state.dataloader is loader and int(fit.state.dataloader_len) == len(loader) == 6
    assert spy.seen["batch_start"] == [2] * 4 + [6] * 4


@pytest.mark.parametrize("kind", ["DataLoader", "Loader"])
@pytest.mark.parametrize("new", [True, False])
def test_training_after_an_interruption_starts_with_the_subset_again(trainer, indexed, kind, new):
    def interrupt(state):
        lengths.append(len(state.dataloader))
        if len(lengths) == 2:
            raise KeyboardInterrupt

    loader = DataLoader(indexed, batch_size=8) if kind == "DataLoader" else resettable_loader()
    algorithm, lengths = SubsetSampling(SUBSET, 4), []
    fits = [
        trainer([algorithm], steps=5, loader=loader, callbacks=[Spy(batch_start=interrupt)]) for _ in range(1 + new)
    ]
    with pytest.raises(KeyboardInterrupt):
        fits[0].fit()
    fits[-1].fit()
    assert lengths == [2] * 2 + [2] * (3 + new) + [6]


@pytest.mark.parametrize(
    ("indices", "until", "sentence"),
    [(range(16), 4, "other indices"), (SUBSET, 6, "until=6ba; the checkpoint was saved with 4ba")],
)
def test_resuming_with_another_subset_or_time_raises(trainer, indexed, place, indices, until, sentence):
    options = {"loader": DataLoader(indexed, batch_size=8), "steps": 3}
    trainer([SubsetSampling(SUBSET, 4)], **options, save_folder="saved", save_filename="{batch}.pt").fit()
    with pytest.raises(ValueError, match=sentence):
        trainer([SubsetSampling(indices, until)], **options, load_path="saved/3.pt")


def test_the_rows_of_a_stack_must_be_those_of_the_checkpoint():
    saved = SubsetSampling(ROWS, 4).state_dict()
    SubsetSampling(np.array(ROWS), 4).load_state_dict(saved)
    for others in (ROWS[::-1], sum(ROWS, []), [ROWS[0]] * 2):
        with pytest.raises(ValueError, match="other indices"):
            SubsetSampling(others, 4).load_state_dict(saved)


RANKS = """
import json
import torch
from composer import Trainer
from composer.models import ComposerClassifier
from composer.utils import dist
from helpers import Spy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from lth_diet.algorithms import Rewind, SubsetSampling

def train(*algorithms):
    spy = Spy(batch_start=lambda state: state.batch[0].flatten().int().tolist())
    sampler = DistributedSampler(data, 2, rank, shuffle=False)
    Trainer(
        model=ComposerClassifier(network, num_classes=2),
        train_dataloader=DataLoader(data, batch_size=4, sampler=sampler),
        max_duration="8ba",
        optimizers=torch.optim.SGD(network.parameters(), lr=1e-3),
        algorithms=algorithms,
        callbacks=[spy],
        device="cpu",
        progress_bar=False,
    ).fit()
    return spy.seen["batch_start"]

dist.initialize_dist("cpu")
rank, network, rewind = dist.get_global_rank(), torch.nn.Linear(1, 2), Rewind(2)
data = TensorDataset(torch.arange(48.0)[:, None], torch.zeros(48, dtype=torch.long))
first, second = train(rewind, SubsetSampling(range(0, 48, 3), 2)), train(rewind)
try:
    train(SubsetSampling(range(rank, 16), 2))
except ValueError as error:
    json.dump([first, second, sorted(rewind.state), str(error)], open(f"{rank}.json", "w"))
"""


@pytest.mark.integration
def test_two_ranks_share_the_subset_and_the_state_and_must_have_the_same_indices(place):
    Path("train.py").write_text(RANKS)
    process = Process(["composer", "-n", 2, "train.py"])
    output = process.communicate()
    assert process.returncode == 0, output
    for rank in range(2):
        first, second, names, error = json.loads(Path(f"{rank}.json").read_text())
        assert sum(first[:2], []) == SUBSET[rank::2]
        assert sum(first[2:], []) == list(range(rank, 48, 2))
        assert second == [*first[4:], *first[2:4]]  # the third batch of an epoch is the first after rewinding
        assert names == ["bias", "weight"]
        assert error == "the ranks have different subsets; draw the indices from the same seed on every rank"


@pytest.mark.parametrize(("batches", "starts"), [(3, [0, 2, 5]), (1, [0, 1, 2, 3, 4, 5, 6, 7])])
def test_train_subset_num_batches_applies_to_the_subset_and_to_all_examples(trainer, indexed, batches, starts):
    spy = Spy(epoch_start=lambda state: int(state.timestamp.batch))
    options = {"train_subset_num_batches": batches, "steps": 8, "callbacks": [spy]}
    trainer([SubsetSampling(SUBSET, "2ba")], loader=DataLoader(indexed, batch_size=8), **options).fit()
    assert spy.seen["epoch_start"] == starts
