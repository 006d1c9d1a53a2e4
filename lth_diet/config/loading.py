"""Reads a configuration: base files, overrides, validation."""

import difflib
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from lth_diet.config.fields import CONTROL_CHARACTERS, Section
from lth_diet.config.identity import DEFAULTS
from lth_diet.config.schema import Config
from lth_diet.config.yaml_files import MAX_DEPTH, ends_in_comment, parse, quote, read_tree
from lth_diet.data import catalog
from lth_diet.errors import UserError
from lth_diet.scores import artifact

Layer = tuple[str, dict[str, Any]]
"""A tree of settings, and where it is from."""
AnySection = TypeVar("AnySection", bound=Section)


def load_config(path: str | Path, overrides: Iterable[str] = (), layers: Iterable[Layer] = ()) -> Config:
    """Read, merge and validate a configuration.

    Args:
        path: A YAML file; its `base:` is a path relative to it, and is read first.
        overrides: `key.sub=value`, the value in YAML.
        layers: What is merged over the file before the overrides are, in order.

    Raises:
        UserError: With a sentence naming file, key, value and what is allowed.
    """
    tree, origin = _read(Path(path), ())
    for where, layer in [*layers, *(("command line", nested(*parse_override(text))) for text in overrides)]:
        tree, origin = _merge(tree, origin, layer, where)
    config = validate(Config, tree, origin, str(path))
    _check(config, functools.partial(_problem, origin, str(path)))
    return config


def parse_override(text: str) -> tuple[str, Any]:
    """Key and value of a `key.sub=value`.

    Raises:
        UserError: If it is none, or the value is no YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")) or key.count(".") >= MAX_DEPTH:
        raise UserError(f"command line: {quote(text)} is not an override; allowed: key.sub=value")
    parsed = parse(value, f"command line: {key}")
    if ends_in_comment(value):
        raise UserError(
            f"command line: {key}: {quote(value)} ends in a comment, for YAML; allowed: quotes within quotes, "
            f"as in {key}='\"...\"'"
        )
    return key, parsed


def nested(key: str, value: Any) -> dict[str, Any]:
    """`{"a": {"b": 1}}` of `"a.b", 1`."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def validate(section: type[AnySection], tree: dict[str, Any], origin: dict[str, str], path: str) -> AnySection:
    """A section of a tree.

    Args:
        section: Its class.
        tree: What was read.
        origin: Dotted key to where it is from.
        path: Of the file, for keys that have no origin.

    Raises:
        UserError: With a sentence naming file, key, value and what is allowed.
    """
    try:
        return section.model_validate(tree)
    except ValidationError as errors:
        unknown = [error for error in errors.errors() if error["type"] == "extra_forbidden"]
        raise _sentence([*unknown, *errors.errors()][0], origin, path) from None


def _problem(origin: dict[str, str], path: str, key: str, value: Any, allowed: str) -> UserError:
    where = next((origin[k] for k in _upwards(key) if k in origin), path)
    return UserError(f"{where}: {key}: {quote(value)} is not allowed; {allowed}")


def _upwards(key: str) -> Iterable[str]:
    parts = key.split(".")
    return (".".join(parts[:n]) for n in range(len(parts), 0, -1))


def _sentence(error: dict, origin: dict[str, str], path: str) -> UserError:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, DEFAULTS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(Config.model_fields)}"
        if key in DEFAULTS:  # written with its dot in a file
            hint = f"write {key.replace('.', ': {')}: ...{'}' * key.count('.')}"
        where = next((origin[k] for k in _upwards(key) if k in origin), path)
        return UserError(f"{where}: {key} is not a known key; {hint}")
    if error["type"] == "missing":
        return UserError(f"{path}: {key} is missing; give it here, in the base file or as {key}=... after the file")
    if error["type"] in ("model_type", "model_attributes_type"):
        return _problem(origin, path, key, error["input"], f"allowed: a section of keys below {key}:")
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "allowed:")
    return _problem(origin, path, key, error["input"], message)


def _check(config: Config, problem: Callable[..., UserError]) -> None:
    """What a field alone does not tell."""
    train, pretrain = config.train, config.pretrain
    if list(train.milestones) != sorted(set(train.milestones)):
        raise problem("train.milestones", list(train.milestones), "allowed: increasing steps")
    if config.arm != "init" and not 0 < config.rewind_step < train.steps:
        allowed = f"allowed: 1 to {train.steps - 1} (below train.steps), for arm: {config.arm}"
        raise problem("pretrain.steps", config.rewind_step, allowed)
    if config.arm in ("random", "easy", "hard") and pretrain.subset is None:
        raise problem("pretrain.subset", None, f"allowed: {{size: M}}, for arm: {config.arm}")
    try:
        data = catalog.info(config.dataset.name, config.dataset.root)
    except UserError as error:
        raise problem("dataset.root", config.dataset.root, str(error)) from None
    if train.batch_size > data.train_size:
        raise problem("train.batch_size", train.batch_size, f"allowed: up to the {data.train_size} training images")
    if config.subset_size is not None:
        offset = pretrain.subset.offset if config.needs_scores else 0
        if offset > data.train_size - train.batch_size:
            allowed = f"allowed: 0 to {data.train_size - train.batch_size} (a batch has to be left)"
            raise problem("pretrain.subset.offset", offset, allowed)
        last = data.train_size - offset
        if not train.batch_size <= config.subset_size <= last:
            allowed = f"allowed: {train.batch_size} (a batch) to {last} (the training images that can be taken)"
            raise problem("pretrain.subset.size", config.subset_size, allowed)
    if config.needs_scores and config.scores.file is not None:
        try:
            artifact.check_dataset(Path(config.scores.file), config.dataset.name, data.fingerprint)
        except UserError as error:
            raise problem("scores.file", config.scores.file, str(error)) from None


def _read(path: Path, children: tuple[Path, ...]) -> tuple[dict, dict[str, str]]:
    tree = read_tree(path, f", the base of {children[-1]}," if children else "")
    base = tree.pop("base", None)
    if base is None:
        return _merge({}, {}, tree, str(path))
    if not isinstance(base, str) or CONTROL_CHARACTERS.search(base):
        raise UserError(f"{path}: base: {quote(base)} is not allowed; allowed: a path relative to this file")
    if path.resolve() in [child.resolve() for child in children]:
        raise UserError(f"{path}: base: {base!r} is not allowed; the files are each other's base")
    return _merge(*_read(path.parent / base, (*children, path)), tree, str(path))


def _merge(base: dict, origin: dict[str, str], tree: dict, where: str, prefix: str = "") -> tuple[dict, dict]:
    """`tree` over `base`, section by section; `origin` tells for each dotted key which file gave it."""
    merged = dict(base)
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict):
            below = merged.get(key) if isinstance(merged.get(key), dict) else {}
            merged[key], origin = _merge(below, origin, value, where, f"{dotted}.")
        else:
            merged[key] = value
        origin = origin | {dotted: where}
    return merged, origin
