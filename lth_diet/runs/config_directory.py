"""A directory with a config.json that says which configuration created it."""

import json
import os
from pathlib import Path
from typing import Any

from lth_diet.config.run_ids import DEFAULTS
from lth_diet.config.schema import Config
from lth_diet.errors import UserError
from lth_diet.files import read_json, write_json
from lth_diet.runs.run_store import RunStore

_RUN_TYPES = {
    **dict.fromkeys(("run_id", "dataset", "model", "arm", "experiment"), str),
    **dict.fromkeys(("rewind_steps", "seed", "train_steps", "planned_levels"), int),
    "identity": dict,
    "subset_size": int | None,
    "label_noise": float | int,
    "ranks": int | None,
}
_SCORES_TYPES = {
    **dict.fromkeys(("scores_id", "dataset", "model", "experiment"), str),
    **dict.fromkeys(("seed", "networks", "steps"), int),
    "identity": dict,
    "label_noise": float | int,
}
_INSTABILITY_TYPES = {
    **dict.fromkeys(("instability_id", "dataset", "model", "arm", "experiment"), str),
    **dict.fromkeys(("level", "copies"), int),
    "identity": dict,
}
HOW_TO_REPLACE = "move it away or set runs=<another folder>"


class ConfigDirectory:
    """A directory whose config.json says which configuration created it. Nothing is written before `create`.

    Args:
        config: Configuration of this process.
        store: The directory, which may not exist yet.
        content: Content of config.json for this configuration. Its `identity` must equal that of an existing directory.

    Raises:
        UserError: If the directory was created with a different configuration, or its config.json is damaged.
    """

    def __init__(self, config: Config, store: RunStore, content: dict[str, Any]):
        self.config = config
        self.store = store
        self.path = store.path
        self._content = content
        store.refresh_index()
        existing = self._read_existing()
        if existing is not None:
            self._check(existing)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r})"

    @property
    def is_writable(self) -> bool:
        """Whether files of the existing directory can be written."""
        return os.access(self.path, os.W_OK)

    def create(self) -> None:
        """Create the directory and write its config.json."""
        try:
            with self.store.lock(timeout=-1):
                existing = self._read_existing()
                merged = self._merge(existing)
                if merged != existing:
                    write_json(self.path / "config.json", merged)
                    self.store.upload()
        except OSError as error:
            raise UserError(
                f"runs = {self.config.runs!r}: cannot be written ({error.strerror}); expected a writable folder"
            ) from None

    def _read_existing(self) -> dict[str, Any] | None:
        """Content of the existing config.json, if any."""
        path = self.path / "config.json"
        # listed first: another rank may be creating the directory, and writes config.json before anything else
        names = [entry.name for entry in self.path.iterdir()] if self.path.exists() else []
        if not path.exists():
            if not self.store.is_remote and any(not name.startswith(".") for name in names):
                raise UserError(f"{self.path}: not a run directory (it has no config.json); expected an empty folder")
            return None
        try:
            return read_config(self.path)
        except UserError as error:
            raise UserError(f"{error}; {HOW_TO_REPLACE}") from None

    def _check(self, existing: dict[str, Any]) -> None:
        theirs, ours = with_defaults(existing["identity"]), with_defaults(self._content["identity"])
        for key in sorted({*theirs, *ours}):
            if theirs.get(key) != ours.get(key):
                raise UserError(
                    f"{self.path} was created with a different configuration: {key} is {theirs.get(key)!r} there, "
                    f"{ours.get(key)!r} here; {HOW_TO_REPLACE}"
                )

    def _merge(self, existing: dict[str, Any] | None) -> dict[str, Any]:
        """Content to write, given the existing content."""
        return existing or self._content


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config.json of a run directory, a scores directory or an instability analysis.

    Raises:
        UserError: If the file is damaged, or a value is missing or has the wrong type.
    """
    path = folder / "config.json"
    kinds = {"scores_id": _SCORES_TYPES, "instability_id": _INSTABILITY_TYPES}
    content = read_json(path)
    return read_json(path, next((types for key, types in kinds.items() if key in content), _RUN_TYPES))


def with_defaults(identity: dict[str, Any]) -> dict[str, Any]:
    """Identity as JSON, with the default of every field that did not exist when the run was created."""
    return json.loads(json.dumps(DEFAULTS | identity))
