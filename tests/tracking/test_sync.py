import shlex
import shutil
from importlib import metadata
from pathlib import Path

import mlflow.cli
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from filelock import FileLock, Timeout
from helpers import MEASURED
from mlflow import MlflowClient
from PIL import Image
from tracking.runs import finish, stored

from lth_diet.__main__ import main
from lth_diet.config import loading
from lth_diet.config.run_ids import run_id
from lth_diet.files import read_json, write_json
from lth_diet.masks.mask import Mask
from lth_diet.networks.resnet import ResNet
from lth_diet.runs.run_directory import ReplicateDirectory, RunDirectory
from lth_diet.runs.scores_directory import ScoresDirectory
from lth_diet.scores import artifact
from lth_diet.tracking import mlflow_store, sync


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
        "arm_description": "random 128, t_r = 4",
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
    assert params == {key: str(value) for key, value in replicate.run_config["identity"].items()}


def test_arms_of_other_subsets_have_other_descriptions(tiny):
    found = set()
    for key in ("", "class_balanced=true", "offset=16"):
        overrides = [f"pretrain.subset.{key}"] if key else []
        run = RunDirectory(loading.load_config(tiny("easy"), overrides))
        run.create()
        finish(run.replicate(0).pretrain, 0)
        sync.sync_replicate(run.replicate(0))
        description = stored()[f"{run.path.name}/replicate_0"][1]["arm_description"]
        assert description == run.config.arm_description
        found.add(description.removeprefix("easy 128, t_r = 4"))
    assert found == {"", ", balanced", ", offset = 16"}


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


def test_devices_are_tags_of_phases_and_a_replicate_has_those_of_all(run):
    replicate = run.replicate(0)
    for level, device in enumerate(("NVIDIA A100", "NVIDIA H100")):
        environment = {"device": device, "precision": "bf16", "torch": "2.7.0"}
        replicate.level(level).path.mkdir(parents=True)
        replicate.level(level).finish({**MEASURED, "level": level, "environment": environment})
    sync.sync_replicate(replicate)
    runs = stored()
    for name, device in {"": "NVIDIA A100 and NVIDIA H100", "/level_0": "NVIDIA A100"}.items():
        tags = runs[f"{run.path.name}/replicate_0{name}"][1]
        assert (tags["device"], tags["precision"], "torch" in tags) == (device, "bf16", False)


def test_syncing_again_changes_nothing(run):
    replicate = run.replicate(0)
    finish(replicate.pretrain, 0)
    finish(replicate.level(0), 1, level=0)
    sync.sync_replicate(replicate)
    before = stored()
    sync.sync_replicate(replicate)
    assert stored() == before


def test_the_curve_of_an_unfinished_phase_is_sent_up_to_its_checkpoint(run):
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


def test_planning_more_levels_reopens_a_finished_run(run, tiny):
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


def test_a_lost_store_is_rebuilt_from_the_run_directory(run, place, monkeypatch):
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
    client = MlflowClient(mlflow_store.tracking_uri())
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
    assert read_json(parent["config.json"]) == replicate.run_config
    with Image.open(parent["accuracy.png"]) as figure:
        assert figure.width > 800
    level = artifacts(f"{run.path.name}/replicate_0/level_1")
    assert Mask.load(level["mask.safetensors"]) == Mask.load(replicate.level(1).path / "mask.safetensors")
    table = pd.read_csv(level["density.csv"])
    assert list(table) == ["layer", "shape", "total", "remaining", "density"] and "fc.weight" in set(table.layer)


def test_versions_are_tags_and_the_description_is_readable(run):
    finish(run.replicate(0).level(0), 1, level=0)
    sync.sync_replicate(run.replicate(0))
    _, tags, _, _ = stored()[f"{run.path.name}/replicate_0"]
    assert tags["version.torch"] == metadata.version("torch")
    assert tags["version.composer"] == metadata.version("mosaicml")
    assert {"version.python", "version.lth_diet"} <= set(tags)
    note = tags["mlflow.note.content"]
    assert note.startswith("**digits, ResNet-8 width 2, random 128, t_r = 4**, replicate 0")
    assert "to level 1 (80.0 % of weights): each level trains from step 4 to 12, then 20 %" in note


def test_levels_computed_again_with_another_result_replace_the_old_ones(run):
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


def test_a_failed_replicate_is_failed_until_it_resumes(run):
    replicate = run.replicate(0)
    finish(replicate.level(0), 1, level=0)
    replicate.record_failure("a reason")
    sync.sync_replicate(replicate)
    assert stored()[f"{run.path.name}/replicate_0"][0] == "FAILED"
    with replicate.lock():
        sync.sync_replicate(replicate)
    assert stored()[f"{run.path.name}/replicate_0"][0] == "RUNNING"


def test_the_command_syncs_every_run_in_a_folder(run, capsys):
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
    network_metrics = {"scoring_test_accuracy_percent": [(1, 91.0)]}
    for number in (1, 0):
        phase = folder.network(number)
        phase.write("curve.jsonl", b'{"step": 2, "timestamp": 1, "train_loss": 1.5}\n')
        phase.finish({"network": number, "timestamp": 7 + number, "test_accuracy_percent": 90.0 + number})
        sync.sync_scores(folder.path)
        status, tags, params, metrics = stored()[f"scores/{folder.path.name}"]
        assert status == "RUNNING"
        assert {name: sorted(points) for name, points in metrics.items()} == network_metrics
        network_metrics = {"scoring_test_accuracy_percent": [(0, 90.0), (1, 91.0)]}
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
    assert sorted(runs[f"scores/{folder.path.name}"][3]["scoring_test_accuracy_percent"]) == [(0, 90.0), (1, 91.0)]
    assert runs[f"scores/{folder.path.name}/network_0"][3] == {"train_loss": [(2, 1.5)]}


def test_scores_stored_under_the_former_metric_name_are_stored_again_with_the_tags_added_by_hand(tiny, monkeypatch):
    folder = ScoresDirectory(loading.load_config(tiny("easy"), []))
    folder.create()
    client = MlflowClient(mlflow_store.tracking_uri())
    for number in (0, 1):
        folder.network(number).path.mkdir(parents=True)
        folder.network(number).finish({**MEASURED, "network": number})
    with monkeypatch.context() as patch:
        patch.setattr(sync._ScoresSync, "metric_names", {})
        sync.sync_scores(folder.path)
    (old,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id], "tags.phase = 'scores'")
    client.set_tag(old.info.run_id, "reviewed", "yes")
    sync.sync_scores(folder.path)
    _, tags, _, metrics = stored()[f"scores/{folder.path.name}"]
    assert tags["reviewed"] == "yes" and set(metrics) == {"scoring_test_accuracy_percent"}
    assert len(stored()) == 3


@pytest.mark.parametrize("kind", [None, "genai_development_inferred", "genai_development"])
def test_an_existing_experiment_opens_as_model_training_unless_a_person_chose_another_kind(run, kind):
    client = MlflowClient(mlflow_store.tracking_uri())
    experiment = client.create_experiment("tiny", tags={"mlflow.experimentKind": kind} if kind else None)
    finish(run.replicate(0).level(0), 0, level=0)
    sync.sync_replicate(run.replicate(0))
    chosen = kind if kind == "genai_development" else "custom_model_development"
    assert client.get_experiment(experiment).tags["mlflow.experimentKind"] == chosen


def test_the_description_has_a_table_of_levels_and_is_sent_only_when_it_changes(run, monkeypatch):
    def count(client, run_id, metrics=(), params=(), tags=()):
        sent.extend(tag.key for tag in tags)
        return log(client, run_id, metrics=metrics, params=params, tags=tags)

    sent, log, replicate = [], MlflowClient.log_batch, run.replicate(0)
    finish(replicate.level(0), 0, level=0)
    sync.sync_replicate(replicate)
    monkeypatch.setattr(MlflowClient, "log_batch", count)
    sync.sync_replicate(replicate)
    assert sent == []
    finish(replicate.level(1), 1, level=1)
    sync.sync_replicate(replicate)
    assert sent.count("mlflow.note.content") == 1
    table = stored()[f"{run.path.name}/replicate_0"][1]["mlflow.note.content"].partition("\n\n")[2].splitlines()
    assert table == [
        "| level | weights remaining (%) | test accuracy (%) |",
        "|---|---|---|",
        "| 0 | 100 | 90.00 |",
        "| 1 | 80 | 91.00 |",
    ]


def test_the_table_of_very_many_levels_fits_into_a_tag():
    results = [
        {"level": level, "weights_remaining_percent": 1e-9, "test_accuracy_percent": 10} for level in range(10_000)
    ]
    assert "| 9999 |" in sync._levels_table(results) and len(sync._levels_table(results)) < 6000


def test_the_command_rejects_a_folder_without_runs_and_fails_for_an_unreachable_store(run, place, monkeypatch, capsys):
    assert main(["sync", str(place / "nowhere")]) == 2
    assert "nowhere: contains no runs" in capsys.readouterr().err
    finish(run.replicate(0).level(0), 0, level=0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/no/such/place.db")
    assert main(["sync", "runs"]) == 1
    reason = "/proc/no: No such file or directory"
    assert capsys.readouterr().err == f"error: {run.path}/replicate_0: MLflow is not up to date: {reason}\n"


def test_a_result_without_measurements_is_reported_in_one_sentence_and_other_runs_are_synced(run, tiny, capsys):
    other = RunDirectory(loading.load_config(tiny("init"), []))
    other.create()
    for made in (run, other):
        finish(made.replicate(0).level(0), 0, level=0)
    path = run.replicate(0).level(0).path / "result.json"
    write_json(path, {key: value for key, value in read_json(path).items() if key != "test_accuracy_percent"})
    assert main(["sync", "runs"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"error: {path}: test_accuracy_percent is missing, expected float | int; delete ")
    assert err.count("\n") == 1 and out == f"{other.path}/replicate_0: up to date\n"
    assert set(stored()) == {f"{other.path.name}/replicate_0", f"{other.path.name}/replicate_0/level_0"}


@pytest.fixture
def two_experiments(run, tiny):
    """Finished replicates of two runs in the experiments tiny and other."""
    other = RunDirectory(loading.load_config(tiny("init"), ["experiment=other"]))
    other.create()
    for made in (run, other):
        finish(made.replicate(0).level(0), 0, level=0)
    finish(run.replicate(1).level(0), 1, level=0)
    return run.path, other.path


def test_a_deleted_experiment_is_reported_with_the_remedy_and_other_runs_are_synced(two_experiments, capsys):
    tiny, other = two_experiments
    client = MlflowClient(mlflow_store.tracking_uri())
    client.delete_experiment(client.create_experiment("tiny"))
    assert main(["sync", "runs"]) == 1
    out, err = capsys.readouterr()
    assert out == f"{other}/replicate_0: up to date\n"
    first, second = err.splitlines()
    assert first.startswith(f"error: {tiny}/replicate_0: MLflow is not up to date: the experiment 'tiny' is deleted; ")
    assert second == f"error: {tiny}/replicate_1: MLflow is not up to date: as above"
    uri, _, *command = shlex.split(first.split("`")[1])
    assert uri == f"MLFLOW_TRACKING_URI={mlflow_store.tracking_uri()}"
    assert CliRunner().invoke(mlflow.cli.cli, command).exit_code == 0
    assert main(["sync", "runs"]) == 0
    assert len(stored()) == 4


@pytest.mark.parametrize(
    "uri", ["./mlruns", "mlruns", "file:mlruns", "sqlite://", "sqlite:///", "sqlite:///:memory:?a=b"]
)
def test_a_store_that_keeps_nothing_is_reported_once_with_the_remedy(two_experiments, monkeypatch, place, capsys, uri):
    before = sorted(path for path in place.parent.rglob("*") if path.name != ".mlflow.lock")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert main(["sync", "runs"]) == 1
    err = capsys.readouterr().err
    assert f"MLFLOW_TRACKING_URI = {uri!r} " in err and "; set it to sqlite:///<file> or http://<server>" in err
    assert err.count("\n") == 1
    assert sorted(path for path in place.parent.rglob("*") if path.name != ".mlflow.lock") == before


def everything():
    """Metrics and names of artifacts of every run."""
    client = MlflowClient(mlflow_store.tracking_uri())
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    files = {run.info.run_name: {file.path for file in client.list_artifacts(run.info.run_id)} for run in runs}
    return {name: (files[name], metrics) for name, (*_, metrics) in stored().items()}


def test_a_moved_store_is_reported_and_a_new_one_gets_all_points_and_artifacts(
    run, place, empty_store, monkeypatch, capsys
):
    finish(run.replicate(0).level(0), 0, level=0)
    finish(run.replicate(0).level(1), 1, level=1)
    old, new = place / "old", place / "new"
    old.mkdir()
    Path("runs").rename(old / "runs")
    shutil.copy(empty_store, old / "mlflow.db")
    monkeypatch.chdir(old)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{old}/mlflow.db")
    assert main(["sync", "runs"]) == 0
    before = everything()
    assert before[f"{run.path.name}/replicate_0/level_1"][0] == {"mask.safetensors", "density.csv"}

    old.rename(new)
    monkeypatch.chdir(new)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{new}/mlflow.db")
    finish(ReplicateDirectory(new / run.replicate(0).path).pretrain, 2)
    capsys.readouterr()
    assert main(["sync", "runs"]) == 1
    err = capsys.readouterr().err
    assert "mlflow.db was moved or copied" in err and "rename mlflow.db and run `python -m lth_diet sync" in err
    assert "tags and notes that were added by hand are not kept" in err
    assert not old.exists()

    Path("mlflow.db").rename("mlflow.db.old")
    shutil.copy(empty_store, new / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{new}/../new/mlflow.db")  # MLflow keeps stores open by URI
    assert main(["sync", "runs"]) == 0
    after = everything()
    assert after.pop(f"{run.path.name}/replicate_0/pretrain")
    assert after == before


@pytest.mark.parametrize("call", ["log_artifact", "log_figure", "log_text", "set_terminated", "log_batch"])
def test_the_next_sync_sends_what_a_killed_sync_missed(run, monkeypatch, call):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    finish(run.replicate(0).level(0), 0, level=0)
    finish(run.replicate(0).level(1), 0, level=1)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, call, killed)
        with pytest.raises(KeyboardInterrupt):
            sync.sync_replicate(run.replicate(0))
    sync.sync_replicate(run.replicate(0))
    runs, client = stored(), MlflowClient(mlflow_store.tracking_uri())
    status, tags, params, metrics = runs[f"{run.path.name}/replicate_0"]
    assert status == "FINISHED" and "version.torch" in tags and "train.lr" in params
    assert sorted(metrics["test_accuracy_percent"]) == [(0, 90.0), (1, 90.0)]
    parent = client.search_runs([client.get_experiment_by_name("tiny").experiment_id], "tags.phase = 'all'")[0]
    assert {item.path for item in client.list_artifacts(parent.info.run_id)} == {"accuracy.png", "config.json"}


def test_duplicate_runs_are_merged(run):
    replicate, client = run.replicate(0), MlflowClient(mlflow_store.tracking_uri())
    finish(replicate.level(0), 0, level=0)
    sync.sync_replicate(replicate)
    before = stored()
    for parent in client.search_runs([client.get_experiment_by_name("tiny").experiment_id]):
        client.create_run(parent.info.experiment_id, tags=parent.data.tags)  # as a request that was sent twice does
    sync.sync_replicate(replicate)
    assert stored() == before


def test_a_request_processed_twice_leaves_one_run(run, monkeypatch):
    def twice(client, *args, **kwargs):
        create(client, *args, **kwargs)
        return create(client, *args, **kwargs)

    create = MlflowClient.create_run
    finish(run.replicate(0).level(0), 0, level=0)
    monkeypatch.setattr(MlflowClient, "create_run", twice)
    sync.sync_replicate(run.replicate(0))
    assert len(stored()) == 2


def test_an_experiment_that_another_process_has_just_created_is_used(run, monkeypatch):
    def late(client, name):
        first.append(name)
        return None if len(first) == 1 else get(client, name)

    first, get = [], MlflowClient.get_experiment_by_name
    finish(run.replicate(0).level(0), 0, level=0)
    MlflowClient(mlflow_store.tracking_uri()).create_experiment("tiny")
    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", late)
    sync.sync_replicate(run.replicate(0))
    assert len(stored()) == 2


@pytest.mark.parametrize("lock", ["{replicate}/.mlflow.lock", "{store}.lock"])
def test_a_process_does_not_wait_without_end_for_another_one_that_writes_to_mlflow(run, monkeypatch, lock):
    finish(run.replicate(0).level(0), 0, level=0)
    monkeypatch.setattr(sync, "_LOCK_TIMEOUT", 0.1)
    monkeypatch.setattr(mlflow_store, "LOCK_TIMEOUT", 0.1)
    store = mlflow_store.tracking_uri().removeprefix("sqlite:///")
    with FileLock(lock.format(replicate=run.replicate(0).path, store=store)), pytest.raises(Timeout):
        sync.sync_replicate(run.replicate(0))
    sync.sync_replicate(run.replicate(0))
    assert len(stored()) == 2
