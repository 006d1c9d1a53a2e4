import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from lth_diet.data.subsets import describe_imbalance, easy, hard, random_subset, save_indices
from lth_diet.errors import UserError

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=80).map(np.array)


@given(LABELS, st.data())
def test_random_subset_has_the_given_size_without_duplicates(labels, data):
    size = data.draw(st.integers(1, len(labels)))
    subset = random_subset(labels, size, seed=1)
    assert len(subset) == len(set(subset.tolist())) == size
    assert np.array_equal(subset, np.sort(subset))
    assert subset.min() >= 0 and subset.max() < len(labels)


@given(st.integers(2, 6), st.integers(1, 60), st.integers(0, 9))
def test_random_subset_has_equal_shares_of_equally_large_classes(classes, size, seed):
    labels = np.repeat(np.arange(classes), 30)
    size = min(size, len(labels))
    counts = np.bincount(labels[random_subset(labels, size, seed)], minlength=classes)
    assert counts.min() >= size // classes
    if size % classes == 0:
        assert counts.min() == counts.max()


def test_random_subset_depends_on_the_seed():
    labels = np.arange(100) % 10
    assert np.array_equal(random_subset(labels, 30, 5), random_subset(labels, 30, 5))
    assert not np.array_equal(random_subset(labels, 30, 5), random_subset(labels, 30, 6))


@pytest.mark.parametrize("size", [0, 11])
def test_random_subset_of_invalid_size_raises(size):
    with pytest.raises(ValueError, match="expected 1 to 10"):
        random_subset(np.zeros(10, int), size, 0)


@st.composite
def scored(draw, ties=True):
    """Draw scores and labels of some examples."""
    labels = draw(LABELS)
    values = st.integers(0, 9) if ties else st.integers(0, 10**6)
    scores = draw(st.lists(values, min_size=len(labels), max_size=len(labels), unique=not ties))
    return np.array(scores, np.float32), labels


@given(scored(), st.data(), st.sampled_from([easy, hard]), st.booleans())
def test_easy_and_hard_have_the_given_size_without_duplicates(examples, data, choose, balanced):
    scores, labels = examples
    offset = data.draw(st.integers(0, len(labels) - 1))
    size = data.draw(st.integers(1, len(labels) - offset))
    subset = choose(scores, labels, size, balanced, offset)
    assert len(subset) == len(set(subset.tolist())) == size
    assert np.array_equal(subset, np.sort(subset))
    assert subset.min() >= 0 and subset.max() < len(labels)


@given(scored(), st.data())
def test_easy_has_the_lowest_and_hard_the_highest_scores(examples, data):
    scores, labels = examples
    size = data.draw(st.integers(1, len(labels)))
    assert np.array_equal(np.sort(scores[easy(scores, labels, size)]), np.sort(scores)[:size])
    assert np.array_equal(np.sort(scores[hard(scores, labels, size)]), np.sort(scores)[len(labels) - size :])


@given(scored(), st.data(), st.sampled_from([easy, hard]), st.booleans())
def test_smaller_subset_is_contained_in_a_larger_one(examples, data, choose, balanced):
    scores, labels = examples
    size = data.draw(st.integers(1, len(labels)))
    smaller = data.draw(st.integers(1, size))
    assert set(choose(scores, labels, smaller, balanced)) <= set(choose(scores, labels, size, balanced))


@given(scored(), st.data())
def test_easy_and_hard_are_disjoint_up_to_half_the_examples(examples, data):
    scores, labels = examples
    size = data.draw(st.integers(0, len(labels) // 2))
    if size:
        assert not set(easy(scores, labels, size)) & set(hard(scores, labels, size))


@given(st.integers(2, 6), st.data(), st.sampled_from([easy, hard]))
def test_class_counts_of_a_balanced_subset_differ_by_at_most_one(classes, data, choose):
    labels = np.repeat(np.arange(classes), 12)
    scores = np.array(data.draw(st.lists(st.integers(0, 9), min_size=len(labels), max_size=len(labels))), np.float32)
    offset = data.draw(st.integers(0, len(labels) // 2))
    skipped = choose(scores, labels, offset, class_balanced=True) if offset else np.array([], int)
    left = np.bincount(np.delete(labels, skipped), minlength=classes)
    size = data.draw(st.integers(1, int(left.min()) * classes))
    subset = choose(scores, labels, size, class_balanced=True, offset=offset)
    counts = np.bincount(labels[subset], minlength=classes)
    assert counts.max() - counts.min() <= 1
    assert not set(subset) & set(skipped)
    for label in range(classes):  # the easiest or hardest examples of each class that are not skipped
        direction = 1 if choose is easy else -1
        in_class = np.sort(scores[np.setdiff1d(np.flatnonzero(labels == label), skipped)])[::direction]
        chosen = np.sort(scores[subset[labels[subset] == label]])[::direction]
        assert np.array_equal(chosen, in_class[: counts[label]])


@given(scored(), st.data(), st.sampled_from([easy, hard]))
def test_offset_skips_the_subset_of_that_size(examples, data, choose):
    scores, labels = examples
    offset = data.draw(st.integers(0, len(labels) - 1))
    size = data.draw(st.integers(1, len(labels) - offset))
    whole = set(choose(scores, labels, offset + size))
    skipped = set(choose(scores, labels, offset)) if offset else set()
    assert set(choose(scores, labels, size, offset=offset)) == whole - skipped


@given(scored(ties=False), st.data(), st.sampled_from([easy, hard]), st.booleans())
def test_subset_does_not_depend_on_the_order_of_the_data(examples, data, choose, balanced):
    scores, labels = examples
    order = np.array(data.draw(st.permutations(range(len(labels)))))
    size = data.draw(st.integers(1, len(labels)))
    permuted = order[choose(scores[order], labels[order], size, balanced)]
    assert set(permuted) == set(choose(scores, labels, size, balanced))


def test_equal_scores_are_ordered_by_index():
    scores, labels = np.zeros(6, np.float32), np.zeros(6, int)
    assert easy(scores, labels, 2).tolist() == [0, 1]
    assert hard(scores, labels, 2).tolist() == [4, 5]


@pytest.mark.parametrize("balanced", [False, True])
def test_equal_scores_of_many_examples_are_ordered_by_index(balanced):
    random = np.random.default_rng(0)
    scores, labels = random.integers(0, 3, 1000).astype(np.float32), random.integers(0, 4, 1000)
    order = sorted(range(1000), key=lambda index: scores[index])
    for choose, ranking in ((easy, order), (hard, order[::-1])):
        ranks = np.arange(1000)
        if balanced:
            ranks = [sum(labels[ranking[:rank]] == labels[index]) for rank, index in enumerate(ranking)]
        expected = [ranking[rank] for rank in sorted(range(1000), key=lambda rank: ranks[rank])]
        for size in range(200, 800, 19):
            assert choose(scores, labels, size, balanced).tolist() == sorted(expected[:size])


@pytest.mark.parametrize("choose", [easy, hard])
def test_nan_scores_and_too_large_subsets_raise(choose):
    scores, labels = np.array([0.1, np.nan, 0.3], np.float32), np.zeros(3, int)
    with pytest.raises(ValueError, match="scores contain NaN"):
        choose(scores, labels, 1)
    with pytest.raises(ValueError, match="subset size 3 for 3 examples; expected 1 to 2"):
        choose(np.zeros(3), labels, 3, offset=1)


def test_saved_indices_cannot_be_replaced_by_others(place):
    save_indices(place / "pretrain", np.array([1, 4]))
    save_indices(place / "pretrain", np.array([1, 4]))
    assert load_file(place / "pretrain/subset.safetensors")["indices"].tolist() == [1, 4]
    with pytest.raises(UserError, match=r"pretrain/subset\.safetensors: pre-training started with other examples"):
        save_indices(place / "pretrain", np.array([1, 5]))


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(0, 500), min_size=1, max_size=9))
def test_exactly_classes_with_less_than_a_tenth_of_their_share_are_described(counts):
    share = sum(counts.values()) / len(counts)
    found = describe_imbalance(counts, "easy")
    assert bool(found) == any(count < share / 10 or not count for count in counts.values())
    assert ("no example of" in (found or "")) == (0 in counts.values())


@given(st.integers(5, 50))
def test_a_random_subset_of_equally_large_classes_is_not_described(size):
    labels = np.repeat(range(5), 20)
    counts = np.bincount(labels[random_subset(labels, size, 3)], minlength=5).tolist()
    assert describe_imbalance(dict(zip("abcde", counts, strict=True)), "random") is None


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ({"3": 0, "4": 200, "8": 0, "9": 0}, "no example of 3, 8 and 9 among the 200 easiest examples; see "),
        ({"ant": 1, "bee": 99}, "less than a tenth of the fair share of ant among the 100 easiest examples; see "),
        ({"ant": 1, "bee": 99, "cow": 0}, "no example of cow and less than a tenth of the fair share of ant among "),
        (dict.fromkeys("abcdefghijklm", 0) | {"z": 20}, "no example of a, b, c, d, e, f, g, h, i, j and 3 other "),
    ],
)
def test_missing_and_rare_classes_are_named(counts, sentence):
    assert describe_imbalance(counts, "easy").startswith(sentence)


def test_the_remedy_is_a_balanced_subset_or_a_larger_one():
    assert describe_imbalance({"a": 0, "b": 9}, "hard").endswith("; see pretrain.subset.class_balanced")
    assert describe_imbalance({"a": 0, "b": 1}, "hard").endswith("; see pretrain.subset.size")
    assert describe_imbalance({"a": 0, "b": 9}, "random").endswith("; see pretrain.subset.size")
