import shutil
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from filelock import FileLock, Timeout
from mlflow import MlflowClient
from PIL import Image

from lth_diet.__main__ import main
from lth_diet.config import loading
from lth_diet.config.identity import run_id
from lth_diet.files import read_json, write_json
from lth_diet.launch import tracker
from lth_diet.masks.mask import Mask
from lth_diet.networks.resnet import ResNet
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.runs.scores_directory import ScoresDirectory
from lth_diet.scores import artifact
from lth_diet.tracking import store, sync
from lth_diet.training.progress import Progress


@pytest.fixture
def run(tiny):
    """The directory of a small run, as training leaves it, without training."""
    made = RunDirectory(loading.load_config(tiny(), ["replicates=2", "prune.levels=1"]))
    made.create()
    return made


def finish(phase, number, level=None):
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
    """Every run of the store by name: (status, tags, params, metrics as {name: [(step, value)]})."""
    client = MlflowClient(store.tracking_uri())
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


def test_a_replicate_is_a_parent_run_whose_steps_are_levels(run):
    replicate = run.replicate(1)
    finish(replicate.pretrain, 0)
    finish(replicate.level(0), 1, level=0)
    finish(replicate.level(1), 2, level=1)
    sync.sync_replicate(replicate)
    status, tags, params, metrics = stored()[f"{run.path.name}/replicate_1"]
    assert status == "FINISHED"
    assert metrics["test_accuracy_percent"] == [(0, 91.0), (1, 92.0)]
    assert metrics["weights_remaining_percent"] == [(0, 100.0), (1, 80.0)]
    expected = {
        "dataset": "digits",
        "model": "ResNet-8 width 2",
        "arm": "random",
        "subset_size": "128",
        "rewind_steps": "4",
        "label_noise": "0.0",
        "replicate": "1",
        "seed": "42",
        "run_id": run_id(run.config),
        "planned_levels": "1",
        "train_steps": "12",
    }
    assert expected.items() <= tags.items()
    assert params == {key: str(value) for key, value in replicate.about["identity"].items()}


def test_a_phase_is_a_child_run_with_its_curve(run):
    replicate = run.replicate(0)
    finish(replicate.pretrain, 0)
    finish(replicate.level(0), 1, level=0)
    sync.sync_replicate(replicate)
    runs = stored()
    status, tags, _, metrics = runs[f"{run.path.name}/replicate_0/level_0"]
    assert status == "FINISHED"
    assert metrics["train_loss"] == [(2, 1.0), (4, 2.0), (6, 3.0)]
    assert metrics["learning_rate"] == [(2, 0.1), (4, 0.1), (6, 0.1)]
    assert tags["phase"] == "level_0"
    assert runs[f"{run.path.name}/replicate_0"][0] == "RUNNING"


def test_syncing_again_changes_nothing(run):
    replicate = run.replicate(0)
    finish(replicate.pretrain, 0)
    finish(replicate.level(0), 1, level=0)
    sync.sync_replicate(replicate)
    before = stored()
    sync.sync_replicate(replicate)
    assert stored() == before


def test_of_a_running_phase_only_rows_up_to_the_checkpoint_are_sent(run):
    replicate = run.replicate(0)
    finish(replicate.pretrain, 0)
    phase = replicate.level(0)
    phase.write(
        "curve.jsonl", b'{"step": 2, "timestamp": 1, "train_loss": 1}\n{"step": 4, "timestamp": 2, "train_loss": 2}\n'
    )
    phase.checkpoint_path(3).write_text("state")
    phase.commit_checkpoint(3)
    sync.sync_replicate(replicate)
    assert stored()[f"{run.path.name}/replicate_0/level_0"][3] == {"train_loss": [(2, 1.0)]}


def test_a_resumed_phase_has_every_point_once(run):
    replicate = run.replicate(0)
    phase = replicate.level(0)
    phase.write("curve.jsonl", b'{"step": 2, "timestamp": 1, "train_loss": 1}\n')
    phase.checkpoint_path(3).write_text("state")
    phase.commit_checkpoint(3)
    sync.sync_replicate(replicate)
    phase.write(
        "curve.jsonl", b'{"step": 2, "timestamp": 1, "train_loss": 1}\n{"step": 4, "timestamp": 9, "train_loss": 2}\n'
    )
    phase.write("mask.safetensors", Mask.dense(ResNet(8, 10, width=2)).to_bytes())
    phase.finish({"level": 0, "weights_remaining_percent": 100.0, "test_accuracy_percent": 1.0, "timestamp": 10})
    sync.sync_replicate(replicate)
    assert stored()[f"{run.path.name}/replicate_0/level_0"][3]["train_loss"] == [(2, 1.0), (4, 2.0)]


def test_more_levels_open_a_finished_run_again(run, tiny):
    replicate = run.replicate(0)
    finish(replicate.level(0), 1, level=0)
    finish(replicate.level(1), 2, level=1)
    sync.sync_replicate(replicate)
    RunDirectory(loading.load_config(tiny(), ["prune.levels=2"])).create()
    sync.sync_replicate(replicate)
    assert stored()[f"{run.path.name}/replicate_0"][0] == "RUNNING"
    finish(replicate.level(2), 3, level=2)
    sync.sync_replicate(replicate)
    status, _, _, metrics = stored()[f"{run.path.name}/replicate_0"]
    assert (status, len(metrics["test_accuracy_percent"])) == ("FINISHED", 3)


def test_a_lost_store_is_rewritten_from_the_run_directory(run, place, monkeypatch):
    replicate = run.replicate(0)
    finish(replicate.level(0), 1, level=0)
    sync.sync_replicate(replicate)
    before = {name: metrics for name, (_, _, _, metrics) in stored().items()}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/new.db")
    sync.sync_replicate(replicate)
    assert {name: metrics for name, (_, _, _, metrics) in stored().items()} == before


def test_a_run_that_is_computed_again_has_every_point_once(run, place):
    replicate = run.replicate(0)
    finish(replicate.level(0), 1, level=0)
    sync.sync_replicate(replicate)
    before = stored()
    shutil.rmtree(replicate.path)
    finish(replicate.level(0), 1, level=0)
    path = replicate.level(0).path / "result.json"
    write_json(path, read_json(path) | {"timestamp": 99_999})
    sync.sync_replicate(replicate)
    assert stored() == before


def artifacts(name):
    client = MlflowClient(store.tracking_uri())
    experiment = client.get_experiment_by_name("tiny").experiment_id
    (run,) = [run for run in client.search_runs([experiment]) if run.info.run_name == name]
    folder = client.download_artifacts(run.info.run_id, "")
    return {path.name: path for path in Path(folder).iterdir()}


def test_config_figure_masks_and_density_tables_are_artifacts(run):
    replicate = run.replicate(0)
    finish(replicate.pretrain, 0)
    finish(replicate.level(0), 1, level=0)
    finish(replicate.level(1), 2, level=1)
    sync.sync_replicate(replicate)
    parent = artifacts(f"{run.path.name}/replicate_0")
    assert read_json(parent["config.json"]) == replicate.about
    with Image.open(parent["accuracy.png"]) as figure:
        assert figure.width > 800
    level = artifacts(f"{run.path.name}/replicate_0/level_1")
    assert Mask.load(level["mask.safetensors"]) == Mask.load(replicate.level(1).path / "mask.safetensors")
    table = pd.read_csv(level["density.csv"])
    assert list(table) == ["layer", "shape", "total", "remaining", "density"] and "fc.weight" in set(table.layer)


def test_versions_are_tags_and_the_description_can_be_read(run):
    finish(run.replicate(0).level(0), 1, level=0)
    sync.sync_replicate(run.replicate(0))
    _, tags, _, _ = stored()[f"{run.path.name}/replicate_0"]
    assert tags["version.torch"] == metadata.version("torch")
    assert tags["version.composer"] == metadata.version("mosaicml")
    assert {"version.python", "version.lth_diet"} <= set(tags)
    note = tags["mlflow.note.content"]
    assert note.startswith(
        "**digits, ResNet-8 width 2, pre-trained on the 128 random examples for 4 steps**, replicate 0"
    )
    assert "to level 1 (80.0 % of weights): each level trains from step 4 to 12, then 20 %" in note


def test_levels_computed_anew_with_another_result_replace_the_old_ones(run):
    replicate = run.replicate(0)
    for level in (0, 1):
        finish(replicate.level(level), level, level=level)
    sync.sync_replicate(replicate)
    shutil.rmtree(replicate.level(1).path)
    finish(replicate.level(1), 5, level=1)  # another accuracy, another curve
    sync.sync_replicate(replicate)
    runs = stored()
    assert runs[f"{run.path.name}/replicate_0"][3]["test_accuracy_percent"] == [(0, 90.0), (1, 95.0)]
    assert len(runs) == 3


def test_a_replicate_that_failed_is_failed_until_it_goes_on(run):
    replicate = run.replicate(0)
    finish(replicate.level(0), 1, level=0)
    replicate.record_failure("a reason")
    sync.sync_replicate(replicate)
    assert stored()[f"{run.path.name}/replicate_0"][0] == "FAILED"
    with replicate.lock():
        sync.sync_replicate(replicate)
    assert stored()[f"{run.path.name}/replicate_0"][0] == "RUNNING"


def test_how_to_look_is_a_command_for_a_local_store_and_an_address_without_secrets(monkeypatch, place):
    assert store.describe_store() == f"mlflow ui --backend-store-uri sqlite:///{place.parent}/mlflow.db"
    for secret in ("me:secret@", "me:s@e/c?r#et@", "me@", ""):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{secret}host:5000")
        assert store.describe_store() == "http://host:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql+psycopg://me:secret@host/mlflow?password=secret")
    assert store.describe_store() == "postgresql+psycopg://host/mlflow"


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


def test_sixteen_processes_that_create_and_write_one_store_at_once_lose_nothing(tiny, place, monkeypatch):
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


def test_the_command_catches_up_with_every_run_below_a_folder(run, capsys):
    for index in (0, 1):
        finish(run.replicate(index).level(0), index, level=0)
    assert main(["sync", "runs"]) == 0
    assert capsys.readouterr().out.count(": up to date") == 2
    assert len(stored()) == 4
    assert main(["sync", str(run.path)]) == 0
    assert len(stored()) == 4


def test_a_scores_artifact_is_a_parent_run_whose_steps_are_networks(tiny, capsys):
    folder = ScoresDirectory(loading.load_config(tiny("easy"), ["pretrain.label_noise=0.1"]))
    folder.create()
    network_metrics = {"test_accuracy_percent": [(1, 91.0)]}
    for number in (1, 0):
        phase = folder.network(number)
        phase.write("curve.jsonl", b'{"step": 2, "timestamp": 1, "train_loss": 1.5}\n')
        phase.finish({"network": number, "timestamp": 7 + number, "test_accuracy_percent": 90.0 + number})
        sync.sync_scores(folder.path)
        status, tags, params, metrics = stored()[f"scores/{folder.path.name}"]
        assert status == "RUNNING"
        assert {name: sorted(points) for name, points in metrics.items()} == network_metrics
        network_metrics = {"test_accuracy_percent": [(0, 90.0), (1, 91.0)]}
    assert (tags["phase"], tags["scores_id"], tags["label_noise"]) == ("scores", folder.path.name, "0.1")
    assert params["scores.networks"] == "2"
    (folder.path / "examples").mkdir()
    (folder.path / "examples/histogram.png").write_bytes(b"a picture")
    artifact.save_scores(folder.path, np.zeros((2, 3), np.float32), np.zeros(3, int), "digits", "digits")
    for _ in range(2):
        assert main(["sync", "runs"]) == 0
        assert capsys.readouterr().out == f"{folder.path}: up to date\n"
    runs = stored()
    assert len(runs) == 3 and {run[0] for run in runs.values()} == {"FINISHED"}
    assert sorted(runs[f"scores/{folder.path.name}"][3]["test_accuracy_percent"]) == [(0, 90.0), (1, 91.0)]
    assert runs[f"scores/{folder.path.name}/network_0"][3] == {"train_loss": [(2, 1.5)]}


def test_the_command_refuses_a_folder_without_runs_and_an_unreachable_store(run, place, monkeypatch, capsys):
    assert main(["sync", str(place / "nowhere")]) == 2
    assert "nowhere: holds no run" in capsys.readouterr().err
    finish(run.replicate(0).level(0), 0, level=0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/no/such/place.db")
    assert main(["sync", "runs"]) == 1
    assert "MLflow is not up to date" in capsys.readouterr().err


def test_a_result_without_measurements_is_one_sentence_and_other_runs_are_synced(run, tiny, capsys):
    other = RunDirectory(loading.load_config(tiny("init"), []))
    other.create()
    for made in (run, other):
        finish(made.replicate(0).level(0), 0, level=0)
    path = run.replicate(0).level(0).path / "result.json"
    write_json(path, {key: value for key, value in read_json(path).items() if key != "test_accuracy_percent"})
    assert main(["sync", "runs"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {path}: no test_accuracy_percent, where float | int has to be; delete ")
    assert err.count("\n") == 1 and out == f"{other.path}/replicate_0: up to date\n"
    assert set(stored()) == {f"{other.path.name}/replicate_0", f"{other.path.name}/replicate_0/level_0"}


def test_a_store_that_cannot_be_reached_is_one_warning(run, monkeypatch):
    finish(run.replicate(0).level(0), 0, level=0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/no/such/place.db")
    progress = Progress(["replicate_0"], 0)
    track = tracker.Tracker(lambda: sync.sync_replicate(run.replicate(0)), run.path.parent, progress)
    track()
    track()
    (message,) = progress.messages
    assert message.startswith("warning: MLflow is not up to date") and "lth_diet sync runs" in message


@pytest.mark.parametrize("experiment", ["../../trap", "/tmp/trap", "..", ".", "a/../../../trap", "trap\\..", "é" * 300])
def test_artifacts_lie_below_mlartifacts_whatever_an_experiment_is_called(run, place, experiment):
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


@pytest.mark.parametrize("call", ["log_artifact", "log_figure", "log_text", "set_terminated", "log_batch"])
def test_what_a_killed_sync_left_out_is_sent_by_the_next(run, monkeypatch, call):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    finish(run.replicate(0).level(0), 0, level=0)
    finish(run.replicate(0).level(1), 0, level=1)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, call, killed)
        with pytest.raises(KeyboardInterrupt):
            sync.sync_replicate(run.replicate(0))
    sync.sync_replicate(run.replicate(0))
    runs, client = stored(), MlflowClient(store.tracking_uri())
    status, tags, params, metrics = runs[f"{run.path.name}/replicate_0"]
    assert status == "FINISHED" and "version.torch" in tags and "train.lr" in params
    assert sorted(metrics["test_accuracy_percent"]) == [(0, 90.0), (1, 90.0)]
    parent = client.search_runs([client.get_experiment_by_name("tiny").experiment_id], "tags.phase = 'all'")[0]
    assert {item.path for item in client.list_artifacts(parent.info.run_id)} == {"accuracy.png", "config.json"}


def test_a_store_whose_making_was_killed_is_made_anew(run, place, monkeypatch):
    class Killed(store.SqlAlchemyStore):
        def __init__(self, *args):
            super().__init__(*args)
            raise KeyboardInterrupt

    finish(run.replicate(0).level(0), 0, level=0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/new.db?timeout=60")
    with monkeypatch.context() as patch:
        patch.setattr(store, "SqlAlchemyStore", Killed)
        with pytest.raises(KeyboardInterrupt):
            sync.sync_replicate(run.replicate(0))
    assert not (place / "new.db").exists()
    (place / "new.db.part-123").write_text("half a store")
    sync.sync_replicate(run.replicate(0))
    assert len(stored()) == 2
    assert sorted(path.name for path in place.glob("new*")) == ["new.db", "new.db.lock"]


def test_runs_that_tell_of_the_same_become_one(run):
    replicate, client = run.replicate(0), MlflowClient(store.tracking_uri())
    finish(replicate.level(0), 0, level=0)
    sync.sync_replicate(replicate)
    before = stored()
    for parent in client.search_runs([client.get_experiment_by_name("tiny").experiment_id]):
        client.create_run(parent.info.experiment_id, tags=parent.data.tags)  # as a request that was sent twice does
    sync.sync_replicate(replicate)
    assert stored() == before


def test_a_request_that_was_carried_out_twice_leaves_one_run(run, monkeypatch):
    def twice(client, *args, **kwargs):
        create(client, *args, **kwargs)
        return create(client, *args, **kwargs)

    create = MlflowClient.create_run
    finish(run.replicate(0).level(0), 0, level=0)
    monkeypatch.setattr(MlflowClient, "create_run", twice)
    sync.sync_replicate(run.replicate(0))
    assert len(stored()) == 2


def test_an_experiment_that_another_process_has_just_made_is_taken(run, monkeypatch):
    def late(client, name):
        first.append(name)
        return None if len(first) == 1 else get(client, name)

    first, get = [], MlflowClient.get_experiment_by_name
    finish(run.replicate(0).level(0), 0, level=0)
    MlflowClient(store.tracking_uri()).create_experiment("tiny")
    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", late)
    sync.sync_replicate(run.replicate(0))
    assert len(stored()) == 2


@pytest.fixture
def silent(monkeypatch):
    """A server that takes requests and answers none of them; a request is given up after a second."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        yield


def test_a_server_that_does_not_answer_takes_little_time_and_gets_a_last_try_at_the_end(run, silent, monkeypatch):
    def sync():
        tried.append(time.monotonic())
        sync.sync_replicate(run.replicate(0))

    tried, progress = [], Progress(["replicate_0"], 0)
    finish(run.replicate(0).level(0), 0, level=0)
    track = tracker.Tracker(sync, run.path.parent, progress)
    begin = time.monotonic()
    for _ in range(100):
        track()
    assert len(tried) == 1 and time.monotonic() - begin < 5  # two requests of a second, and MLflow's jitter
    track.finish()
    assert len(tried) == 2 and len(progress.messages) == 1
    track.finish()
    assert len(tried) == 2


def test_what_a_server_missed_is_sent_once_its_respite_is_over(run, monkeypatch):
    def sync():
        tried.append(True)
        if len(tried) == 1:
            time.sleep(0.01)
            raise ConnectionError

    tried = []
    track = tracker.Tracker(sync, run.path.parent, Progress(["replicate_0"], 0))
    track()
    track()
    assert len(tried) == 1
    time.sleep(0.02 * tracker.BACKOFF_FACTOR)
    track()
    track.finish()
    assert len(tried) == 2


def test_two_processes_do_not_sync_one_replicate_at_once(run, monkeypatch):
    finish(run.replicate(0).level(0), 0, level=0)
    monkeypatch.setattr(sync, "_LOCK_TIMEOUT", 0.1)
    with FileLock(run.replicate(0).path / ".mlflow.lock"), pytest.raises(Timeout):
        sync.sync_replicate(run.replicate(0))
    sync.sync_replicate(run.replicate(0))
    assert len(stored()) == 2
