import dataclasses
import json

import pandas as pd
import pytest
from helpers import ROOT

from analysis import arms, collect, identities, paper
from analysis.arms import Arm
from lth_diet.config.loading import load_config
from lth_diet.config.run_ids import run_identity


def test_every_arm_of_every_family_is_published_except_the_copied_one():
    published = collect.published()
    missing = []
    for family in paper.PUBLISHED:
        curves = arms.curves_by_arm(published[published.dataset == family.dataset])
        wanted = [family.arm("init"), family.arm("all"), family.arm("all", family.t_star)]
        names = ("random", "easy") if family.label_noise else ("random", "easy", "hard")
        wanted += [family.arm(name, size=size) for name in names for size in family.sizes]
        missing += [arm for arm in wanted if arm not in curves]
    assert missing == [paper.SAME_RUNS]


def test_each_setup_has_its_own_family():
    slow, fast = (("train.lr", "0.1"),), (("train.lr", "0.2"),)
    families = paper.families("cifar10", [Arm("all", None, 200, setup=setup) for setup in (slow, fast)])
    assert [family.without_setup for family in families] == [paper.CIFAR10] * 2
    assert str(families[0]) == "CIFAR-10, train.lr = 0.1" and families[1].arm("init") == Arm("init", setup=fast)


def test_results_of_the_settings_of_the_paper_and_no_others_are_compared_with_the_published_curves():
    for path in sorted((ROOT / "yamls").glob("c*_*.yaml")):
        config = load_config(path)
        identity = identities.normalize(run_identity(config))
        assert paper.differences_from_published(config.dataset.name, identity) == "", path
    identity |= {"train.lr": "0.2", "threads": "3"}
    assert paper.differences_from_published("cinic10", identity) == "train.lr = 0.2 and 0.1"
    assert paper.differences_from_published("digits", identity) == ""


def curves_of(*settings):
    """Curves of shipped files with overrides, as collected from MLflow; one (file, *overrides) per arm."""
    rows = []
    for number, (name, *overrides) in enumerate(settings):
        config = load_config(ROOT / "yamls" / f"{name}.yaml", overrides)
        identity = {key: identities.to_text(value) for key, value in run_identity(config).items()}
        values = [config.dataset.name, "m", config.arm, config.subset_size, config.rewind_step]
        values += [config.pretrain.label_noise if config.pretrain else 0.0]
        text = json.dumps({key: identities.parse(value) for key, value in identity.items()})
        rows += [(*values, level, 100 * 0.8**level, str(number), text, 90.0) for level in (0, 1)]
    names = ["dataset", "model", "arm", "subset_size", "rewind_steps", "label_noise", "level"]
    names += ["weights_remaining_percent", "run_id", "identity", "test_accuracy_percent"]
    return arms.curves_by_arm(pd.DataFrame(rows, columns=names).assign(replicate=0, seed=1))


SMALL = ("dataset.size=16", "model.width=8", "train.batch_size=64", "train.steps=1500", "train.milestones=[750,1125]")
SMALL += ("pretrain.lr=0.1", "prune.fraction=0.5", "prune.levels=6", "pretrain.steps=75")
OVERNIGHT = (*SMALL, "train.steps=6000", "train.milestones=[3000,4500]")


def test_shipped_files_have_the_settings_of_their_family():
    for dataset in ("cifar10", "cifar100", "cinic10", "digits"):
        for path in sorted((ROOT / "yamls").glob(f"{dataset}_*.yaml")):
            curves = curves_of((path.stem,))
            found = paper.families(dataset, curves)
            assert all(f.settings for f in found) and (found or path.stem.endswith("_init")), path
            assert paper.describe_other_settings(dataset, curves) == []


@pytest.mark.parametrize(
    ("name", "overrides", "family"),
    [
        ("cifar10_all_half", (), paper.CIFAR10),
        ("digits_noise50_easy", (), paper.DIGITS.with_noise(0.5)),
        ("cifar10_all_half", SMALL, paper.CIFAR10_SMALL),
        ("cifar10_all_half", OVERNIGHT, paper.CIFAR10_OVERNIGHT),
        *(
            ("cifar10_all_half", (other,), None)
            for other in ("dataset.size=16", "train.steps=63000", "train.batch_size=64", "train.lr=0.2")
        ),
        ("cifar10_all_half", ("pretrain.lr=0.1",), None),
        ("cifar10_all_half", ("prune.fraction=0.5", "prune.levels=6"), None),
        ("cifar10_all_half", ("model.width=8",), None),
    ],
)
def test_a_family_has_the_image_size_steps_batch_size_rates_and_fraction_of_its_runs(name, overrides, family):
    dataset = name.split("_")[0]
    curves = curves_of((name, *overrides))
    (found,) = paper.families(dataset, curves)
    sentences = paper.describe_other_settings(dataset, curves)
    if family is not None:
        assert (found, sentences) == (family, [])
        return
    assert found.settings == () and found.t_star == 200 and (found.margin, found.levels) == (paper.MARGIN, paper.LEVELS)
    key, value = overrides[0].split("=")
    ((sentence),) = sentences
    assert sentence.startswith(f"all, t_r = 200: not the settings of CIFAR-10: {key} = {value} (")
    assert sentence.endswith("levels 3 to 12 are the paper's")


def test_an_image_folder_is_of_a_family_only_with_the_images_of_the_family():
    ((arm, curve),) = curves_of(("cifar10_all_half", *SMALL)).items()
    (images,) = {dict(f.settings)["dataset.fingerprint"] for f in paper.FAMILIES if f.dataset == "image_folder"}
    for name, fingerprint in (("image_folder", images), ("image_folder-df3d5a40", images), ("image_folder", "0" * 16)):
        identity = {**curve.identity, "dataset.name": "image_folder", "dataset.fingerprint": fingerprint}
        curves = {arm: dataclasses.replace(curve, identity=identity)}
        (found,) = paper.families(name, curves)
        assert (found.dataset, found.margin) == (name, 0.5 if fingerprint == images else paper.MARGIN)
        other = paper.describe_other_settings(name, curves)
        assert [text[:50] for text in other] == ["all, t_r = 75: not a data set of the paper or of t"] * (
            fingerprint != images
        )


def test_arms_with_a_label_noise_of_no_family_have_margin_and_levels_of_the_family_without_noise():
    arms_of = [Arm("init"), Arm("all", None, 40, 0.25), Arm("easy", 128, 20, 0.25)]
    (found,) = paper.families("digits", arms_of)
    assert found == paper.DIGITS.with_noise(0.25, size=128, sizes=(128,))
    assert paper.describe_settings_of({"digits": dict.fromkeys(arms_of, arms.Curve(pd.DataFrame()))}) == []


def test_data_sets_and_rewind_steps_of_no_family_are_named_with_the_margin_and_levels_that_are_used():
    for dataset, steps, start in (
        ("mine", 40, "not a data set of the paper or of this repository's experiments"),
        ("digits", 30, "no arm with the settings of digits has t_r = 20 or 40"),
    ):
        (sentence,) = paper.describe_other_settings(dataset, {Arm("all", None, steps): arms.Curve(pd.DataFrame())})
        assert sentence.startswith(f"all, t_r = {steps}: {start}; t* is read from these arms, and without --margin and")


def test_results_without_recorded_steps_are_of_one_family():
    ((arm, curve),) = curves_of(("cifar10_all_half", *SMALL)).items()
    unknown = {key: value for key, value in curve.identity.items() if key != "train.steps"} | {identities.UNKNOWN: ""}
    assert paper.families("cifar10", {arm: dataclasses.replace(curve, identity=unknown)}) == [paper.CIFAR10_SMALL]


def test_margin_and_levels_are_those_of_the_family_unless_they_are_given():
    small = curves_of(("cifar10_all_half", *SMALL))
    (arm,) = small
    assert paper.test_range("cifar10", small, arm, None, None) == (0.5, (2, 6))
    assert paper.test_range("cifar10", small, arm, 2.0, (1, 3)) == (2.0, (1, 3))
    assert paper.test_range("else", {}, None, None, None) == (paper.MARGIN, paper.LEVELS)
    for family in paper.FAMILIES:
        assert family.margin > 0 and 0 < family.levels[0] < family.levels[1] and dict(family.settings)


def test_results_without_recorded_settings_keep_the_family_of_their_name_unless_their_steps_differ():
    curves = curves_of(("cifar10_all",))
    ((arm, curve),) = curves.items()
    for steps, family in (("62400", paper.CIFAR10), ("100", dataclasses.replace(paper.CIFAR10, settings=()))):
        identity = {identities.UNKNOWN: "unknown", "model": "m", "train.steps": steps}
        (found,) = paper.families("cifar10", {arm: dataclasses.replace(curve, identity=identity)})
        assert (found.t_star, bool(found.settings)) == (400, bool(family.settings))


def test_arms_are_assigned_to_families_of_the_paper_if_possible():
    def found(dataset, *available):
        return paper.families(dataset, available)

    assert found("cifar10", Arm("init"), Arm("all", None, 200)) == [paper.CIFAR10]
    assert found("cifar10", Arm("easy", 2048, 200, 0.1)) == [paper.NOISE_10]
    assert found("cinic10", Arm("all", None, 400), Arm("all", None, 800)) == [paper.CINIC10]
    assert found("cinic10", Arm("all", None, 200)) == [paper.CINIC10_400]
    assert found("digits", Arm("init")) == []
    (easy,) = found("digits", Arm("easy", 64, 20))
    assert easy == paper.DIGITS
    (easy,) = found("image_folder", Arm("easy", 64, 20))
    assert (easy.t_star, easy.size) == (40, 64)
    available = Arm("all", None, 40), Arm("random", 256, 20), Arm("easy", 64, 20), Arm("easy", 512, 9)
    (folder,) = found("image_folder", *available)
    assert (folder.t_star, folder.size, folder.sizes) == (40, 256, (64, 256))
    (digits,) = found("digits", *available)
    assert str(digits) == "digits" and str(paper.NOISE_10) == "CIFAR-10, 10 % label noise"
