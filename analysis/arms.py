"""Arms of the experiment and their accuracy curves over replicates.

On a command line an arm is written `easy:size=12800,steps=200,noise=0.1`. A key may be omitted if the arm is unique
without it; `noise` defaults to 0. Configurations that agree in all of these are distinguished by `run_id=...`.
"""

import dataclasses
import math
from collections.abc import Iterable

import pandas as pd

from lth_diet.errors import UserError

ORDER = ("init", "all", "random", "easy", "hard")
_FIELDS = {"size": "subset_size", "steps": "rewind_steps", "noise": "label_noise", "run_id": "run_id"}
_EXAMPLE = "easy:size=12800,steps=200,noise=0.1"


@dataclasses.dataclass(frozen=True)
class Arm:
    """One pre-training setting.

    Args:
        name: init, all, random, easy or hard.
        subset_size: Number of examples seen in pre-training; None for all examples or no pre-training.
        rewind_steps: Rewind step t_r, in batches.
        label_noise: Fraction of labels that are resampled, 0 to 1.
        run_id: Set only if several configurations share all other fields.
    """

    name: str
    subset_size: int | None = None
    rewind_steps: int = 0
    label_noise: float = 0.0
    run_id: str = ""

    def __str__(self) -> str:
        """Readable name, such as `random 256, t_r = 20, 10 % noise`."""
        size = f" {self.subset_size}" if self.subset_size is not None else ""
        steps = f", t_r = {self.rewind_steps}" if self.name != "init" else ""
        noise = f", {100 * self.label_noise:g} % noise" if self.label_noise else ""
        return self.name + size + steps + noise + (f" ({self.run_id})" if self.run_id else "")

    @property
    def spec(self) -> str:
        """Command-line form, such as `random:size=256,steps=20,noise=0.1`."""
        parts = {} if self.subset_size is None else {"size": self.subset_size}
        parts |= {"steps": self.rewind_steps} if self.name != "init" else {}
        parts |= {"noise": f"{self.label_noise:g}"} if self.label_noise else {}
        parts |= {"run_id": self.run_id} if self.run_id else {}
        return self.name + ":" * bool(parts) + ",".join(f"{key}={value}" for key, value in parts.items())

    @property
    def sort_key(self) -> tuple:
        """Sort key: label noise, then init, all, random, easy, hard, then steps and size."""
        position = ORDER.index(self.name) if self.name in ORDER else len(ORDER)
        return (self.label_noise, position, self.name, self.rewind_steps, self.subset_size or 0, self.run_id)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Test accuracy of an arm at each pruning level.

    Args:
        summary: One row per level (the index), with columns weights_remaining_percent, mean (in %), sd (in percentage
            points, NaN for a single replicate) and n.
        values: Accuracy in %, one row per (seed, replicate) and one column per level; NaN for an unfinished level.
            None if only the summary is known, as for the published curves.
    """

    summary: pd.DataFrame
    values: pd.DataFrame | None = None

    def __repr__(self) -> str:
        return f"Curve({len(self.summary)} levels, up to {self.summary.n.max()} replicates)"

    @property
    def levels(self) -> list[int]:
        return self.summary.index.tolist()


def curves_by_arm(frame: pd.DataFrame) -> dict[Arm, Curve]:
    """Groups the results of one data set and model by arm.

    Configurations that differ in other settings, such as the seed, are merged into one arm unless they share a
    replicate or train for different numbers of steps; then each gets its `run_id`.

    Args:
        frame: Rows of one data set and model, as returned by `collect.load` or `collect.published`.

    Returns:
        Arms and their curves, sorted by `Arm.sort_key`.
    """
    curves = {}
    keys = ["arm", "subset_size", "rewind_steps", "label_noise"]
    for (name, size, steps, noise), rows in frame.groupby(keys, dropna=False, sort=False):
        arm = Arm(name, None if pd.isna(size) else int(size), int(steps), 0.0 if name == "init" else float(noise))
        if "mean" in rows:
            columns = ["weights_remaining_percent", "mean", "sd", "n"]
            curves[arm] = Curve(rows.set_index("level").sort_index()[columns])
        elif _can_be_merged(rows):
            curves[arm] = _curve(rows)
        else:
            curves |= {dataclasses.replace(arm, run_id=run_id): _curve(part) for run_id, part in rows.groupby("run_id")}
    return dict(sorted(curves.items(), key=lambda item: item[0].sort_key))


def _can_be_merged(rows: pd.DataFrame) -> bool:
    overlap = rows.duplicated(["seed", "replicate", "level"]).any()
    return rows.run_id.nunique() == 1 or not (overlap or rows.train_steps.nunique(dropna=False) > 1)


def _curve(rows: pd.DataFrame) -> Curve:
    groups = rows.groupby("level")
    summary = groups.test_accuracy_percent.agg(["mean", "std", "count"]).set_axis(["mean", "sd", "n"], axis=1)
    summary.insert(0, "weights_remaining_percent", groups.weights_remaining_percent.mean())
    values = rows.assign(seed=rows.seed.fillna(-1).astype(int))  # without seeds, replicates pair by number
    return Curve(summary, values.pivot(index=["seed", "replicate"], columns="level", values="test_accuracy_percent"))


def find(spec: str, arms: Iterable[Arm]) -> Arm:
    """Returns the arm that matches a command-line specification.

    Raises:
        UserError: If the specification is malformed, or matches no arm or several.
    """
    name, _, rest = spec.partition(":")
    wanted = {}
    for part in rest.split(",") if rest else ():
        key, equals, value = part.partition("=")
        if key not in _FIELDS or not equals:
            keys = ", ".join(_FIELDS)
            raise UserError(f"{spec!r}: {part!r} is not <key>=<value> with a key of {keys}, as in {_EXAMPLE}")
        wanted[_FIELDS[key]] = value if key == "run_id" else _number(spec, key, value)
    wanted["label_noise"] = 0.0 if name == "init" else wanted.get("label_noise", 0.0)  # init has no pre-training
    arms = list(arms)
    found = [arm for arm in arms if arm.name == name and all(getattr(arm, k) == v for k, v in wanted.items())]
    if len(found) == 1:
        return found[0]
    problem = "matches several arms" if found else "is not an arm of these results"
    raise UserError(f"{spec!r} {problem}; expected one of {', '.join(arm.spec for arm in found or arms)}")


def describe_missing(arm: Arm, available: Iterable[Arm]) -> str:
    """Says why an arm is not among the available ones."""
    if any(dataclasses.replace(other, run_id="") == arm for other in available):
        return f"several configurations of {arm}"
    return f"missing {arm}"


def _number(spec: str, key: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not number >= 0 or (key != "noise" and number != int(number)):
        kind = "a number" if key == "noise" else "a whole number"
        raise UserError(f"{spec!r}: {key} = {value!r}: must be {kind} of at least 0, as in {_EXAMPLE}")
    return number
