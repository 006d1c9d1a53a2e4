import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from analysis import arms, collect, difference, dominance, identities
from analysis.arms import Arm, Curve
from lth_diet.errors import UserError

LEVELS = range(3, 13)
EASY, ALL = Arm("easy", 256, 200), Arm("all", None, 400)


def curve(values, first=0, levels=LEVELS):
    """Curve with the given accuracies, shape (n, L)."""
    table = pd.DataFrame(values, columns=list(levels))
    table.index = pd.MultiIndex.from_product([[42], range(first, first + len(table))], names=["seed", "replicate"])
    weights = 100 * 0.8 ** np.array(list(levels))
    summary = {"weights_remaining_percent": weights, "mean": table.mean(), "sd": table.std(), "n": table.count()}
    return Curve(pd.DataFrame(summary, index=table.columns), table)


def noise(n, sd=0.2, seed=0):
    return 90 + sd * np.random.default_rng(seed).standard_normal((n, len(LEVELS)))


def compare(ours, theirs, **settings):
    return dominance.compare({EASY: ours, ALL: theirs}, EASY, ALL, **settings)


def test_mean_tests_the_means_of_the_replicates():
    ours, theirs = noise(4), noise(4, seed=1)
    (mean,) = compare(curve(ours), curve(theirs)).statements["mean"].levels.itertuples()
    expected = stats.ttest_rel(ours.mean(1), theirs.mean(1)).confidence_interval(0.9)
    assert (mean.lower, mean.upper) == pytest.approx(tuple(expected))


@given(arrays(float, (4, 10), elements=st.floats(-1, 1)), arrays(float, (5, 10), elements=st.floats(-1, 1)))
def test_swapping_the_arms_reverses_the_verdict(ours, theirs):
    forward = compare(curve(90 + ours), curve(90 + theirs, first=9), margin=0)
    backward = compare(curve(90 + theirs, first=9), curve(90 + ours), margin=0)
    for name in forward.statements:
        verdicts = [side.statements[name].verdict.replace("weakly ", "") for side in (forward, backward)]
        assert sorted(verdicts) in (["dominated", "dominates"], ["undecided", "undecided"])
        lower, upper = forward.statements[name].levels.lower, backward.statements[name].levels.upper
        assert np.allclose(lower, -upper)


@given(st.floats(0, 3), st.floats(0, 3))
def test_a_larger_margin_never_weakens_the_verdict(small, more):
    ours, theirs = curve(noise(4) - 0.4), curve(noise(4, seed=1))
    strength = {"dominates": 2, "weakly dominates": 1}
    first, second = (compare(ours, theirs, margin=margin) for margin in (small, small + more))
    for name in first.statements:
        assert strength.get(second.statements[name].verdict, 0) >= strength.get(first.statements[name].verdict, 0)


@pytest.mark.parametrize(("shift", "verdict"), [(2.0, "dominates"), (0.0, "weakly dominates"), (-2.0, "dominated")])
def test_verdict_of_clear_cases(shift, verdict):
    found = compare(curve(noise(8) + shift), curve(noise(8, seed=1)), margin=0.6)
    assert found.paired and found.verdict == verdict
    assert {statement.verdict for statement in found.statements.values()} <= {
        verdict,
        "dominates" if shift == 0 else verdict,
    }


def test_a_single_worse_level_makes_the_comparison_undecided():
    values = noise(8) + 2
    values[:, 4] -= 4
    found = compare(curve(values), curve(noise(8, seed=1)))
    assert found.verdict == "undecided"
    assert found.statements["pooled"].worst["level"] == 7
    table = found.statements["per_level"].levels.set_index("level").verdict
    assert table[7] == "worse" and set(table.drop(7)) == {"better"}


def test_slightly_worse_at_every_level_is_weak_dominance_with_a_note():
    found = compare(curve(noise(16, sd=0.01) - 0.1), curve(noise(16, sd=0.01, seed=1)))
    assert found.verdict == "weakly dominates" and found.notes == ["worse at every level, but by less than the margin"]


def test_slightly_worse_at_some_levels_is_weak_dominance_without_a_note():
    shift = np.where(np.arange(len(LEVELS)) < 5, -0.1, 0.1)
    found = compare(curve(noise(16, sd=0.01) + shift), curve(noise(16, sd=0.01, seed=1)))
    assert found.verdict == "weakly dominates" and found.notes == []


def test_a_single_replicate_is_undecided_with_unknown_bounds():
    found = compare(curve(noise(1) + 5), curve(noise(4, seed=1)))
    assert {statement.verdict for statement in found.statements.values()} == {"undecided"}
    assert found.as_dict()["statements"]["pooled"]["worst"]["lower"] is None
    assert dominance.describe(found).endswith(
        "simultaneous interval unknown; needs at least two replicates per arm to estimate the spread"
    )
    assert "nan" not in dominance.table(found)


def test_replicates_pair_by_seed_and_number_and_the_others_are_excluded():
    ours, theirs = noise(4), noise(5, seed=1)
    found = compare(curve(ours), curve(theirs, first=1))
    assert found.paired and found.n == (3, 3)
    assert found.notes == ["3 replicates excluded because no partner has the same seed and number"]
    expected = difference.paired(ours[1:], theirs[:3]).mean
    assert np.allclose(found.statements["pooled"].levels.difference, expected)
    assert not compare(curve(ours), curve(theirs, first=9)).paired


def test_one_common_replicate_is_not_enough_for_pairs():
    found = compare(curve(noise(4)), curve(noise(4, seed=1), first=3))
    assert not found.paired and found.n == (4, 4) and found.notes == []


def test_a_replicate_that_lacks_a_level_is_excluded_with_a_note():
    values = noise(4)
    values[3, -1] = np.nan
    found = compare(curve(values), curve(noise(4, seed=1)))
    assert found.n == (3, 3)
    assert found.notes[0] == f"1 of 4 replicates of {EASY} excluded because they lack some levels"


def test_a_replicate_that_is_ahead_of_the_others_changes_no_verdict():
    values = noise(4)
    values[1:, -2:] = np.nan
    ahead, behind = curve(values), curve(values[:, :-2], levels=LEVELS[:-2])
    found, before = (compare(each, curve(noise(4, seed=1))) for each in (ahead, behind))
    assert found.n == (4, 4) and found.notes == ["tested at levels 3 to 10 of 3 to 12 only"] == before.notes
    assert found.statements["pooled"].worst == before.statements["pooled"].worst


def test_of_two_replicates_the_one_that_is_ahead_adds_no_level():
    values = noise(2)
    values[1, -2:] = np.nan
    assert curve(values).finished_levels == list(LEVELS)[:-2]
    assert curve(values[:1]).finished_levels == list(LEVELS), "a single one is not ahead"


def test_levels_that_half_of_the_replicates_have_finished_are_compared_and_others_named():
    values = noise(8)
    values[4:, 1:] = np.nan
    assert compare(curve(values), curve(noise(8, seed=1))).n == (4, 4), "as if four replicates were added"
    values = noise(5)
    values[2:, 1:] = np.nan
    with pytest.raises(
        UserError, match=f"have none in common; .*; {EASY}: 2 of 5 replicates have finished levels 4 to"
    ):
        compare(curve(values), curve(noise(8, seed=1)), levels=(4, 12))


def test_all_pairs_name_those_without_some_replicates_or_without_pairs():
    values = noise(8, seed=1)
    values[:3, -1] = np.nan
    curves = {EASY: curve(values), ALL: curve(noise(8)), Arm("init"): curve(noise(8, seed=2), first=20)}
    notes = dominance.matrix(curves, 0.3, (3, 12), 0.95).attrs["notes"]
    assert notes == [
        f"{EASY} against {ALL}: n = 5 of 8 and 8",
        f"{EASY} against init: n = 5 and 8 of 8 and 8, unpaired",
        f"{ALL} against init: n = 8, unpaired",
    ]


def test_arms_with_other_weights_at_a_level_are_not_compared():
    other = curve(noise(4, seed=1))
    other.summary["weights_remaining_percent"] **= 1.1
    with pytest.raises(UserError, match=r"cannot be compared: at level 3 they have 51.2 and 75.9 % of their weights"):
        compare(curve(noise(4)), other)


def test_arms_with_few_common_replicates_are_compared_without_pairs():
    found = compare(curve(noise(8)), curve(noise(10, seed=1), first=6))
    assert not found.paired and found.n == (8, 10)
    assert compare(curve(noise(8)), curve(noise(10, seed=1), first=4)).n == (4, 4)


def identity(**keys):
    return identities.normalize({"arm": "all"} | {key.replace("__", "."): value for key, value in keys.items()})


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"train__steps": 40}, "train.steps = 40 and 200"),
        ({"train__lr": 0.2, "model__width": 4}, "model.width = 4 and 16, train.lr = 0.2 and 0.1, train.steps = none"),
        ({"dataset__name": "digits"}, "dataset.name = digits and none"),
    ],
)
def test_arms_that_differ_in_more_than_their_pre_training_are_not_compared(keys, sentence):
    ours = dataclasses.replace(curve(noise(4)), identity=identity(**keys))
    theirs = dataclasses.replace(curve(noise(4)), identity=identity(train__steps=200))
    with pytest.raises(UserError) as error:
        compare(ours, theirs)
    assert f"{EASY} and {ALL} cannot be compared: they differ in {sentence}" in str(error.value)
    assert dominance.matrix({EASY: ours, ALL: theirs}, 0.3, (3, 12), 0.95).loc[EASY.spec, ALL.spec] == ""


def test_arms_with_other_pre_training_scores_and_numerical_settings_are_compared_with_a_note():
    ours = identity(threads=2, pretrain__lr=0.1, pretrain__label_noise=0.5, parallelism="data", ranks=4)
    found = compare(
        dataclasses.replace(curve(noise(4)), identity=ours), dataclasses.replace(curve(noise(4)), identity=identity())
    )
    different = "parallelism = data and replicates, ranks = 4 and 1, threads = 2 and 1"
    assert found.notes == [f"the arms also differ in {different}"]


def test_only_common_levels_are_compared_with_a_note():
    found = compare(curve(noise(4)), curve(noise(4)[:, :5], levels=range(3, 8)))
    assert found.statements["pooled"].levels.level.tolist() == [3, 4, 5, 6, 7]
    assert "tested at levels 3 to 7 of 3 to 12 only" in found.notes


def test_variance_is_at_least_the_rounding_variance_of_the_accuracies():
    steps = 100 / 355  # resolution with 355 test images
    ours = 90 + steps * np.array([[1.0] * 10, [1.0] * 10])
    theirs = 90 + steps * np.array([[0.0] * 10, [0.0] * 10])  # the same difference twice, by chance
    found = difference.paired(ours, theirs)
    assert np.allclose(found.variance, steps**2 / 12)
    assert dominance.compare({EASY: curve(ours), ALL: curve(theirs)}, EASY, ALL).verdict == "undecided"


def test_zero_variance_gives_finite_results():
    found = compare(curve(np.full((4, 10), 90.0)), curve(np.full((4, 10), 90.0)))
    assert found.verdict == "weakly dominates" and found.statements["pooled"].holds_at_margin < 1e-6


@pytest.mark.parametrize("levels", [1, 2, 3, 5, 8])
def test_pooling_works_with_few_levels(levels):
    found = compare(curve(noise(4)[:, :levels] + 2, levels=range(3, 3 + levels)), curve(noise(4, seed=1)))
    assert found.verdict == "dominates"


def test_the_simultaneous_interval_of_the_worst_level_is_wider():
    statement = compare(curve(noise(4)), curve(noise(4, seed=1))).statements["per_level"]
    row = statement.levels.set_index("level").loc[statement.worst["level"]]
    assert row.difference == statement.levels.difference.min()
    assert statement.worst["lower"] < row.lower and statement.worst["upper"] > row.upper


@given(st.floats(-0.5, 0.5))
def test_as_many_replicates_as_are_needed_below_a_bound_put_the_worst_level_below_it(bound):
    ours, theirs = noise(4), noise(4, seed=1)
    worst = compare(curve(ours), curve(theirs)).statements["per_level"]
    needed = worst.replicates_below(bound, 0.95)
    if needed is None:
        assert worst.worst["difference"] > bound - 0.03, "so close that 1,000 replicates are not enough"
    else:
        ours, theirs = (np.tile(part, (-(-needed // 4), 1)) for part in (ours, theirs))
        assert compare(curve(ours), curve(theirs)).statements["per_level"].worst["upper"] < bound


COMMAND = ["--published", "--dataset", "cifar10", "--challenger", "easy:size=12800,steps=200"]


def test_published_matching_claim_of_cifar10_is_undecided_at_the_default_margin_and_holds_at_one_point(capsys):
    assert dominance.main([*COMMAND, "--reference", "all:steps=400", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "undecided" and set(found["statements"]) == {"per_level", "pooled", "mean"}
    assert found["paired"] is False and found["n"] == [4, 4] and found["levels"] == list(LEVELS)
    assert all("assumed" in found["statements"][name]["assumption"] for name in ("pooled", "mean"))
    assert dominance.main([*COMMAND, "--reference", "all:steps=400", "--margin", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "weakly dominates"


def test_command_prints_verdict_worst_level_and_replicates_needed(capsys):
    assert dominance.main([*COMMAND, "--reference", "all:steps=400"]) == 0
    out = capsys.readouterr().out
    assert "easy 12800, t_r = 200 against all, t_r = 400: undecided" in out
    assert "worst at level 3 (51.2 % of weights): -0.23 points" in out
    assert "; needs about 198 replicates per arm to show that it weakly dominates\n" in out
    assert dominance.main([*COMMAND, "--reference", "init"]) == 0
    assert "easy 12800, t_r = 200 dominates init" in capsys.readouterr().out


def test_all_pairs_compares_arms_of_every_size_and_rewind_step(capsys):
    assert dominance.main(["--published", "--dataset", "cinic10", "--all-pairs", "--json"]) == 0
    verdicts = json.loads(capsys.readouterr().out)["verdicts"]
    assert len(verdicts) == 25
    assert verdicts["all:steps=800"]["all:steps=400"] == "dominates"
    assert verdicts["all:steps=400"]["all:steps=800"] == "dominated"
    assert verdicts["easy:size=12800,steps=400"]["easy:size=12800,steps=200"] != "dominated"


def test_all_pairs_of_several_setups_have_a_matrix_each_with_its_margin_and_levels(place, capsys):
    tables = [collect.load(ROOT / f"analysis/results/cifar10_{name}.csv.gz") for name in ("small", "overnight")]
    frame = pd.concat(tables)
    frame[frame.arm.isin(["init", "easy"]) & (frame.label_noise == 0)].to_csv("two.csv", index=False)
    assert dominance.main(["two.csv", "--all-pairs"]) == 0
    out = capsys.readouterr().out
    assert out.count(": levels 2 to 6, margin 0.5 points") == 2
    assert "train.steps = 6000, ResNet-20 width 8" in out and "train.steps = 1500, ResNet-20 width 8" in out


def test_symbol_matrix_has_numbered_columns():
    curves = {EASY: curve(noise(8) + 2), ALL: curve(noise(8, seed=1)), Arm("init"): curve(noise(4)[:, :1], levels=[0])}
    cells = dominance.matrix(curves, 0.3, (3, 12), 0.95)
    lines = dominance.to_symbols(cells).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["1", "2", "3"],
        ["1", EASY.spec, ">"],
        ["2", ALL.spec, "<"],
        ["3", "init"],
    ]


def test_command_compares_results_from_a_file(place, capsys):
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
        (
            [*COMMAND, "--reference", "best"],
            "'best' is not an arm of these results; expected one of init, all:steps=200",
        ),
        (
            [*COMMAND, "--reference", "easy:size=12800"],
            "--challenger and --reference are both easy:size=12800,steps=200",
        ),
        (
            [*COMMAND, "--reference", "init", "--levels", "21", "30"],
            "levels 21 to 30: the arms have none in common; the results have levels 0 to 20",
        ),
        (
            [*COMMAND, "--reference", "init", "--levels", "5", "3"],
            "--levels = 5 3: must be 0 to 10000, the first at most the last",
        ),
        ([*COMMAND, "--reference", "init", "--margin", "-1"], "--margin = -1.0: must be 0 or more percentage points"),
        ([*COMMAND, "--reference", "init", "--margin", "nan"], "--margin = nan: must be 0 or more percentage points"),
        (
            [*COMMAND, "--reference", "init", "--confidence", "95"],
            "--confidence = 95.0: must be greater than 0.5 and less than 1",
        ),
        (COMMAND, "--challenger and --reference must be given together"),
        (["--published", "--dataset", "cifar10"], "give either --challenger and --reference or --all-pairs"),
        (["--all-pairs"], "give either a CSV file written by python -m analysis.collect or --published"),
        (["nowhere.csv", "--all-pairs"], "nowhere.csv cannot be read"),
    ],
)
def test_invalid_input_is_reported_in_one_sentence_with_exit_status_2(capsys, arguments, sentence):
    assert dominance.main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {sentence}") and err.count("\n") == 1


def test_published_curves_have_one_model_per_data_set():
    published = collect.published()
    for _, rows in published.groupby("dataset"):
        assert rows.model.nunique() == 1 and len(arms.curves_by_arm(rows)) > 20
