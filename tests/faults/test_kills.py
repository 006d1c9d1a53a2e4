"""A run killed at any moment and started again ends with the bits of one never killed."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from faults.victims import MOMENTS
from helpers import ROOT, TINY
from mlflow import MlflowClient
from safetensors.numpy import load_file

from lth_diet import tracking
from lth_diet.phases import Phase

KILLS = int(os.environ.get("KILLS", 12))  # `make faults` asks for more
SMALL = ["prune.levels=1", "pretrain.label_noise=0.1", "replicates=1"]
CALLS = {"training step": 28, "a file": 20, "MLflow": 7, "pruning": 1}  # at most, of the times that a moment comes


@pytest.fixture(scope="module")
def victims():
    """Runs a recipe in a process that may die; returns its exit status."""
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("victims.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
    )

    def run(*arguments, moment=None, call=1, signal="SIGKILL", recipe="imp"):
        keys = ("MLFLOW_TRACKING_URI", "LTH_DIET_CACHE")
        command = {
            "recipe": recipe,
            "arguments": ["-f", *map(str, arguments)],
            "moment": moment,
            "call": call,
            "signal": signal,
            "environment": {key: os.environ[key] for key in keys},
            "folder": str(Path.cwd()),
            "output": str(Path("output.txt").resolve()),
        }
        print(json.dumps(command), file=server.stdin, flush=True)
        return int(server.stdout.readline())

    yield run
    server.stdin.close()
    server.wait()


def bits(root):
    """Every tensor, and every measured number, below a folder."""
    found = {}
    for path in sorted(Path(root).rglob("*.safetensors")):
        found[str(path.relative_to(root))] = {name: array.tobytes() for name, array in load_file(path).items()}
    for path in sorted(Path(root).rglob("result.json")):
        result = Phase(path.parent).result()
        found[str(path.relative_to(root))] = {key: result.get(key) for key in ("test_accuracy_percent", "test_loss")}
    for path in sorted(Path(root).rglob("curve.jsonl")):
        rows = Phase(path.parent).curve()
        found[str(path.relative_to(root))] = [{key: row[key] for key in row if key != "timestamp"} for row in rows]
    return found


def check_mlflow():
    """Every phase is one finished run with each point of its curve once; parents have a point a level or network."""
    client = MlflowClient(tracking.tracking_uri())
    experiment = client.get_experiment_by_name("tiny").experiment_id
    stored = {run.info.run_name: run for run in client.search_runs([experiment])}
    folders = {path.parent: path.parent.relative_to("runs") for path in Path("runs").rglob("result.json")}
    parents = {str(name.parent) for name in folders.values()}
    assert len(client.search_runs([experiment])) == len(stored) == len(folders) + len(parents)
    assert set(stored) == {str(name) for name in folders.values()} | parents
    assert {run.info.status for run in stored.values()} == {"FINISHED"}
    for path, name in folders.items():
        expected = [
            (row["step"], key, value)
            for row in Phase(path).curve()
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
        history = client.get_metric_history(stored[name].info.run_id, "test_accuracy_percent")
        assert sorted(point.step for point in history) == [0, 1]


@pytest.fixture(scope="module")
def reference(victims, tmp_path_factory, empty_store):
    """The bits of a run that is never killed."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "tiny.yaml").write_text(TINY.format(arm="easy"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shutil.copy(empty_store, folder / 'mlflow.db')}")
        patch.chdir(folder)
        assert victims("tiny.yaml", *SMALL) == 0, Path("output.txt").read_text()
        check_mlflow()
        return bits("runs")


def plan():
    """Moments in turn; how often a moment comes before it kills, and by which signal, is drawn from a seed."""
    draw = random.Random(7)
    for number in range(KILLS):
        moment = list(MOMENTS)[number % len(MOMENTS)]
        calls = next((most for words, most in CALLS.items() if words in moment), 3)
        yield number, moment, draw.randint(1, calls), draw.choice(["SIGKILL", "SIGKILL", "SIGTERM"])


@pytest.mark.parametrize(("number", "moment", "call", "signal"), plan())
def test_a_killed_run_ends_with_the_same_bits(
    victims, reference, tiny, place, monkeypatch, number, moment, call, signal
):
    path = tiny("easy")
    if moment == "while building the data cache":
        monkeypatch.setenv("LTH_DIET_CACHE", str(place / "cache"))
    status = victims(path, *SMALL, moment=moment, call=call, signal=signal)
    assert status != 0, "the moment never came"
    assert victims(path, *SMALL) == 0, (place / "output.txt").read_text()
    assert bits("runs") == reference
    check_mlflow()
    assert not list(Path("runs").rglob("*.part-*")) and not list(Path("runs").rglob("checkpoint*"))


def test_a_run_killed_again_and_again_ends_with_the_same_bits(victims, reference, tiny, place):
    path, draw, statuses = tiny("easy"), random.Random(3), Counter()
    for _ in range(6):
        statuses[victims(path, *SMALL, moment="in a training step", call=draw.randint(1, 9))] += 1
    assert statuses[-9] > 3
    assert victims(path, *SMALL) == 0, (place / "output.txt").read_text()
    assert bits("runs") == reference
    check_mlflow()
