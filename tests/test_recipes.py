"""The recipes as a user runs them, through `composer` and `python`."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import ROOT, check_launcher_output, run, start
from mlflow import MlflowClient
from safetensors.torch import load_file

from lth_diet.masks.mask import Mask
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.tracking import mlflow_store


def bits(root):
    """All masks, weights and other tensors below a runs directory, as bytes."""
    found = {}
    for path in sorted(Path(root).rglob("*.safetensors")):
        tensors = load_file(path)
        found[str(path.relative_to(root))] = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    assert found
    return found


def test_two_ranks_match_one_process_bit_for_bit_and_a_rerun_computes_nothing(tiny):
    path = tiny()
    code, out, err = run(path, "replicates=2", ranks=2, fork=False)
    assert code == 0, err
    assert "replicate 0  level 2    64.0 % of weights  test accuracy" in out
    assert "weights remaining" in out and out.count("\n    2             64.0 %") == 1
    assert out.count("  2\n") == 3, "the table counts both replicates at each of three levels"
    assert "runs/digits_random-" in out
    code, _, err = run(path, "replicates=2", "runs=alone", fork=False)
    assert code == 0, err
    assert "Warning" not in err and "INFO" not in err
    assert bits("runs") == bits("alone")

    before = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*.safetensors")}
    code, again, err = run(path, "replicates=2", ranks=2)
    assert code == 0, err
    assert "steps/s" not in again
    assert {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*.safetensors")} == before

    client = MlflowClient(mlflow_store.tracking_uri())
    experiment = client.get_experiment_by_name("tiny").experiment_id
    parents = client.search_runs([experiment], "tags.phase = 'all'")
    assert sorted(parent.data.tags["replicate"] for parent in parents) == ["0", "1"]
    for parent in parents:
        history = client.get_metric_history(parent.info.run_id, "test_accuracy_percent")
        assert [metric.step for metric in history] == [0, 1, 2]


def test_a_run_killed_within_a_level_and_resumed_is_bit_identical(tiny):
    path = tiny()
    longer = ["train.steps=300", "intervals.checkpoint=10", "prune.levels=1"]
    code, _, err = run(path, *longer, "runs=whole")
    assert code == 0, err
    process = start(path, *longer)
    name = next(Path("whole").glob("digits*")).name
    level = Path("runs") / name / "replicate_0/level_1"
    while not (level / "checkpoint.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (level / "result.json").exists()
    code, out, err = run(path, *longer)
    assert code == 0, err
    assert "level 0   100.0 % of weights  step" not in out
    assert bits("runs") == bits("whole")
    assert Mask.load(level / "mask.safetensors").density < 1

    client = MlflowClient(mlflow_store.tracking_uri())
    experiment = client.get_experiment_by_name("tiny").experiment_id
    children = client.search_runs([experiment], "tags.phase = 'level_1'")
    assert len(children) == 1
    steps = [metric.step for metric in client.get_metric_history(children[0].info.run_id, "train_loss")]
    assert steps == list(range(6, 301, 2))


@pytest.mark.integration
def test_a_rerun_resumes_after_the_launcher_is_killed(tiny):
    path = tiny()
    longer = ["train.steps=400", "intervals.checkpoint=10", "prune.levels=1", "replicates=2"]
    process = start(path, *longer, ranks=2)
    while not list(Path("runs").glob("*/replicate_1/level_0/checkpoint.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    code, _, err = run(path, *longer, ranks=2)
    assert code == 0, err
    assert len(list(Path("runs").glob("*/replicate_*/level_1/result.json"))) == 2


@pytest.mark.integration
def test_a_run_in_a_folder_with_special_characters_is_resumed(tiny):
    path = tiny()
    odd = ['runs="a {b} #c?d ü"', "train.steps=300", "intervals.checkpoint=10", "prune.levels=0"]
    process = start(path, *odd)
    while not list(Path().glob("a*/*/replicate_0/level_0/checkpoint.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    code, _, err = run(path, *odd)
    assert code == 0, err


def test_a_rerun_sends_what_mlflow_missed(tiny, monkeypatch, place):
    path = tiny("init")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/no/such/place.db")
    code, _, err = run(path, "prune.levels=0")
    assert code == 0 and err.count("warning: MLflow is not up to date") == 1
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")
    code, _, err = run(path, "prune.levels=0")
    assert code == 0 and "MLflow" not in err
    client = MlflowClient(mlflow_store.tracking_uri())
    experiment = client.get_experiment_by_name("tiny").experiment_id
    (parent,) = client.search_runs([experiment], "tags.phase = 'all'")
    assert parent.info.status == "FINISHED" and "test_accuracy_percent" in parent.data.metrics


@pytest.mark.integration
def test_data_parallel_training_resumes_bit_identically(tiny):
    path = tiny()
    together = ["parallelism=data", "train.steps=150", "intervals.checkpoint=10", "prune.levels=1"]
    code, out, err = run(path, *together, "runs=whole", ranks=2)
    assert code == 0, err
    assert "replicate 0  level 1    80.0 % of weights  test accuracy" in out
    process = start(path, *together, ranks=2)
    level = Path("runs") / next(Path("whole").glob("digits*")).name / "replicate_0/level_1"
    while not (level / "checkpoint.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    ranks = psutil.Process(process.pid).children(recursive=True)
    for rank in ranks:
        rank.kill()
    process.communicate()
    assert not (level / "result.json").exists()
    code, _, err = run(path, *together, ranks=2)
    assert code == 0, err
    assert bits("runs") == bits("whole")


MEASURED = re.compile(r"^(network \d)  scoring .* test accuracy", re.M)


@pytest.mark.integration
def test_scores_needed_by_two_launches_of_two_ranks_are_computed_once(tiny):
    launches = [
        start(tiny(arm, f"{arm}.yaml"), "replicates=2", "scores.networks=4", "prune.levels=0", ranks=2)
        for arm in ("easy", "hard")
    ]
    outputs = [launch.communicate(timeout=300) for launch in launches]
    assert [launch.returncode for launch in launches] == [0, 0], outputs
    networks = [name for out, _ in outputs for name in MEASURED.findall(out)]
    assert sorted(networks) == [f"network {number}" for number in range(4)]
    assert len(list(Path("runs/scores").glob("*/manifest.json"))) == 1
    for arm in ("easy", "hard"):
        assert len(list(Path("runs").glob(f"digits_{arm}-*/replicate_*/level_0/result.json"))) == 2

    code, _, err = run("easy.yaml", "replicates=2", "scores.networks=4", "prune.levels=0", "runs=alone")
    assert code == 0, err
    easy = [path for path in Path("runs").iterdir() if path.is_dir() and "hard" not in path.name]
    assert {name: tensors for folder in easy for name, tensors in bits(folder).items()} == {
        name: tensors for folder in Path("alone").iterdir() if folder.is_dir() for name, tensors in bits(folder).items()
    }

    client = MlflowClient(mlflow_store.tracking_uri())
    experiment = client.get_experiment_by_name("tiny").experiment_id
    (parent,) = client.search_runs([experiment], "tags.phase = 'scores'")
    history = client.get_metric_history(parent.info.run_id, "scoring_test_accuracy_percent")
    assert sorted(point.step for point in history) == [0, 1, 2, 3]
    artifacts = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert artifacts == {"config.json", "manifest.json", "scores.safetensors", "examples"}
    (child, *_) = client.search_runs([experiment], "tags.phase = 'pretrain'")
    artifacts = {item.path for item in client.list_artifacts(child.info.run_id)}
    assert artifacts == {"images.png", "subset.json", "subset.png", "subset.safetensors"}


@pytest.mark.integration
def test_scoring_killed_within_a_network_and_resumed_is_bit_identical(tiny):
    path = tiny("easy")
    longer = ["scores.steps=300", "scores.networks=3", "intervals.checkpoint=10", "pretrain.label_noise=0.1"]
    code, out, err = run(path, *longer, "runs=whole", ranks=2, recipe="score")
    assert code == 0, err
    assert '"wrong_labels_roc_auc"' in out
    process = start(path, *longer, ranks=2, recipe="score")
    while not list(Path("runs").glob("scores/*/network_1/checkpoint.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()
    (network,) = (PhaseDirectory(found) for found in Path("runs").glob("scores/*/network_1"))
    assert not network.done
    kept = network.curve(until=network.checkpoint()[1])
    code, out, err = run(path, *longer, ranks=2, recipe="score")
    assert code == 0, err
    assert network.curve()[: len(kept)] == kept and kept, "training resumes from the checkpoint"
    assert bits("runs") == bits("whole")

    before = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*.*")}
    code, out, err = run(path, *longer, recipe="score")
    assert code == 0, err
    assert not MEASURED.search(out) and '"wrong_labels_roc_auc"' in out
    assert {p: p.stat().st_mtime_ns for p in before} == before


@pytest.mark.integration
def test_data_parallel_ranks_score_networks_independently(tiny):
    path = tiny("hard")
    code, out, err = run(path, "parallelism=data", "prune.levels=0", ranks=2)
    assert code == 0, err
    assert sorted(MEASURED.findall(out)) == ["network 0", "network 1"]
    code, _, err = run(path, "runs=alone", recipe="score")
    assert code == 0, err
    assert bits("runs/scores") == bits("alone/scores")


def test_a_diverging_scoring_network_stops_the_launch_and_is_named(tiny):
    code, _, err = run(tiny("easy"), "train.lr=1e30", "scores.steps=20")
    assert code == 1
    assert re.search(r"error: scores: runs/scores/\w+/network_0: the loss is nan at step \d+ with learning rate", err)
    (failed,) = Path("runs").glob("digits*/replicate_0/failed.json")
    assert "network_0: the loss is nan" in failed.read_text()


def test_a_failed_replicate_is_recorded_and_does_not_stop_the_others(tiny):
    path = tiny("init")
    code, out, _ = run(path, "--plan")
    obstacle = Path(out.split(":")[0]) / "replicate_0/level_1/mask.safetensors"
    run(path, "replicates=[1]", "prune.levels=0")
    obstacle.mkdir(parents=True)
    code, out, err = run(path, "replicates=2", ranks=2)
    assert code != 0
    assert "error: replicate 0: IsADirectoryError" in err
    failed = obstacle.parents[1] / "failed.json"
    assert "IsADirectoryError" in failed.read_text()
    assert str(failed) in out
    assert (obstacle.parents[2] / "replicate_1/level_2/result.json").exists()
    obstacle.rmdir()
    code, out, err = run(path, "replicates=2")
    assert code == 0, err
    assert not failed.exists()


def test_bad_input_under_composer_is_reported_once_and_fails(tiny, place):
    path = tiny()
    before = sorted(place.rglob("*"))
    code, out, err = run(path, "train.lr=fast", "replicates=2", ranks=2)
    assert code != 0
    check_launcher_output(err + out, "train.lr = 'fast' on the command line: must be a number")
    assert sorted(place.rglob("*")) == before


def test_without_a_tracking_uri_the_mlflow_store_is_in_the_working_folder(tiny, place, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    path = tiny("init")
    path.write_text(path.read_text().replace("experiment: tiny\n", ""))
    code, out, err = run(path, "prune.levels=0")
    assert code == 0, err
    assert (place / "mlflow.db").exists()
    assert f"compare in MLflow: mlflow ui --backend-store-uri sqlite:///{place}/mlflow.db" in out
    assert "digits: http://127.0.0.1:5000/#/experiments/1/runs?compareRunsMode=CHART&workflowType=" in out


@pytest.mark.parametrize("version", ["3.9", "3.13"])
def test_make_rejects_an_unsupported_python_version(place, version):
    other = place / "python"
    major, minor = version.split(".")
    other.write_text(f"#!{sys.executable}\nimport sys\nsys.version_info = ({major}, {minor}, 0)\nexec(sys.argv[2])\n")
    other.chmod(0o755)
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        (place / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(["make", "lint", f"PYTHON={other}"], capture_output=True, text=True, env=os.environ)
    assert done.returncode != 0
    assert f"This is Python {version}; lth_diet needs 3.10, 3.11 or 3.12" in done.stderr
    assert not (place / ".venv").exists()
