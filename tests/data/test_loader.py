import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lth_diet.data.dataset import Dataset, Split
from lth_diet.data.loader import EvaluationLoader, Loader, crop


def dataset(count=50, size=8, channels=3, name="cifar10"):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, size, size, channels), dtype=np.uint8)
    split = Split(images, np.arange(count))  # a label tells which image it is
    return Dataset(name, split, split, (0.5,) * channels, (0.25,) * channels, tuple(map(str, range(count))))


def loader(data=None, batch_size=7, order=1, augmentation=2):
    return Loader(data or dataset(), batch_size, order, augmentation)


def naive_crop(images, padding, top, left, is_remote):
    """Pixel by pixel."""
    count, height, width, channels = images.shape
    out = np.zeros_like(images)
    for b, y, x, c in itertools.product(range(count), range(height), range(width), range(channels)):
        across = width - 1 - x if is_remote[b] else x
        row, column = y + top[b] - padding, across + left[b] - padding
        if 0 <= row < height and 0 <= column < width:
            out[b, y, x, c] = images[b, row, column, c]
    return out


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 3), st.integers(0, 99))
def test_crops_equal_a_naive_reference_pixel_by_pixel(count, height, width, padding, seed):
    random = np.random.default_rng(seed)
    images = random.integers(1, 256, (count, height, width, 2), dtype=np.uint8)
    top, left = random.integers(0, 2 * padding + 1, (2, count))
    is_remote = random.integers(0, 2, count).astype(bool)
    arrays = (torch.from_numpy(a) for a in (top, left, is_remote))
    assert np.array_equal(
        crop(torch.from_numpy(images), padding, *arrays).numpy(), naive_crop(images, padding, top, left, is_remote)
    )


@given(st.integers(1, 50), st.integers(0, 5), st.integers(0, 5))
def test_each_pass_is_a_permutation_without_the_rest(batch_size, number, seed):
    train = loader(batch_size=batch_size, order=seed)
    steps = range(number * len(train), (number + 1) * len(train))
    seen = np.concatenate([train.examples(step) for step in steps])
    assert len(seen) == len(train) * batch_size
    assert len(set(seen.tolist())) == len(seen)
    assert set(seen.tolist()) <= set(range(50))
    if 50 % batch_size == 0:
        assert sorted(seen.tolist()) == list(range(50))


def test_every_pass_has_another_order():
    train = loader(batch_size=50)
    assert not np.array_equal(train.examples(0), train.examples(1))


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(0, 60))
def test_the_batch_at_a_step_does_not_depend_on_what_came_before(before, step):
    used, fresh = loader(), loader()
    for earlier in before:
        used.batch(earlier)
    for a, b in zip(used.batch(step), fresh.batch(step), strict=True):
        assert torch.equal(a, b)


@given(st.integers(0, 40))
def test_iteration_begins_at_the_clock_and_ends_with_the_pass(start):
    train = loader()
    train.current_step = lambda: start
    batches = list(train)
    assert len(batches) == len(train) - start % len(train)
    for step, (images, labels) in enumerate(batches, start):
        expected = train.batch(step)
        assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1])


def test_batches_are_the_normalised_crops_of_the_images_they_name():
    data, train = dataset(), loader()
    images, labels = train.batch(5)
    top, left, is_remote = train.augmentation(5)
    cropped = naive_crop(data.train.images[labels.numpy()], 1, top, left, is_remote)
    expected = (torch.from_numpy(cropped).permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.25
    assert images.dtype == torch.float32 and images.shape == (7, 3, 8, 8)
    assert torch.allclose(images.double(), expected, atol=1e-5)
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("size", "padding"), [(32, 4), (8, 1)])
def test_padding_is_4_pixels_at_32_and_1_at_8(size, padding):
    assert loader(dataset(size=size)).padding == padding


def test_crops_and_mirrors_are_spread_evenly():
    train = loader(dataset(size=32), batch_size=50)
    tops, lefts, is_remote = (np.concatenate(a) for a in zip(*map(train.augmentation, range(200)), strict=True))
    for edges in (tops, lefts):
        counts = np.bincount(edges, minlength=9)
        assert len(counts) == 9 and np.all(np.abs(counts - 10_000 / 9) < 150)
    assert abs(is_remote.mean() - 0.5) < 0.02


def test_digits_are_not_mirrored():
    train = loader(dataset(channels=1, name="digits"))
    assert not any(train.augmentation(step)[2].any() for step in range(20))


@given(st.sets(st.integers(0, 49), min_size=7, max_size=50))
def test_a_restricted_loader_draws_from_its_indices_only_in_whole_passes(indices):
    train = loader()
    train.indices = sorted(indices)
    seen = np.concatenate([train.examples(step) for step in range(len(train))])
    assert len(train) == len(indices) // 7
    assert set(seen.tolist()) <= indices and len(set(seen.tolist())) == len(seen)


def test_indices_act_on_the_next_batch_of_an_iteration_under_way():
    train, free = loader(), loader()
    train.indices = range(14)
    iterator = iter(train)
    next(iterator)
    train.indices = None
    assert torch.equal(next(iterator)[1], free.batch(1)[1])


def test_fewer_examples_than_a_batch_are_refused():
    with pytest.raises(ValueError, match="6 examples do not fill a batch of 7"):
        loader().indices = range(6)


def test_evaluation_goes_through_all_images_in_order_without_augmentation():
    data = dataset()
    batches = list(EvaluationLoader(data, data.test, batch_size=16))
    assert [len(labels) for _, labels in batches] == [13, 13, 12, 12]
    assert len(EvaluationLoader(data, data.test, batch_size=16)) == 4
    images = torch.cat([images for images, _ in batches])
    expected = (torch.from_numpy(data.test.images).permute(0, 3, 1, 2).double() / 255 - 0.5) / 0.25
    assert torch.allclose(images.double(), expected, atol=1e-5)
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(50))


@given(st.integers(1, 4), st.integers(0, 30))
def test_the_shares_of_the_ranks_are_together_the_batch_of_one_rank(ranks, step):
    whole = Loader(dataset(), 12, 1, 2).batch(step)
    for rank in range(ranks):
        share = Loader(dataset(), 12, 1, 2, rank=rank, ranks=ranks)
        assert share.batch_size == 12 // ranks
        for mine, all_of_it in zip(share.batch(step), whole, strict=True):
            assert torch.equal(mine, all_of_it[rank::ranks])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_evaluate_each_image_once_in_as_many_batches(ranks):
    data = dataset()
    loaders = [EvaluationLoader(data, data.test, 16, rank=rank, ranks=ranks) for rank in range(ranks)]
    batches = [list(loader) for loader in loaders]
    assert {len(of_rank) for of_rank in batches} == {4}
    labels = torch.cat([labels for of_rank in batches for _, labels in of_rank])
    assert sorted(labels.tolist()) == list(range(50))


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(ValueError, match="a batch of 7 cannot be shared by 2 ranks"):
        Loader(dataset(), 7, 1, 2, ranks=2)
