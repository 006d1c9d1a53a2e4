import subprocess
import sys

import pytest
from tracking.runs import finish, stored

from lth_diet.config import loading
from lth_diet.files import read_json, write_json
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.tracking import mlflow_store, sync


def test_a_local_store_is_described_by_a_command_and_a_server_by_its_address_without_secrets(monkeypatch, place):
    assert mlflow_store.describe_store() == f"mlflow ui --backend-store-uri sqlite:///{place.parent}/mlflow.db"
    for secret in ("me:secret@", "me:s@e/c?r#et@", "me@", ""):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{secret}host:5000")
        assert mlflow_store.describe_store() == "http://host:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+psycopg://me:secret@host/mlflow?password=secret")
    assert mlflow_store.describe_store() == "postgresql+psycopg://host/mlflow"


SIXTEEN = """
import multiprocessing, sys
from pathlib import Path
from lth_diet.runs.run_directory import ReplicateDirectory
from lth_diet.tracking.sync import sync_replicate

def sync(path, barrier):
    barrier.wait()
    sync_replicate(ReplicateDirectory(path))

context = multiprocessing.get_context("fork")  # each child opens the store for itself
barrier = context.Barrier(16)
paths = sorted(Path(sys.argv[1]).glob("replicate_*"))
processes = [context.Process(target=sync, args=(path, barrier)) for path in paths]
for process in processes:
    process.start()
for process in processes:
    process.join()
sys.exit([process.exitcode for process in processes] != [0] * 16)
"""


def test_sixteen_processes_that_create_and_write_one_store_concurrently_lose_nothing(tiny, place, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/new.db")
    run = RunDirectory(loading.load_config(tiny(), ["replicates=16", "prune.levels=0"]))
    run.create()
    for index in range(16):
        finish(run.replicate(index).level(0), index, level=0)
    done = subprocess.run([sys.executable, "-c", SIXTEEN, str(run.path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    runs = stored()
    assert len(runs) == 32
    for index in range(16):
        status, _, _, metrics = runs[f"{run.path.name}/replicate_{index}"]
        assert (status, metrics["test_accuracy_percent"]) == ("FINISHED", [(0, 90.0 + index)])


@pytest.mark.parametrize("experiment", ["../../trap", "/tmp/trap", "..", ".", "a/../../../trap", "trap\\..", "é" * 300])
def test_artifacts_are_stored_below_mlartifacts_for_any_name_of_an_experiment(run, place, experiment):
    finish(run.replicate(0).level(0), 0, level=0)
    config_path = run.path / "config.json"
    write_json(config_path, read_json(config_path) | {"experiment": experiment})
    before = set(place.parent.parent.rglob("*"))
    sync.sync_replicate(run.replicate(0))
    made = {path for path in place.parent.parent.rglob("*") if path not in before}
    store = place.parent / "mlartifacts"
    assert any(path.name == "density.csv" for path in made)
    assert all(path == store or len(path.relative_to(store).parts) for path in made if path.suffix != ".lock")
    assert len(list(store.iterdir())) == 1


def test_a_store_whose_creation_was_killed_is_created_again(run, place, monkeypatch):
    class Killed(mlflow_store.SqlAlchemyStore):
        def __init__(self, *args):
            super().__init__(*args)
            raise KeyboardInterrupt

    finish(run.replicate(0).level(0), 0, level=0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/new.db?timeout=60")
    with monkeypatch.context() as patch:
        patch.setattr(mlflow_store, "SqlAlchemyStore", Killed)
        with pytest.raises(KeyboardInterrupt):
            sync.sync_replicate(run.replicate(0))
    assert not (place / "new.db").exists()
    (place / "new.db.part-123").write_text("half a store")
    sync.sync_replicate(run.replicate(0))
    assert len(stored()) == 2
    assert sorted(path.name for path in place.glob("new*")) == ["new.db", "new.db.lock"]
