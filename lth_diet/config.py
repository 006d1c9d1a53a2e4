"""YAML to a validated configuration to a run id (no torch is imported here).

A configuration is plain YAML with `base:` inheritance and `key.sub=value` overrides. Its identity, the fields that
change a result, is hashed to the run id; see `Config.identity`.
"""

import collections
import difflib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from lth_diet import datasets, scores
from lth_diet.errors import UserError

_MOST_REPLICATES = 1000
_MOST = 2**31  # of a number of steps, images, channels ...
_MOST_BYTES = 1 << 16  # of a file
_MOST_DEEP = 20  # sections in sections
_MOST_DIGITS = 100  # of a number, in whatever notation
_NOT_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
Arm = Literal["init", "all", "random", "easy", "hard"]


def _steps(value: Any) -> int:
    match = re.fullmatch(r"(\d{1,20})(ba)?", str(value)) if not isinstance(value, bool) else None
    if match is None:
        raise ValueError("allowed: a number of batches, such as 400 or 400ba")
    return int(match[1])


def _real(value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)  # a string too: YAML 1.1 reads 1e-4 as one
    except (TypeError, ValueError):
        raise ValueError("allowed: a number") from None


def _replicates(value: Any) -> tuple[int, ...]:
    if type(value) is int and 0 < value <= _MOST_REPLICATES:
        return tuple(range(value))
    indices = value if isinstance(value, list | tuple) else []
    allowed = all(type(index) is int and 0 <= index < _MOST for index in indices)
    if allowed and 0 < len(indices) == len(set(indices)) <= _MOST_REPLICATES:
        return tuple(indices)
    raise ValueError(
        f"allowed: a count of 1 to {_MOST_REPLICATES}, such as 4, or a list of different indices such as [0, 2]"
    )


def _text(value: str) -> str:
    if _NOT_TEXT.search(value):
        raise ValueError("allowed: text without control characters")
    return value


Steps = Annotated[int, BeforeValidator(_steps), Field(lt=_MOST)]
Interval = Annotated[Steps, Field(gt=0)]
Real = Annotated[float, BeforeValidator(_real), Field(allow_inf_nan=False)]
Positive = Annotated[Real, Field(gt=0)]
NotNegative = Annotated[Real, Field(ge=0)]
Count = Annotated[int, Field(strict=True, gt=0, lt=_MOST)]
Index = Annotated[int, Field(strict=True, ge=0, lt=_MOST)]
Text = Annotated[str, Field(strict=True, min_length=1), AfterValidator(_text)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Dataset(Section):
    name: Literal["cifar10", "cifar100", "cinic10", "image_folder", "digits"]
    root: Text = "data"
    """Folder of the data; downloads go there. Not identity: an image folder enters by its fingerprint."""


def _depth(value: Any) -> int:
    if type(value) is not int or not 8 <= value <= 1202 or value % 6 != 2:
        raise ValueError("allowed: 6n + 2, such as 20, 32 or 56, up to 1202")
    return value


class Model(Section):
    depth: Annotated[int, BeforeValidator(_depth)]
    width: Annotated[Count, Field(le=1024)] = 16
    """Channels of the first stage; the next have two and four times as many."""


class Subset(Section):
    size: Count
    class_balanced: Annotated[bool, Field(strict=True)] = False
    """Of easy and hard; a random subset is always balanced (paper, section 3)."""
    offset: Index = 0
    """Skip that many of the easiest or hardest."""


class Pretrain(Section):
    steps: Steps = 0
    """t_r, the rewind step, in batches; it counts towards train.steps."""
    lr: Positive = 0.4
    subset: Subset | None = None
    label_noise: Annotated[Real, Field(ge=0, le=1)] = 0.0
    """Fraction of the training labels drawn anew, during pre-training only."""


class Train(Section):
    steps: Interval
    """T, in batches: a level trains from t_r to T."""
    batch_size: Count
    lr: Positive = 0.1
    momentum: Annotated[Real, Field(ge=0, lt=1)] = 0.9
    weight_decay: NotNegative = 1e-4
    milestones: tuple[Steps, ...] = ()
    """Absolute steps at which the learning rate is multiplied by gamma."""
    gamma: Positive = 0.1


class Prune(Section):
    fraction: Annotated[Real, Field(gt=0, lt=1)] = 0.2
    """Share of the surviving weights that one pruning removes."""
    levels: Index = 20
    """N prunings, N + 1 trainings."""


class Scores(Section):
    """EL2N, of the easy and hard arms; networks train as `train` says, without pre-training."""

    networks: Count = 10
    """K, from different initialisations."""
    steps: Interval = 7800
    """t, after which they are evaluated."""
    file: Text | None = None
    """A scores.safetensors to use instead; it enters the identity by its sha256."""


class Intervals(Section):
    log: Interval = 100
    checkpoint: Interval = 1000
    evaluate: Steps = 0
    """Batches between evaluations inside a phase; 0: only at its end."""


class Config(Section):
    """One arm. The defaults are frozen: a run id hashes what differs from them, so changing one changes old ids."""

    arm: Arm
    dataset: Dataset
    model: Model
    train: Train
    pretrain: Pretrain = Pretrain()
    prune: Prune = Prune()
    scores: Scores = Scores()
    replicates: Annotated[tuple[int, ...], BeforeValidator(_replicates)] = (0, 1, 2, 3)
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 42
    threads: Annotated[Count, Field(le=1024)] = 1
    """CPU threads a process. Identity: sums depend on how they are split."""
    parallelism: Literal["replicates", "data"] = "replicates"
    """replicates: a rank trains replicates of its own. data: all ranks train each replicate together (DDP)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: fp32 on CPU, bf16 on GPU."""
    deterministic: Annotated[bool, Field(strict=True)] = False
    """Deterministic kernels on GPU; on CPU the same bits are promised without."""
    compile: Annotated[bool, Field(strict=True)] = False
    """Train a network that torch.compile has translated, on GPU with CUDA graphs; once a process, not once a level."""
    intervals: Intervals = Intervals()
    runs: Text = "runs"
    experiment: Text | None = None
    """MLflow experiment; the name of the dataset if none is given."""

    @property
    def rewind_steps(self) -> int:
        """t_r: the step that a level starts from."""
        return 0 if self.arm == "init" else self.pretrain.steps

    @property
    def subset_size(self) -> int | None:
        """Examples seen in pre-training; None: all of them, or no pre-training."""
        return self.pretrain.subset.size if self.arm in ("random", "easy", "hard") else None

    @property
    def label_noise(self) -> float:
        """Fraction of labels drawn anew in pre-training."""
        return 0.0 if self.arm == "init" else self.pretrain.label_noise

    @property
    def experiment_name(self) -> str:
        """The MLflow experiment."""
        return self.experiment or self.dataset.name

    @property
    def arm_in_words(self) -> str:
        """Such as `random 2048, t_r = 200, 10 % noise`."""
        size = f" {self.subset_size}" if self.subset_size is not None else ""
        steps = f", t_r = {self.rewind_steps}" if self.arm != "init" else ""
        noise = f", {100 * self.label_noise:g} % noise" if self.label_noise else ""
        return f"{self.arm}{size}{steps}{noise}"

    @property
    def model_name(self) -> str:
        return f"ResNet-{self.model.depth}" + (f" width {self.model.width}" if self.model.width != 16 else "")

    @property
    def needs_scores(self) -> bool:
        """Whether the arm chooses examples by score."""
        return self.arm in ("easy", "hard")

    def identity(self) -> dict[str, Any]:
        """The fields that change a result, in dotted keys, without those that the arm ignores."""
        fields = self._fields()
        ignored = ["prune.levels"]
        if self.arm == "init":
            ignored += ["pretrain."]
        if not self.needs_scores:
            ignored += ["scores.", "pretrain.subset.class_balanced", "pretrain.subset.offset"]
        elif self.scores.file is not None:
            ignored += ["scores.networks", "scores.steps"]
            fields["scores.file"] = scores.manifest_of(Path(self.scores.file))["sha256"]
        if self.arm not in ("random", "easy", "hard"):
            ignored += ["pretrain.subset"]
        if self.parallelism == "replicates":
            ignored += ["parallelism"]
        return {key: value for key, value in fields.items() if not key.startswith(tuple(ignored))}

    def scores_identity(self) -> dict[str, Any]:
        """The fields that change the scores, in dotted keys: arms that agree in them share one artifact."""
        fields = self._fields()
        heeded = ("dataset.", "model.", "train.", "pretrain.label_noise", "scores.networks", "scores.steps")
        heeded += ("seed", "threads", "precision", "deterministic", "compile")
        milestones = tuple(step for step in self.train.milestones if step < self.scores.steps)
        ignored = ("train.steps",) if milestones else ("train.steps", "train.gamma")
        fields["train.milestones"] = milestones
        return {key: value for key, value in fields.items() if key.startswith(heeded) and key not in ignored}

    def _fields(self) -> dict[str, Any]:
        fields = flatten(self.model_dump(exclude={"replicates", "runs", "experiment", "intervals"}))
        del fields["dataset.root"]
        if self.dataset.name == "image_folder":
            fields["dataset.fingerprint"] = datasets.facts(self.dataset.name, self.dataset.root).fingerprint
        return fields

    def run_id(self) -> str:
        """Ten hexadecimal digits: the hash of the identity fields that differ from their frozen defaults."""
        return _hash(self.identity())

    def scores_id(self) -> str:
        """As `run_id`, of the scores."""
        return _hash(self.scores_identity())

    @property
    def run_name(self) -> str:
        """Name of the run directory."""
        return f"{self.dataset.name}_{self.arm}-{self.run_id()}"


def _hash(fields: dict[str, Any]) -> str:
    different = {key: value for key, value in fields.items() if DEFAULTS.get(key) != value}
    return hashlib.sha256(json.dumps(different, sort_keys=True).encode()).hexdigest()[:10]


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`."""
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
"""Dotted key to frozen default of every field (None: it has none)."""


Layer = tuple[str, dict[str, Any]]
"""A tree of settings, and where it is from."""
AnySection = TypeVar("AnySection", bound=Section)


def load(path: str | Path, overrides: Iterable[str] = (), layers: Iterable[Layer] = ()) -> Config:
    """Read, merge and validate a configuration.

    Args:
        path: A YAML file; its `base:` is a path relative to it, and is read first.
        overrides: `key.sub=value`, the value in YAML.
        layers: What is merged over the file before the overrides are, in order.

    Raises:
        UserError: With a sentence naming file, key, value and what is allowed.
    """
    tree, origin = _read(Path(path), ())
    for where, layer in [*layers, *(("command line", nested(*override(text))) for text in overrides)]:
        tree, origin = _merge(tree, origin, layer, where)
    config = validate(Config, tree, origin, str(path))
    _check(config, functools.partial(_problem, origin, str(path)))
    return config


def override(text: str) -> tuple[str, Any]:
    """Key and value of a `key.sub=value`.

    Raises:
        UserError: If it is none, or the value is no YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")) or key.count(".") >= _MOST_DEEP:
        raise UserError(f"command line: {short(text)} is not an override; allowed: key.sub=value")
    parsed = parse(value, f"command line: {key}")
    if _ends_in_comment(value):
        raise UserError(
            f"command line: {key}: {short(value)} ends in a comment, for YAML; allowed: quotes within quotes, "
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
    return UserError(f"{where}: {key}: {short(value)} is not allowed; {allowed}")


def _upwards(key: str) -> Iterable[str]:
    parts = key.split(".")
    return (".".join(parts[:n]) for n in range(len(parts), 0, -1))


def short(value: Any) -> str:
    """As it is quoted in a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


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
    if config.arm != "init" and not 0 < config.rewind_steps < train.steps:
        allowed = f"allowed: 1 to {train.steps - 1} (below train.steps), for arm: {config.arm}"
        raise problem("pretrain.steps", config.rewind_steps, allowed)
    if config.arm in ("random", "easy", "hard") and pretrain.subset is None:
        raise problem("pretrain.subset", None, f"allowed: {{size: M}}, for arm: {config.arm}")
    try:
        data = datasets.facts(config.dataset.name, config.dataset.root)
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
            scores.refuse_other_data(Path(config.scores.file), config.dataset.name, data.fingerprint)
        except UserError as error:
            raise problem("scores.file", config.scores.file, str(error)) from None


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, and what lets a short file become a huge tree or number."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _not_here("an alias; write what it stands for", event.start_mark)
        if event.tag is not None:
            raise _not_here(f"a tag, {event.tag}; allowed: values without", event.start_mark)
        self.depth += 1
        if self.depth > _MOST_DEEP:
            raise _not_here(f"more than {_MOST_DEEP} sections or lists in each other", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _not_here(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    keys = (loader.construct_object(key, deep=True) for key, _ in node.value)
    for key, count in collections.Counter(key for key in keys if isinstance(key, Hashable)).items():
        if count > 1:
            raise _not_here(f"the key {short(key)} stands twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    if len(node.value) <= _MOST_DIGITS and abs(number := loader.construct_yaml_int(node)) < 2**63:
        return number
    raise _not_here("a number of more than 64 bits", node.start_mark)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse(text: str, where: str) -> Any:
    """Safe YAML.

    Raises:
        UserError: If it is none; `where` is its subject.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: not YAML{line}: {reason}") from None


def _ends_in_comment(text: str) -> bool:
    value = yaml.compose(text)
    return "#" in (text[value.end_mark.index :] if value else text)


def read_tree(path: Path, named: str = "") -> dict[str, Any]:
    """Keys and values of a YAML file.

    Args:
        path: Of the file.
        named: Where its name stands, for the sentence.

    Raises:
        UserError: If it cannot be read or holds something else.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError
        text = content.decode()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not text of up to {_MOST_BYTES:,} bytes"
        raise UserError(f"{path}{named} cannot be read: {reason}") from None
    tree = parse(text, str(path))
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise UserError(f"{path}: not a configuration; allowed: keys and values, as in yamls/cifar10_all.yaml")
    return tree


def _read(path: Path, children: tuple[Path, ...]) -> tuple[dict, dict[str, str]]:
    tree = read_tree(path, f", the base of {children[-1]}," if children else "")
    base = tree.pop("base", None)
    if base is None:
        return _merge({}, {}, tree, str(path))
    if not isinstance(base, str) or _NOT_TEXT.search(base):
        raise UserError(f"{path}: base: {short(base)} is not allowed; allowed: a path relative to this file")
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
