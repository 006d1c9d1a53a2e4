import shutil
import subprocess
import sys
import time

import pytest
from mlflow import MlflowClient
from mlflow.entities import Experiment
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


def test_the_link_opens_the_comparison_of_an_experiment_and_has_no_secrets(run, monkeypatch):
    assert mlflow_store.comparison_link("tiny") is None
    finish(run.replicate(0).level(0), 0, level=0)
    sync.sync_replicate(run.replicate(0))
    found = mlflow_store.open_client().get_experiment_by_name("tiny").experiment_id
    link = f"http://127.0.0.1:5000/#/experiments/{found}/runs?compareRunsMode=CHART&workflowType=machine_learning"
    assert mlflow_store.comparison_link("tiny").startswith(link)
    client = mlflow_store.open_client()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@host:5000/")
    monkeypatch.setattr(mlflow_store, "open_client", lambda: client)
    assert mlflow_store.comparison_link("tiny").startswith(f"http://host:5000/#/experiments/{found}/runs?")


def folders(place):
    """The folder of a store that was moved there, and its former folder, with the files of both."""
    here, there = place / "here", place / "there"
    (here / "mlartifacts/tiny").mkdir(parents=True)
    (here / "mlflow.db").touch()
    return here, there


def moved(here, there):
    pass


def copied(here, there):
    shutil.copytree(here, there)


def moved_back(here, there):
    there.symlink_to(here)  # found under its former name


def moved_without_its_artifacts(here, there):
    there.mkdir()
    (here / "mlartifacts").rename(there / "mlartifacts")


def copied_without_its_artifacts(here, there):
    copied(here, there)
    shutil.rmtree(here / "mlartifacts")


@pytest.mark.parametrize(
    ("change", "uri", "location", "reported"),
    [
        (moved, "sqlite:///{here}/mlflow.db", "file://{there}/mlartifacts/tiny", True),
        (moved, "sqlite:///here/mlflow.db?timeout=9", "file://{there}/mlartifacts/tiny", True),
        (moved, "sqlite:///{here}/mlflow.db", "file://{here}/mlartifacts/tiny", False),
        (moved, "sqlite:///here/mlflow.db", "file://{here}/mlartifacts/1", False),
        (moved, "sqlite:///{here}/mlflow.db", "file://{there}/mlartifacts/1", True),
        (moved, "sqlite:///{here}/mlflow.db", "{there}/chosen", False),  # nothing has been stored there yet
        (moved, "sqlite:///{here}/mlflow.db", "s3://bucket/mlartifacts/tiny", False),
        (moved, "sqlite:///{here}/mlflow.db", "mlflow-artifacts:/mlartifacts/tiny", False),
        (moved, "http://localhost:5000", "file://{there}/mlartifacts/tiny", False),
        (copied, "sqlite:///{here}/mlflow.db", "file://{there}/mlartifacts/tiny", True),
        (moved_back, "sqlite:///{here}/mlflow.db", "file://{there}/mlartifacts/tiny", False),
        (moved_back, "sqlite:///{there}/mlflow.db", "file://{there}/mlartifacts/tiny", False),
        (moved_without_its_artifacts, "sqlite:///{here}/mlflow.db", "file://{there}/mlartifacts/tiny", False),
        (copied_without_its_artifacts, "sqlite:///{here}/mlflow.db", "file://{there}/mlartifacts/tiny", True),
    ],
)
def test_a_store_is_moved_if_its_artifacts_would_go_elsewhere_than_where_it_is_now(
    place, monkeypatch, change, uri, location, reported
):
    here, there = folders(place)
    change(here, there)
    client = MlflowClient(mlflow_store.tracking_uri())
    monkeypatch.setattr(client._tracking_client, "tracking_uri", uri.format(here=here, there=there))
    experiment = Experiment("1", "tiny", location.format(here=here, there=there), "active")
    move = mlflow_store.describe_move(client, experiment)
    assert bool(move) == reported
    assert (
        not reported
        or f"mlflow.db was moved or copied, but MLflow still keeps the artifacts of 'tiny' in {there}" in move
    )


def test_artifacts_of_finished_runs_that_are_gone_from_a_chosen_folder_are_reported(run, place, monkeypatch):
    client = MlflowClient(mlflow_store.tracking_uri())
    client.create_experiment("tiny", (place / "chosen").as_uri())
    for level in (0, 1):
        finish(run.replicate(0).level(level), level, level=level)
    sync.sync_replicate(run.replicate(0))
    sync.sync_replicate(run.replicate(0))
    (place / "chosen").rename(place / "moved")
    with pytest.raises(mlflow_store.StoreError, match="was moved or copied"):
        sync.sync_replicate(run.replicate(0))


def test_the_reason_of_a_failure_is_one_line_without_secrets(monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for uri, reason in {
        "http://me:secret@127.0.0.1:9": "http://127.0.0.1:9: Connection refused",
        "http://me:secret@name.invalid": "http://name.invalid: ",  # and the resolver's words
        "sqlite://secret.db": "Invalid SQLite URL: sqlite://secret.db",
        "ftp://me:secret@host": " Model registry functionality is unavailable; got unsupported URI 'ftp://host' for",
    }.items():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with pytest.raises(Exception) as caught:
            mlflow_store.open_client().search_experiments()
        shown = mlflow_store.failure_reason(caught.value)
        assert shown.startswith(reason.strip()) and "me:secret" not in shown and "\n" not in shown
    assert mlflow_store.failure_reason(ValueError()) == "ValueError"
    assert len(mlflow_store.failure_reason(ValueError("long " * 999))) < 500


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("postgresql+psycopg://me:secret@127.0.0.1:9/x", "127.0.0.1:9/x: Connection refused"),
        ("mysql+nothing://me:secret@127.0.0.1:9/x", "cannot be used: Can't load plugin"),
        ("sqlite:////proc/x.db", "/proc/x.db.lock: No such file or directory"),
    ],
)
def test_a_database_that_cannot_be_used_is_reported_at_once(monkeypatch, uri, reason):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(time, "sleep", None)
    monkeypatch.setattr(mlflow_store, "LOCK_TIMEOUT", 0)
    with pytest.raises((mlflow_store.StoreError, OSError)) as caught, mlflow_store.lock_store():
        mlflow_store.open_client()
    shown = mlflow_store.failure_reason(caught.value)
    assert reason in shown and "me:secret" not in shown


def test_a_database_at_a_socket_is_left_to_its_driver(monkeypatch):
    for uri in ("postgresql+psycopg:///x", "postgresql+psycopg://me:secret@/x?host=/run/sql", "sqlite:///x.db"):
        mlflow_store.check_database(uri)


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


@pytest.mark.parametrize("uri", ["databricks", "databricks-uc", "sqlite:///a.db", "http://server"])
def test_databricks_and_servers_are_no_folders(uri):
    mlflow_store._check_uri(uri)
    with pytest.raises(mlflow_store.StoreError, match="means a folder"):
        mlflow_store._check_uri("mlruns")


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
