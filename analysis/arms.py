"""Arms of the experiment and their accuracy curves over replicates.

On a command line an arm is written `easy:size=12800,steps=200,noise=0.1`. A key may be omitted if the arm is unique
without it; `noise` defaults to 0. Arms that agree in all of these are distinguished by `balanced=true`, `offset=100`,
and the keys in which their configurations differ, such as `pretrain.lr=0.2`; if there are none, by `run_id=...`.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from lth_diet.config.schema import describe_arm
from lth_diet.errors import UserError

from . import identities
from .identities import Identity

ORDER = ("init", "all", "random", "easy", "hard")
SAME_WEIGHTS = 0.05
"""Relative difference of the weights remaining at a level up to which they count as equal; tables may be rounded."""
_FIELDS = {"size": "subset_size", "steps": "rewind_steps", "noise": "label_noise", "run_id": "run_id"}
_SHORT = {"pretrain.subset.class_balanced": "balanced", "pretrain.subset.offset": "offset"}
_EXAMPLE = "easy:size=12800,steps=200,noise=0.1"

Settings = tuple[tuple[str, str], ...]
"""Keys of a configuration and their values, sorted by key."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One pre-training setting.

    Args:
        name: init, all, random, easy or hard.
        subset_size: Number of examples seen in pre-training; None for all examples or no pre-training.
        rewind_steps: Rewind step t_r, in batches.
        label_noise: Fraction of labels that are resampled, 0 to 1.
        details: `class_balanced` and `offset` if they are set, and what else distinguishes the arm from arms with the
            same other fields.
        setup: Settings outside the pre-training, if the results have several setups. Arms of different setups are not
            compared.
        run_id: Set only if several configurations share all other fields.
    """

    name: str
    subset_size: int | None = None
    rewind_steps: int = 0
    label_noise: float = 0.0
    details: Settings = ()
    setup: Settings = ()
    run_id: str = ""

    def __str__(self) -> str:
        """Readable name, such as `random 256, t_r = 20, 10 % noise`."""
        name = describe_arm(self.name, self.subset_size, self.rewind_steps, self.label_noise)
        settings = describe_settings(self.details + self.setup)
        return name + settings + (f" ({self.run_id})" if self.run_id else "")

    @property
    def spec(self) -> str:
        """Command-line form, such as `random:size=256,steps=20,noise=0.1`."""
        parts = {} if self.subset_size is None else {"size": self.subset_size}
        parts |= {"steps": self.rewind_steps} if self.name != "init" else {}
        parts |= {"noise": f"{self.label_noise:g}"} if self.label_noise else {}
        parts |= {_SHORT.get(key, key): value.replace(" ", "") for key, value in self.details + self.setup}
        parts |= {"run_id": self.run_id} if self.run_id else {}
        return self.name + ":" * bool(parts) + ",".join(f"{key}={value}" for key, value in parts.items())

    @property
    def sort_key(self) -> tuple:
        """Sort key: setup, label noise, then init, all, random, easy, hard, then steps and size."""
        position = ORDER.index(self.name) if self.name in ORDER else len(ORDER)
        size = self.subset_size or 0
        rest = (self.rewind_steps, size, self.details, self.run_id)
        return (self.setup, self.label_noise, position, self.name, *rest)

    @property
    def without_details(self) -> "Arm":
        return dataclasses.replace(self, details=(), run_id="")


def describe_settings(settings: Settings) -> str:
    """Describes settings at the end of a name, such as `, balanced, train.lr = 0.1`."""
    named = [(_SHORT.get(key, key), value) for key, value in settings]
    return "".join(f", {key}" if (key, value) == ("balanced", "true") else f", {key} = {value}" for key, value in named)


@dataclasses.dataclass(frozen=True)
class Curve:
    """Test accuracy of an arm at each pruning level.

    Args:
        summary: One row per level (the index), with columns weights_remaining_percent, mean (in %), sd (in percentage
            points, NaN for a single replicate) and n.
        values: Accuracy in %, one row per (seed, replicate) and one column per level; NaN for an unfinished level.
            None if only the summary is known, as for the published curves.
        identity: Identity of the runs, see `identities`; empty if nothing is known.
    """

    summary: pd.DataFrame
    values: pd.DataFrame | None = None
    identity: Identity = dataclasses.field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return f"Curve({len(self.summary)} levels, up to {self.summary.n.max()} replicates)"

    @property
    def levels(self) -> list[int]:
        return self.summary.index.tolist()

    @property
    def finished_levels(self) -> list[int]:
        """Levels that half of the replicates have finished; one that is ahead of the others adds none."""
        n, most = self.summary.n, self.summary.n.max()
        return self.summary.index[(2 * n >= most) & (n >= min(2, most))].tolist()

    @property
    def finished(self) -> "Curve":
        """The curve without levels that only a few replicates, which are ahead of the others, have finished."""
        return dataclasses.replace(self, summary=self.summary.loc[self.finished_levels])


Results = dict[str, dict[Arm, Curve]]
"""Curves by name of the data set and arm."""


def curves_by_arm(frame: pd.DataFrame) -> dict[Arm, Curve]:
    """Groups the results of one data set by arm.

    Runs whose identities differ only in the seed are one arm. Runs without an identity are one arm if they have the
    same model and train for the same number of steps, unless they share a replicate or have other weights remaining at
    a level; then each gets its `run_id`.

    Args:
        frame: Rows of one data set, as returned by `collect.load` or `collect.published`.

    Returns:
        Arms and their curves, sorted by `Arm.sort_key`.
    """
    found = rows_by_arm(frame)
    curves = {arm: _curve(arm, rows, identity) for arm, (identity, rows) in found.items()}
    return dict(sorted(curves.items(), key=lambda item: item[0].sort_key))


def rows_by_arm(frame: pd.DataFrame) -> dict[Arm, tuple[Identity, pd.DataFrame]]:
    """Identity and rows of each arm, as for `curves_by_arm`."""
    groups = _groups(frame)
    setups = [identities.setup(identity) for _, identity, _ in groups]
    setup_keys = identities.differing_keys(setups)
    named = [
        (dataclasses.replace(arm, setup=_settings(setup, setup_keys)), identity, rows)
        for (arm, identity, rows), setup in zip(groups, setups, strict=True)
    ]
    found: dict[Arm, tuple[Identity, pd.DataFrame]] = {}
    for arm, identity, rows in named:
        keys = set(identities.differing_keys(other for same, other, _ in named if same == arm))
        keys = keys.difference(setup_keys, _SHORT) | {key for key in _SHORT if identity.get(key) not in ("false", "0")}
        parts = _by_run(dataclasses.replace(arm, details=_settings(identity, keys)), rows)
        found |= {each: (identity, part) for each, part in parts.items()}
    return found


def _groups(frame: pd.DataFrame) -> list[tuple[Arm, Identity, pd.DataFrame]]:
    """Rows by arm and identity."""
    core = ["arm", "subset_size", "rewind_steps", "label_noise"]
    other = [key for key in ("model", "train_steps", "identity") if key in frame]
    groups: dict[tuple, list[pd.DataFrame]] = {}
    for (name, size, steps, noise, *values), rows in frame.groupby([*core, *other], dropna=False, sort=False):
        arm = Arm(name, None if pd.isna(size) else int(size), int(steps), 0.0 if name == "init" else float(noise))
        known = {key: value for key, value in zip(other, values, strict=True) if not pd.isna(value)}
        groups.setdefault((arm, tuple(sorted(_identity(known).items()))), []).append(rows)
    return [(arm, dict(identity), pd.concat(parts)) for (arm, identity), parts in groups.items()]


def _identity(known: dict[str, Any]) -> Identity:
    if "identity" in known:
        return identities.normalize(json.loads(known["identity"]))
    steps = {"train.steps": str(known["train_steps"])} if "train_steps" in known else {}
    return {identities.UNKNOWN: "unknown", "model": known["model"], **steps}


def _settings(identity: Identity, keys: Iterable[str]) -> Settings:
    shown = {key: identity[key] for key in sorted(keys) if key in identity}
    return tuple((key, value[:10] if key == "scores.file" else value) for key, value in shown.items())


def _by_run(arm: Arm, rows: pd.DataFrame) -> dict[Arm, pd.DataFrame]:
    """Rows of an arm, by run if its runs share a replicate or have other weights remaining."""
    if "mean" in rows or not (rows.duplicated(["seed", "replicate", "level"]).any() or _differing_weights(rows)):
        return {arm: rows}
    return {dataclasses.replace(arm, run_id=run_id): part for run_id, part in rows.groupby("run_id")}


def _curve(arm: Arm, rows: pd.DataFrame, identity: Identity) -> Curve:
    if "mean" in rows:
        columns = ["weights_remaining_percent", "mean", "sd", "n"]
        return Curve(rows.set_index("level").sort_index()[columns], None, identity)
    if differing := _differing_weights(rows):
        raise UserError(f"{arm}: its replicates have {differing}; expected runs of one prune.fraction")
    groups = rows.groupby("level")
    summary = groups.test_accuracy_percent.agg(["mean", "std", "count"]).set_axis(["mean", "sd", "n"], axis=1)
    summary.insert(0, "weights_remaining_percent", groups.weights_remaining_percent.mean())
    values = rows.assign(seed=rows.seed.fillna(-1).astype(int))  # without seeds, replicates pair by number
    table = values.pivot(index=["seed", "replicate"], columns="level", values="test_accuracy_percent")
    return Curve(summary, table, identity)


def _differing_weights(rows: pd.DataFrame) -> str:
    """Where replicates have other weights remaining at the same level; empty if they do not."""
    weights = rows.groupby("level").weights_remaining_percent
    least, most = weights.min(), weights.max()
    far = most / least - 1 > SAME_WEIGHTS
    at = far.idxmax()
    return f"{least[at]:.3g} to {most[at]:.3g} % of their weights at level {at}" if far.any() else ""


def by_setup(curves: Mapping[Arm, Curve]) -> dict[Settings, dict[Arm, Curve]]:
    """Groups arms by setup; arms of different setups are not compared."""
    groups: dict[Settings, dict[Arm, Curve]] = {}
    for arm, curve in curves.items():
        groups.setdefault(arm.setup, {})[arm] = curve
    return groups


def describe_differences(curves: Mapping[Arm, Curve]) -> list[str]:
    """Says which setups the arms have, if there are several, and in which numerical settings arms of a setup differ."""
    sentences = []
    groups = by_setup(curves)
    names = [describe_settings(setup).removeprefix(", ") or "the others" for setup in sorted(groups)]
    if len(names) > 1:
        sentences.append(f"several setups, whose arms are not compared with each other: {'; '.join(names)}")
    found: dict[str, set[str]] = {}
    for mine in groups.values():
        known = [curve.identity for curve in mine.values()]
        for key in set(identities.differing_keys(known)).intersection(identities.NUMERICAL):
            found.setdefault(key, set()).update(identities.value(identity, key) for identity in known)
    if found:
        differ = ", ".join(f"{key} = {' or '.join(sorted(values))}" for key, values in sorted(found.items()))
        sentences.append(f"arms that are compared differ in numerical settings: {differ}")
    return sentences


def find(spec: str, arms: Iterable[Arm]) -> Arm:
    """Returns the arm that matches a command-line specification.

    Raises:
        UserError: If the specification is malformed, or matches no arm or several.
    """
    name, _, rest = spec.partition(":")
    wanted, settings, given = {}, {}, set()
    long = {short: key for key, short in _SHORT.items()}
    for part in re.split(r",(?![^[]*\])", rest) if rest else ():
        key, equals, value = part.partition("=")
        if not equals or (key not in _FIELDS and key not in long and not _is_setting(key)):
            keys = ", ".join((*_FIELDS, *long))
            raise UserError(
                f"{spec!r}: {part!r} is not <key>=<value> with a key of {keys} or a key of a configuration, as in "
                f"{_EXAMPLE} and all:steps=400,train.lr=0.1"
            )
        if key in given:
            raise UserError(f"{spec!r}: {key} is given twice")
        given.add(key)
        if key in _FIELDS:
            wanted[_FIELDS[key]] = value if key == "run_id" else _number(spec, key, value)
        else:
            settings[long.get(key, key)] = value.replace(" ", "")
    wanted["label_noise"] = 0.0 if name == "init" else wanted.get("label_noise", 0.0)  # init has no pre-training
    arms = list(arms)
    found = {
        arm: {key: value.replace(" ", "") for key, value in arm.details + arm.setup}
        for arm in arms
        if arm.name == name and all(getattr(arm, key) == value for key, value in wanted.items())
    }
    found = {arm: theirs for arm, theirs in found.items() if settings.items() <= theirs.items()}
    exact = [arm for arm, theirs in found.items() if theirs == settings]
    if len(exact) == 1 and len({dataclasses.replace(arm, details=(), setup=(), run_id="") for arm in found}) == 1:
        return exact[0]
    if len(found) == 1:
        return next(iter(found))
    problem = "matches several arms" if found else "is not an arm of these results"
    raise UserError(f"{spec!r} {problem}; expected one of {', '.join(arm.spec for arm in found or arms)}")


def _is_setting(key: str) -> bool:
    return "." in key or key in (*identities.NUMERICAL, identities.UNKNOWN, "model")


def candidates(wanted: Arm, available: Iterable[Arm]) -> list[Arm]:
    """Arms that a name of the paper stands for: the arm without details if there is one, else all with any details."""
    available = list(available)
    return [wanted] if wanted in available else [arm for arm in available if arm.without_details == wanted]


def lookup(wanted: Arm, available: Iterable[Arm]) -> Arm | None:
    """The arm that a name of the paper stands for; None if there is none, or several."""
    found = candidates(wanted, available)
    return found[0] if len(found) == 1 else None


def describe_missing(wanted: Arm, available: Iterable[Arm]) -> str:
    """Says why `lookup` found no arm."""
    available = list(available)
    several = candidates(wanted, available)
    if several:
        details = [dict(arm.details) for arm in several]
        keys = sorted({key for settings in details for key in settings})
        values = {key: sorted({settings.get(key, "none") for settings in details}) for key in keys}
        values |= {"run_id": [arm.run_id for arm in several if arm.run_id]}
        differ = ", ".join(f"{key} = {' or '.join(found)}" for key, found in values.items() if found)
        return f"several configurations of {wanted}: {differ}"
    same = [arm for arm in available if dataclasses.replace(arm.without_details, setup=wanted.setup) == wanted]
    return f"missing {wanted}" + (f" (not compared: {'; '.join(map(str, same))})" if same else "")


def _number(spec: str, key: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf or (key != "noise" and number != int(number)):
        kind = "a number" if key == "noise" else "a whole number"
        raise UserError(f"{spec!r}: {key} = {value!r}: must be {kind} of at least 0, as in {_EXAMPLE}")
    return number
