"""Experiments of the paper: data sets, t*, subset sizes, and which of them each figure shows."""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path

from lth_diet.config.loading import load_config
from lth_diet.config.run_ids import run_identity

from . import identities
from .arms import ORDER, Arm, Settings, describe_settings
from .identities import Identity

NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "cinic10": "CINIC-10"}
_NAMED = ("pretrain.steps", "pretrain.label_noise", "pretrain.subset.size")  # in the name of an arm
_CONFIGURATIONS = Path(__file__).parents[1] / "yamls"


@dataclasses.dataclass(frozen=True)
class Family:
    """Arms that are compared with each other: same data set, label noise and t*.

    Args:
        dataset: Name of the data set, as in a configuration.
        t_star: Rewind step t*, in batches, at which all examples give a matching initialization.
        label_noise: Fraction of labels that are resampled, 0 to 1.
        size: Subset size of Figures 2 and 3; None if there are no subset arms.
        sizes: All subset sizes (Figures 5 to 7).
        last_level: Last level drawn in figures; None for all.
        setup: Setup of the arms, see `Arm.setup`.
    """

    dataset: str
    t_star: int
    label_noise: float = 0.0
    size: int | None = None
    sizes: tuple[int, ...] = ()
    last_level: int | None = None
    setup: Settings = ()

    def __str__(self) -> str:
        noise = f", {100 * self.label_noise:g} % label noise" if self.label_noise else ""
        several = f", t* = {self.t_star}" if self.dataset == "cinic10" else ""
        return NAMES.get(self.dataset, self.dataset) + noise + several + describe_settings(self.setup)

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


_CIFAR10 = (256, 512, 1024, 2048, 3200, 6400, 12800, 25600)
_NOISE = (512, 1024, 2048, 3200)
CIFAR10 = Family("cifar10", 400, 0.0, 12800, _CIFAR10, 16)
CIFAR100 = Family("cifar100", 800, 0.0, 2048, _CIFAR10[:6], 16)
CINIC10 = Family("cinic10", 800, 0.0, 51200, (12800, 25600, 51200, 102400), 12)
CINIC10_400 = Family("cinic10", 400, 0.0, 51200, (12800, 25600, 51200), 12)
NOISE_10 = Family("cifar10", 400, 0.1, 2048, _NOISE, 16)
NOISE_50 = Family("cifar10", 400, 0.5, 3200, _NOISE, 16)
CLEAN = (CIFAR10, CIFAR100, CINIC10)
SAME_RUNS = Arm("random", 25600, 200)
"""CIFAR-10 arm whose published curve is a copy of all examples at t*/2 (200 batches of 128 are 25,600 images)."""
FAMILIES = (*CLEAN, CINIC10_400, NOISE_10, NOISE_50)


def title(dataset: str, setup: Settings) -> str:
    """Name of a data set and setup, such as `CIFAR-10, train.lr = 0.1`."""
    return NAMES.get(dataset, dataset) + describe_settings(setup)


def families(dataset: str, arms: Iterable[Arm]) -> list[Family]:
    """Returns the families of the paper that the arms belong to, for each setup.

    For any other data set or t*, a family is derived from the arms: t* is the largest rewind step of the `all` arms, or
    twice that of the others if there is no `all`, and `size` is the largest subset size at t*/2.
    """
    arms, found = list(arms), []
    for setup, noise in sorted({(arm.setup, arm.label_noise) for arm in arms}):
        mine = [arm for arm in arms if (arm.setup, arm.label_noise) == (setup, noise) and arm.name != "init"]
        steps = {arm.rewind_steps for arm in mine}
        paper = [family for family in FAMILIES if (family.dataset, family.label_noise) == (dataset, noise)]
        known = [f for f in paper if f.half in steps] or [f for f in paper if f.t_star in steps]
        if known or not mine:
            found += [dataclasses.replace(family, setup=setup) for family in known]
            continue
        t_star = max([arm.rewind_steps for arm in mine if arm.name == "all"] or [2 * max(steps)])
        sizes = {a.subset_size for a in mine if a.subset_size is not None and a.rewind_steps == t_star // 2}
        found.append(Family(dataset, t_star, noise, max(sizes, default=None), tuple(sorted(sizes)), setup=setup))
    return found


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
