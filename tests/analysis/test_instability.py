"""Error barriers beside accuracies: which barriers predict which arm, and the rank correlation."""

import re
from pathlib import Path

import numpy as np
import pytest

from analysis import arms, collect, instability, matching, paper, report
from lth_diet.config.instability import load_instability
from lth_diet.runs.instability_directory import InstabilityDirectory
from lth_diet.tracking import mlflow_store, sync


@pytest.fixture
def measure(tiny):
    """Writes the directory of an analysis and syncs it to MLflow; takes the barriers of each replicate by step."""

    def write(arm, barriers, *overrides):
        count = len(next(iter(barriers.values())))
        steps = f"steps={list(barriers)}".replace(" ", "")
        settings = [f"replicates={count}", steps, "experiment=tiny", *overrides]
        analysis = InstabilityDirectory(load_instability(tiny(arm), settings))
        analysis.create()
        for replicate in analysis.replicates():
            for step, values in barriers.items():
                phase = replicate.barrier(step)
                phase.path.mkdir(parents=True)
                value = values[replicate.index]
                phase.finish({"step": step, "timestamp": 7, "test_barrier": value, "train_barrier": value / 2})
            sync.sync_replicate(replicate)

    return write


def accuracies(*means):
    """Three replicates and five levels around a mean."""
    return [{index: [mean + 0.1 * index + 0.01 * level for level in range(5)] for index in range(3)} for mean in means]


@pytest.fixture
def experiment(record, measure):
    """Four arms whose accuracy falls with their barrier; t* = 8."""
    init, half, full, random = accuracies(80.0, 90.0, 95.0, 93.0)
    record("init", init)
    record("all", half, "pretrain.steps=4")
    record("all", full, "pretrain.steps=8")
    record("random", random, "pretrain.steps=4")
    measure("all", {0: [20.0, 30.0, 40.0], 4: [5.0, 6.0, 7.0], 8: [1.0, 1.0, 1.0]})
    measure("random", {0: [20.0, 30.0, 40.0], 4: [2.0, 3.0, 4.0]})
    return mlflow_store.tracking_uri()


def predictions(uri, *settings):
    analyses = instability.collect_analyses(*collect.open_store(uri, "tiny"))
    curves = arms.curves_by_arm(collect.collect(uri, "tiny"))
    found = [matching.match(family, curves, None, None, 0.95) for family in paper.families("digits", curves)]
    return analyses, [instability.predict(each, curves, analyses) for each in found]


def test_an_arm_is_predicted_by_the_barrier_of_its_settings_at_its_rewind_step(experiment, tiny):
    analyses, (found,) = predictions(experiment)
    assert [each.label for each in analyses] == ["all", "random 128"]
    again = InstabilityDirectory(load_instability(tiny("all"), ["replicates=3", "steps=[0,4,8]", "experiment=other"]))
    again.create()
    sync.sync_replicate(again.replicate(0))
    twice, _ = instability.collect_analyses(*collect.open_store(experiment, None))
    assert {len(each.test) for each in twice.barriers} == {3}, "a replicate in two experiments counts once"
    measured = {(arm.name, arm.rewind_steps): value for arm, value in found.barriers.items()}
    assert measured == {("init", 0): 30.0, ("all", 4): 6.0, ("all", 8): 1.0, ("random", 4): 3.0}
    differences = {(arm.name, arm.rewind_steps): value for arm, value in found.differences.items()}
    assert differences == pytest.approx({("init", 0): -15, ("all", 4): -5, ("all", 8): 0, ("random", 4): -2})
    assert found.correlation == pytest.approx(-1.0)
    assert str(found).endswith("the accuracy over the tested levels: -1.00 (n = 4 arms)")
    points = [line.get_xydata() for line in instability.figure(found).axes[0].lines if len(line.get_xydata()) == 1]
    assert len(points) == 4 and np.isfinite(np.concatenate(points)).all()


def test_barriers_of_other_settings_predict_nothing_and_three_arms_have_no_correlation(record, measure):
    for arm, means, *settings in (("init", 80.0), ("all", 90.0, "pretrain.steps=4"), ("all", 95.0, "pretrain.steps=8")):
        record(arm, accuracies(means)[0], *settings)
    measure("all", {0: [9.0], 4: [5.0], 8: [1.0]}, "train.lr=0.3")
    uri = mlflow_store.tracking_uri()
    _, (found,) = predictions(uri)
    assert found.barriers == {} and found.correlation is None
    measure("all", {0: [9.0], 4: [5.0], 8: [1.0]}, "threads=2")
    _, (found,) = predictions(uri)
    assert sorted(found.barriers.values()) == [1.0, 5.0, 9.0], "rounding is no other setting"
    assert found.correlation is None and "known of 3 arms, too few" in str(found)


def test_the_command_prints_a_table_and_writes_figures_and_the_report_shows_them(experiment, place, capsys):
    assert instability.main(["--experiment", "tiny", "-o", "figures"]) == 0
    out = capsys.readouterr().out
    assert "| error barrier at k = | 0 | 4 | 8 | n |" in out
    assert (
        "| all | 30.0 ± 10.0 | 6.0 ± 1.0 | 1.0 ± 0.0 | 3 |" in out
        and "| random 128 | 30.0 ± 10.0 | 3.0 ± 1.0 |  | 3 |" in out
    )
    for name in ("barriers.svg", "barriers.png", "prediction_1.svg", "prediction_1.png"):
        assert f"figures/{name}\n" in out and Path("figures", name).stat().st_size > 1000
    page = report.write(experiment, "tiny", Path("report.html")).path.read_text()
    assert re.search(r"rank correlation of the error barrier .*: -1\.00 \(n = 4 arms\)", page)
    assert page.count('alt="error barrier') == 2


def test_a_store_without_barriers_is_rejected_in_one_sentence(record, capsys):
    record("init", accuracies(80.0)[0])
    assert instability.main(["--experiment", "tiny"]) == 2
    assert "no error barrier of dense networks is measured yet" in capsys.readouterr().err
