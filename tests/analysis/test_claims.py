import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT

from analysis import arms, claims, collect, matching, paper
from lth_diet.errors import UserError

SETTINGS = (0.3, (3, 12), 0.95)


def find(family, text):
    frame = collect.published()
    curves = arms.curves_by_arm(frame[frame.dataset == family.dataset])
    (found,) = (finding for finding in claims.evaluate(family, curves, *SETTINGS) if finding.claim.text == text)
    return found


def test_claim_holds_only_with_its_own_verdict():
    found = find(paper.CIFAR100, "all at t* dominates all at t*/2")
    assert (found.outcome, found.comparison.verdict) == ("holds", "dominates")
    found = find(paper.CIFAR10, "all at t* dominates all at t*/2")
    assert (found.outcome, found.comparison.verdict) == ("undecided", "weakly dominates")
    assert 4 < found.confirming < 50


def test_replicates_to_run_next_decide_what_few_do_or_else_the_nearest_claim():
    frame = collect.published()
    curves = arms.curves_by_arm(frame[frame.dataset == "cifar10"])
    findings = claims.evaluate(paper.CIFAR10, curves, *SETTINGS)
    needed = sorted(each.deciding for each in findings if each.outcome == "undecided" and each.deciding)
    few = [number for number in needed if number <= 16]
    assert 0 < len(few) < len(needed), "n = 4"
    assert claims.affordable_replicates(findings) == (few[-1], len(few))
    many = [each for each in findings if each.outcome == "undecided" and (each.deciding or 0) > 16]
    assert claims.affordable_replicates(many) == (min(each.deciding for each in many), 1)
    assert claims.affordable_replicates([each for each in findings if each.outcome == "holds"]) is None


def test_an_undecided_claim_says_how_many_replicates_would_show_or_contradict_it():
    found = find(paper.CIFAR10, "all at t* dominates all at t*/2")
    assert found.brief.endswith(f"n = 4, about {found.confirming} would show it") and found.contradicting is None
    found = find(paper.CIFAR100, "easy at t*/2 matches all at t*")
    assert found.brief.endswith(f"n = 4, about {found.contradicting} would contradict it") and found.confirming is None
    found = find(paper.NOISE_50, "all at t* dominates all at t*/2")
    assert found.brief.endswith("n = 4, more would not decide it") and found.deciding is None


def test_the_headline_is_about_the_arms_of_the_claims_and_not_about_other_arms():
    frame = collect.published()
    curves = arms.curves_by_arm(frame[frame.dataset == "cifar10"])
    findings = claims.evaluate(paper.CIFAR10, curves, *SETTINGS)
    easy = next(each for each in findings if each.claim.challenger == "easy")
    other = dataclasses.replace(easy, claim=claims.Claim("easy 256 matches all at t*", "easy", "full", False))
    assert claims.headline(paper.CIFAR10, [*findings, other]) == claims.headline(paper.CIFAR10, findings)
    no_subset = dataclasses.replace(paper.CIFAR10, size=None)
    alone = dataclasses.replace(other, family=no_subset)
    assert "was not compared with none" in claims.headline(no_subset, [alone])


def test_claim_is_contradicted_if_the_interval_excludes_it():
    frame = collect.published()
    curves = arms.curves_by_arm(frame[frame.dataset == "cifar100"])
    easy, init = paper.CIFAR100.arm("easy"), paper.CIFAR100.arm("init")
    swapped = curves | {easy: curves[init], init: curves[easy]}
    found = {finding.claim.text: finding.outcome for finding in claims.evaluate(paper.CIFAR100, swapped, *SETTINGS)}
    assert found["easy at t*/2 matches all at t*"] == "contradicted"
    assert found["all at t*/2 dominates init"] == "contradicted"


def curves_with(family, spread=0.05, **accuracy):
    """Curves of eight replicates whose accuracy (%) is about the same at all levels, by challenger or reference."""
    random, rows = np.random.default_rng(0), []
    names = {"full": ("all", family.t_star), "half": ("all", family.half), "init": ("init", 0)}
    for name, mean in accuracy.items():
        arm, steps = names.get(name, (name, family.half))
        size = family.size if name == "easy" else None
        rows += [
            [arm, size, steps, family.label_noise * (arm != "init"), r, level, value + 0.01 * random.standard_normal()]
            for r, value in enumerate(mean + spread * random.standard_normal(8))
            for level in range(13)
        ]
    columns = ["arm", "subset_size", "rewind_steps", "label_noise", "replicate", "level", "test_accuracy_percent"]
    frame = pd.DataFrame(rows, columns=columns).assign(model="m", seed=1, run_id="a", weights_remaining_percent=50.0)
    return arms.curves_by_arm(frame)


@pytest.mark.parametrize(
    ("half", "sentence"),
    [
        (90.0, "Half the steps suffice."),
        (89.85, "Half the steps suffice."),
        (91.0, "Half the steps suffice."),
        (89.7, "Half the steps make them 0.3 points worse."),
        (88.0, "Half the steps do not suffice: 2.0 points fewer at 50 % of weights."),
    ],
)
def test_half_the_steps_suffice_if_they_match_and_not_if_they_are_worse_by_more_than_the_margin(half, sentence):
    curves = curves_with(paper.CIFAR10, full=90.0, half=half, init=85.0)
    text = claims.headline(paper.CIFAR10, claims.evaluate(paper.CIFAR10, curves, *SETTINGS))
    assert text.endswith(sentence)


def test_the_headline_names_the_level_at_which_half_the_steps_do_not_suffice_also_if_they_are_better_at_the_last():
    curves = curves_with(paper.CIFAR10, full=90.0, half=88.0, init=85.0)
    half = curves[paper.CIFAR10.arm("all")]
    for part in (half.values[12], half.summary["mean"].loc[[12]]):
        part += 5
    text = claims.headline(paper.CIFAR10, claims.evaluate(paper.CIFAR10, curves, *SETTINGS))
    assert re.search(r"Half the steps do not suffice: 2\.\d points fewer at 50 % of weights\.$", text)


def test_the_interval_of_a_headline_has_the_sign_of_its_words():
    curves = curves_with(paper.CIFAR10, full=84.0, half=84.0, init=90.0)
    text = claims.headline(paper.CIFAR10, claims.evaluate(paper.CIFAR10, curves, *SETTINGS))
    assert re.search(r"6\.0 points worse than none \(95 % interval 5\.9 to 6\.\d, n = 8\)", text)


@pytest.mark.parametrize(
    ("easy", "sentence"),
    [(92.0, "are better than all examples."), (90.0, "match all examples."), (88.0, "fall short of all examples.")],
)
def test_under_noise_the_headline_says_the_most_that_is_shown_of_the_easiest_examples(easy, sentence):
    curves = curves_with(paper.NOISE_50, full=90.0, easy=easy, init=85.0)
    text = claims.headline(paper.NOISE_50, claims.evaluate(paper.NOISE_50, curves, *SETTINGS))
    assert text.endswith(f"Half the steps on the 3,200 easiest examples {sentence}")


def test_a_claim_of_dominance_is_contradicted_if_the_arm_is_worse_at_every_level():
    curves = curves_with(paper.CIFAR10, full=89.93, half=90.0, spread=0.08)
    (found,) = (each for each in claims.evaluate(paper.CIFAR10, curves, *SETTINGS) if each.comparison)
    pooled = found.comparison.statements["pooled"]
    assert pooled.levels.upper.max() < 0 < pooled.worst["upper"] and found.outcome == "contradicted"


def test_the_interval_of_the_area_is_two_sided():
    found = find(paper.NOISE_50, "all at t*/2 dominates init")
    (row,) = found.comparison.statements["mean"].levels.itertuples()
    assert row.lower > 0, "shown by a one-sided test"
    assert claims._row(found)[6].startswith("[-")


def test_claim_with_missing_arms_is_not_tested():
    frame = collect.published()
    curves = arms.curves_by_arm(frame[(frame.dataset == "cifar10") & (frame.arm != "hard")])
    found = [
        finding for finding in claims.evaluate(paper.CIFAR10, curves, *SETTINGS) if finding.outcome == "not tested"
    ]
    assert [finding.reason for finding in found] == ["missing hard 12800, t_r = 200"] * 2


def test_noise_claims_are_tested_only_under_noise():
    frame = collect.published()
    curves = arms.curves_by_arm(frame[frame.dataset == "cifar10"])
    clean, noisy = (claims.evaluate(family, curves, *SETTINGS) for family in (paper.CIFAR10, paper.NOISE_50))
    assert not any(finding.claim.noise for finding in clean) and sum(finding.claim.noise for finding in noisy) == 4


@pytest.mark.parametrize(("drop", "expected"), [(0.0, 0.8**12), (1.0, 0.8**5)])
def test_dense_accuracy_is_kept_down_to_the_first_failing_level(place, drop, expected):
    random = np.random.default_rng(0)
    rows = [
        {
            "dataset": "cifar10",
            "model": "m",
            "arm": "all",
            "subset_size": None,
            "rewind_steps": 400,
            "label_noise": 0,
            "replicate": replicate,
            "level": level,
            "weights_remaining_percent": 100 * 0.8**level,
            "run_id": "a",
            "test_accuracy_percent": 91 - drop * (level == 6) + 0.02 * random.standard_normal(),
        }
        for replicate in range(4)
        for level in range(17)
    ]
    pd.DataFrame(rows).to_csv("rows.csv", index=False)
    curves = arms.curves_by_arm(collect.load("rows.csv"))
    assert claims.dense_accuracy_kept(paper.CIFAR10, curves, *SETTINGS) == pytest.approx(
        (100 * expected, 100 * expected)
    )
    with pytest.raises(UserError, match="missing all, t_r = 800"):
        claims.dense_accuracy_kept(paper.CIFAR100, curves, *SETTINGS)
    ((arm, curve),) = curves.items()
    for level, kept in ((1, "all, t_r = 400 has no level 1"), (4, 100 * 0.8**3)):
        without = {arm: dataclasses.replace(curve, summary=curve.summary.drop(level))}
        if level == 1:
            with pytest.raises(UserError, match=kept):
                claims.dense_accuracy_kept(paper.CIFAR10, without, *SETTINGS)
        else:
            assert claims.dense_accuracy_kept(paper.CIFAR10, without, *SETTINGS)[0] == pytest.approx(kept)


def test_documentation_has_the_tables_that_the_command_prints(capsys):
    assert claims.main(["--published"]) == 0
    out = capsys.readouterr().out
    assert out in (ROOT / "docs/statistics.md").read_text()
    assert out.count("**holds**") > 10 and out.count("**undecided**") > 10


def test_invalid_input_is_reported_in_one_sentence(capsys):
    assert claims.main(["--published", "--dataset", "mnist"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: --dataset = 'mnist': not in these results; expected one of cifar10,"
    )


def test_latex_table_has_a_row_and_a_sentence_for_each_claim_with_escaped_signs(capsys):
    assert claims.main(["--published", "--dataset", "cifar100", "--latex"]) == 0
    table, rest = capsys.readouterr().out.split("\\bottomrule")
    sentences = [line for line in rest.splitlines() if line.startswith("% ")]
    assert table.count(r" \\") == 1 + len(sentences) == 8
    assert r"all at t* dominates init & CIFAR-100 & $+1.05$ & 51.2 & 4 & holds \\" in table
    assert r"+7.84 percentage points in test accuracy (95 \% confidence interval 6.93 to 8.75)" in sentences[-1]


def test_latex_names_what_was_left_out_and_rejects_results_without_a_tested_claim(place, capsys):
    frame = collect.load(ROOT / "analysis/results/digits.csv.gz")
    frame = frame[(frame.seed == 101) & (frame.label_noise == 0)]
    frame[(frame.arm != "easy") & (frame.level != 5)].to_csv("some.csv", index=False)
    assert claims.main(["some.csv", "--latex"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("points; tested at levels 3, 4, 6, 7 of 3 to 7 only)." in line for line in lines)
    assert "% digits: easy at t*/2 matches all at t*: not tested: missing easy 256, t\\_r = 20" in lines
    assert claims.main(["some.csv", "--latex", "--levels", "20", "30"]) == 2
    assert "error: no claim can be tested: " in capsys.readouterr().err
    frame[frame.arm == "init"].to_csv("init.csv", index=False)
    assert claims.main(["init.csv", "--latex"]) == 2
    assert "error: these results have no arm with pre-training" in capsys.readouterr().err


@pytest.mark.parametrize("command", [claims, matching])
def test_results_without_pre_training_are_rejected(place, capsys, command):
    frame = collect.load(ROOT / "analysis/results/digits.csv.gz")
    frame[frame.arm == "init"].to_csv("init.csv", index=False)
    assert command.main(["init.csv"]) == 2
    assert "error: these results have no arm with pre-training" in capsys.readouterr().err


def test_a_single_replicate_has_an_unknown_margin_and_number_of_replicates(place, capsys):
    frame = collect.load(ROOT / "analysis/results/digits.csv.gz")
    frame[(frame.replicate == 0) & (frame.seed == 101)].to_csv("one.csv", index=False)
    assert claims.main(["one.csv"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "**" in line]
    assert rows and all(row.endswith("| unknown | unknown |") for row in rows)
