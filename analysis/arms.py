"""An arm by name, and its curve: accuracy at each level, over replicates.

An arm is written `easy:size=12800,steps=200,noise=0.1`; what is left out must not be needed to tell it from the others
(no noise is noise=0). Where two configurations share these words, `run_id=...` tells them apart.
"""

import dataclasses
import math
from collections.abc import Iterable

import pandas as pd

from lth_diet.errors import UserError

ORDER = ("init", "all", "random", "easy", "hard")
_KEYS = {"size": "subset_size", "steps": "rewind_steps", "noise": "label_noise", "run_id": "run_id"}


@dataclasses.dataclass(frozen=True)
class Arm:
    """What differs in pre-training.

    Args:
        name: init, all, random, easy or hard.
        subset_size: Examples; None: all of them, or no pre-training.
        rewind_steps: t_r in batches.
        label_noise: Fraction of labels drawn anew, 0 to 1.
        run_id: Only where arms are alike in all of these and still differ.
    """

    name: str
    subset_size: int | None = None
    rewind_steps: int = 0
    label_noise: float = 0.0
    run_id: str = ""

    def __str__(self) -> str:
        """In words, such as `random 256, t_r = 20, 10 % noise`."""
        size = f" {self.subset_size}" if self.subset_size is not None else ""
        steps = f", t_r = {self.rewind_steps}" if self.name != "init" else ""
        noise = f", {100 * self.label_noise:g} % noise" if self.label_noise else ""
        return self.name + size + steps + noise + (f" ({self.run_id})" if self.run_id else "")

    @property
    def spec(self) -> str:
        """As it is written on a command line."""
        parts = {} if self.subset_size is None else {"size": self.subset_size}
        parts |= {"steps": self.rewind_steps} if self.name != "init" else {}
        parts |= {"noise": f"{self.label_noise:g}"} if self.label_noise else {}
        parts |= {"run_id": self.run_id} if self.run_id else {}
        return self.name + ":" * bool(parts) + ",".join(f"{key}={value}" for key, value in parts.items())

    @property
    def rank(self) -> tuple:
        """Sorts arms: by noise, then init, all, random, easy, hard, then by steps and size."""
        place = ORDER.index(self.name) if self.name in ORDER else len(ORDER)
        return (self.label_noise, place, self.name, self.rewind_steps, self.subset_size or 0, self.run_id)


@dataclasses.dataclass(frozen=True)
class Curve:
    """What was measured of an arm.

    Args:
        summary: Index level; columns weights_remaining_percent, mean and sd (in %, NaN for one replicate), n.
        values: Index (seed, replicate), columns levels, accuracy in %, NaN where a level is not done; None: only the
            summary is known, as of the published curves.
    """

    summary: pd.DataFrame
    values: pd.DataFrame | None = None

    @property
    def levels(self) -> list[int]:
        return self.summary.index.tolist()


def of(frame: pd.DataFrame) -> dict[Arm, Curve]:
    """The arms of one data set and model, and their curves.

    Replicates of several configurations (another seed, say) are one arm as long as none of them is there twice.

    Args:
        frame: A table that `collect.load` or `collect.published` returned, of one data set and model.
    """
    curves = {}
    keys = ["arm", "subset_size", "rewind_steps", "label_noise"]
    for (name, size, steps, noise), rows in frame.groupby(keys, dropna=False, sort=False):
        arm = Arm(name, None if pd.isna(size) else int(size), int(steps), 0.0 if name == "init" else float(noise))
        if "mean" in rows:
            columns = ["weights_remaining_percent", "mean", "sd", "n"]
            curves[arm] = Curve(rows.set_index("level").sort_index()[columns])
        elif _one_configuration(rows):
            curves[arm] = _curve(rows)
        else:
            curves |= {dataclasses.replace(arm, run_id=run_id): _curve(part) for run_id, part in rows.groupby("run_id")}
    return dict(sorted(curves.items(), key=lambda item: item[0].rank))


def _one_configuration(rows: pd.DataFrame) -> bool:
    again = rows.duplicated(["seed", "replicate", "level"]).any()
    return rows.run_id.nunique() == 1 or not (again or rows.train_steps.nunique(dropna=False) > 1)


def _curve(rows: pd.DataFrame) -> Curve:
    groups = rows.groupby("level")
    summary = groups.test_accuracy_percent.agg(["mean", "std", "count"]).set_axis(["mean", "sd", "n"], axis=1)
    summary.insert(0, "weights_remaining_percent", groups.weights_remaining_percent.mean())
    values = rows.assign(seed=rows.seed.fillna(-1).astype(int))  # a table without seeds: replicates pair by number
    return Curve(summary, values.pivot(index=["seed", "replicate"], columns="level", values="test_accuracy_percent"))


def find(spec: str, arms: Iterable[Arm]) -> Arm:
    """The one arm that a specification means.

    Raises:
        UserError: If it cannot be read, or means none of them or several.
    """
    name, _, rest = spec.partition(":")
    wanted = {}
    for part in rest.split(",") if rest else ():
        key, equals, value = part.partition("=")
        if key not in _KEYS or not equals:
            raise UserError(f"{spec!r}: {part!r} is not allowed; allowed: {', '.join(_KEYS)}, as in {_EXAMPLE}")
        wanted[_KEYS[key]] = value if key == "run_id" else _number(spec, key, value)
    wanted["label_noise"] = 0.0 if name == "init" else wanted.get("label_noise", 0.0)  # init has no pre-training
    arms = list(arms)
    found = [arm for arm in arms if arm.name == name and all(getattr(arm, k) == v for k, v in wanted.items())]
    if len(found) == 1:
        return found[0]
    problem = "means several arms" if found else "is not an arm of these results"
    raise UserError(f"{spec!r} {problem}; allowed: {', '.join(arm.spec for arm in found or arms)}")


def missing(arm: Arm, there: Iterable[Arm]) -> str:
    """Why an arm that was looked for is not there."""
    if any(dataclasses.replace(other, run_id="") == arm for other in there):
        return f"several configurations of {arm}"
    return f"missing {arm}"


_EXAMPLE = "easy:size=12800,steps=200,noise=0.1"


def _number(spec: str, key: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not number >= 0 or (key != "noise" and number != int(number)):
        raise UserError(f"{spec!r}: {key}: {value!r} is not allowed; allowed: a number, as in {_EXAMPLE}")
    return number
