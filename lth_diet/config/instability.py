"""Keys of `recipes/instability.py`, beside those of an arm."""

import dataclasses
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import Field

from lth_diet.config import loading
from lth_diet.config.fields import Count, Index, Section, Steps
from lth_diet.config.loading import Loaded
from lth_diet.config.schema import Config
from lth_diet.config.yaml_files import quote
from lth_diet.data import catalog
from lth_diet.errors import UserError

MAX_STEPS = 20


class InstabilityKeys(Section):
    """Keys of the command line that say which networks an instability analysis trains."""

    steps: tuple[Steps, ...] = ()
    """Steps k of pre-training from which copies are trained, less than train.steps; by default the rewind step."""
    copies: Annotated[Count, Field(ge=2, le=16)] = 2
    """Copies trained from each step, with different data order and augmentation; errors are measured between pairs."""
    level: Annotated[Index, Field(le=10_000)] = 0
    """Level whose mask the copies have; 0 is dense. Other masks are those of the finished run that rewinds to k."""


@dataclasses.dataclass(frozen=True)
class LoadedInstability(Loaded):
    """The configuration of an instability analysis, whose `pretrain.steps` is its last step k.

    Attributes:
        arm_config: Configuration of the arm, as its file has it.
        keys: Keys of the analysis. Its steps are in increasing order.
    """

    arm_config: Config
    keys: InstabilityKeys


def load_instability(path: str | Path, overrides: Iterable[str] = ()) -> LoadedInstability:
    """Read the configuration of an arm and the keys of an instability analysis among the overrides.

    Raises:
        UserError: If the configuration, a key or a value is invalid.
    """
    pairs = [(text, *loading.parse_override(text)) for text in overrides]
    for _, key, _ in pairs:
        near = difflib.get_close_matches(key, InstabilityKeys.model_fields, n=1, cutoff=0.75)
        if near and key not in {**InstabilityKeys.model_fields, **Config.model_fields}:
            raise UserError(f"{key} on the command line is not a known key; did you mean {near[0]}?")
    loaded = loading.load(path, [text for text, key, _ in pairs if key not in InstabilityKeys.model_fields])
    own = [(key, value) for _, key, value in pairs if key in InstabilityKeys.model_fields]
    config, tree = loaded.config, dict(own)
    where = dict.fromkeys(tree, "command line")

    def batches_per_epoch() -> int:
        return catalog.info(config.dataset.name, config.dataset.root).train_size // config.train.batch_size

    keys = loading.validate(InstabilityKeys, tree, where, str(path), batches_per_epoch)
    steps = tuple(sorted(keys.steps)) if "steps" in tree else (config.rewind_step,)
    problem = _problem(config, steps)
    if problem:
        raise UserError(f"steps = {quote(tree['steps'])} on the command line: {problem}")
    if config.parallelism == "data":
        raise UserError(
            f"parallelism = 'data' {loaded.where['parallelism']}: must be replicates for instability analysis"
        )
    pretrain = config.pretrain.model_copy(update={"steps": steps[-1]})
    fields = {field.name: getattr(loaded, field.name) for field in dataclasses.fields(loaded)}
    fields["config"] = config.model_copy(update={"pretrain": pretrain})
    fields["repeated"] += loading.repeated_keys(key for key, _ in own)
    return LoadedInstability(**fields, arm_config=config, keys=keys.model_copy(update={"steps": steps}))


def _problem(config: Config, steps: tuple[int, ...]) -> str:
    """Say what is wrong with steps, in increasing order; an empty string if nothing is."""
    if not 0 < len(set(steps)) == len(steps) <= MAX_STEPS:
        return f"must be 1 to {MAX_STEPS} different steps, such as [0, 20, 40]"
    if steps[-1] >= config.train.steps:
        return f"must be less than train.steps = {config.train.steps}"
    if config.arm == "init" and steps != (0,):
        return "must be [0] for arm: init, which has no pre-training; use another arm, whose step 0 is the same network"
    return ""
