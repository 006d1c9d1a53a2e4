import dataclasses
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lth_diet.data.dataset import Dataset, Split
from lth_diet.data.loader import EvaluationLoader, Loader, StackedLoader


def dataset(count=50, size=8, channels=3, name="cifar10"):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, size, size, channels), dtype=np.uint8)
    split = Split(images, np.arange(count))  # labels identify images
    return Dataset(name, split, split, (0.5,) * channels, (0.25,) * channels, tuple(map(str, range(count))))


def loader(data=None, batch_size=7, order=1, augmentation=2):
    return Loader(data or dataset(), batch_size, order, augmentation)


@given(st.integers(1, 50), st.integers(0, 5), st.integers(0, 5))
def test_epoch_is_a_permutation_without_the_last_incomplete_batch(batch_size, epoch, seed):
    train = loader(batch_size=batch_size, order=seed)
    steps = range(epoch * len(train), (epoch + 1) * len(train))
    seen = np.concatenate([train.examples(step) for step in steps])
    assert len(seen) == len(train) * batch_size
    assert len(set(seen.tolist())) == len(seen)
    assert set(seen.tolist()) <= set(range(50))
    if 50 % batch_size == 0:
        assert sorted(seen.tolist()) == list(range(50))


def test_epochs_have_different_orders():
    train = loader(batch_size=50)
    assert not np.array_equal(train.examples(0), train.examples(1))


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(0, 60))
def test_batch_at_a_step_does_not_depend_on_earlier_batches(before, step):
    used, fresh = loader(), loader()
    for earlier in before:
        used.batch(earlier)
    for a, b in zip(used.batch(step), fresh.batch(step), strict=True):
        assert torch.equal(a, b)


@given(st.integers(0, 40))
def test_iteration_starts_at_current_step_and_ends_with_the_epoch(start):
    train = loader()
    train.current_step = lambda: start
    batches = list(train)
    assert len(batches) == len(train) - start % len(train)
    for step, (images, labels) in enumerate(batches, start):
        expected = train.batch(step)
        assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1])


def test_batch_has_the_normalized_crops_of_the_images_with_its_labels():
    data, train = dataset(), loader()
    images, labels = train.batch(5)
    top, left, flipped = train.augmentation(5)
    padded = np.pad(data.train.images[labels.numpy()], [(0, 0), (1, 1), (1, 1), (0, 0)])
    edges = zip(padded, top, left, flipped, strict=True)
    cropped = np.stack([image[y : y + 8, x : x + 8][:, :: -1 if flip else 1] for image, y, x, flip in edges])
    expected = (torch.from_numpy(cropped).permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.25
    assert images.dtype == torch.float32 and images.shape == (7, 3, 8, 8)
    assert torch.allclose(images.double(), expected, atol=1e-5)
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("size", "padding"), [(32, 4), (8, 1)])
def test_padding_is_an_eighth_of_the_image_size(size, padding):
    assert loader(dataset(size=size)).padding == padding


def test_crops_and_flips_are_uniform():
    train = loader(dataset(size=32), batch_size=50)
    tops, lefts, flipped = (np.concatenate(a) for a in zip(*map(train.augmentation, range(200)), strict=True))
    for edges in (tops, lefts):
        counts = np.bincount(edges, minlength=9)
        assert len(counts) == 9 and np.all(np.abs(counts - 10_000 / 9) < 150)
    assert abs(flipped.mean() - 0.5) < 0.02


@pytest.mark.parametrize(
    ("name", "flip", "flips"), [("digits", None, False), ("digits", True, True), ("cifar10", False, False)]
)
def test_digits_are_not_flipped_unless_the_loader_is_told_to(name, flip, flips):
    train = Loader(dataset(name=name), 7, 0, 0, flip=flip)
    assert any(train.augmentation(step)[2].any() for step in range(20)) == flips


@given(st.sets(st.integers(0, 49), min_size=7, max_size=50))
def test_restricted_loader_uses_only_its_indices_once_per_epoch(indices):
    train = loader()
    train.indices = sorted(indices)
    seen = np.concatenate([train.examples(step) for step in range(len(train))])
    assert len(train) == len(indices) // 7
    assert set(seen.tolist()) <= indices and len(set(seen.tolist())) == len(seen)


def test_new_indices_take_effect_at_the_next_batch_of_a_running_iteration():
    train, free = loader(), loader()
    train.indices = range(14)
    iterator = iter(train)
    next(iterator)
    train.indices = None
    assert torch.equal(next(iterator)[1], free.batch(1)[1])


def test_reprs_have_sizes_and_not_arrays():
    data, train = dataset(), loader()
    train.indices = range(14)
    assert repr(train) == "Loader(14 of 50 examples, batch_size=7, device='cpu')"
    assert repr(EvaluationLoader(data, data.test)) == "EvaluationLoader(50 examples, batch_size=500, device='cpu')"


def test_fewer_examples_than_a_batch_raise():
    with pytest.raises(ValueError, match="6 examples do not fill a batch of 7"):
        loader().indices = range(6)


def test_evaluation_yields_all_images_in_order_without_augmentation():
    data = dataset()
    batches = list(EvaluationLoader(data, data.test, batch_size=16))
    assert [len(labels) for _, labels in batches] == [13, 13, 12, 12]
    assert len(EvaluationLoader(data, data.test, batch_size=16)) == 4
    images = torch.cat([images for images, _ in batches])
    expected = (torch.from_numpy(data.test.images).permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.25
    assert torch.allclose(images.double(), expected, atol=1e-5)
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(50))


@given(st.integers(1, 4), st.integers(0, 30))
def test_ranks_together_make_the_batch_of_one_rank(ranks, step):
    whole = Loader(dataset(), 12, 1, 2).batch(step)
    for rank in range(ranks):
        share = Loader(dataset(), 12, 1, 2, rank=rank, ranks=ranks)
        assert share.batch_size == 12 // ranks
        for part, full in zip(share.batch(step), whole, strict=True):
            assert torch.equal(part, full[rank::ranks])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_evaluate_each_image_once_in_equally_many_batches(ranks):
    data = dataset()
    loaders = [EvaluationLoader(data, data.test, 16, rank=rank, ranks=ranks) for rank in range(ranks)]
    batches = [list(loader) for loader in loaders]
    assert {len(of_rank) for of_rank in batches} == {4}
    labels = torch.cat([labels for of_rank in batches for _, labels in of_rank])
    assert sorted(labels.tolist()) == list(range(50))


def test_loaders_on_a_device_share_one_copy_of_images_and_labels_which_is_freed_with_the_data():
    data = dataset()
    noisy = dataclasses.replace(data, train=Split(data.train.images, data.train.labels[::-1].copy()))
    loaders = [Loader(each, 7, 1, 2, "meta") for each in (data, noisy)] + [
        EvaluationLoader(data, data.train, 7, "meta")
    ]
    assert len({id(each.images) for each in loaders}) == 1 and len({id(each.labels) for each in loaders}) == 2
    assert loader(dataset()).images.device.type == "cpu", "other images"
    copy = weakref.ref(loaders[0].images)
    del loaders
    assert copy() is Loader(noisy, 7, 1, 2, "meta").images
    del data, noisy
    assert copy() is None


def test_images_on_the_cpu_are_not_copied():
    data = dataset()
    assert np.shares_memory(loader(data).images.numpy(), data.train.images)


@given(st.integers(1, 40), st.integers(1, 60), st.integers(1, 50))
def test_no_rank_evaluates_an_empty_share(ranks, batch_size, images):
    data = dataset()
    split = Split(data.test.images[:images], data.test.labels[:images])
    if images < ranks:
        with pytest.raises(ValueError, match=f"{images} images do not suffice for {ranks} ranks"):
            EvaluationLoader(data, split, batch_size, ranks=ranks)
        return
    loaders = [EvaluationLoader(data, split, batch_size, rank=rank, ranks=ranks) for rank in range(ranks)]
    sizes = np.array([[len(labels) for _, labels in loader] for loader in loaders])
    assert sizes.min() > 0 and sizes.sum() == images
    assert sizes.sum(0).max() <= max(batch_size, 2 * ranks - 1)


def test_batch_size_not_divisible_by_ranks_raises():
    with pytest.raises(ValueError, match="batch_size 7 is not divisible by 2 ranks"):
        Loader(dataset(), 7, 1, 2, ranks=2)


def loaders_of_a_stack(count, channels=3, batch_size=7, size=8, **options):
    data = dataset(size=size, channels=channels)
    return [Loader(data, batch_size, 10 + r, 20 + r, **options) for r in range(count)]


@given(st.integers(1, 4), st.sampled_from([1, 3]), st.booleans(), st.integers(0, 40), st.data())
def test_batch_of_a_stack_is_the_batches_of_its_loaders_bit_for_bit(count, channels, flip, step, drawn):
    ranks = drawn.draw(st.sampled_from([1, 2]))
    options = {"channels": channels, "batch_size": 6, "size": 9, "flip": flip, "ranks": ranks, "rank": ranks - 1}
    stacked, single = StackedLoader(loaders_of_a_stack(count, **options)), loaders_of_a_stack(count, **options)
    length = drawn.draw(st.integers(6, 50))
    orders = drawn.draw(st.lists(st.permutations(range(50)), min_size=count, max_size=count))
    for rows in (None, [order[:length] for order in orders], None):
        stacked.indices = rows
        for loader, row in zip(single, rows or [None] * count, strict=True):
            loader.indices = row
        images, labels = stacked.batch(step)
        expected = [loader.batch(step) for loader in single]
        assert torch.equal(images, torch.cat([images for images, _ in expected], 1))
        assert torch.equal(labels, torch.stack([labels for _, labels in expected], 1))
        assert images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.float32
        assert len(stacked) == len(single[0])


@given(st.integers(0, 20))
def test_iteration_of_a_stack_starts_at_its_current_step_and_ends_with_the_epoch(start):
    train = StackedLoader(loaders_of_a_stack(2))
    train.current_step = lambda: start
    batches = list(train)
    assert len(batches) == len(train) - start % len(train)
    for step, batch in enumerate(batches, start):
        for made, expected in zip(batch, train.batch(step), strict=True):
            assert torch.equal(made, expected)


def test_a_stack_has_the_sizes_and_the_indices_of_its_loaders():
    train = StackedLoader(loaders_of_a_stack(2))
    assert (train.batch_size, train.num_examples, train.indices) == (7, 50, None)
    train.indices = np.arange(28).reshape(2, 14)
    assert [list(row) for row in train.indices] == [[*range(14)], [*range(14, 28)]]
    assert repr(train) == "StackedLoader(2 x Loader(14 of 50 examples, batch_size=7, device='cpu'))"


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (loader(batch_size=8), "have different batch sizes"),
        (loader(dataset(count=49)), "have different images"),
        (loader(dataclasses.replace(dataset(), train=Split(dataset().train.images, np.zeros(50)))), "different labels"),
        (None, "at least one Loader"),
    ],
)
def test_loaders_that_do_not_fit_together_raise(other, sentence):
    with pytest.raises(ValueError, match=sentence):
        StackedLoader([loader(), other] if other else [])


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([range(8)], "indices have 1 rows; expected 2, one per loader"),
        ([range(8), range(9)], "lengths \\[8, 9\\]; expected rows of the same length"),
        ([range(6)] * 2, "6 examples do not fill a batch of 7"),
    ],
)
def test_indices_that_do_not_fit_a_stack_raise_and_change_nothing(rows, sentence):
    train = StackedLoader(loaders_of_a_stack(2))
    with pytest.raises(ValueError, match=sentence):
        train.indices = rows
    assert train.indices is None


@pytest.mark.parametrize("channels", [1, 3])
def test_evaluation_of_a_stack_repeats_images_and_labels(channels):
    data = dataset(channels=channels)
    single, stacked = (list(EvaluationLoader(data, data.test, 16, copies=copies)) for copies in (1, 3))
    for (images, labels), (repeated, repeated_labels) in zip(single, stacked, strict=True):
        assert torch.equal(repeated, torch.cat([images] * 3, 1))
        assert torch.equal(repeated_labels, torch.stack([labels] * 3, 1))
        assert repeated.is_contiguous(memory_format=torch.channels_last)
