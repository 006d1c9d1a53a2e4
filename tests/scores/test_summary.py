import dataclasses
import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from lth_diet.data.dataset import Split
from lth_diet.scores.artifact import Scores
from lth_diet.scores.summary import ScoredExamples, describe_scores, describe_subset


def test_summary_counts_mislabeled_examples_among_all_easiest_and_hardest(noisy):
    summary = describe_scores(noisy)
    mean, mislabeled = noisy.scores.mean, noisy.mislabeled
    assert summary["wrong_labels_percent"] == round(100 * mislabeled.mean(), 4)
    size = round(0.1 * len(mean))
    hardest = np.argsort(mean)[-size:]
    assert summary["wrong_labels_in_hardest_percent"]["10"] == round(100 * mislabeled[hardest].mean(), 4)
    assert summary["wrong_labels_in_easiest_percent"]["10"] < summary["wrong_labels_percent"]
    pairs = mean[mislabeled][:, None] > mean[~mislabeled]
    assert summary["wrong_labels_roc_auc"] == pytest.approx(pairs.mean(), abs=1e-4)


def test_summary_compares_the_two_halves_of_the_networks(noisy):
    first, second = noisy.scores.el2n[:2].mean(0), noisy.scores.el2n[2:].mean(0)
    summary = describe_scores(noisy)
    assert summary["halves_spearman"] == pytest.approx(spearmanr(first, second).statistic, abs=1e-4)
    size = round(0.25 * len(first))
    common = set(np.argsort(first)[:size]) & set(np.argsort(second)[:size])
    assert summary["halves_overlap_of_easiest_percent"]["25"] == pytest.approx(100 * len(common) / size, abs=1e-4)
    one_network = ScoredExamples(noisy.data, noisy.labels, Scores(noisy.scores.el2n[:1], {}))
    assert "halves_spearman" not in describe_scores(one_network)


def test_summary_ranks_equal_scores_by_index(noisy):
    examples = ScoredExamples(noisy.data, noisy.labels, Scores(np.round(noisy.scores.el2n), {}))
    summary, count = describe_scores(examples), len(noisy.labels)
    first, second = (
        sorted(range(count), key=lambda index, half=half: half[index])[: round(0.25 * count)]
        for half in (examples.scores.el2n[:2].mean(0), examples.scores.el2n[2:].mean(0))
    )
    expected = 100 * len(set(first) & set(second)) / len(first)
    assert summary["halves_overlap_of_easiest_percent"]["25"] == pytest.approx(expected, abs=1e-4)
    hardest = sorted(range(count), key=lambda index: examples.scores.mean[index])[-round(0.05 * count) :]
    expected = 100 * noisy.mislabeled[hardest].mean()
    assert summary["wrong_labels_in_hardest_percent"]["5"] == pytest.approx(expected, abs=1e-4)


def test_summary_has_shares_of_1_to_50_percent_and_at_least_one_example(noisy):
    few = np.array([0, 1, 2])
    train = Split(noisy.data.train.images[few], noisy.data.train.labels[few])
    data = dataclasses.replace(noisy.data, train=train)
    scores = Scores(np.array([[0.1, 0.2, 0.3], [0.3, 0.1, 0.2]], np.float32), {})
    overlap = describe_scores(ScoredExamples(data, noisy.labels[few], scores))["halves_overlap_of_easiest_percent"]
    assert overlap == {"1": 0, "5": 0, "10": 0, "25": 0, "50": 50}


def test_summary_of_clean_labels_has_no_statistics_of_mislabeled_examples(noisy):
    clean = ScoredExamples(noisy.data, noisy.data.train.labels, noisy.scores)
    summary = describe_scores(clean)
    assert summary["wrong_labels_percent"] == 0
    assert not any(key.startswith(("wrong_labels_in", "wrong_labels_roc")) for key in summary)


def test_subset_summary_has_classes_mislabeled_examples_and_overlap_of_halves(noisy, hardest):
    indices = hardest(noisy.scores.mean)
    summary = describe_subset(noisy, indices, hardest)
    assert summary["size"] == 200 == sum(summary["classes"].values())
    assert summary["classes"]["3"] == int((noisy.labels[indices] == 3).sum())
    mislabeled = noisy.mislabeled
    shares = {"subset": 100 * mislabeled[indices].mean(), "data": round(100 * mislabeled.mean(), 4)}
    assert summary["wrong_labels_percent"] == shares
    assert summary["scores"]["lowest"] == noisy.scores.mean[indices].min()
    halves = [set(hardest(noisy.scores.el2n[part].mean(0))) for part in (slice(0, 2), slice(2, 4))]
    assert summary["halves_overlap_percent"] == 100 * len(halves[0] & halves[1]) / 200


@pytest.mark.parametrize("values", [[1, np.nextafter(np.float32(1), np.float32(2))], [0.5, 0.5]])
def test_summary_of_nearly_constant_scores_is_finite(noisy, values):
    rows = np.resize(np.array(values, np.float32), (2, len(noisy.labels)))
    json.dumps(describe_scores(ScoredExamples(noisy.data, noisy.labels, Scores(rows, {}))), allow_nan=False)
