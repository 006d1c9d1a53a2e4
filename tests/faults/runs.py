"""What a run left, to compare with what another left."""

from pathlib import Path

from mlflow import MlflowClient
from safetensors.numpy import load_file

from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.tracking import mlflow_store

SMALL = ["prune.levels=1", "pretrain.label_noise=0.1", "replicates=1"]
STACKED = [*SMALL[:-1], "replicates=2", "stack=2"]


def bits(root):
    """Every tensor, and every measured number, below a folder."""
    found = {}
    for path in sorted(Path(root).rglob("*.safetensors")):
        found[str(path.relative_to(root))] = {name: array.tobytes() for name, array in load_file(path).items()}
    for path in sorted(Path(root).rglob("result.json")):
        result = PhaseDirectory(path.parent).result()
        found[str(path.relative_to(root))] = {key: result.get(key) for key in ("test_accuracy_percent", "test_loss")}
    for path in sorted(Path(root).rglob("curve.jsonl")):
        rows = PhaseDirectory(path.parent).curve()
        found[str(path.relative_to(root))] = [{key: row[key] for key in row if key != "timestamp"} for row in rows]
    return found


def check_mlflow():
    """Every phase is one finished run with each point of its curve once; parents have a point a level or network."""
    client = MlflowClient(mlflow_store.tracking_uri())
    experiment = client.get_experiment_by_name("tiny").experiment_id
    stored = {run.info.run_name: run for run in client.search_runs([experiment])}
    folders = {path.parent: path.parent.relative_to("runs") for path in Path("runs").rglob("result.json")}
    parents = {str(name.parent) for name in folders.values()}
    assert len(client.search_runs([experiment])) == len(stored) == len(folders) + len(parents)
    assert set(stored) == {str(name) for name in folders.values()} | parents
    assert {run.info.status for run in stored.values()} == {"FINISHED"}
    for path, name in folders.items():
        accuracy = "scoring_test_accuracy_percent" if name.parts[0] == "scores" else "test_accuracy_percent"
        expected = [
            (row["step"], accuracy if key == "test_accuracy_percent" else key, value)
            for row in PhaseDirectory(path).curve()
            for key, value in row.items()
            if key not in ("step", "timestamp")
        ]
        run = stored[str(name)]
        points = [
            (p.step, p.key, p.value)
            for key in run.data.metrics
            for p in client.get_metric_history(run.info.run_id, key)
        ]
        assert sorted(points) == sorted(expected), name
    for name in parents:
        accuracy = "scoring_test_accuracy_percent" if name.startswith("scores/") else "test_accuracy_percent"
        history = client.get_metric_history(stored[name].info.run_id, accuracy)
        assert sorted(point.step for point in history) == [0, 1]
