"""Writes run directories to MLflow: one parent run per replicate or scores artifact, one child run per phase.

The parent's metrics have step = level, so that the MLflow UI draws accuracy against level. Syncing is idempotent: it
can run at any time and repeatedly, also for a copy of a run directory or a run that was computed again. Values that
MLflow has already are not sent again.

python -m lth_diet sync runs       bring MLflow up to date with every run in a folder
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
from filelock import FileLock
from mlflow.entities import Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException

from lth_diet.config.schema import describe_arm
from lth_diet.errors import UserError
from lth_diet.masks.mask import Mask
from lth_diet.runs.config_directory import read_config
from lth_diet.runs.instability_directory import InstabilityReplicate, open_replicate
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.run_directory import ReplicateDirectory
from lth_diet.tracking.figures import accuracy_curves
from lth_diet.tracking.mlflow_store import artifact_location, check_experiment, lock_store, open_client

_MAX_METRICS = 1000  # per request to MLflow
_MAX_PARAMS = 100  # per request to MLflow
_LOCK_TIMEOUT = 30.0  # seconds to wait for another process that syncs the same folder
_VERSIONS = ("torch", "composer")  # tagged as version.torch and version.composer
_SCORING_METRIC = "scoring_test_accuracy_percent"
"""Accuracy of scoring networks: one name with the levels' would put both into one chart of MLflow's UI."""
_MAX_DESCRIBED_LEVELS = 100  # MLflow refuses or cuts tags of more than 8000 characters
_KIND = RunTag("mlflow.experimentKind", "custom_model_development")  # otherwise MLflow opens its GenAI overview
_ARTIFACTS = ("mask.safetensors", "subset.safetensors", "subset.json", "subset.png", "images.png")  # of a phase


def sync_replicate(replicate: ReplicateDirectory) -> None:
    """Bring MLflow up to date with the directory of a replicate, of a run or an instability analysis.

    The curve of an unfinished phase is sent up to its last checkpoint, because later rows may be measured again.

    Raises:
        Exception: Whatever MLflow raises if its store cannot be reached.
    """
    with _lock_folder(replicate.path), lock_store():
        kind = _InstabilitySync if isinstance(replicate, InstabilityReplicate) else _ReplicateSync
        kind(replicate).run()


def sync_scores(folder: Path) -> None:
    """Bring MLflow up to date with the folder of a scores artifact, `runs/scores/<id>`.

    Raises:
        Exception: Whatever MLflow raises if its store cannot be reached.
    """
    with _lock_folder(folder), lock_store():
        _ScoresSync(folder).run()


def _lock_folder(folder: Path) -> contextlib.AbstractContextManager:
    """Lock a folder, so that two processes do not both create its missing MLflow runs."""
    lock = FileLock(folder / ".mlflow.lock", timeout=_LOCK_TIMEOUT)
    return lock if os.access(folder, os.W_OK) else contextlib.nullcontext()


class _Sync:
    """Syncs one folder: a parent run, and one child run per phase.

    Args:
        folder: Folder of config.json.
        name: Name of the parent run.
        keys: Keys of config.json that become tags of the parent and its children.
        tags: Other tags of the parent and its children.
        key_tags: Names of the tags that identify the parent run.

    Attributes:
        metric_names: MLflow's names of the metrics that have another name in the files.
    """

    metric_names: ClassVar[dict[str, str]] = {}

    def __init__(self, folder: Path, name: str, keys: Sequence[str], tags: dict[str, Any], key_tags: Sequence[str]):
        self.client = open_client()
        self.config_path = folder / "config.json"
        self.config = read_config(folder)
        self.experiment_id = self._create_experiment(self.config["experiment"])
        self.name = name
        tags = {key: self.config.get(key) for key in keys} | tags
        self.tags = {key: str(value) for key, value in tags.items() if value is not None}
        self.key_tags = {key: self.tags[key] for key in key_tags}

    def _create_experiment(self, name: str) -> str:
        """Return the id of an experiment, which is created if it is missing."""
        if found := self.client.get_experiment_by_name(name):
            check_experiment(self.client, found)
            kind = found.tags.get(_KIND.key, "inferred")
            if kind.endswith("inferred") or kind == "no_inferred_type":  # not chosen by a person
                self.client.set_experiment_tag(found.experiment_id, _KIND.key, _KIND.value)
            return found.experiment_id
        try:
            return self.client.create_experiment(name, artifact_location(name), {_KIND.key: _KIND.value})
        except MlflowException:
            found = self.client.get_experiment_by_name(name)
            if found is None:  # otherwise another process has just created it
                raise
            return found.experiment_id

    def _parent(self, rows: list[dict[str, Any]], description: str) -> MlflowRun:
        """Return the parent run, which is created if it is missing or if its metrics contradict `rows`."""
        tags, rows = self.tags | {"mlflow.note.content": description}, self._rename(rows)
        found = self._deduplicate(self._search(self.key_tags))
        if found and self._contradicts(found, rows):  # phases were computed again, with another result
            self._delete(found)
            found = None
        elif found and self._has_old_names(found, rows):
            self._delete(found)
            by_hand = {key: value for key, value in found.data.tags.items() if not key.startswith("mlflow.")}
            found, tags = None, by_hand | tags
        run = found or self._create(self.name, tags, self.key_tags)
        params = [Param(key, str(value)) for key, value in self.config["identity"].items()]
        for start in range(0, len(params), _MAX_PARAMS):
            self.client.log_batch(run.info.run_id, params=params[start : start + _MAX_PARAMS])
        changed = [RunTag(key, value) for key, value in tags.items() if run.data.tags.get(key) != value]
        if changed:
            self.client.log_batch(run.info.run_id, tags=changed)
        if run.info.status != "FINISHED":
            self.client.log_artifact(run.info.run_id, str(self.config_path))
        return run

    def _contradicts(self, run: MlflowRun, rows: list[dict[str, Any]]) -> bool:
        """Whether MLflow has another value for a row."""
        expected = {(key, row["step"]): value for row in rows for key, value in row.items()}
        return any(expected.get((key, step), value) != value for key, step, value in self._logged(run))

    def _has_old_names(self, run: MlflowRun, rows: list[dict[str, Any]]) -> bool:
        """Whether a run has metrics under a former name, which MLflow cannot remove, all of which `rows` has."""
        steps = {step for key, step, _ in self._logged(run) if key in self.metric_names}
        return bool(steps) and steps <= {row["step"] for row in rows}

    def _rename(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{self.metric_names.get(key, key): value for key, value in row.items()} for row in rows]

    def _sync_phases(self, parent: MlflowRun, phases: Sequence[PhaseDirectory]) -> None:
        """Bring the child runs up to date with the phases that are finished or have a checkpoint."""
        children = self._search(_child_of(parent))
        for phase in phases:
            checkpoint = phase.checkpoint()
            child = self._deduplicate([run for run in children if run.data.tags["phase"] == phase.name])
            if (child and child.info.status == "FINISHED") or not (phase.done or checkpoint):
                continue
            if phase.done:
                _check(phase)
            if child is None:
                key_tags = _child_of(parent) | {"phase": phase.name}
                child = self._create(f"{self.name}/{phase.name}", self.tags | key_tags, key_tags)
            rows = self._rename(phase.curve(until=None if phase.done else checkpoint[1]))
            self._log_metrics(child, self._missing(child, rows))
            if phase.done:
                self._tag_environment(child, [phase.result()])
                self._log_artifacts(child, phase)
                self.client.set_terminated(child.info.run_id, "FINISHED", phase.result().get("timestamp"))

    def _log_artifacts(self, child: MlflowRun, phase: PhaseDirectory) -> None:
        for path in (phase.path / name for name in _ARTIFACTS):
            if path.exists():
                self.client.log_artifact(child.info.run_id, str(path))
        if (phase.path / "mask.safetensors").exists():
            table = Mask.load(phase.path / "mask.safetensors").table().to_csv(index=False)
            self.client.log_text(child.info.run_id, table, "density.csv")

    def _tag_environment(self, run: MlflowRun, results: Sequence[dict[str, Any]]) -> None:
        """Tag the versions, code and device that trained some phases, with all values where they differ."""
        values: dict[str, dict[str, None]] = {}
        for result in results:
            tags = {f"version.{name}": version for name, version in (result.get("versions") or {}).items()}
            for key, value in (result.get("environment") or {}).items():
                tags[f"version.{key}" if key in _VERSIONS else key] = value
            for key, value in tags.items():
                values.setdefault(key, {})[value] = None
        tags = [RunTag(key, " and ".join(different)) for key, different in values.items()]
        self.client.log_batch(run.info.run_id, tags=tags)

    def _create(self, name: str, tags: dict[str, str], key_tags: dict[str, str]) -> MlflowRun:
        self.client.create_run(self.experiment_id, tags=tags, run_name=name)
        return self._deduplicate(self._search(key_tags))

    def _deduplicate(self, runs: Sequence[MlflowRun]) -> MlflowRun | None:
        """Return the oldest of some runs with the same key tags, and delete the others.

        There can be several because a request that timed out and was sent again may be processed twice, and because
        copies of a run directory can be synced from different machines.
        """
        first, *others = sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id)) or [None]
        for run in others:
            self._delete(run)
        return first

    def _delete(self, parent: MlflowRun) -> None:
        for run in [*self._search(_child_of(parent)), parent]:
            self.client.delete_run(run.info.run_id)

    def _search(self, tags: dict[str, str]) -> list[MlflowRun]:
        """Return all runs of the experiment with these tags."""
        query, runs, token = " and ".join(f"tags.{key} = '{value}'" for key, value in tags.items()), [], ""
        while token is not None:
            page = self.client.search_runs([self.experiment_id], query, page_token=token or None)
            runs += page
            token = page.token or None
        return runs

    def _missing(self, run: MlflowRun, rows: list[dict[str, Any]]) -> list[Metric]:
        """Return the metrics of `rows` that MLflow does not have with the same value at the same step."""
        logged = self._logged(run)
        return [
            Metric(key, float(value), row["timestamp"], row["step"])
            for row in rows
            for key, value in row.items()
            if key not in ("step", "timestamp") and (key, row["step"], float(value)) not in logged
        ]

    def _logged(self, run: MlflowRun) -> set[tuple[str, int, float]]:
        """Return name, step and value of every metric that MLflow has."""
        history = [self.client.get_metric_history(run.info.run_id, key) for key in run.data.metrics]
        return {(point.key, point.step, point.value) for points in history for point in points}

    def _set_status(self, run: MlflowRun, status: str, results: list[dict[str, Any]]) -> None:
        """Set the status of a run; a finished one ended with the last of its results."""
        if status == "FINISHED":
            self.client.set_terminated(run.info.run_id, status, max(result["timestamp"] for result in results))
        else:
            self.client.update_run(run.info.run_id, status=status)

    def _log_metrics(self, run: MlflowRun, metrics: list[Metric]) -> None:
        for start in range(0, len(metrics), _MAX_METRICS):
            self.client.log_batch(run.info.run_id, metrics=metrics[start : start + _MAX_METRICS])


class _ReplicateSync(_Sync):
    """Syncs one replicate. The metrics of its parent run have step = level."""

    def __init__(self, replicate: ReplicateDirectory):
        self.replicate = replicate
        run = replicate.path.parent
        keys = ("run_id", "dataset", "model", "arm", "subset_size", "rewind_steps", "label_noise", "seed")
        keys += ("planned_levels", "train_steps", "ranks")
        tags, key_tags = {"replicate": replicate.index, "phase": "all"}, ("run_id", "replicate", "phase")
        super().__init__(run, f"{run.name}/{replicate.name}", keys, tags, key_tags)
        about = (self.config[key] for key in ("arm", "subset_size", "rewind_steps", "label_noise"))
        subset = (self.config["identity"].get(f"pretrain.subset.{key}", 0) for key in ("class_balanced", "offset"))
        self.tags["arm_description"] = describe_arm(*about, *subset)

    def run(self) -> None:
        results = [phase.result() for _, phase in self.replicate.levels() if phase.done]
        keys = ("test_accuracy_percent", "weights_remaining_percent", "timestamp")
        rows = [{"step": result["level"]} | {key: result[key] for key in keys} for result in results]
        parent = self._parent(rows, f"{self._description()}\n\n{_levels_table(results)}".rstrip())
        if missing := self._missing(parent, rows):
            self._tag_environment(parent, results)
            self._log_metrics(parent, missing)  # after the tags, so that a parent with these metrics has them
        self._sync_phases(parent, self.replicate.phases())
        finished = self.replicate.finished(self.config["planned_levels"])  # false again once more levels are planned
        status = "FINISHED" if finished else "FAILED" if self.replicate.failed else "RUNNING"
        if parent.info.status != status:
            if results and status != "RUNNING":
                self._draw(parent, results)
            self._set_status(parent, status, results)

    def _draw(self, parent: MlflowRun, results: list[dict[str, Any]]) -> None:
        frame = (
            pd.DataFrame(results).rename(columns={"test_accuracy_percent": "mean"}).assign(std=float("nan"), count=1)
        )
        title = f"{self.config['dataset']}, {self.config['model']}, replicate {self.replicate.index}"
        figure = accuracy_curves({self.tags["arm_description"]: frame}, title)
        self.client.log_figure(parent.info.run_id, figure, "accuracy.png")

    def _description(self) -> str:
        config, fraction = self.config, self.config["identity"]["prune.fraction"]
        least = 100 * (1 - fraction) ** config["planned_levels"]
        return (
            f"**{config['dataset']}, {config['model']}, {self.tags['arm_description']}**, replicate "
            f"{self.replicate.index}. Iterative magnitude pruning to level {config['planned_levels']} ({least:.1f} % "
            f"of weights): each level trains from step {config['rewind_steps']} to {config['train_steps']}, then "
            f"{100 * fraction:g} % of the weights that are left are pruned and the rest rewound. "
            f"Metrics: step = level. Directory: `{self.replicate.path}`."
        )


class _InstabilitySync(_Sync):
    """Syncs one replicate of an instability analysis as one run, whose metrics have step = k."""

    def __init__(self, replicate: InstabilityReplicate):
        self.replicate = replicate
        analysis = replicate.path.parent
        keys = ("instability_id", "dataset", "model", "arm", "level", "copies")
        tags, key_tags = (
            {"replicate": replicate.index, "phase": "instability"},
            ("instability_id", "replicate", "phase"),
        )
        super().__init__(analysis, f"instability/{analysis.name}/{replicate.name}", keys, tags, key_tags)

    def run(self) -> None:
        barriers = [phase for phase in self.replicate.phases() if phase.name == "barrier"]
        results = [phase.result() for phase in barriers if phase.done]
        keys = {"test_barrier": "test_error_barrier", "train_barrier": "train_error_barrier", "timestamp": "timestamp"}
        rows = [{"step": result["step"]} | {name: result[key] for key, name in keys.items()} for result in results]
        parent = self._parent(rows, self._description())
        if missing := self._missing(parent, rows):
            self._tag_environment(parent, results)
            self._log_metrics(parent, missing)
        planned = {f"step_{step}" for step in self.replicate.keys.steps}
        planned |= {path.name for path in self.replicate.path.glob("step_*")}
        finished = results and len(results) == len(planned)
        status = "FAILED" if self.replicate.failed else "FINISHED" if finished else "RUNNING"
        if parent.info.status != status:
            self._set_status(parent, status, results)

    def _description(self) -> str:
        config = self.config
        return (
            f"**Instability analysis of {config['dataset']}, {config['model']}, arm {config['arm']}**, level "
            f"{config['level']}, replicate {self.replicate.index}: barriers of the test and training error, in points, "
            f"between {config['copies']} copies trained from step k. Metrics: step = k. "
            f"Directory: `{self.replicate.path}`."
        )


class _ScoresSync(_Sync):
    """Syncs one scores artifact. The metrics of its parent run have step = network."""

    metric_names: ClassVar[dict[str, str]] = {"test_accuracy_percent": _SCORING_METRIC}

    def __init__(self, folder: Path):
        self.folder = folder
        keys = ("scores_id", "dataset", "model", "label_noise", "seed", "networks", "steps")
        super().__init__(folder, f"scores/{folder.name}", keys, {"phase": "scores"}, ("scores_id", "phase"))

    def run(self) -> None:
        networks = [PhaseDirectory(self.folder / f"network_{number}") for number in range(self.config["networks"])]
        results = [network.result() for network in networks if network.done]
        keys = ("test_accuracy_percent", "timestamp")
        rows = [{"step": result["network"]} | {key: result[key] for key in keys} for result in results]
        parent = self._parent(rows, self._description())
        self._log_metrics(parent, self._missing(parent, self._rename(rows)))
        self._sync_phases(parent, networks)
        if (self.folder / "manifest.json").exists() and parent.info.status != "FINISHED":
            self._tag_environment(parent, results)
            for name in ("manifest.json", "scores.safetensors"):
                self.client.log_artifact(parent.info.run_id, str(self.folder / name))
            if (self.folder / "examples").exists():
                self.client.log_artifacts(parent.info.run_id, str(self.folder / "examples"), "examples")
            self.client.set_terminated(parent.info.run_id, "FINISHED", results[-1]["timestamp"])

    def _description(self) -> str:
        config = self.config
        noise = f" with {100 * config['label_noise']:g} % label noise" if config["label_noise"] else ""
        return (
            f"**EL2N scores of {config['dataset']}{noise}**: {config['networks']} networks {config['model']}, "
            f"{config['steps']} steps each. Metrics: step = network. Directory: `{self.folder}`."
        )


def _check(phase: PhaseDirectory) -> None:
    if damaged := phase.damaged():
        raise UserError(f"{damaged[0]}: missing or damaged; `python -m lth_diet verify` says what to do")


def _levels_table(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of the finished levels: all of them, or the last ones if there are very many."""
    rows = [
        f"| {result['level']} | {result['weights_remaining_percent']:.3g} | {result['test_accuracy_percent']:.2f} |"
        for result in results[-_MAX_DESCRIBED_LEVELS:]
    ]
    return "\n".join(["| level | weights remaining (%) | test accuracy (%) |", "|---|---|---|", *rows] if rows else [])


def _child_of(parent: MlflowRun) -> dict[str, str]:
    return {"mlflow.parentRunId": parent.info.run_id}


def updates(folder: Path, scored: bool) -> list[tuple[Path, Callable[[], None]]]:
    """List the updates of MLflow for a run directory or the folder of a scores artifact.

    Args:
        folder: The folder.
        scored: Whether it is the folder of a scores artifact.

    Returns:
        The folder of each replicate, or of the scores artifact, and a function that brings MLflow up to date with it.
        The function checks all files of finished phases before it writes any, and raises UserError if one is damaged.

    Raises:
        UserError: If config.json is damaged.
    """

    def update(phases: Sequence[PhaseDirectory], sync: Callable[[], None]) -> None:
        for phase in phases:
            if phase.done:
                phase.result()
                _check(phase)
        sync()

    read_config(folder)
    if scored:
        networks = [PhaseDirectory(path) for path in folder.glob("network_*")]
        return [(folder, lambda: update(networks, lambda: sync_scores(folder)))]
    replicates = [open_replicate(path) for path in sorted(folder.glob("replicate_*"))]
    return [(each.path, lambda each=each: update(each.phases(), lambda: sync_replicate(each))) for each in replicates]
