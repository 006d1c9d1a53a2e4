"""Run ids: hashes of the configuration fields that change a result."""

import hashlib
import json
from pathlib import Path
from typing import Any, get_args

from lth_diet.config.fields import Section
from lth_diet.config.schema import Config
from lth_diet.data import catalog
from lth_diet.scores import artifact


def run_id(config: Config, fingerprint: str | None = None) -> str:
    """Run id: ten hexadecimal digits, a hash of the identity fields that differ from their frozen defaults.

    Args:
        config: Configuration of the run.
        fingerprint: Fingerprint of other images, to get the id that a run on them has.
    """
    return _hash(run_identity(config) | _replace(fingerprint))


def run_name(config: Config, fingerprint: str | None = None) -> str:
    """Name of the run directory: `<dataset>_<arm>-<run id>`. Arguments as of `run_id`."""
    return f"{config.dataset.name}_{config.arm}-{run_id(config, fingerprint)}"


def scores_id(config: Config, fingerprint: str | None = None) -> str:
    """Id of the scores: ten hexadecimal digits, a hash of `scores_identity`. Arguments as of `run_id`."""
    return _hash(scores_identity(config) | _replace(fingerprint))


def _replace(fingerprint: str | None) -> dict[str, str]:
    return {} if fingerprint is None else {"dataset.fingerprint": fingerprint}


def run_identity(config: Config) -> dict[str, Any]:
    """Fields that change the result of a run, by dotted key, without those that its arm ignores."""
    fields = _fields(config)
    if config.needs_scores and config.scores.file is not None:
        fields["scores.file"] = artifact.read_manifest(Path(config.scores.file))["sha256"]
    return without_ignored(fields)


def without_ignored(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a configuration, by dotted key, without those that its arm ignores."""
    ignored = ["prune.levels"]
    if fields["arm"] == "init":
        ignored += ["pretrain."]
    if fields["arm"] not in ("easy", "hard"):
        ignored += ["scores.", "pretrain.subset.class_balanced", "pretrain.subset.offset"]
    elif fields["scores.file"] is not None:
        ignored += ["scores.networks", "scores.steps"]
    if fields["arm"] not in ("random", "easy", "hard"):
        ignored += ["pretrain.subset"]
    if fields["parallelism"] == "replicates":
        ignored += ["parallelism"]
    if fields["stack"] == 1:
        ignored += ["stack"]
    return {key: value for key, value in fields.items() if not key.startswith(tuple(ignored))}


def scores_identity(config: Config) -> dict[str, Any]:
    """Fields that change the scores, by dotted key; arms with equal values share one set of scores."""
    fields = _fields(config)
    used = ("dataset.", "model.", "train.", "pretrain.label_noise", "scores.networks", "scores.steps")
    used += ("seed", "threads", "precision", "deterministic", "compile", "variant")
    used += ("stack",) * (config.stack > 1)
    milestones = tuple(step for step in config.train.milestones if step < config.scores.steps)
    ignored = ("train.steps",) if milestones else ("train.steps", "train.gamma")
    fields["train.milestones"] = milestones
    return {key: value for key, value in fields.items() if key.startswith(used) and key not in ignored}


def instability_id(config: Config, level: int, copies: int) -> str:
    """Id of an instability analysis: ten hexadecimal digits, a hash of `instability_identity`."""
    return _hash(instability_identity(config, level, copies))


def instability_identity(config: Config, level: int, copies: int) -> dict[str, Any]:
    """Fields that change the result of an instability analysis at any step k, by dotted key."""
    ignored = {"pretrain.steps"} | ({"prune.fraction"} if level == 0 else set())
    fields = {key: value for key, value in run_identity(config).items() if key not in ignored}
    return fields | {"instability.level": level, "instability.copies": copies}


def _fields(config: Config) -> dict[str, Any]:
    fields = flatten(config.model_dump(exclude={"replicates", "runs", "experiment", "intervals"}))
    del fields["dataset.root"]
    if config.dataset.name == "image_folder":
        fields["dataset.fingerprint"] = catalog.info(config.dataset.name, config.dataset.root).fingerprint
    return fields


def _hash(fields: dict[str, Any]) -> str:
    different = {key: value for key, value in fields.items() if DEFAULTS.get(key) != value}
    return hashlib.sha256(json.dumps(different, sort_keys=True).encode()).hexdigest()[:10]


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """Nested sections as dotted keys: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    flat = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _defaults(section: type[Section], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, field in section.model_fields.items():
        inner = next((t for t in (field.annotation, *get_args(field.annotation)) if _is_section(t)), None)
        if inner is not None:
            flat |= _defaults(inner, f"{prefix}{name}.")
        if inner is None or field.default is None:
            flat[f"{prefix}{name}"] = None if field.is_required() else field.default
    return flat


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


DEFAULTS = _defaults(Config)
"""Frozen default of every field, by dotted key; None for required fields."""

OUTSIDE_IDENTITY = frozenset(
    key
    for key in DEFAULTS
    if key in ("dataset.root", "replicates", "runs", "experiment", "prune.levels") or key.startswith("intervals.")
)
"""Fields that are used, but change no result."""
