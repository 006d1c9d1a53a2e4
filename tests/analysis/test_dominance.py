import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from analysis import arms, collect, difference, dominance
from analysis.arms import Arm, Curve

LEVELS = range(3, 13)
EASY, ALL = Arm("easy", 256, 200), Arm("all", None, 400)


def curve(values, first=0, levels=LEVELS):
    """Of accuracies of shape (n, L)."""
    table = pd.DataFrame(values, columns=list(levels))
    table.index = pd.MultiIndex.from_product([[42], range(first, first + len(table))], names=["seed", "replicate"])
    weights = 100 * 0.8 ** np.array(list(levels))
    summary = {"weights_remaining_percent": weights, "mean": table.mean(), "sd": table.std(), "n": len(table)}
    return Curve(pd.DataFrame(summary, index=table.columns), table)


def noise(n, sd=0.2, seed=0):
    return 90 + sd * np.random.default_rng(seed).standard_normal((n, len(LEVELS)))


def compare(ours, theirs, **settings):
    return dominance.compare({EASY: ours, ALL: theirs}, EASY, ALL, **settings)


def test_the_mean_statement_is_a_test_of_the_replicates_means():
    ours, theirs = noise(4), noise(4, seed=1)
    (mean,) = compare(curve(ours), curve(theirs)).statements["mean"].levels.itertuples()
    expected = stats.ttest_rel(ours.mean(1), theirs.mean(1)).confidence_interval(0.9)
    assert (mean.lower, mean.upper) == pytest.approx(tuple(expected))


@given(arrays(float, (4, 10), elements=st.floats(-1, 1)), arrays(float, (5, 10), elements=st.floats(-1, 1)))
def test_who_dominates_is_dominated_the_other_way_round(ours, theirs):
    there = compare(curve(90 + ours), curve(90 + theirs, first=9), margin=0)
    back = compare(curve(90 + theirs, first=9), curve(90 + ours), margin=0)
    for name in there.statements:
        words = [side.statements[name].verdict.replace("weakly ", "") for side in (there, back)]
        assert sorted(words) in (["dominated", "dominates"], ["undecided", "undecided"])
        lower, upper = there.statements[name].levels.lower, back.statements[name].levels.upper
        assert np.allclose(lower, -upper)


@given(st.floats(0, 3), st.floats(0, 3))
def test_a_larger_margin_never_loses_a_verdict(small, more):
    ours, theirs = curve(noise(4) - 0.4), curve(noise(4, seed=1))
    strength = {"dominates": 2, "weakly dominates": 1}
    first, second = (compare(ours, theirs, margin=margin) for margin in (small, small + more))
    for name in first.statements:
        assert strength.get(second.statements[name].verdict, 0) >= strength.get(first.statements[name].verdict, 0)


@pytest.mark.parametrize(("shift", "verdict"), [(2.0, "dominates"), (0.0, "weakly dominates"), (-2.0, "dominated")])
def test_verdicts_of_clear_cases(shift, verdict):
    found = compare(curve(noise(8) + shift), curve(noise(8, seed=1)), margin=0.6)
    assert found.paired and found.verdict == verdict
    assert {statement.verdict for statement in found.statements.values()} <= {
        verdict,
        "dominates" if shift == 0 else verdict,
    }


def test_one_level_that_is_worse_is_enough_to_be_undecided():
    values = noise(8) + 2
    values[:, 4] -= 4
    found = compare(curve(values), curve(noise(8, seed=1)))
    assert found.verdict == "undecided"
    assert found.statements["pooled"].worst["level"] == 7
    table = found.statements["per_level"].levels.set_index("level").verdict
    assert table[7] == "worse" and set(table.drop(7)) == {"better"}


def test_worse_at_every_level_by_less_than_the_margin_is_weakly_dominating_and_noted():
    found = compare(curve(noise(16, sd=0.01) - 0.1), curve(noise(16, sd=0.01, seed=1)))
    assert found.verdict == "weakly dominates" and found.notes == ["worse at every level, and by less than the margin"]


def test_one_replicate_is_undecided_and_its_bounds_are_unknown():
    found = compare(curve(noise(1) + 5), curve(noise(4, seed=1)))
    assert {statement.verdict for statement in found.statements.values()} == {"undecided"}
    assert found.as_dict()["statements"]["pooled"]["worst"]["lower"] is None
    assert dominance.in_words(found).endswith("simultaneous interval unknown; one replicate has no spread")
    assert "nan" not in dominance.table(found)


def test_replicates_pair_by_seed_and_number_and_the_others_are_left_out():
    ours, theirs = noise(4), noise(5, seed=1)
    found = compare(curve(ours), curve(theirs, first=1))
    assert found.paired and found.n == (3, 3)
    assert found.notes == ["3 replicates without a partner of the same seed and number are left out"]
    expected = difference.paired(ours[1:], theirs[:3]).mean
    assert np.allclose(found.statements["pooled"].levels.difference, expected)
    assert not compare(curve(ours), curve(theirs, first=9)).paired


def test_a_replicate_that_lacks_a_level_is_left_out_and_named():
    values = noise(4)
    values[3, -1] = np.nan
    found = compare(curve(values), curve(noise(4, seed=1)))
    assert found.n == (3, 3)
    assert found.notes[0].startswith("1 of 4 replicates of the challenger lack some of the levels and are left out")


def test_the_levels_compared_are_those_in_common_and_said():
    found = compare(curve(noise(4)), curve(noise(4)[:, :5], levels=range(3, 8)))
    assert found.statements["pooled"].levels.level.tolist() == [3, 4, 5, 6, 7]
    assert "levels 3 to 12 were asked for; both arms have 3 to 7" in found.notes


def test_spread_below_the_resolution_of_the_accuracies_is_not_believed():
    steps = 100 / 355  # of 355 test images
    ours = 90 + steps * np.array([[1.0] * 10, [1.0] * 10])
    theirs = 90 + steps * np.array([[0.0] * 10, [0.0] * 10])  # the same difference twice, by chance
    found = difference.paired(ours, theirs)
    assert np.allclose(found.variance, steps**2 / 12)
    assert dominance.compare({EASY: curve(ours), ALL: curve(theirs)}, EASY, ALL).verdict == "undecided"


def test_differences_that_are_all_the_same_give_numbers():
    found = compare(curve(np.full((4, 10), 90.0)), curve(np.full((4, 10), 90.0)))
    assert found.verdict == "weakly dominates" and found.statements["pooled"].holds_at_margin < 1e-6


@pytest.mark.parametrize("levels", [1, 2, 3, 5, 8])
def test_few_levels_can_be_pooled(levels):
    found = compare(curve(noise(4)[:, :levels] + 2, levels=range(3, 3 + levels)), curve(noise(4, seed=1)))
    assert found.verdict == "dominates"


def test_the_worst_level_has_a_simultaneous_interval_which_is_wider():
    statement = compare(curve(noise(4)), curve(noise(4, seed=1))).statements["per_level"]
    row = statement.levels.set_index("level").loc[statement.worst["level"]]
    assert row.difference == statement.levels.difference.min()
    assert statement.worst["lower"] < row.lower and statement.worst["upper"] > row.upper


COMMAND = ["--published", "--dataset", "cifar10", "--challenger", "easy:size=12800,steps=200"]


def test_the_published_matching_claim_of_cifar_10_is_undecided_at_a_small_margin_and_holds_at_one_point(capsys):
    assert dominance.main([*COMMAND, "--reference", "all:steps=400", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "undecided" and set(found["statements"]) == {"per_level", "pooled", "mean"}
    assert found["paired"] is False and found["n"] == [4, 4] and found["levels"] == list(LEVELS)
    assert all("assumed" in found["statements"][name]["assumption"] for name in ("pooled", "mean"))
    assert dominance.main([*COMMAND, "--reference", "all:steps=400", "--margin", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "weakly dominates"


def test_the_command_in_words_names_verdict_worst_level_and_what_would_be_needed(capsys):
    assert dominance.main([*COMMAND, "--reference", "all:steps=400"]) == 0
    out = capsys.readouterr().out
    assert "easy 12800, t_r = 200 against all, t_r = 400: undecided" in out
    assert "worst at level 3 (51.2 % of weights): -0.23" in out
    assert "replicates of each would show that it weakly dominates" in out
    assert dominance.main([*COMMAND, "--reference", "init"]) == 0
    assert "easy 12800, t_r = 200 dominates init" in capsys.readouterr().out


def test_all_pairs_is_a_matrix_over_arm_size_and_rewind_step(capsys):
    assert dominance.main(["--published", "--dataset", "cinic10", "--all-pairs", "--json"]) == 0
    verdicts = json.loads(capsys.readouterr().out)["verdicts"]
    assert len(verdicts) == 25
    assert verdicts["all:steps=800"]["all:steps=400"] == "dominates"
    assert verdicts["all:steps=400"]["all:steps=800"] == "dominated"
    assert verdicts["easy:size=12800,steps=400"]["easy:size=12800,steps=200"] != "dominated"


def test_the_matrix_in_signs_numbers_its_columns():
    curves = {EASY: curve(noise(8) + 2), ALL: curve(noise(8, seed=1)), Arm("init"): curve(noise(4)[:, :1], levels=[0])}
    cells = dominance.matrix(curves, 0.3, (3, 12), 0.95)
    lines = dominance.in_signs(cells).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["1", "2", "3"],
        ["1", EASY.spec, ">"],
        ["2", ALL.spec, "<"],
        ["3", "init"],
    ]


def test_results_from_a_file_are_compared(place, capsys):
    rows = [
        {
            "dataset": "d",
            "model": "m",
            "arm": arm,
            "subset_size": size,
            "rewind_steps": steps,
            "label_noise": 0,
            "replicate": replicate,
            "level": level,
            "weights_remaining_percent": 100 * 0.8**level,
            "test_accuracy_percent": accuracy,
            "run_id": arm,
        }
        for arm, size, steps, values in (("easy", 256, 200, noise(4) + 3), ("all", None, 400, noise(4, seed=1)))
        for replicate, line in enumerate(values)
        for level, accuracy in zip(LEVELS, line, strict=True)
    ]
    pd.DataFrame(rows).to_csv("results.csv", index=False)
    assert dominance.main(["results.csv", "--challenger", "easy", "--reference", "all", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["verdict"], found["paired"], found["n"]) == ("dominates", True, [4, 4])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--published", "--challenger", "init", "--reference", "all"],
            "these results mix datasets; choose one with --dataset",
        ),
        ([*COMMAND, "--reference", "best"], "'best' is not an arm of these results; allowed: init, all:steps=200"),
        (
            [*COMMAND, "--reference", "easy:size=12800"],
            "--challenger and --reference are both easy:size=12800,steps=200",
        ),
        (
            [*COMMAND, "--reference", "init", "--levels", "21", "30"],
            "levels 21 to 30: the arms have none in common; there are 0 to 20",
        ),
        ([*COMMAND, "--reference", "init", "--levels", "5", "3"], "--levels: 5 3 is not allowed"),
        ([*COMMAND, "--reference", "init", "--margin", "-1"], "--margin: -1.0 is not allowed"),
        ([*COMMAND, "--reference", "init", "--margin", "nan"], "--margin: nan is not allowed"),
        (
            [*COMMAND, "--reference", "init", "--confidence", "95"],
            "--confidence: 95.0 is not allowed; allowed: above 0.5, below 1",
        ),
        (COMMAND, "--challenger and --reference belong together"),
        (["--published", "--dataset", "cifar10"], "give either --challenger and --reference or --all-pairs"),
        (["--all-pairs"], "give either a CSV file of python -m analysis.collect or --published"),
        (["nowhere.csv", "--all-pairs"], "nowhere.csv cannot be read"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_status_2(capsys, arguments, sentence):
    assert dominance.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {sentence}") and err.count("\n") == 1


def test_published_arms_of_other_models_never_meet():
    published = collect.published()
    for _, rows in published.groupby("dataset"):
        assert rows.model.nunique() == 1 and len(arms.of(rows)) > 20
