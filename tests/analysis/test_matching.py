import dataclasses
import math

import pytest

from analysis import arms, collect, matching, paper
from analysis.arms import Arm

SETTINGS = ((3, 12), 0.95)


@pytest.fixture(scope="module")
def cifar10():
    frame = collect.published()
    return arms.curves_by_arm(frame[frame.dataset == "cifar10"])


def test_the_cheapest_match_has_the_fewest_examples_times_steps(cifar10):
    found = matching.match(paper.CIFAR10, cifar10, 1.0, *SETTINGS)
    costs = [entry.cost for entry in found.entries]
    assert costs == sorted(costs) and costs[0] == 0 and costs[-1] == 200 * 50_000
    assert found.cheapest.arm == Arm("easy", 3200, 200) and found.cheapest.cost == 640_000
    assert not any(entry.matching for entry in found.entries if entry.cost < 640_000)
    assert matching.describe(found) == (
        "CIFAR-10: 3 of 25 arms are matching initializations; the cheapest is easy 3200, t_r = 200 "
        "(640,000 examples × steps)"
    )


def test_reference_has_the_same_label_noise(cifar10):
    found = matching.match(paper.NOISE_10, cifar10, 1.0, *SETTINGS)
    assert {entry.arm.label_noise for entry in found.entries if entry.arm.name != "init"} == {0.1}
    assert {entry.comparison.reference for entry in found.entries} == {Arm("all", None, 400, 0.1)}


def test_nothing_is_tested_without_all_at_t_star(cifar10):
    curves = {arm: curve for arm, curve in cifar10.items() if arm != Arm("all", None, 400)}
    found = matching.match(paper.CIFAR10, curves, 1.0, *SETTINGS)
    assert (
        found.cheapest is None
        and found.entries == []
        and matching.describe(found) == "CIFAR-10: matching initializations not tested: missing all, t_r = 400"
    )


def test_an_arm_without_a_common_level_is_named(cifar10):
    early = dataclasses.replace(cifar10[Arm("init")], summary=cifar10[Arm("init")].summary.loc[:2])
    found = matching.match(paper.CIFAR10, cifar10 | {Arm("init"): early}, 1.0, *SETTINGS)
    assert "; not tested: init (levels 3 to 12: the arms have none in common" in matching.describe(found)


def test_unknown_cost_is_nan_and_sorts_last(cifar10):
    for dataset in ("image_folder", "mine"):
        found = matching.match(dataclasses.replace(paper.CIFAR10, dataset=dataset), cifar10, 1.0, *SETTINGS)
        alone = dataclasses.replace(found, entries=[found.entries[-1]])
        alone.entries[0].comparison.statements["pooled"] = dataclasses.replace(
            alone.entries[0].comparison.statements["pooled"], verdict="dominates"
        )
        assert matching.describe(alone).endswith("all, t_r = 200 (of unknown cost)")
        assert (
            [entry.arm.name for entry in found.entries if math.isnan(entry.cost)]
            == ["all"]
            == [found.entries[-1].arm.name]
        )


def test_the_cheapest_is_of_known_cost_and_matches_of_unknown_cost_are_named(cifar10):
    found = matching.match(dataclasses.replace(paper.CIFAR10, dataset="mine"), cifar10, 5.0, *SETTINGS)
    matches = [entry for entry in found.entries if entry.matching]
    assert len(matches) > 2 and math.isnan(matches[-1].cost)
    text = matching.describe(found)
    assert f"the cheapest of known cost is {matches[0].arm} (" in text and "; of unknown cost: all, t_r = 200" in text


def test_heat_map_has_one_cell_per_arm_and_frames_the_matches(cifar10):
    found = matching.match(paper.CIFAR10, cifar10, 1.0, *SETTINGS)
    (axes,) = matching.figure([found]).axes
    texts = [text.get_text() for text in axes.texts]
    assert len(texts) == 24 and sum("matching" in text for text in texts) == len(axes.patches) == 3
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "all, t_r = 200",
        "random, t_r = 200",
        "easy, t_r = 200",
        "hard, t_r = 200",
    ]


def test_arms_that_differ_only_in_details_have_rows_of_their_own(cifar10):
    easy = Arm("easy", 3200, 200)
    balanced = dataclasses.replace(easy, details=(("pretrain.subset.class_balanced", "true"),))
    found = matching.match(paper.CIFAR10, cifar10 | {balanced: cifar10[easy]}, 1.0, *SETTINGS)
    (axes,) = matching.figure([found]).axes
    assert len(axes.texts) == 25 and "easy, t_r = 200, balanced" in [t.get_text() for t in axes.get_yticklabels()]


def test_command_prints_a_table_and_writes_the_heat_map(place, capsys):
    assert matching.main(["--published", "--dataset", "cifar100", "--margin", "2", "-o", "out"]) == 0
    out = capsys.readouterr().out
    assert "CIFAR-100: 3 of 20 arms are matching initializations" in out or "matching initialization" in out
    assert "weakly dominates" in out and (place / "out/matching.svg").exists()
    assert matching.main(["nowhere.csv"]) == 2
