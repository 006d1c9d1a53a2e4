"""MLflow, written from the run directory: a parent run a replicate, or scores artifact, and a child run a phase.

The parent's metrics have step = level, so that the MLflow UI draws arms as curves of accuracy against level. `sync`
may be called at any time and any number of times, also for a copy of a run directory or a run that was computed anew:
a step that has the same value already is not sent again.

python -m lth_diet sync runs       bring MLflow up to date with every run below a folder
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun
from mlflow.exceptions import MlflowException

from lth_diet.errors import UserError
from lth_diet.masks.mask import Mask
from lth_diet.runs.config_directory import read_config
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.run_directory import ReplicateDirectory
from lth_diet.tracking.figures import accuracy_curves
from lth_diet.tracking.store import artifact_location, lock_store, open_client

_MAX_METRICS = 1000  # that MLflow takes in one request
_MAX_PARAMS = 100
_LOCK_TIMEOUT = 30.0  # seconds, with another process that syncs the same folder
_ARTIFACTS = ("mask.safetensors", "subset.safetensors", "subset.json", "subset.png", "images.png")  # of a phase


def sync_replicate(replicate: ReplicateDirectory) -> None:
    """Bring MLflow up to date with a replicate's directory.

    Of a phase that still runs, the curve up to the last checkpoint is sent: later rows may be measured again.

    Raises:
        Exception: Whatever MLflow raises if its store cannot be reached.
    """
    with _lock_folder(replicate.path), lock_store():
        _ReplicateSync(open_client(), replicate).run()


def sync_scores(folder: Path) -> None:
    """Bring MLflow up to date with the folder of a scores artifact, `runs/scores/<id>`.

    Raises:
        Exception: Whatever MLflow raises if its store cannot be reached.
    """
    with _lock_folder(folder), lock_store():
        _ScoresSync(open_client(), folder).run()


def _lock_folder(folder: Path) -> contextlib.AbstractContextManager:
    """Ranks that make one artifact, or training and the command, would each create the runs that are missing."""
    lock = FileLock(folder / ".mlflow.lock", timeout=_LOCK_TIMEOUT)
    return lock if os.access(folder, os.W_OK) else contextlib.nullcontext()


class _Sync:
    """Phases of one folder, the MLflow run that tells of them all, and its children, one a phase.

    Args:
        client: Of the store.
        config: config.json of what trains.
        name: Of the parent run.
        marks: Tags that tell the parent run from all others.
        tags: The other tags, of parent and children.
    """

    def __init__(self, client: MlflowClient, config: Path, name: str, marks: dict[str, Any], tags: dict[str, Any]):
        self.client = client
        self.config = config
        self.about = read_config(config.parent)
        self.experiment = self._experiment(self.about["experiment"])
        self.name = name
        self.marks = {key: str(value) for key, value in marks.items()}
        self.tags = {key: str(value) for key, value in (tags | marks).items() if value is not None}

    def _experiment(self, name: str) -> str:
        """Its id."""
        if found := self.client.get_experiment_by_name(name):
            return found.experiment_id
        try:
            return self.client.create_experiment(name, artifact_location(name))
        except MlflowException:
            found = self.client.get_experiment_by_name(name)
            if found is None:  # else another process has just made it
                raise
            return found.experiment_id

    def _parent(self, rows: list[dict[str, Any]], description: str) -> MlflowRun:
        """The run that tells of all phases; its metrics are `rows`."""
        tags = self.tags | {"mlflow.note.content": description}
        found = self._only(self._search(self.marks))
        if found and self._contradicts(found, rows):  # phases were computed anew, with another result
            self._delete(found)
            found = None
        run = found or self._create(self.name, tags, self.marks)
        params = [Param(key, str(value)) for key, value in self.about["identity"].items()]
        for start in range(0, len(params), _MAX_PARAMS):
            self.client.log_batch(run.info.run_id, params=params[start : start + _MAX_PARAMS])
        if found:
            self.client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in tags.items()])
        if run.info.status != "FINISHED":
            self.client.log_artifact(run.info.run_id, str(self.config))
        return run

    def _contradicts(self, run: MlflowRun, rows: list[dict[str, Any]]) -> bool:
        """Whether MLflow has another value for what is done."""
        for key in {key for row in rows for key in row if key not in ("step", "timestamp")}:
            mine = {row["step"]: row[key] for row in rows}
            history = self.client.get_metric_history(run.info.run_id, key) if key in run.data.metrics else []
            if any(mine.get(point.step, point.value) != point.value for point in history):
                return True
        return False

    def _phases(self, parent: MlflowRun, phases: Sequence[PhaseDirectory]) -> None:
        children = self._search(_child_of(parent))
        for phase in phases:
            checkpoint = phase.checkpoint()
            child = self._only([run for run in children if run.data.tags["phase"] == phase.name])
            if (child and child.info.status == "FINISHED") or not (phase.done or checkpoint):
                continue
            if phase.done and (damaged := phase.damaged()):
                raise UserError(f"{damaged[0]}: missing or damaged; `python -m lth_diet verify` tells what to do")
            if child is None:
                marks = _child_of(parent) | {"phase": phase.name}
                child = self._create(f"{self.name}/{phase.name}", self.tags | marks, marks)
            self._send(child, self._lacking(child, phase.curve(until=None if phase.done else checkpoint[1])))
            if phase.done:
                self._tag_versions(child, phase.result())
                self._log_artifacts(child, phase)
                self._finish(child, phase.result().get("timestamp"))

    def _log_artifacts(self, child: MlflowRun, phase: PhaseDirectory) -> None:
        for path in (phase.path / name for name in _ARTIFACTS):
            if path.exists():
                self.client.log_artifact(child.info.run_id, str(path))
        if (phase.path / "mask.safetensors").exists():
            table = Mask.load(phase.path / "mask.safetensors").table().to_csv(index=False)
            self.client.log_text(child.info.run_id, table, "density.csv")

    def _tag_versions(self, run: MlflowRun, result: dict[str, Any]) -> None:
        """Tell what trained a phase."""
        tags = [RunTag(f"version.{name}", version) for name, version in (result.get("versions") or {}).items()]
        self.client.log_batch(run.info.run_id, tags=tags)

    def _create(self, name: str, tags: dict[str, str], marks: dict[str, str]) -> MlflowRun:
        self.client.create_run(self.experiment, tags=tags, run_name=name)
        return self._only(self._search(marks))

    def _only(self, runs: Sequence[MlflowRun]) -> MlflowRun | None:
        """One of those that tell of the same, without the others.

        Requests that were given up and sent again may all be carried out, and copies of a directory know nothing of
        each other.
        """
        first, *others = sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id)) or [None]
        for run in others:
            self._delete(run)
        return first

    def _delete(self, parent: MlflowRun) -> None:
        for run in [*self._search(_child_of(parent)), parent]:
            self.client.delete_run(run.info.run_id)

    def _search(self, marks: dict[str, str]) -> list[MlflowRun]:
        """Those with these tags."""
        query, runs, token = " and ".join(f"tags.{key} = '{value}'" for key, value in marks.items()), [], ""
        while token is not None:
            page = self.client.search_runs([self.experiment], query, page_token=token or None)
            runs += page
            token = page.token or None
        return runs

    def _lacking(self, run: MlflowRun, rows: list[dict[str, Any]]) -> list[Metric]:
        """The points that MLflow lacks; one is there if its step has its value."""
        there = {
            (key, point.step, point.value)
            for key in run.data.metrics
            for point in self.client.get_metric_history(run.info.run_id, key)
        }
        return [
            Metric(key, float(value), row["timestamp"], row["step"])
            for row in rows
            for key, value in row.items()
            if key not in ("step", "timestamp") and (key, row["step"], float(value)) not in there
        ]

    def _send(self, run: MlflowRun, metrics: list[Metric]) -> None:
        for start in range(0, len(metrics), _MAX_METRICS):
            self.client.log_batch(run.info.run_id, metrics=metrics[start : start + _MAX_METRICS])

    def _finish(self, run: MlflowRun, timestamp: int | None) -> None:
        if run.info.status != "FINISHED":
            self.client.set_terminated(run.info.run_id, "FINISHED", timestamp)


class _ReplicateSync(_Sync):
    """One replicate."""

    def __init__(self, client: MlflowClient, replicate: ReplicateDirectory):
        self.replicate = replicate
        about = replicate.about
        keys = ("dataset", "model", "arm", "subset_size", "rewind_steps", "label_noise", "seed", "planned_levels")
        super().__init__(
            client,
            replicate.path.parent / "config.json",
            f"{replicate.path.parent.name}/{replicate.name}",
            {"run_id": about["run_id"], "replicate": replicate.index, "phase": "all"},
            {key: about[key] for key in (*keys, "train_steps")},
        )

    def run(self) -> None:
        results = [phase.result() for _, phase in self.replicate.levels() if phase.done]
        keys = ("test_accuracy_percent", "weights_remaining_percent", "timestamp")
        rows = [{"step": result["level"]} | {key: result[key] for key in keys} for result in results]
        parent = self._parent(rows, self._description())
        if lacking := self._lacking(parent, rows):
            self._tag_versions(parent, results[-1])
            self._send(parent, lacking)  # last: when they are there, so are the tags that go with them
        self._phases(parent, self.replicate.phases())
        finished = self.replicate.finished(self.about["planned_levels"])  # not any more, if more levels were asked for
        status = "FINISHED" if finished else "FAILED" if self.replicate.failed else "RUNNING"
        if parent.info.status != status:
            if results and status != "RUNNING":
                self._draw(parent, results)
            if finished:
                self._finish(parent, results[-1]["timestamp"])
            else:
                self.client.update_run(parent.info.run_id, status=status)

    def _draw(self, parent: MlflowRun, results: list[dict[str, Any]]) -> None:
        frame = pd.DataFrame(results).rename(columns={"test_accuracy_percent": "mean"}).assign(std=pd.NA, count=1)
        title = f"{self.about['dataset']}, {self.about['model']}, replicate {self.replicate.index}"
        figure = accuracy_curves({_describe_arm(self.about): frame}, title)
        self.client.log_figure(parent.info.run_id, figure, "accuracy.png")

    def _description(self) -> str:
        about, fraction = self.about, self.about["identity"]["prune.fraction"]
        least = 100 * (1 - fraction) ** about["planned_levels"]
        return (
            f"**{about['dataset']}, {about['model']}, {_describe_arm(about)}**, replicate {self.replicate.index}. "
            f"Iterative magnitude pruning to level {about['planned_levels']} ({least:.1f} % of weights): each level "
            f"trains from step {about['rewind_steps']} to {about['train_steps']}, then {100 * fraction:g} % of the "
            f"weights that are left are pruned and the rest rewound. Metrics: step = level. "
            f"Directory: `{self.replicate.path}`."
        )


class _ScoresSync(_Sync):
    """One scores artifact; the metrics of its run have step = network."""

    def __init__(self, client: MlflowClient, folder: Path):
        self.folder = folder
        about = read_config(folder)
        keys = ("dataset", "model", "label_noise", "seed", "networks", "steps")
        super().__init__(
            client,
            folder / "config.json",
            f"scores/{folder.name}",
            {"scores_id": about["scores_id"], "phase": "scores"},
            {key: about[key] for key in keys},
        )

    def run(self) -> None:
        networks = [PhaseDirectory(self.folder / f"network_{number}") for number in range(self.about["networks"])]
        results = [network.result() for network in networks if network.done]
        keys = ("test_accuracy_percent", "timestamp")
        rows = [{"step": result["network"]} | {key: result[key] for key in keys} for result in results]
        parent = self._parent(rows, self._description())
        self._send(parent, self._lacking(parent, rows))
        self._phases(parent, networks)
        if (self.folder / "manifest.json").exists() and parent.info.status != "FINISHED":
            self._tag_versions(parent, results[-1])
            for name in ("manifest.json", "scores.safetensors"):
                self.client.log_artifact(parent.info.run_id, str(self.folder / name))
            if (self.folder / "examples").exists():
                self.client.log_artifacts(parent.info.run_id, str(self.folder / "examples"), "examples")
            self._finish(parent, results[-1]["timestamp"])

    def _description(self) -> str:
        about = self.about
        noise = f" with {100 * about['label_noise']:g} % label noise" if about["label_noise"] else ""
        return (
            f"**EL2N scores of {about['dataset']}{noise}**: {about['networks']} networks {about['model']}, "
            f"{about['steps']} steps each. Metrics: step = network. Directory: `{self.folder}`."
        )


def _child_of(parent: MlflowRun) -> dict[str, str]:
    return {"mlflow.parentRunId": parent.info.run_id}


def _describe_arm(about: dict[str, Any]) -> str:
    if about["arm"] == "init":
        return "no pre-training"
    examples = "all examples" if about["arm"] == "all" else f"the {about['subset_size']} {about['arm']} examples"
    noise = f" with {100 * about['label_noise']:g} % label noise" if about["label_noise"] else ""
    return f"pre-trained on {examples}{noise} for {about['rewind_steps']} steps"


def sync_folder(folder: Path, scored: bool) -> None:
    """Bring MLflow up to date with a run directory or folder of scores, and say so.

    All that MLflow is to be told is read before anything is written to it.

    Raises:
        UserError: If a file is damaged.
    """
    read_config(folder)
    replicates = [ReplicateDirectory(path) for path in sorted(folder.glob("replicate_*"))]
    networks = [PhaseDirectory(path) for path in folder.glob("network_*")]
    for phase in [*networks, *(phase for replicate in replicates for phase in replicate.phases())]:
        if phase.done:
            phase.result()
    if scored:
        sync_scores(folder)
        print(f"{folder}: up to date")
    for replicate in replicates:
        sync_replicate(replicate)
        print(f"{replicate.path}: up to date")
