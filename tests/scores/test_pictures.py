import dataclasses
import io
import json
import os

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from scipy.stats import spearmanr

from lth_diet.data import catalog, dataset, subsets
from lth_diet.errors import UserError
from lth_diet.files import read_json
from lth_diet.scores import pictures, summary
from lth_diet.scores.artifact import Scores
from lth_diet.scores.summary import ScoredExamples


@pytest.fixture
def noisy():
    """The digits with a third of the labels wrong, and scores of four networks that rank most of those highest."""
    data = catalog.load("digits", "unused")
    labels = data.train.labels.copy()
    labels[::3] = (labels[::3] + 1) % 10
    random = np.random.default_rng(0)
    values = random.random((4, len(labels))) + 0.5 * (labels != data.train.labels)
    return ScoredExamples(data, labels, Scores(values.astype(np.float32), {}))


def test_wrong_labels_are_counted_where_they_are(noisy):
    found = summary.describe_scores(noisy)
    mean, wrong = noisy.scores.mean, noisy.wrong
    assert found["wrong_labels_percent"] == round(100 * wrong.mean(), 4)
    size = round(0.1 * len(mean))
    hardest = np.argsort(mean)[-size:]
    assert found["wrong_labels_in_hardest_percent"]["10"] == round(100 * wrong[hardest].mean(), 4)
    assert found["wrong_labels_in_easiest_percent"]["10"] < found["wrong_labels_percent"]
    pairs = mean[wrong][:, None] > mean[~wrong]
    assert found["wrong_labels_roc_auc"] == pytest.approx(pairs.mean(), abs=1e-4)


def test_the_halves_of_the_networks_are_compared(noisy):
    first, second = noisy.scores.el2n[:2].mean(0), noisy.scores.el2n[2:].mean(0)
    found = summary.describe_scores(noisy)
    assert found["halves_spearman"] == pytest.approx(spearmanr(first, second).statistic, abs=1e-4)
    size = round(0.25 * len(first))
    common = set(np.argsort(first)[:size]) & set(np.argsort(second)[:size])
    assert found["halves_overlap_of_easiest_percent"]["25"] == pytest.approx(100 * len(common) / size, abs=1e-4)
    one = ScoredExamples(noisy.data, noisy.labels, Scores(noisy.scores.el2n[:1], {}))
    assert "halves_spearman" not in summary.describe_scores(one)


def test_clean_labels_have_no_share_of_wrong_ones_to_find(noisy):
    clean = ScoredExamples(noisy.data, noisy.data.train.labels, noisy.scores)
    found = summary.describe_scores(clean)
    assert found["wrong_labels_percent"] == 0
    assert not any(key.startswith(("wrong_labels_in", "wrong_labels_roc")) for key in found)


def choose(noisy):
    return lambda scores: subsets.hard(scores, noisy.labels, 200)


def test_a_subset_is_described_by_classes_wrong_labels_and_agreement(noisy):
    indices = choose(noisy)(noisy.scores.mean)
    found = summary.describe_subset(noisy, indices, choose(noisy))
    assert found["size"] == 200 == sum(found["classes"].values())
    assert found["classes"]["3"] == int((noisy.labels[indices] == 3).sum())
    shares = found["wrong_labels_percent"]
    assert shares == {"subset": 100 * noisy.wrong[indices].mean(), "data": round(100 * noisy.wrong.mean(), 4)}
    assert found["scores"]["lowest"] == noisy.scores.mean[indices].min()
    halves = [set(choose(noisy)(noisy.scores.el2n[part].mean(0))) for part in (slice(0, 2), slice(2, 4))]
    assert found["halves_overlap_percent"] == 100 * len(halves[0] & halves[1]) / 200


def colours(content):
    image = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content).convert("RGB")
    return {colour for _, colour in image.getcolors(1_000_000)}


def rgb(colour):
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def test_the_pictures_of_scores_show_wrong_labels_in_their_colour(noisy, place):
    pictures.save_scores_pictures(place / "noisy", noisy)
    clean = ScoredExamples(noisy.data, noisy.data.train.labels, noisy.scores)
    summary = pictures.save_scores_pictures(place / "clean", clean)
    assert read_json(place / "clean/summary.json") == summary
    for name in ("histogram.png", "hardest.png"):
        assert rgb(pictures.WRONG) in colours(place / "noisy" / name)
        assert rgb(pictures.WRONG) not in colours(place / "clean" / name)


def test_a_contact_sheet_shows_every_pixel_of_its_images_in_their_rows(noisy):
    rows = [noisy.of_class(label, noisy.order)[:2] for label in range(10)]
    axes = pictures.contact_sheet(noisy, {"a": rows, "b": rows}, "title").axes[0]
    canvas = np.asarray(axes.images[0].get_array())
    assert canvas.shape[0] == 10 * 9 - 1, "ten rows of eight pixels, one between them"
    second_of_class_4 = noisy.data.train.images[rows[4][1]]
    assert np.array_equal(canvas[4 * 9 : 4 * 9 + 8, 9:17, :1], second_of_class_4)
    after_a_gap = canvas[4 * 9 : 4 * 9 + 8, 4 * 9 : 4 * 9 + 8, :1]
    assert np.array_equal(after_a_gap, second_of_class_4)
    assert [text.get_text().split("\n")[0] for text in axes.get_yticklabels()] == list(noisy.data.class_names)
    framed = sum(noisy.wrong[position] for row in rows for position in row)
    assert len(axes.patches) == 2 * framed and len(axes.texts) == 2 * framed


@pytest.mark.parametrize("scored", [True, False])
def test_the_record_of_a_subset_has_numbers_and_pictures(noisy, place, scored):
    indices = choose(noisy)(noisy.scores.mean)
    given = noisy if scored else ScoredExamples(noisy.data, noisy.labels)
    summary = pictures.save_subset_pictures(place, given, indices, choose(noisy) if scored else None)
    assert read_json(place / "subset.json") == summary
    assert ("scores" in summary) == scored
    for name in ("subset.png", "images.png"):
        assert rgb(pictures.WRONG) in colours(place / name)


def test_the_indices_of_a_subset_are_kept_and_other_ones_refused(place):
    subsets.save_indices(place / "pretrain", np.array([1, 4]))
    subsets.save_indices(place / "pretrain", np.array([1, 4]))
    assert load_file(place / "pretrain/subset.safetensors")["indices"].tolist() == [1, 4]
    with pytest.raises(UserError, match=r"pretrain/subset\.safetensors: pre-training began with other examples"):
        subsets.save_indices(place / "pretrain", np.array([1, 5]))


def test_rows_without_scores_are_not_said_to_be_empty(noisy):
    given = ScoredExamples(noisy.data, noisy.labels)
    rows = [np.array([label]) if label != 3 else np.array([], int) for label in range(10)]
    axes = pictures.contact_sheet(given, {"some": rows}, "title").axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == [*"012", "3\nnone", *"456789"]


@pytest.mark.parametrize("values", [[1, np.nextafter(np.float32(1), np.float32(2))], [0.5, 0.5]])
def test_scores_that_hardly_differ_are_drawn_and_described(noisy, values):
    rows = np.resize(np.array(values, np.float32), (2, len(noisy.labels)))
    close = ScoredExamples(noisy.data, noisy.labels, Scores(rows, {}))
    pictures.histogram(close)
    json.dumps(summary.describe_scores(close), allow_nan=False)


def test_large_images_of_many_classes_are_thinned_out(noisy):
    images = np.zeros((300, 200, 130, 3), np.uint8)
    labels = np.arange(300) % 150
    split = dataset.Split(images, labels)
    data = dataset.Dataset("mine", split, split, (0.5,) * 3, (0.2,) * 3, tuple(map(str, range(150))))
    rows = [np.array([label, label + 150]) for label in range(150)]
    sheet = pictures.contact_sheet(ScoredExamples(data, labels), {"some": rows}, "title")
    assert np.asarray(sheet.axes[0].images[0].get_array()).shape == (100 * 54 - 4, 2 * 37 - 4, 3)


def test_a_hundred_classes_and_colour_images_are_drawn(place):
    images = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(300) % 100
    split = dataset.Split(images, labels)
    data = dataset.Dataset("mine", split, split, (0.5,) * 3, (0.2,) * 3, tuple(f"class {i}" for i in range(100)))
    scored = ScoredExamples(data, labels, Scores(np.random.default_rng(1).random((2, 300)).astype(np.float32), {}))
    pictures.save_scores_pictures(place, scored)
    pictures.save_subset_pictures(place, scored, np.arange(50), lambda scores: np.arange(50))
    assert Image.open(place / "easiest.png").height > 3000


@pytest.mark.parametrize("name", ["$\\frac$", "$x$", os.fsdecode(b"\xff"), "\x1b[31m", "a\nb", "日本"])
def test_a_class_of_any_name_is_drawn(noisy, place, name):
    data = dataclasses.replace(noisy.data, class_names=(name, *noisy.data.class_names[1:]))
    pictures.save_subset_pictures(place, dataclasses.replace(noisy, data=data), np.arange(100), None)
    assert name in read_json(place / "subset.json")["classes"]
