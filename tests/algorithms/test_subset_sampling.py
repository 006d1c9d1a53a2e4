import numpy as np
import pytest
import torch
from helpers import Spy
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset, WeightedRandomSampler

from lth_diet.algorithms import SubsetSampling
from lth_diet.data.dataset import Dataset, Split
from lth_diet.data.loader import Loader
from lth_diet.networks.classifier import build_classifier

SUBSET = list(range(0, 48, 3))  # 16 of 48 examples: two batches of 8


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


def resettable_loader(count=48):
    images = np.zeros((count, 8, 8, 3), np.uint8)
    data = Dataset(
        "cifar10", Split(images, np.arange(count)), Split(images, np.arange(count)), (0.0,) * 3, (1.0,) * 3, ()
    )
    return Loader(data, 8, order_seed=1, augmentation_seed=2)


def labels_of(state):
    return state.batch[1].tolist()


@pytest.mark.parametrize("until", [3, 4, 5])
def test_loader_with_indices_switches_exactly_at_the_time(trainer, until):
    loader, unrestricted = resettable_loader(), resettable_loader()
    spy = Spy(before_forward=labels_of)
    model = build_classifier(8, 48, width=2, seed=1)
    fit = trainer(
        [SubsetSampling(SUBSET, until)], model=model, loader=loader, steps=9, callbacks=[spy], spin_dataloaders=False
    )
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


@pytest.mark.parametrize("until", ["0.5dur", "3sec", "never"])
def test_time_in_another_unit_raises(until):
    with pytest.raises(ValueError):
        SubsetSampling([1], until)


def test_unsupported_sampler_raises(trainer, indexed):
    loader = DataLoader(indexed, batch_size=8, sampler=WeightedRandomSampler([1.0] * 48, 48))
    with pytest.raises(ValueError, match="WeightedRandomSampler"):
        trainer([SubsetSampling(SUBSET, 2)], loader=loader).fit()


def test_iterable_dataset_raises(trainer):
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.zeros(3, 8, 8), 0

        def __len__(self):
            return 48

    with pytest.raises(ValueError, match="without an attribute `indices`"):
        trainer([SubsetSampling(SUBSET, 2)], loader=DataLoader(Stream(), batch_size=8)).fit()


def test_train_subset_num_batches_applies_again_after_the_switch(trainer, indexed):
    spy = Spy(epoch_start=lambda state: int(state.timestamp.batch))
    options = {"train_subset_num_batches": 3, "steps": 8, "callbacks": [spy]}
    trainer([SubsetSampling(SUBSET, "2ba")], loader=DataLoader(indexed, batch_size=8), **options).fit()
    assert spy.seen["epoch_start"] == [0, 2, 5]
