"""A directory that stores in config.json what made it."""

import json
from pathlib import Path
from typing import Any

from lth_diet.config.identity import DEFAULTS
from lth_diet.errors import UserError
from lth_diet.files import read_json, write_json
from lth_diet.runs.run_store import RunStore

_RUN = {
    **dict.fromkeys(("run_id", "dataset", "model", "arm", "experiment"), str),
    **dict.fromkeys(("rewind_steps", "seed", "train_steps", "planned_levels"), int),
    "identity": dict,
    "subset_size": int | None,
    "label_noise": float | int,
    "ranks": int | None,
}
_SCORES = {
    **dict.fromkeys(("scores_id", "dataset", "model", "experiment"), str),
    **dict.fromkeys(("seed", "networks", "steps"), int),
    "identity": dict,
    "label_noise": float | int,
}


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json tells of a run directory or a folder of scores.

    Raises:
        UserError: If it is damaged, or a value is missing or of a wrong type.
    """
    path = folder / "config.json"
    return read_json(path, _SCORES if "scores_id" in read_json(path) else _RUN)


def with_defaults(identity: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it; a field that did not exist when a run was made had its default."""
    return json.loads(json.dumps(DEFAULTS | identity))


class ConfigDirectory:
    """A folder whose config.json tells what made it; nothing is written until `create`.

    Args:
        store: May not exist yet.
        about: What config.json is to hold; its `identity` has to be that of the folder, if there is one.

    Raises:
        UserError: If the folder is there but another configuration made it.
    """

    def __init__(self, store: RunStore, about: dict[str, Any]):
        self.store = store
        self.path = store.path
        self._about = about
        store.refresh_index()
        there = self._there()
        if there is not None:
            self._check(there)

    def _there(self) -> dict[str, Any] | None:
        """The config.json that is there."""
        path = self.path / "config.json"
        # listed first: another rank may be creating the directory, and writes config.json before anything else
        names = [entry.name for entry in self.path.iterdir()] if self.path.exists() else []
        if not path.exists():
            if not self.store.is_remote and any(not name.startswith(".") for name in names):
                raise UserError(f"{self.path}: not a run directory (it has no config.json); allowed: an empty place")
            return None
        try:
            return read_config(self.path)
        except UserError as error:
            raise UserError(f"{error}; move it away or choose other runs=...") from None

    def _check(self, about: dict[str, Any]) -> None:
        there, mine = with_defaults(about["identity"]), with_defaults(self._about["identity"])
        for key in sorted({*there, *mine}):
            if there.get(key) != mine.get(key):
                raise UserError(
                    f"{self.path} was made by another configuration: {key}: {there.get(key)!r} there, "
                    f"{mine.get(key)!r} here; move it away or choose other runs=..."
                )

    def create(self) -> None:
        """Make the folder and say in it what it is."""
        try:
            with self.store.lock(timeout=-1):
                there = self._there()
                if self._to_say(there) != there:
                    write_json(self.path / "config.json", self._to_say(there))
                    self.store.upload()
        except OSError as error:
            raise UserError(
                f"runs: {self.config.runs!r} cannot be written ({error.strerror}); allowed: a folder that can"
            ) from None

    def _to_say(self, there: dict[str, Any] | None) -> dict[str, Any]:
        """What config.json is to hold, given what it holds."""
        return there or self._about
