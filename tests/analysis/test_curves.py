import pandas as pd
import pytest
from PIL import Image

from analysis import curves
from analysis.collect import COLUMNS, collect
from lth_diet import config, tracking
from lth_diet.masks import Mask
from lth_diet.models import ResNet
from lth_diet.runs import Run

MASK = Mask.dense(ResNet(8, 10, width=2)).to_bytes()


@pytest.fixture
def store(tiny):
    """A store with two arms, two levels, two replicates (one of them half done)."""
    for arm in ("init", "random"):
        run = Run(config.load(tiny(arm), ["replicates=2", "prune.levels=1"]))
        run.create()
        for index in (0, 1):
            for level in range(1 if (arm, index) == ("random", 1) else 2):
                phase = run.replicate(index).level(level)
                phase.write("curve.jsonl", b"")
                phase.write("mask.safetensors", MASK)
                accuracy = 90.0 + index - level - (arm == "init")
                result = {"level": level, "timestamp": 7, "weights_remaining_percent": 100 * 0.8**level}
                phase.finish({**result, "test_accuracy_percent": accuracy})
            tracking.sync(run.replicate(index))
    return tracking.tracking_uri()


def test_results_are_a_tidy_table_a_row_a_replicate_and_level(store):
    results = collect(store, "tiny")
    assert list(results.columns) == list(COLUMNS)
    assert len(results) == 7
    first = results.iloc[0]
    assert (first.arm, first.replicate, first.level, first.test_accuracy_percent) == ("init", 0, 0, 89.0)
    assert pd.isna(first.subset_size) and first.rewind_steps == 0
    assert (results.arm[4], results.subset_size[4], results.rewind_steps[4]) == ("random", 128, 4)


def test_the_summary_counts_the_replicates_of_each_level(store):
    frame = curves.summary(collect(store, "tiny"))
    counts = frame.set_index(["arm", "level"])["count"].to_dict()
    assert counts == {("init", 0): 2, ("init", 1): 2, ("random", 0): 2, ("random", 1): 1}
    assert frame["mean"].tolist() == [89.5, 88.5, 90.5, 89.0]


def test_the_command_prints_the_table_and_draws_the_picture(store, place, capsys):
    assert curves.main(["--experiment", "tiny", "-o", "picture.png"]) == 0
    out = capsys.readouterr().out
    assert "random 128, t_r = 4" in out and "89.50 ± 0.71 (2)" in out and "89.00 (1)" in out
    with Image.open(place / "picture.png") as picture:
        assert picture.width > 800
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 20


def test_runs_that_share_their_words_are_told_apart_by_run_id(store, tiny):
    run = Run(config.load(tiny("random"), ["train.lr=0.2", "prune.levels=0"]))
    run.create()
    phase = run.replicate(0).level(0)
    phase.write("curve.jsonl", b"")
    phase.write("mask.safetensors", MASK)
    phase.finish({"level": 0, "timestamp": 7, "weights_remaining_percent": 100.0, "test_accuracy_percent": 50.0})
    tracking.sync(run.replicate(0))
    names = set(curves.labels(curves.summary(collect(store, "tiny"))))
    ids = {run.config.run_id(), config.load("tiny.yaml").run_id()}
    assert names == {"init"} | {f"random 128, t_r = 4 ({run_id})" for run_id in ids}


def test_an_unknown_experiment_is_one_sentence(store, capsys):
    assert curves.main(["--experiment", "other", "-o", "x.png"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: no experiment 'other' in the MLflow store") and err.count("\n") == 1
