"""MLflow, written from the run directory: a parent run a replicate, a child run a phase.

The parent's metrics have step = level, so that the MLflow UI draws arms as curves of accuracy against level. `sync`
may be called at any time and any number of times, also for a copy of a run directory or a run that was computed anew:
a step that has the same value already is not sent again.
"""

import os
from collections.abc import Iterator
from typing import Any

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.entities import Run as MlflowRun

from lth_diet.runs import Replicate

_MOST_METRICS = 1000  # that MLflow takes in one request
_MOST_PARAMS = 100


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or a SQLite store in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


def sync(replicate: Replicate) -> None:
    """Bring MLflow up to date with a replicate's directory.

    Of a phase that still runs, the curve up to the last checkpoint is sent: later rows may be measured again.

    Raises:
        Exception: Whatever MLflow raises if its store cannot be reached.
    """
    about = replicate.about
    client, experiment = _open(about["experiment"])
    name = f"{replicate.path.parent.name}/replicate_{replicate.index}"
    parent = _find_or_create(client, experiment, name, _tags(about, replicate) | {"phase": "all"})
    params = [Param(key, str(value)) for key, value in about["identity"].items()]
    for start in range(0, len(params), _MOST_PARAMS):
        client.log_batch(parent.info.run_id, params=params[start : start + _MOST_PARAMS])
    results = [phase.result() for _, phase in replicate.levels() if phase.done]
    rows = [
        {key: result[key] for key in ("test_accuracy_percent", "weights_remaining_percent", "timestamp")}
        | {"step": result["level"]}
        for result in results
    ]
    _log(client, parent, rows)
    _sync_phases(client, experiment, parent, replicate, about)
    if replicate.finished(about["planned_levels"]):
        _finish(client, parent, results[-1]["timestamp"])
    elif parent.info.status == "FINISHED":  # more levels were asked for
        client.update_run(parent.info.run_id, status="RUNNING")


def _sync_phases(
    client: MlflowClient, experiment: str, parent: MlflowRun, replicate: Replicate, about: dict[str, Any]
) -> None:
    here = f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    known = {run.data.tags["phase"]: run for run in _search(client, experiment, here)}
    for phase in [replicate.pretrain, *(phase for _, phase in replicate.levels())]:
        checkpoint = phase.checkpoint()
        child = known.get(phase.name)
        if (child and child.info.status == "FINISHED") or not (phase.done or checkpoint):
            continue
        rows = phase.curve(until=None if phase.done else checkpoint[1])
        if child is None:
            tags = _tags(about, replicate) | {"phase": phase.name, "mlflow.parentRunId": parent.info.run_id}
            child = client.create_run(experiment, tags=_strings(tags), run_name=f"{parent.info.run_name}/{phase.name}")
        _log(client, child, rows)
        if phase.done:
            _finish(client, child, phase.result().get("timestamp"))


def _open(experiment: str) -> tuple[MlflowClient, str]:
    uri = tracking_uri()
    if not uri.startswith("sqlite:///"):
        return _with_experiment(MlflowClient(uri), experiment)
    with FileLock(uri.removeprefix("sqlite:///") + ".lock"):  # two processes cannot create one store
        return _with_experiment(MlflowClient(uri), experiment)


def _with_experiment(client: MlflowClient, name: str) -> tuple[MlflowClient, str]:
    found = client.get_experiment_by_name(name)
    return client, found.experiment_id if found else client.create_experiment(name)


def _tags(about: dict[str, Any], replicate: Replicate) -> dict[str, Any]:
    keys = ("dataset", "model", "arm", "subset_size", "rewind_steps", "label_noise", "seed", "run_id")
    keys += ("planned_levels", "train_steps")
    return {key: about[key] for key in keys if about[key] is not None} | {"replicate": replicate.index}


def _strings(tags: dict[str, Any]) -> dict[str, str]:
    return {key: str(value) for key, value in tags.items()}


def _search(client: MlflowClient, experiment: str, query: str) -> Iterator[MlflowRun]:
    token = None
    while True:
        page = client.search_runs([experiment], query, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _find_or_create(client: MlflowClient, experiment: str, name: str, tags: dict[str, Any]) -> MlflowRun:
    marks = {key: tags[key] for key in ("run_id", "replicate", "phase")}
    found = list(_search(client, experiment, " and ".join(f"tags.{key} = '{value}'" for key, value in marks.items())))
    run = found[0] if found else client.create_run(experiment, tags=_strings(tags), run_name=name)
    client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in _strings(tags).items()])
    return run


def _log(client: MlflowClient, run: MlflowRun, rows: list[dict[str, Any]]) -> None:
    """Send the points that MLflow lacks; one is there if its step has its value."""
    there = {
        (key, point.step, point.value)
        for key in run.data.metrics
        for point in client.get_metric_history(run.info.run_id, key)
    }
    metrics = [
        Metric(key, float(value), row["timestamp"], row["step"])
        for row in rows
        for key, value in row.items()
        if key not in ("step", "timestamp") and (key, row["step"], float(value)) not in there
    ]
    for start in range(0, len(metrics), _MOST_METRICS):
        client.log_batch(run.info.run_id, metrics=metrics[start : start + _MOST_METRICS])


def _finish(client: MlflowClient, run: MlflowRun, timestamp: int | None) -> None:
    if run.info.status != "FINISHED":
        client.set_terminated(run.info.run_id, "FINISHED", timestamp)
