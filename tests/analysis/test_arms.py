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
            "'step=200' is not <key>=<value> with a key of size, steps, noise, run_id, as in easy:size=12800",
        ),
        ("all:steps=many", "steps = 'many': must be a whole number of at least 0"),
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
    assert arms.describe_missing(Arm("all", None, 4), found) == "several configurations of all, t_r = 4"
    assert arms.describe_missing(Arm("all", None, 5), found) == "missing all, t_r = 5"


def test_configurations_with_different_train_steps_are_separate_arms(place):
    assert len(curves(place, {"train_steps": 10}, {"seed": 2, "run_id": "b", "train_steps": 20})) == 2


def test_sd_is_the_sample_standard_deviation_and_nan_for_one_replicate(place):
    (curve,) = curves(place, {}, {"replicate": 1, "test_accuracy_percent": 92.0}, {"level": 1}).values()
    assert curve.summary.sd[0] == pytest.approx(2**0.5)
    assert pd.isna(curve.summary.sd[1]) and curve.summary.n.tolist() == [2, 1]
    assert pd.isna(curve.values.loc[(1, 1), 1])
