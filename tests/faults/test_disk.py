"""Disks that are full or cannot be written, folders that move, names and bytes that nobody expects."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from faults.test_kills import bits, check_mlflow
from helpers import ROOT, TINY

SMALL = ["prune.levels=1", "pretrain.label_noise=0.1", "replicates=1"]


class Rooms:
    """Runs commands where small disks are mounted, which this process sees below `root`."""

    def __init__(self):
        self.server = subprocess.Popen(
            ["unshare", "-rm", sys.executable, str(Path(__file__).with_name("rooms.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        )
        self.root = Path(f"/proc/{self.server.pid}/root")

    def _ask(self, **told):
        print(json.dumps(told), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def system(self, *command):
        assert self._ask(run=[str(part) for part in command]) == 0

    def mount(self, folder, size):
        folder.mkdir(exist_ok=True)
        self.system("mount", "-t", "tmpfs", "-o", f"size={size}k", "none", folder)

    def remount(self, folder, options):
        self.system("mount", "-o", f"remount,{options}", folder)

    def run(self, module, *arguments, folder, fill=None):
        """Exit status and output of a module's main, called in a folder."""
        output = folder.parent / "output.txt"
        environment = {key: os.environ[key] for key in ("MLFLOW_TRACKING_URI", "LTH_DIET_CACHE")}
        told = {"environment": environment, "folder": str(folder), "output": str(output)}
        status = self._ask(module=module, arguments=[str(argument) for argument in arguments], fill=fill, **told)
        return status, output.read_text()

    def end(self):
        self.server.stdin.close()
        self.server.wait()


@pytest.fixture(scope="module")
def rooms():
    allowed = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True)
    if allowed.returncode:
        pytest.skip(f"no mounts of one's own on this machine: {allowed.stderr.strip()}")
    made = Rooms()
    yield made
    made.end()


@pytest.fixture(scope="module")
def reference(rooms, tmp_path_factory, empty_store):
    """The folder of a run that never meets a fault."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "tiny.yaml").write_text(TINY.format(arm="easy"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shutil.copy(empty_store, folder / 'mlflow.db')}")
        status, output = rooms.run("recipes.imp", "-f", "tiny.yaml", *SMALL, folder=folder)
        assert status == 0, output
    return folder


def finished(root):
    """When each file of the finished phases was written."""
    results = list(Path(root).rglob("result.json"))
    return {path: path.stat().st_mtime_ns for result in results for path in result.parent.iterdir()}


def told(output):
    """The only sentence among what a command said."""
    (sentence,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in output
    return sentence


WRITTEN = [  # in this order: a name that begins with a dot is that of a file which is not yet whole
    "/.config.json",
    "network_0/curve.jsonl",
    "network_0/checkpoint-3.pt",
    "/.scores.safetensors",
    "pretrain/.weights.safetensors",
    "level_1/.result.json",
]
ALSO_WRITTEN = [
    "network_0/.curve.jsonl",
    "network_0/.checkpoint.json",
    "network_0/.el2n.safetensors",
    "network_1/curve.jsonl",
    "network_1/.result.json",
    "examples/.histogram.png",
    "examples/.summary.json",
    "/.manifest.json",
    "pretrain/.subset.safetensors",
    "pretrain/.subset.json",
    "pretrain/.images.png",
    "pretrain/curve.jsonl",
    "pretrain/checkpoint-3.pt",
    "pretrain/.result.json",
    "level_0/.mask.safetensors",
    "level_0/.weights.safetensors",
    "level_1/.curve.jsonl",
    "level_1/curve.jsonl",
    "level_1/checkpoint-6.pt",
    "level_1/.checkpoint.json",
    "level_1/checkpoint-9.pt",
    "level_1/.weights.safetensors",
]


@pytest.mark.parametrize("names", [WRITTEN, pytest.param(ALSO_WRITTEN, marks=pytest.mark.integration)])
def test_a_run_whose_disk_is_full_again_and_again_ends_with_the_same_bits(
    rooms, reference, tiny, place, monkeypatch, names
):
    command = ["recipes.imp", "-f", tiny("easy"), *SMALL]
    room = place / "runs"
    rooms.mount(room, 4096)
    monkeypatch.chdir(f"{rooms.root}{place}")  # from where the small disk is seen
    before = {}
    for name in names:
        status, output = rooms.run(*command, folder=place, fill=[name, str(room)])
        assert status in (1, 2), f"the disk was not filled at {name}"
        sentence = told(output)
        if name == "/.config.json":
            assert (
                sentence
                == "error: runs: 'runs' cannot be written (No space left on device); allowed: a folder that can"
            )
        elif "checkpoint" in name:
            assert re.search(rf"{Path(name).parent}/checkpoint-\d\.pt cannot be written \(", sentence)
            assert sentence.endswith("; the same command goes on once there is room")
        else:
            assert sentence.endswith(f"{name.replace('/.', '/')}; the same command goes on once there is room")
        assert not list(Path("runs").rglob("*.part-*"))
        assert all(finished("runs")[path] == time for path, time in before.items()), "what was finished is kept"
        before = finished("runs")
        rooms.system("rm", room / "ballast")
    status, output = rooms.run(*command, folder=place)
    assert status == 0, output
    assert finished("runs").items() >= before.items()
    assert bits("runs") == bits(reference / "runs")
    check_mlflow()
    assert not list(Path("runs").rglob("failed.json")) and not list(Path("runs").rglob("checkpoint*"))


def test_a_report_that_finds_no_room_leaves_the_old_one(rooms, reference, tiny, place, monkeypatch):
    command = ["recipes.imp", "-f", tiny("easy"), *SMALL]
    room = place / "runs"
    rooms.mount(room, 4096)
    rooms.system("cp", "-r", f"{reference}/runs/.", room)
    rooms.system("sh", "-c", f"echo old >{room}/tiny.html")
    status, output = rooms.run(*command, folder=place, fill=["/.tiny.html", str(room)])
    assert status == 0 and "no report: runs/tiny.html cannot be written: No space left on device" in output
    monkeypatch.chdir(f"{rooms.root}{place}")
    assert Path("runs/tiny.html").read_text() == "old\n"


@pytest.mark.parametrize("size", [200, 700])
def test_mlflow_catches_up_once_its_full_disk_has_room(rooms, reference, tiny, place, monkeypatch, size):
    shutil.copytree(reference / "runs", place / "runs")
    tiny("easy")
    store = place / "store"
    rooms.mount(store, size)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db")
    command = ["recipes.imp", "-f", "tiny.yaml", *SMALL]
    status, output = rooms.run(*command, folder=place)
    assert status == 0 and "Traceback" not in output
    assert output.count("warning: MLflow is not up to date") == 1
    rooms.remount(store, "size=64m")
    status, output = rooms.run(*command, folder=place)
    assert status == 0 and "warning" not in output
    rooms.system("cp", store / "mlflow.db", place)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")
    check_mlflow()


@pytest.mark.parametrize("size", [60, *(pytest.param(size, marks=pytest.mark.integration) for size in (20, 92))])
def test_a_data_cache_that_finds_no_room_is_one_sentence_and_leaves_nothing(rooms, tiny, place, monkeypatch, size):
    cache = place / "cache"
    rooms.mount(cache, size)
    monkeypatch.setenv("LTH_DIET_CACHE", str(cache))
    command = ["recipes.score", "-f", tiny("easy"), "scores.networks=1"]
    status, output = rooms.run(*command, folder=place)
    assert status == 2
    assert told(output).endswith("; allowed: a place with room, such as another one in LTH_DIET_CACHE")
    assert f"{cache}/digits: the cache of digits cannot be written (" in output
    assert not [path for path in Path(f"{rooms.root}{cache}").rglob("*") if path.suffix != ".lock"]
    assert not (place / "runs").exists()
    rooms.remount(cache, "size=4m")
    assert rooms.run(*command, folder=place)[0] == 0
