"""A sweep survives the loss of a node, a worker, a launcher, a rank or itself, and ends bit-identical to serial runs."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from faults.runs import bits
from helpers import ROOT, TINY, run

from lth_diet.runs import object_store
from lth_diet.runs.find import find_directories
from lth_diet.runs.verify import verify

pytestmark = pytest.mark.integration

VICTIMS = ("node", "sweep", "worker", "launcher", "rank")
KILLS = max(1, int(os.environ.get("KILLS", 0)) // 12)  # `make faults` kills each of them twice
ARMS = ("random", "easy")
GRID = "base: base.yaml\narms: [{arm: [random, easy]}]\ngpus_per_run: 0\n"
LONGER = ["prune.levels=1", "replicates=1", "train.steps=200", "scores.steps=100ba", "intervals.checkpoint=5"]


def plan():
    """What is killed, by which signal, and how many seconds after the first checkpoint of scores or of a run."""
    draw = random.Random(5)
    for number in range(KILLS):
        what = VICTIMS[number % len(VICTIMS)]
        moment = draw.choice(["scores/*/network_*", "*/replicate_*/level_*"])
        yield what, "SIGKILL" if what == "node" else draw.choice(["SIGKILL", "SIGTERM"]), moment, draw.uniform(0, 3)


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one CPU, and a head that runs nothing; a lost node is replaced."""
    with started() as nodes:

        def whole():
            while len(nodes.worker_nodes) < 2:
                nodes.add_node(num_cpus=1)
            nodes.wait_for_nodes()
            return nodes

        yield whole


@contextlib.contextmanager
def started(*environments):
    """A cluster of a head that runs nothing, and of a node of one CPU for each environment."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for environment in environments:
            nodes.add_node(num_cpus=1, env_vars=environment)
        nodes.wait_for_nodes()
        yield nodes
    finally:
        nodes.shutdown()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Bits of the runs of the sweep, trained one after another without Ray."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "base.yaml").write_text(TINY.format(arm="all"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        for arm in ARMS:
            code, _, err = run(folder / "base.yaml", *LONGER, f"arm={arm}", f"runs={folder}/runs")
            assert code == 0, err
    return bits(folder / "runs")


def sweep(nodes, runs):
    command = [sys.executable, ROOT / "recipes/sweep.py", "-f", "grid.yaml", "--address", nodes.address, *LONGER]
    return subprocess.Popen([*command, f"runs={runs}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def launchers(place):
    """Of the attempts that run below a folder."""
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(place) and any(word.endswith("bin/composer") for word in process.cmdline()):
                yield process
        except psutil.Error:
            continue


def kill(what, kind, process, place, nodes):
    """Ends the sweep, or what belongs to one of the attempts that run."""
    launcher = next(launchers(place))
    worker = launcher.parent()
    raylet = worker.parent()
    of_attempt = {"worker": [worker], "launcher": [launcher], "rank": launcher.children()}
    victims = of_attempt | {"sweep": [process], "node": [raylet, *raylet.children()]}
    if what == "node":
        (lost,) = [node for node in nodes.worker_nodes if node.all_processes["raylet"][0].process.pid == raylet.pid]
        nodes.worker_nodes.remove(lost)
    for victim in victims[what]:
        victim.send_signal(signal.Signals[kind])


@pytest.mark.parametrize(("what", "kind", "moment", "delay"), plan())
def test_a_sweep_that_loses_something_ends_bit_identical_to_serial_runs(
    cluster, reference, grid, place, record_property, what, kind, moment, delay
):
    record_property("fault", (f"{what} of a sweep on two nodes", kind))
    grid(GRID)
    nodes = cluster()
    process = sweep(nodes, "runs")
    while not list(Path("runs").glob(f"{moment}/curve.jsonl")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(delay)
    kill(what, kind, process, place, nodes)
    out, err = process.communicate(timeout=600)
    if what == "sweep":
        assert process.returncode != 0
        process = sweep(nodes, "runs")
        out, err = process.communicate(timeout=600)
    else:
        assert out.count("restarts from its last checkpoint") == 1, out
    assert process.returncode == 0, out + err
    assert bits("runs") == reference
    assert list(verify(Path("runs"))) == [] and len(find_directories(Path("runs"))[0]) == len(ARMS)


@pytest.mark.faults
def test_a_sweep_whose_nodes_share_only_an_object_store_survives_the_loss_of_one(
    s3, reference, grid, place, monkeypatch
):
    grid(GRID)
    monkeypatch.delenv("LTH_DIET_CACHE")  # of whoever starts the sweep, which goes before that of the nodes
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "home"))
    caches = [place / "one", place / "two"]
    with started(*({"LTH_DIET_CACHE": str(cache)} for cache in caches)) as nodes:
        process = sweep(nodes, s3)
        while not all(list(cache.glob("runs/**/replicate_0/level_*/curve.jsonl")) for cache in caches):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        kill("node", "SIGKILL", process, place, nodes)
        out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    assert "restarts from its last checkpoint" in out
    object_store.pull(s3, Path("pulled"))
    assert bits("pulled") == reference
    assert list(verify(Path("pulled"))) == []
