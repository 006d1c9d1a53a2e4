"""Identities of runs: which runs are replicates of one arm, and which arms can be compared.

An identity maps the keys of a configuration that change its result to their values, as text. Runs whose identities
differ only in the seed are replicates of one arm. Arms can be compared if they differ only in their pre-training
(`arm`, `pretrain.*`, `scores.*`) or in numerical settings; everything else is their setup.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from lth_diet.config.run_ids import DEFAULTS, OUTSIDE_IDENTITY, without_ignored

Identity = Mapping[str, str]
NUMERICAL = ("threads", "precision", "compile", "deterministic", "stack", "parallelism", "ranks")
"""Settings that change the rounding: arms that differ in them are not pooled, but can be compared."""
UNKNOWN = "identity"
"""Key of an identity that was not recorded, as in a CSV file without the column of that name."""
_TEXTS = ("dataset.fingerprint", "scores.file")  # hexadecimal digits, which may look like a number


def from_params(params: Mapping[str, str], ranks: str | None) -> dict[str, Any]:
    """Identity from the parameters of an MLflow run, without the keys that have their default.

    Args:
        params: Parameters as text.
        ranks: Number of ranks that trained each replicate together, if it was recorded.
    """
    values = {key: text if key in _TEXTS and text != "None" else parse(text) for key, text in params.items()}
    if values.get("parallelism") == "data":
        values["ranks"] = parse(ranks) if ranks else "unknown"
    return {key: value for key, value in values.items() if to_text(value) != to_text(DEFAULTS.get(key))}


def parse(text: str) -> Any:
    """Value of a parameter that MLflow stores as `str(value)`."""
    words = {"None": None, "True": True, "False": False}
    try:
        return words[text] if text in words else json.loads(text)
    except ValueError:
        return text


def normalize(identity: Mapping[str, Any]) -> Identity:
    """Identity without seed and the keys that its arm ignores, with the defaults of the keys that it lacks."""
    defaults = {key: value for key, value in DEFAULTS.items() if key not in OUTSIDE_IDENTITY}
    fields = without_ignored(defaults | dict(identity))
    return {key: to_text(value) for key, value in fields.items() if value is not None and key != "seed"}


def to_text(value: Any) -> str:
    """Value as in a YAML file, such as `0.1`, `true` or `[200, 300]`."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value)


def setup(identity: Identity) -> Identity:
    """The part of an identity in which arms must agree to be compared."""
    return {key: value for key, value in identity.items() if not _may_differ(key) and key not in NUMERICAL}


def _may_differ(key: str) -> bool:
    return key in ("arm", "seed") or key.startswith(("pretrain.", "scores."))


def differing_keys(identities: Iterable[Identity]) -> list[str]:
    """Keys in which some identities differ, sorted.

    Unknown identities differ from the known ones in `UNKNOWN`, and are compared among themselves in what is known.
    """
    identities = list(identities)
    unknown = [identity for identity in identities if UNKNOWN in identity]
    known = [identity for identity in identities if UNKNOWN not in identity]
    keys = {UNKNOWN} if unknown and known else set()
    for part in (unknown, known):
        keys |= {key for identity in part for key in identity if len({other.get(key) for other in part}) > 1}
    return sorted(keys)


def differences(ours: Identity, theirs: Identity) -> tuple[str, str]:
    """Says in what two arms differ, each as text such as `train.lr = 0.1 and 0.2`; empty if they agree.

    Returns:
        The differences that forbid a comparison, and those in numerical settings.
    """
    keys = differing_keys([ours, theirs]) if ours and theirs else []
    forbidden = [key for key in keys if not _may_differ(key) and key not in NUMERICAL]
    numerical = [key for key in keys if key in NUMERICAL]
    if UNKNOWN in keys:
        return "their identity, which was not recorded for one of them", ""
    return describe_differences(ours, theirs, forbidden), describe_differences(ours, theirs, numerical)


def describe_differences(ours: Identity, theirs: Identity, keys: Iterable[str]) -> str:
    """Both values of some keys, such as `train.lr = 0.1 and 0.2`."""
    return ", ".join(f"{key} = {value(ours, key)} and {value(theirs, key)}" for key in keys)


def value(identity: Identity, key: str) -> str:
    """Value of a key as text; its default if the identity lacks it."""
    default = 1 if key == "ranks" else DEFAULTS.get(key)
    return identity.get(key, "none" if default is None else to_text(default))
