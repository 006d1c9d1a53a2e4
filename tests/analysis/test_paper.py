from helpers import ROOT

from analysis import arms, collect, identities, paper
from analysis.arms import Arm
from lth_diet.config.loading import load_config
from lth_diet.config.run_ids import run_identity


def test_every_arm_of_every_family_is_published_except_the_copied_one():
    published = collect.published()
    missing = []
    for family in paper.FAMILIES:
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


def test_arms_are_assigned_to_families_of_the_paper_if_possible():
    def found(dataset, *available):
        return paper.families(dataset, available)

    assert found("cifar10", Arm("init"), Arm("all", None, 200)) == [paper.CIFAR10]
    assert found("cifar10", Arm("easy", 2048, 200, 0.1)) == [paper.NOISE_10]
    assert found("cinic10", Arm("all", None, 400), Arm("all", None, 800)) == [paper.CINIC10]
    assert found("cinic10", Arm("all", None, 200)) == [paper.CINIC10_400]
    assert found("digits", Arm("init")) == []
    (easy,) = found("digits", Arm("easy", 64, 20))
    assert (easy.t_star, easy.size) == (40, 64)
    (digits,) = found("digits", Arm("all", None, 40), Arm("random", 256, 20), Arm("easy", 64, 20), Arm("easy", 512, 9))
    assert (digits.t_star, digits.size, digits.sizes) == (40, 256, (64, 256))
    assert str(digits) == "digits" and str(paper.NOISE_10) == "CIFAR-10, 10 % label noise"
