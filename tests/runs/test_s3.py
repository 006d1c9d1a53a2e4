"""Runs on a real S3 server, with killed processes and a separate cache for each simulated node."""

import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from faults.runs import bits
from forks.client import Process
from helpers import run, start
from seaweed import KEYS, READER

from lth_diet import files
from lth_diet.runs import object_store, run_store
from lth_diet.runs.verify import verify

pytestmark = pytest.mark.integration
LONGER = ["prune.levels=1", "replicates=1", "train.steps=200", "intervals.checkpoint=20"]


@pytest.fixture
def node(place, monkeypatch, empty_store):
    """Moves new processes to another node with its own cache and MLflow store; leases are short."""
    monkeypatch.setenv("LEASE_SECONDS", "3.0")  # of the processes, see forks/server.py
    monkeypatch.setattr(files, "LEASE_SECONDS", 3.0)

    def become(name):
        monkeypatch.setenv("LTH_DIET_CACHE", str(place / name))
        store = shutil.copy(empty_store, place / f"{name}.db")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")

    return become


@pytest.fixture
def begin():
    """Starts a recipe, and kills it at the end of the test if it still runs."""
    started = []

    def begin(*arguments):
        started.append(start(*arguments))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def pulled(url, folder="pulled"):
    object_store.pull(url, Path(folder))
    assert list(verify(Path(folder))) == []
    return bits(folder)


def matching_objects(url, pattern):
    store = run_store.open_run_store(url)._store
    return [name for name in store.list("") if re.search(pattern, name)]


def local(path, *overrides):
    code, out, err = run(path, *overrides, "runs=local")
    assert code == 0, out + err
    return bits("local")


def kill_and_rerun_on_another_node(s3, node, begin, name, command):
    """Kills a command once the store has an object of that name; returns the output of its rerun on another node."""
    node("one")
    process = begin(*command, f"runs={s3}")
    wait_for(lambda: matching_objects(s3, name), process)
    process.kill()
    process.communicate()
    node("two")
    code, out, err = run(*command, f"runs={s3}")
    assert code == 0, out + err
    return out + err


def test_a_run_killed_in_a_level_and_resumed_on_another_node_is_bit_identical_to_a_local_run(s3, node, begin, tiny):
    command = [tiny("random"), *LONGER]
    expected = local(*command)
    output = kill_and_rerun_on_another_node(s3, node, begin, "level_1/checkpoint.json", command)
    assert pulled(s3) == expected
    assert not matching_objects(s3, "checkpoint")
    assert all(secret not in output for secret in KEYS.values())


def test_the_second_of_two_nodes_with_the_same_replicate_names_the_first(s3, node, begin, tiny):
    path = tiny("random")
    longer = [*LONGER, "train.steps=6000"]
    node("one")
    process = begin(path, *longer, f"runs={s3}")
    wait_for(lambda: matching_objects(s3, "checkpoint.json"), process)
    node("two")
    code, out, err = run(path, *longer, f"runs={s3}")
    assert code == 1
    assert re.search(rf"{s3}/.*/replicate_0 is being trained by another process \(process {process.pid} on ", out + err)


def test_a_suspended_process_exits_after_another_node_took_over_and_leaves_the_results_intact(s3, node, begin, tiny):
    path = tiny("random")
    expected = local(path, *LONGER)
    node("one")
    process = begin(path, *LONGER, f"runs={s3}")
    wait_for(lambda: matching_objects(s3, "level_0/checkpoint.json"), process)
    process.send_signal(signal.SIGSTOP)
    node("two")
    code, out, err = run(path, *LONGER, f"runs={s3}")
    assert code == 0, out + err
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "may have been taken over by another process" in err
    assert pulled(s3) == expected


def test_two_nodes_compute_scores_together_and_both_use_them(s3, node, begin, tiny):
    path = tiny("easy")
    settings = ["prune.levels=1", "scores.networks=4", "scores.steps=60"]
    expected = local(path, *settings, "replicates=2")
    processes = []
    for number in range(2):
        node(f"node{number}")
        processes.append(begin(path, *settings, f"replicates=[{number}]", f"runs={s3}"))
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, out + err
    assert pulled(s3) == expected


def test_scores_of_a_killed_process_are_finished_on_another_node(s3, node, begin, tiny):
    settings = ["prune.levels=0", "scores.networks=2", "scores.steps=300", "intervals.checkpoint=20"]
    command = [tiny("easy"), *settings]
    expected = local(*command)
    kill_and_rerun_on_another_node(s3, node, begin, "network_1/checkpoint.json", command)
    assert pulled(s3) == expected


@pytest.mark.parametrize(
    ("environment", "url", "sentence"),
    [
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            "s3://bucket/x",
            "the object store cannot be reached (EndpointConnectionError)",
        ),
        ({"AWS_SECRET_ACCESS_KEY": "wrong-secret"}, "s3://bucket/x", "access denied; set credentials in"),
        (READER, "s3://bucket/x", "access denied; set credentials in the environment"),
        ({}, "s3://nothere/x", "no such bucket"),
    ],
)
def test_an_unusable_bucket_is_reported_in_one_sentence_before_training_starts(
    s3,
    node,
    tiny,
    place,
    monkeypatch,
    environment,
    url,
    sentence,
):
    path = tiny("random")
    node("one")
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    code, out, err = run(path, f"runs={url}")
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and sentence in err
    assert "secret" not in err and not (place / "runs").exists()


@pytest.mark.parametrize("module", ["lth_diet", "lth_diet.remote"])  # the second is the old spelling
def test_plan_and_pull_see_what_another_node_did(s3, node, tiny, module):
    path = tiny("random")
    small = ["prune.levels=1", "replicates=1"]
    node("one")
    assert run(path, *small, f"runs={s3}")[0] == 0
    node("two")
    code, out, _ = run(path, *small, f"runs={s3}", "--plan")
    assert code == 0 and "done" in out
    assert "files" in Process(["-m", module, "pull", s3, "copy"]).communicate()[0]
    code, out, _ = run(path, *small, "runs=copy", "--plan")
    assert code == 0 and "done" in out


def test_data_parallel_ranks_resume_from_another_node(s3, node, tiny):
    path = tiny("init")
    settings = ["parallelism=data", "replicates=1"]
    code, out, err = run(path, *settings, "runs=local", "prune.levels=1", ranks=2)
    assert code == 0, out + err
    for levels in range(2):
        node(f"node{levels}")
        code, out, err = run(path, *settings, f"runs={s3}", f"prune.levels={levels}", ranks=2)
        assert code == 0, out + err
    assert pulled(s3) == bits("local")


@pytest.mark.faults
def test_a_sweep_on_an_object_store_is_bit_identical_to_local_runs_and_uploads_its_logs(s3, node, tiny, place):
    tiny("init", "base.yaml")
    (place / "grid.yaml").write_text("base: base.yaml\narms: [{arm: [init, easy]}]\ngpus_per_run: 0\n")
    settings = ["prune.levels=0", "replicates=1"]
    for arm in ("init", "easy"):
        code, out, err = run("base.yaml", f"arm={arm}", *settings, "runs=local")
        assert code == 0, out + err
    node("one")
    for _ in range(2):
        code, out, err = run("grid.yaml", "cpus=2", *settings, f"runs={s3}", recipe="sweep")
        assert code == 0, out + err
    assert "everything is finished" in out
    assert pulled(s3) == bits("local")
    logs = list(Path("pulled/sweep-logs").rglob("attempt_1.log"))
    assert len(logs) == 4 and all("composer -n 1" in log.read_text() for log in logs)
    node("two")
    code, out, err = run("grid.yaml", *settings, f"runs={s3}", recipe="sweep")
    assert code == 0 and "everything is finished" in out, out + err
