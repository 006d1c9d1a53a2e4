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
from faults.runs import bits, check_mlflow
from faults.victims import MOMENTS
from helpers import ROOT, TINY

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
    victims, reference, tiny, place, monkeypatch, record_property, number, moment, call, signal
):
    record_property("fault", (moment, signal))
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
