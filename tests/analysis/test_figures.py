import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from analysis import collect, figures, paper
from analysis.arms import Arm
from analysis.figures import Panel


@pytest.fixture(scope="module")
def published():
    return collect.results_by_dataset(collect.published())


def results(tmp_path, rows):
    """Writes results.csv with four noisy replicates of each published curve."""
    random = np.random.default_rng(0)
    rows = rows.loc[rows.index.repeat(4)].assign(replicate=np.tile(range(4), len(rows)), run_id="a")
    rows["test_accuracy_percent"] = rows["mean"] + rows.sd * random.standard_normal(len(rows))
    rows.drop(columns=["mean", "sd", "n"]).to_csv(tmp_path / "results.csv", index=False)


@pytest.fixture
def ours(place):
    frame = collect.published()
    some = frame[(frame.dataset == "cifar10") & (frame.label_noise == 0) & frame.arm.isin(["init", "all", "random"])]
    results(place, some[some.subset_size.isna() | some.subset_size.isin([2048, 12800])])
    return collect.results_by_dataset(collect.load("results.csv"))


def text_of(figure):
    """Returns all text of a figure."""
    legends = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    texts = [
        text.get_text()
        for axes in figure.axes
        for text in [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
    ]
    return "\n".join([*legends, *texts, figure.get_suptitle()])


PANELS = {2: 3, 3: 2, 4: 9, 5: 14, 6: 7, 7: 8}


@pytest.mark.parametrize("number", figures.NUMBERS)
def test_published_figures_have_the_panels_of_the_paper(published, number):
    drawn = figures.figure(number, published)
    assert sum(axes.get_visible() for axes in drawn.axes) == PANELS[number]
    assert "missing" not in text_of(drawn) or number == 5
    assert "n = 4" in text_of(drawn)


def test_panel_titles(published):
    titles = [panel.title for row in figures.panels(2, published) for panel in row]
    assert titles == ["CIFAR-10, 12,800 examples", "CIFAR-100, 2,048 examples", "CINIC-10, t* = 800, 51,200 examples"]
    titles = [panel.title for row in figures.panels(3, published) for panel in row]
    assert titles == ["CIFAR-10, 10 % label noise, 2,048 examples", "CIFAR-10, 50 % label noise, 3,200 examples"]
    assert [panel.title.partition(", ")[2] for panel in figures.panels(4, published)[0]] == [
        "16.8 % of weights",
        "10.7 % of weights",
        "6.9 % of weights",
    ]
    assert [panel.family.t_star for row in figures.panels(6, published) for panel in row] == [400] * 3 + [800] * 4


def test_the_title_of_a_level_has_the_weights_of_the_family_or_the_level_if_they_are_not_known():
    level = Panel(paper.CIFAR10, level=8)
    assert level.title == "CIFAR-10, 16.8 % of weights"
    assert dataclasses.replace(level, family=paper.CIFAR10_SMALL).title.endswith(" pixels, 0.4 % of weights")
    assert dataclasses.replace(level, family=paper.Family("cifar10", 100)).title == "CIFAR-10, level 8"


def test_an_arm_above_the_others_is_inside_the_axes(published):
    curves = published["cifar10"]
    init, all_ = curves[Arm("init")], curves[Arm("all", None, 400)]
    drawn = figures.figure(2, {"cifar10": curves | {Arm("init"): dataclasses.replace(init, summary=all_.summary + 20)}})
    assert drawn.axes[0].get_ylim()[1] > (all_.summary["mean"] + 20).max()


def test_levels_beyond_those_of_the_paper_are_drawn(ours):
    assert max(ours["cifar10"][Arm("init")].levels) == 20
    lines, _ = figures._lines(Panel(paper.CIFAR10, 12800), ours["cifar10"])
    assert len(lines["init"].x) == 21


def test_x_axis_is_logarithmic_and_the_dense_line_is_level_0_of_all_at_t_star(published):
    axes = Figure().subplots()
    figures.draw(axes, Panel(paper.CIFAR10, 12800), published["cifar10"])
    assert axes.get_xscale() == "log" and axes.get_xlim()[0] > 100 > axes.get_xlim()[1]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["100", "41.0", "16.8", "6.9", "2.8"]
    dense = [line for line in axes.lines if line.get_color() == figures._DENSE["color"]]
    assert dense[0].get_ydata()[0] == pytest.approx(91.3475, abs=0.2)
    assert len(axes.collections) == 6  # one band per arm


def test_baselines_are_horizontal_lines_against_subset_size(published):
    axes = Figure().subplots()
    figures.draw(axes, Panel(paper.CIFAR100, level=8), published["cifar100"])
    flat = [line for line in axes.lines if len(set(np.atleast_1d(line.get_ydata()))) == 1]
    assert len(flat) == 3 and len(axes.lines) == 6
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["256", "512", "1,024", "2,048", "3,200", "6,400"]
    assert "below: init" in axes.texts[0].get_text()


def test_lines_differ_by_marker_or_dash_in_grayscale():
    looks = [(str(style.get("linestyle")), style.get("marker")) for style in figures._STYLES.values()]
    assert len(set(looks)) == len(looks) == 6


def test_panel_names_missing_arms_and_title_names_missing_data_sets(ours, published):
    text = text_of(figures.figure(2, ours, published))
    assert "missing: easy 12800, t_r = 200, hard 12800," in text
    assert "thin: published" in text and "no results for CIFAR-100; CINIC-10, t* = 800" in text.replace("\n", " ")
    text = text_of(figures.figure(5, ours, published)).replace("\n", " ")
    assert "no results for CIFAR-10 with 256, 512, 1,024, 3,200, 6,400, 25,600 examples; CIFAR-100" in text


def test_published_curves_are_thin_lines_in_the_background(ours, published):
    axes = Figure().subplots()
    figures.draw(axes, Panel(paper.CIFAR10, 12800), ours["cifar10"], published["cifar10"])
    thin = [line for line in axes.lines if line.get_linewidth() == 0.7]
    assert len(thin) == 6 and len(axes.lines) == 6 + 4 + 1
    assert min(line.get_zorder() for line in axes.lines if line not in thin) > max(line.get_zorder() for line in thin)


def test_thin_published_lines_are_left_out_with_a_note_if_the_settings_are_not_those_of_the_paper(ours, place, capsys):
    frame = pd.read_csv("results.csv")
    other = {"dataset.name": "cifar10", "train.lr": 0.2}
    frame.assign(identity=[json.dumps(other | {"arm": arm}) for arm in frame.arm]).to_csv("results.csv", index=False)
    assert figures.main(["results.csv", "--published", "--figure", "2", "-o", "out"]) == 0
    assert (
        "not compared with the published curves (" in (err := capsys.readouterr().err)
        and "train.lr = 0.2 and 0.1" in err
    )
    results = collect.results_by_dataset(collect.load("results.csv"))
    axes = Figure().subplots()
    published = collect.results_by_dataset(collect.published())
    figures.draw(axes, figures.panels(2, results)[0][0], results["cifar10"], published["cifar10"])
    assert not [line for line in axes.lines if line.get_linewidth() == 0.7]


def test_command_writes_svg_and_png_of_figures_with_results(ours, place, capsys):
    assert figures.main(["results.csv", "--published", "-o", "out"]) == 0
    written = sorted(path.name for path in (place / "out").iterdir())
    assert written == [f"figure{number}.{suffix}" for number in (2, 4, 5) for suffix in ("png", "svg")]
    with Image.open(place / "out/figure2.png") as picture:
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 100


def digits(*rows):
    """Curves of the digits from (arm, subset_size, rewind_steps, label_noise), two levels each."""
    columns = ["arm", "subset_size", "rewind_steps", "label_noise", "level"]
    frame = pd.DataFrame([(*row, level) for row in rows for level in (0, 1)], columns=columns)
    fixed = {"dataset": "digits", "model": "m", "replicate": 0, "run_id": "a"}
    measured = {"test_accuracy_percent": 90 - frame.level, "weights_remaining_percent": 100 - 20 * frame.level}
    frame.assign(**fixed, **measured).to_csv("digits.csv", index=False)
    return collect.results_by_dataset(collect.load("digits.csv"))


@pytest.mark.parametrize(
    "rows",
    [
        [("easy", 64, 20, 0)],
        [("init", None, 0, 0)],
        [("all", None, 40, 0), ("random", 64, 30, 0), ("easy", 64, 35, 0.1)],
        [("all", None, 40, 0), ("random", 64, 20, 0), ("random", 128, 9, 0), ("hard", 64, 20, 0.1)],
        [("all", None, steps, 0) for steps in range(1, 20)],
    ],
)
def test_every_arm_is_drawn_whatever_its_rewind_step_and_no_panel_is_empty(place, rows):
    results = digits(*rows)
    drawn = set()
    for number in figures._distinct_figures(results):
        figures.figure(number, results)
        for panel in (panel for row in figures.panels(number, results) for panel in row):
            lines, _ = figures._lines(panel, results["digits"])
            assert lines
            drawn |= {arm for role, arm in figures._roles(panel).items() if role in lines}
    assert drawn == set(results["digits"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["results.csv", "--figure", "3"],
            "these results have no arm of figure 3 (label noise during pre-training)",
        ),
        ([], "give a CSV file written by python -m analysis.collect, --published, or both"),
        (["nowhere.csv"], "nowhere.csv cannot be read"),
    ],
)
def test_invalid_input_is_reported_in_one_sentence_and_writes_nothing(ours, place, capsys, arguments, sentence):
    assert figures.main([*arguments, "-o", "out"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {sentence}")
    assert not (place / "out").exists()


def test_a_single_replicate_is_drawn(place, published):
    frame = collect.published()
    rows = frame[(frame.dataset == "cifar10") & (frame.arm == "init")].assign(replicate=0, run_id="a")
    rows = rows.rename(columns={"mean": "test_accuracy_percent"}).drop(columns=["sd", "n"])
    one = pd.concat([rows, rows.assign(arm="all", rewind_steps=400, run_id="b")])
    one.to_csv("one.csv", index=False)
    assert "n = 1" in text_of(figures.figure(2, collect.results_by_dataset(collect.load("one.csv"))))
