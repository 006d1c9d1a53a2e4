"""Loads a configuration: merges base files and overrides, and validates the result."""

import collections
import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from lth_diet.config.blocks import blocks_problem
from lth_diet.config.fields import CONTROL_CHARACTERS, MAX_REPLICATES, Count, Section
from lth_diet.config.run_ids import DEFAULTS, flatten
from lth_diet.config.schema import Config, Dataset
from lth_diet.config.weights import levels_problem
from lth_diet.config.yaml_files import MAX_DEPTH, ends_in_comment, parse, quote, read_tree
from lth_diet.data import catalog
from lth_diet.data.dataset import DatasetInfo
from lth_diet.errors import UserError, expand_path
from lth_diet.scores import artifact

Layer = tuple[str, dict[str, Any]]
"""Where settings are from, and the settings."""
AnySection = TypeVar("AnySection", bound=Section)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A configuration, and where its values are from.

    Attributes:
        path: Its file.
        config: The configuration.
        where: Where each given value is from, by dotted key, such as "on the command line".
        written: The keys of `where` that were not given in a base file, which arms share.
        repeated: Keys that were given more than once on the command line.
    """

    path: Path
    config: Config
    where: dict[str, str]
    written: frozenset[str]
    repeated: tuple[str, ...]


def load_config(path: str | Path, overrides: Iterable[str] = (), layers: Iterable[Layer] = ()) -> Config:
    """Read, merge and validate a configuration.

    Args:
        path: YAML file. Its `base:`, a path relative to it, is read first.
        overrides: Settings `key.sub=value`, with the value in YAML.
        layers: Settings merged in order over the file and under the overrides. The file is then a base file.

    Raises:
        UserError: If a file cannot be read, or a key or value is invalid.
    """
    return load(path, overrides, layers).config


def load(path: str | Path, overrides: Iterable[str] = (), layers: Iterable[Layer] = ()) -> Loaded:
    """As `load_config`, with where the values are from."""
    tree, origin = _read(Path(path), ())
    given = [parse_override(text) for text in overrides]
    layers = list(layers)
    for where, layer in [*layers, *(("command line", nested(*pair)) for pair in given)]:
        tree, origin = _merge(tree, origin, layer, where)
    invalid = functools.partial(_invalid, origin, str(path))
    config = validate(Config, tree, origin, str(path), functools.partial(_batches_per_epoch, tree, invalid))
    _check(config, invalid)
    sources = {"command line", *(where for where, _ in layers)} if layers else {"command line", str(path)}
    where = {key: _location(origin, "", key) for key in flatten(config.model_dump()) if key in origin}
    written = frozenset(key for key in where if origin[key] in sources)
    return Loaded(Path(path), config, where, written, repeated_keys(key for key, _ in given))


def repeated_keys(keys: Iterable[str]) -> tuple[str, ...]:
    """Return the keys that occur more than once."""
    return tuple(key for key, count in collections.Counter(keys).items() if count > 1)


def parse_override(text: str) -> tuple[str, Any]:
    """Split an override `key.sub=value` into its key and its parsed value.

    Raises:
        UserError: If the text is not an override, or its value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")) or key.count(".") >= MAX_DEPTH:
        raise UserError(f"command line: {quote(text)} is not an override; expected key.sub=value")
    parsed = parse(value, f"{key} on the command line")
    if ends_in_comment(value):
        raise UserError(
            f"{key} = {quote(value)} on the command line: must not end in a YAML comment; quote it for YAML, as in "
            f"{key}='\"...\"'"
        )
    return key, parsed


def nested(key: str, value: Any) -> dict[str, Any]:
    """Nested sections from a dotted key: `"a.b", 1` becomes `{"a": {"b": 1}}`."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def validate(
    section: type[AnySection],
    tree: dict[str, Any],
    origin: dict[str, str],
    path: str,
    batches_per_epoch: Callable[[], int] | None = None,
) -> AnySection:
    """Build a section from settings.

    Args:
        section: Class of the section.
        tree: The settings.
        origin: Where each setting is from, by dotted key.
        path: Path of the file, for keys without an origin.
        batches_per_epoch: Called to convert epochs; required if the section has steps.

    Raises:
        UserError: If a key is unknown or missing, or a value is invalid.
    """
    try:
        return section.model_validate(tree, context=batches_per_epoch)
    except ValidationError as errors:
        unknown = [error for error in errors.errors() if error["type"] == "extra_forbidden"]
        raise _to_user_error([*unknown, *errors.errors()][0], origin, path) from None


def _invalid(origin: dict[str, str], path: str, key: str, value: Any, problem: str) -> UserError:
    return UserError(f"{key} = {quote(value)} {_location(origin, path, key)}: {problem}")


def _location(origin: dict[str, str], path: str, key: str) -> str:
    """Where a key, or else its innermost section with a known origin, was set."""
    parts = key.split(".")
    sections = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    where = next((origin[section] for section in sections if section in origin), path)
    return "on the command line" if where == "command line" else f"in {where}"


def _to_user_error(error: dict, origin: dict[str, str], path: str) -> UserError:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, {**DEFAULTS, **Config.model_fields}, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"known keys are {', '.join(Config.model_fields)}"
        if key == "arms" and origin.get(key) != "command line":
            hint = "a file with arms is of a sweep: use recipes/sweep.py"
        if key in DEFAULTS:  # written with its dot in a file
            hint = f"write {key.replace('.', ': {')}: ...{'}' * key.count('.')}"
        return UserError(f"{key} {_location(origin, path, key)} is not a known key; {hint}")
    if error["type"] == "missing":
        also = ""
        if key.split(".")[0] in Config.model_fields:  # else it is a key of a sweep file
            also = f", to its base file, or as {key}=... on the command line"
        return UserError(f"{key} is missing in {path}; add it to this file{also}")
    if error["type"] == "invalid_key":
        section = key.rpartition(".")[0]
        return UserError(f"the key {quote(error['input'])} of {section} {_location(origin, path, key)} must be text")
    if error["type"] in _PROBLEMS:
        problem = _PROBLEMS[error["type"]]
        if error["type"] == "tuple_type":
            problem += ", such as [[200, 300]] in a grid" if "entry " in origin.get(key, "") else ", such as [200, 300]"
        if error["type"] == "string_type" and error["input"] is None:  # YAML's reading of ~
            problem = "must not be empty; write ~/ for the home folder"
    else:
        problem = re.sub("^(Input|String) should", "must", error["msg"].removeprefix("Value error, "))
    return _invalid(origin, path, key, error["input"], problem)


_PROBLEMS = {
    "model_type": "must be a section of keys",
    "tuple_type": "must be a list",
    "bool_type": "must be true or false",
    "int_type": "must be an integer",
    "string_type": "must be text; quote it for YAML if it is meant as text",
    "string_too_short": "must not be empty",
}


def _batches_per_epoch(tree: dict[str, Any], invalid: Callable[[str, Any, str], UserError]) -> int:
    """Training images // batch size, also under a subset; 1 if one of them is invalid, which is reported elsewhere."""
    try:
        dataset = Dataset.model_validate(tree.get("dataset"))
        batch_size = TypeAdapter(Count).validate_python(tree["train"]["batch_size"])
    except (ValidationError, LookupError, TypeError):
        return 1
    return max(_dataset_info(dataset, invalid).train_size // batch_size, 1)


def _dataset_info(dataset: Dataset, invalid: Callable[[str, Any, str], UserError]) -> DatasetInfo:
    try:
        return catalog.info(dataset.name, dataset.root)
    except UserError as error:
        raise invalid("dataset.root", dataset.root, str(error)) from None


def _check(config: Config, invalid: Callable[[str, Any, str], UserError]) -> None:
    """Check values against each other and against the dataset."""
    train, pretrain = config.train, config.pretrain
    if list(train.milestones) != sorted(set(train.milestones)):
        raise invalid("train.milestones", list(train.milestones), "must be increasing steps")
    if config.arm != "init" and not 0 < config.rewind_step < train.steps:
        expected = f"must be between 1 and {train.steps - 1} (less than train.steps) for arm: {config.arm}"
        raise invalid("pretrain.steps", config.rewind_step, expected)
    if config.arm in ("random", "easy", "hard") and pretrain.subset is None:
        raise invalid("pretrain.subset", None, f"must be {{size: M}} for arm: {config.arm}")
    if config.stack > 1 and config.parallelism == "data":
        raise invalid("stack", config.stack, "must be 1 with parallelism: data")
    if problem := blocks_problem(config.replicates, config.stack, MAX_REPLICATES):
        replicates = config.replicates
        is_count = replicates == tuple(range(len(replicates)))
        raise invalid("replicates", len(replicates) if is_count else list(replicates), problem)
    data = _dataset_info(config.dataset, invalid)
    if problem := levels_problem(config):
        raise invalid("prune.levels", config.prune.levels, problem)
    if train.batch_size > data.train_size:
        expected = f"must be at most {data.train_size}, the number of training images"
        raise invalid("train.batch_size", train.batch_size, expected)
    if config.subset_size is not None:
        offset = pretrain.subset.offset if config.needs_scores else 0
        if offset > data.train_size - train.batch_size:
            expected = f"must be between 0 and {data.train_size - train.batch_size}, to leave one batch"
            raise invalid("pretrain.subset.offset", offset, expected)
        available = data.train_size - offset
        if not train.batch_size <= config.subset_size <= available:
            expected = f"must be between {train.batch_size} (one batch) and {available} (the available training images)"
            raise invalid("pretrain.subset.size", config.subset_size, expected)
    if config.needs_scores and config.scores.file is not None:
        file = Path(config.scores.file)
        if file.suffix != ".safetensors" and not file.is_dir():
            problem = "must be a scores.safetensors; save scores of your own with save_scores, as in docs/extending.md"
            raise invalid("scores.file", config.scores.file, problem)
        try:
            artifact.check_dataset(Path(config.scores.file), config.dataset.name, data)
        except UserError as error:
            raise invalid("scores.file", config.scores.file, str(error)) from None


def _read(path: Path, children: tuple[Path, ...]) -> tuple[dict, dict[str, str]]:
    tree = read_tree(path, f", the base of {children[-1]}," if children else "")
    base = tree.pop("base", None)
    if base is None:
        return _merge({}, {}, tree, str(path))
    if not isinstance(base, str) or CONTROL_CHARACTERS.search(base):
        raise UserError(f"base = {quote(base)} in {path}: must be a path relative to this file")
    try:
        base = expand_path(base)
    except ValueError as error:
        raise UserError(f"base = {base!r} in {path}: {error}") from None
    if path.resolve() in [child.resolve() for child in children]:
        raise UserError(f"base = {base!r} in {path}: must not lead back to this file")
    return _merge(*_read(path.parent / base, (*children, path)), tree, str(path))


def _merge(base: dict, origin: dict[str, str], tree: dict, where: str, prefix: str = "") -> tuple[dict, dict]:
    """Merge `tree` over `base`, section by section, and record in `origin` where each dotted key is from."""
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
