"""Results from MLflow as one tidy table: a row a (replicate, level)."""

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Run

COLUMNS = {
    "dataset": str,
    "model": str,
    "arm": str,
    "subset_size": "Int64",
    "rewind_steps": int,
    "label_noise": float,
    "seed": int,
    "replicate": int,
    "level": int,
    "planned_levels": int,
    "train_steps": int,
    "weights_remaining_percent": float,
    "test_accuracy_percent": float,
    "run_id": str,
}


def collect(tracking_uri: str, experiment: str) -> pd.DataFrame:
    """The levels that are done, of every replicate in an MLflow experiment.

    Returns:
        One row a (replicate, level) with `COLUMNS`; subset_size is missing where all examples were seen.

    Raises:
        ValueError: If there is no such experiment.
    """
    client = MlflowClient(tracking_uri)
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise ValueError(f"no experiment {experiment!r} in the MLflow store {tracking_uri}")
    rows, token = [], None
    while token != "":
        page = client.search_runs([found.experiment_id], "tags.phase = 'all'", page_token=token)
        rows += [row for run in page for row in _levels(client, run)]
        token = page.token or ""
    order = ["arm", "subset_size", "rewind_steps", "run_id", "replicate", "level"]
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS).sort_values(order, ignore_index=True)


def _levels(client: MlflowClient, run: Run) -> list[dict]:
    names = ("test_accuracy_percent", "weights_remaining_percent")
    histories = {name: {m.step: m.value for m in client.get_metric_history(run.info.run_id, name)} for name in names}
    tags = {column: run.data.tags.get(column) for column in COLUMNS if column not in ("level", *names)}
    size = tags["subset_size"]
    tags["subset_size"] = int(size) if size else None
    levels = sorted(set(histories[names[0]]) & set(histories[names[1]]))
    return [{**tags, "level": level} | {name: histories[name][level] for name in names} for level in levels]
