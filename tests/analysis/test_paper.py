from analysis import arms, collect, paper
from analysis.arms import Arm


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


def test_arms_are_assigned_to_families_of_the_paper_if_possible():
    def found(dataset, *available):
        return paper.families(dataset, available)

    assert found("cifar10", Arm("init"), Arm("all", None, 200)) == [paper.CIFAR10]
    assert found("cifar10", Arm("easy", 2048, 200, 0.1)) == [paper.NOISE_10]
    assert found("cinic10", Arm("all", None, 400), Arm("all", None, 800)) == [paper.CINIC10]
    assert found("cinic10", Arm("all", None, 200)) == [paper.CINIC10_400]
    assert found("digits", Arm("init")) == []
    (digits,) = found("digits", Arm("all", None, 40), Arm("random", 256, 20), Arm("easy", 64, 20), Arm("easy", 512, 9))
    assert (digits.t_star, digits.size, digits.sizes) == (40, 256, (64, 256))
    assert str(digits) == "digits" and str(paper.NOISE_10) == "CIFAR-10, 10 % label noise"
