import dataclasses
import os

import numpy as np
import pytest
from PIL import Image

from lth_diet.data import dataset
from lth_diet.files import read_json
from lth_diet.scores import pictures
from lth_diet.scores.artifact import Scores
from lth_diet.scores.summary import ScoredExamples


def colors(path):
    return {color for _, color in Image.open(path).convert("RGB").getcolors(1_000_000)}


def rgb(color):
    return tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))


def test_pictures_of_scores_mark_mislabeled_examples(noisy, place):
    pictures.save_scores_pictures(place / "noisy", noisy)
    clean = ScoredExamples(noisy.data, noisy.data.train.labels, noisy.scores)
    summary = pictures.save_scores_pictures(place / "clean", clean)
    assert read_json(place / "clean/summary.json") == summary
    for name in ("histogram.png", "hardest.png"):
        assert rgb(pictures.MISLABELED) in colors(place / "noisy" / name)
        assert rgb(pictures.MISLABELED) not in colors(place / "clean" / name)


def test_contact_sheet_has_one_row_of_images_per_class(noisy):
    rows = [noisy.of_class(label, noisy.order)[:2] for label in range(10)]
    axes = pictures.contact_sheet(noisy, {"a": rows, "b": rows}, "title").axes[0]
    canvas = np.asarray(axes.images[0].get_array())
    assert canvas.shape[0] == 10 * 9 - 1, "ten rows of eight pixels, with gaps of one"
    second_of_class_4 = noisy.data.train.images[rows[4][1]]
    assert np.array_equal(canvas[4 * 9 : 4 * 9 + 8, 9:17, :1], second_of_class_4)
    second_group = canvas[4 * 9 : 4 * 9 + 8, 4 * 9 : 4 * 9 + 8, :1]
    assert np.array_equal(second_group, second_of_class_4)
    assert [text.get_text().split("\n")[0] for text in axes.get_yticklabels()] == list(noisy.data.class_names)
    framed = sum(noisy.mislabeled[index] for row in rows for index in row)
    assert len(axes.patches) == 2 * framed and len(axes.texts) == 2 * framed


@pytest.mark.parametrize("scored", [True, False])
def test_subset_pictures_mark_mislabeled_examples(noisy, hardest, place, scored):
    indices = hardest(noisy.scores.mean)
    examples = noisy if scored else ScoredExamples(noisy.data, noisy.labels)
    summary = pictures.save_subset_pictures(place, examples, indices, hardest if scored else None)
    assert read_json(place / "subset.json") == summary
    assert ("scores" in summary) == scored
    for name in ("subset.png", "images.png"):
        assert rgb(pictures.MISLABELED) in colors(place / name)


def test_contact_sheet_labels_only_empty_rows_as_empty(noisy):
    examples = ScoredExamples(noisy.data, noisy.labels)
    rows = [np.array([label]) if label != 3 else np.array([], int) for label in range(10)]
    axes = pictures.contact_sheet(examples, {"some": rows}, "title").axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == [*"012", "3\nnone", *"456789"]


@pytest.mark.parametrize("values", [[1, np.nextafter(np.float32(1), np.float32(2))], [0.5, 0.5]])
def test_histogram_of_nearly_constant_scores_is_drawn(noisy, values):
    rows = np.resize(np.array(values, np.float32), (2, len(noisy.labels)))
    pictures.histogram(ScoredExamples(noisy.data, noisy.labels, Scores(rows, {})))


def test_contact_sheet_subsamples_large_images_and_stops_at_100_classes(noisy):
    images = np.zeros((300, 200, 130, 3), np.uint8)
    labels = np.arange(300) % 150
    split = dataset.Split(images, labels)
    data = dataset.Dataset("mine", split, split, (0.5,) * 3, (0.2,) * 3, tuple(map(str, range(150))))
    rows = [np.array([label, label + 150]) for label in range(150)]
    sheet = pictures.contact_sheet(ScoredExamples(data, labels), {"some": rows}, "title")
    assert np.asarray(sheet.axes[0].images[0].get_array()).shape == (100 * 54 - 4, 2 * 37 - 4, 3)


def test_100_classes_of_color_images_are_drawn(place):
    images = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(300) % 100
    split = dataset.Split(images, labels)
    data = dataset.Dataset("mine", split, split, (0.5,) * 3, (0.2,) * 3, tuple(f"class {i}" for i in range(100)))
    scored = ScoredExamples(data, labels, Scores(np.random.default_rng(1).random((2, 300)).astype(np.float32), {}))
    pictures.save_scores_pictures(place, scored)
    pictures.save_subset_pictures(place, scored, np.arange(50), lambda scores: np.arange(50))
    assert Image.open(place / "easiest.png").height > 3000


@pytest.mark.parametrize("name", ["$\\frac$", "$x$", os.fsdecode(b"\xff"), "\x1b[31m", "a\nb", "日本"])
def test_class_names_with_special_characters_are_drawn(noisy, place, name):
    data = dataclasses.replace(noisy.data, class_names=(name, *noisy.data.class_names[1:]))
    pictures.save_subset_pictures(place, dataclasses.replace(noisy, data=data), np.arange(100), None)
    assert name in read_json(place / "subset.json")["classes"]


@pytest.mark.filterwarnings("error:Glyph")
def test_a_class_name_that_no_font_can_draw_is_replaced_by_its_label_and_says_so(noisy, monkeypatch):
    names = ("ant", "\U000f0000", "bee", *noisy.data.class_names[3:])
    examples = dataclasses.replace(noisy, data=dataclasses.replace(noisy.data, class_names=names))
    axes = pictures.subset_figure(examples, np.arange(100)).axes[-1]
    assert [text.get_text() for text in axes.get_yticklabels()][:3] == ["ant", "class 1", "bee"]
    assert "class <label>" in axes.get_xlabel()
    pictures._png(axes.figure)


@pytest.mark.filterwarnings("error:Glyph")
def test_class_names_are_drawn_with_any_installed_font_that_has_their_characters(noisy):
    letter = "の"  # in a font of matplotlib, but not in its default font
    names = (letter, *noisy.data.class_names[1:])
    examples = dataclasses.replace(noisy, data=dataclasses.replace(noisy.data, class_names=names))
    figure = pictures.subset_figure(examples, np.arange(100))
    assert figure.axes[-1].get_yticklabels()[0].get_text() == letter
    pictures._png(figure)
