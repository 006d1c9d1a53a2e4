"""Run directories without training, and what MLflow stores of them."""

from mlflow import MlflowClient

from lth_diet.config import loading
from lth_diet.masks.mask import Mask
from lth_diet.networks.resnet import ResNet
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.tracking import mlflow_store


def create_run(path):
    """Create the directory of a run with two replicates and two levels."""
    made = RunDirectory(loading.load_config(path, ["replicates=2", "prune.levels=1"]))
    made.create()
    return made


def finish(phase, number, level=None):
    """Write the files of a finished phase, without training."""
    rows = "".join(
        f'{{"step": {step}, "timestamp": {1000 * number + step}, "train_loss": {step / 2}, "learning_rate": 0.1}}\n'
        for step in (2, 4, 6)
    )
    phase.write("curve.jsonl", rows.encode())
    result = {"steps": 6, "timestamp": 1000 * number + 7, "test_accuracy_percent": 90.0 + number}
    if level is not None:
        mask = Mask.dense(ResNet(8, 10, width=2))
        phase.write("mask.safetensors", mask.to_bytes())
        result |= {"level": level, "weights_remaining_percent": 100 * 0.8**level}
    phase.finish(result)


def stored():
    """Return every run of the store by name: (status, tags, params, metrics as {name: [(step, value)]})."""
    client = MlflowClient(mlflow_store.tracking_uri())
    experiment = client.get_experiment_by_name("tiny").experiment_id
    runs = client.search_runs([experiment])
    assert len({run.info.run_name for run in runs}) == len(runs)
    return {
        run.info.run_name: (
            run.info.status,
            run.data.tags,
            run.data.params,
            {
                name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
                for name in run.data.metrics
            },
        )
        for run in runs
    }
