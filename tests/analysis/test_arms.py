import json

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis import arms, collect
from analysis.arms import Arm
from lth_diet.errors import UserError

ARMS = st.builds(
    Arm,
    st.sampled_from(["all", "random", "easy", "hard"]),
    st.integers(1, 200_000),
    st.integers(1, 1000),
    st.sampled_from([0.0, 0.1, 0.25, 0.5]),
)


@given(st.lists(ARMS, unique=True, min_size=1))
def test_find_inverts_spec(available):
    for arm in available:
        assert arms.find(arm.spec, available) == arm


def test_unneeded_keys_may_be_omitted_and_noise_defaults_to_zero():
    available = [Arm("init"), Arm("all", None, 400), Arm("easy", 256, 200), Arm("easy", 256, 200, 0.1)]
    assert arms.find("all", available) == available[1]
    assert arms.find("easy", available) == available[2]
    assert arms.find("easy:noise=0.1", available) == available[3]
    assert arms.find("init:noise=0.1", available) == available[0]


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("tiny", "'tiny' is not an arm of these results; expected one of all:steps=200, all:steps=400"),
        ("all", "'all' matches several arms; expected one of all:steps=200, all:steps=400"),
        (
            "all:step=200",
            "'step=200' is not <key>=<value> with a key of size, steps, noise, run_id, balanced, offset or a key of a",
        ),
        ("all:steps=many", "steps = 'many': must be a whole number of at least 0"),
        ("all:steps=inf", "steps = 'inf': must be a whole number of at least 0"),
        ("all:steps=40,steps=20", "steps is given twice"),
        ("all:steps=2.5", "steps = '2.5': must be a whole number of at least 0"),
        ("all:noise=-1", "noise = '-1': must be a number of at least 0"),
        ("all:steps", "'steps' is not <key>=<value>"),
    ],
)
def test_invalid_specification_names_the_problem_and_the_available_arms(spec, sentence):
    with pytest.raises(UserError) as error:
        arms.find(spec, [Arm("all", None, 200), Arm("all", None, 400)])
    assert sentence in str(error.value)


def test_str_of_an_arm():
    assert str(Arm("init")) == "init"
    assert str(Arm("easy", 2048, 200, 0.1)) == "easy 2048, t_r = 200, 10 % noise"


ROW = {
    "dataset": "d",
    "model": "m",
    "arm": "all",
    "subset_size": None,
    "rewind_steps": 4,
    "label_noise": 0.0,
    "level": 0,
}
ROW |= {"seed": 1, "replicate": 0, "weights_remaining_percent": 100.0, "test_accuracy_percent": 90.0, "run_id": "a"}


def curves(place, *changes):
    pd.DataFrame([ROW | change for change in changes]).to_csv("rows.csv", index=False)
    return arms.curves_by_arm(collect.load("rows.csv"))


def test_replicates_with_another_seed_belong_to_the_same_arm(place):
    (curve,) = curves(place, {}, {"seed": 2, "run_id": "b", "test_accuracy_percent": 91.0}).values()
    assert curve.values.index.tolist() == [(1, 0), (2, 0)]
    assert (curve.summary["mean"][0], curve.summary.n[0]) == (90.5, 2)


def test_configurations_that_share_seed_and_replicate_are_separate_arms(place):
    found = curves(place, {}, {"run_id": "b", "test_accuracy_percent": 50.0})
    assert [arm.spec for arm in found] == ["all:steps=4,run_id=a", "all:steps=4,run_id=b"]
    assert arms.find("all:run_id=b", found) == list(found)[1]
    several = "several configurations of all, t_r = 4: run_id = a or b"
    assert arms.describe_missing(Arm("all", None, 4), found) == several
    assert arms.describe_missing(Arm("all", None, 5), found) == "missing all, t_r = 5"


def test_configurations_with_different_train_steps_are_separate_arms(place):
    assert len(curves(place, {"train_steps": 10}, {"seed": 2, "run_id": "b", "train_steps": 20})) == 2


def with_identity(arm="all", **keys):
    known = {"arm": arm, "dataset.name": "d"} | {key.replace("__", "."): value for key, value in keys.items()}
    return {"arm": arm, "identity": json.dumps(known), "run_id": repr(keys)}


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("train__lr", (0.1, 0.2)),
        ("train__batch_size", (64, 128)),
        ("train__milestones", ([200, 300], [100])),
        ("prune__fraction", (0.2, 0.5)),
        ("model__width", (4, 16)),
        ("dataset__size", (None, 32)),
        ("pretrain__lr", (0.4, 0.2)),
        ("threads", (1, 2)),
        ("compile", (False, True)),
        ("ranks", (2, 4)),
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_separate_arms_named_by_what_differs(place, key, values):
    rows = [with_identity(**{key: value, "seed": seed}) | {"seed": seed} for seed, value in enumerate(values)]
    found = curves(place, *rows)
    assert [curve.summary.n[0] for curve in found.values()] == [1, 1]
    shown = {f", {key.replace('__', '.')} = {json.dumps(value)}" if value is not None else "" for value in values}
    assert {str(arm).removeprefix("all, t_r = 4") for arm in found} == shown
    assert all(arms.find(arm.spec, found) == arm and not arm.run_id for arm in found)


def test_runs_that_differ_in_the_seed_and_in_what_their_arm_ignores_are_one_arm(place):
    ignored = {"seed": 2, "scores__networks": 3, "prune__levels": 4, "pretrain__subset__offset": 5}
    (arm,) = found = curves(place, with_identity(), with_identity(**ignored) | {"seed": 2})
    assert found[arm].values.index.tolist() == [(1, 0), (2, 0)] and str(arm) == "all, t_r = 4"


def test_names_carry_balanced_and_offset_and_the_plain_arm_has_the_short_name(place):
    size = {"subset_size": 64}
    options = ({}, {"pretrain__subset__class_balanced": True}, {"pretrain__subset__offset": 9})
    found = curves(place, *(with_identity("easy", pretrain__subset__size=64, **keys) | size for keys in options))
    names = ["easy 64, t_r = 4", "easy 64, t_r = 4, balanced", "easy 64, t_r = 4, offset = 9"]
    assert list(map(str, found)) == names
    assert [str(arms.find(spec, found)) for spec in ("easy", "easy:balanced=true", "easy:offset=9")] == names
    assert arms.lookup(Arm("easy", 64, 4), found) == Arm("easy", 64, 4)


def test_a_missing_arm_is_described_by_the_keys_in_which_others_differ(place):
    rows = [with_identity(pretrain__lr=lr) for lr in (0.4, 0.2)]
    found = curves(place, *rows, with_identity("init", train__steps=40), with_identity(train__steps=200))
    assert [str(arm) for arm in found if arm.name == "init"] == ["init, train.steps = 40"]
    (wanted,) = {arm.without_details for arm in found if arm.details}
    assert arms.describe_missing(wanted, found) == f"several configurations of {wanted}: pretrain.lr = 0.2 or 0.4"
    init = Arm("init", setup=(("train.steps", "200"),))
    sentence = "missing init, train.steps = 200 (not compared: init, train.steps = 40)"
    assert arms.describe_missing(init, found) == sentence
    (setups,) = arms.describe_differences(found)
    assert setups.endswith("not compared with each other: the others; train.steps = 200; train.steps = 40")


def test_rows_without_an_identity_are_not_pooled_with_rows_that_have_one(place):
    found = curves(place, {}, with_identity(seed=2) | {"seed": 2})
    assert sorted(map(str, found)) == ["all, t_r = 4", "all, t_r = 4, identity = unknown"]


def test_runs_with_other_weights_at_a_level_are_separate_arms_and_replicates_of_one_run_are_rejected(place):
    first, second = ({"replicate": r, "level": 1, "weights_remaining_percent": w} for r, w in ((0, 64.0), (1, 80.0)))
    assert [arm.run_id for arm in curves(place, first, second | {"run_id": "b"})] == ["a", "b"]
    with pytest.raises(UserError, match="its replicates have 64 to 80 % of their weights at level 1; expected runs of"):
        curves(place, first, second)


def test_sd_is_the_sample_standard_deviation_and_nan_for_one_replicate(place):
    (curve,) = curves(place, {}, {"replicate": 1, "test_accuracy_percent": 92.0}, {"level": 1}).values()
    assert curve.summary.sd[0] == pytest.approx(2**0.5)
    assert pd.isna(curve.summary.sd[1]) and curve.summary.n.tolist() == [2, 1]
    assert pd.isna(curve.values.loc[(1, 1), 1])
