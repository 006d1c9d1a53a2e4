import pytest

from lth_diet.config import loading
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.tracking import sync
from lth_diet.tracking.mlflow_store import tracking_uri


@pytest.fixture
def record(tiny):
    """Writes the run directory of an arm and syncs it to MLflow; takes a dict from replicate to accuracy per level."""

    def write(arm, accuracies, *overrides, experiment="tiny"):
        planned = max(map(len, accuracies.values())) - 1
        settings = [
            f"replicates={len(accuracies)}",
            f"prune.levels={planned}",
            f"experiment={experiment!r}",
            *overrides,
        ]
        run = RunDirectory(loading.load_config(tiny(arm), settings))
        run.create()
        for index, levels in accuracies.items():
            for level, accuracy in enumerate(levels):
                phase = run.replicate(index).level(level)
                phase.path.mkdir(parents=True)
                result = {"level": level, "timestamp": 7, "weights_remaining_percent": 100 * 0.8**level}
                phase.finish({**result, "test_accuracy_percent": accuracy})
            sync.sync_replicate(run.replicate(index))
        return run

    return write


@pytest.fixture
def store(record):
    """MLflow store with two arms of two levels and two replicates, one of them incomplete."""
    record("init", {0: [89.0, 88.0], 1: [90.0, 89.0]})
    record("random", {0: [90.0, 89.0], 1: [91.0]})
    return tracking_uri()
