"""A process that is suspended between a check and a write, and wakes after another has taken over, changes nothing."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from faults.runs import SMALL, bits, check_mlflow
from forks.client import Process

from lth_diet.runs.verify import verify

# moment, its call: the place that it is in
CASES = [
    ("before a row is appended", 13, "replicate_0/level_0"),
    ("before a checkpoint is removed", 2, "scores"),
]
MORE_CASES = [
    ("before a row is appended", 2, "scores/network_0"),
    ("before a checkpoint is written", 4, "replicate_0/level_0"),
    ("between a checkpoint and its commit", 4, "replicate_0/level_0"),
    ("before a result is written", 8, "level_0"),
    *(("before a file is written", call, "anywhere") for call in (2, 9, 20, 30)),
    *(("before a file is renamed into place", call, "anywhere") for call in (5, 14, 24, 33)),
]


@pytest.fixture
def suspend(place, monkeypatch):
    """Starts a command that stops itself; returns the stopped process."""
    monkeypatch.setenv("LEASE_SECONDS", "1.0")
    started = []

    def suspend(command, **fault):
        process = Process(["-m", *command], place, {"signal": "SIGSTOP", **fault})
        started.append(process)
        end = time.monotonic() + 120
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.01)
        return process

    yield suspend
    for process in started:
        process.kill()


def contents(root):
    return {path: path.read_bytes() for path in Path(root).rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("moment", "call", "where"), [*CASES, *(pytest.param(*case, marks=pytest.mark.faults) for case in MORE_CASES)]
)
def test_a_suspended_process_that_wakes_after_a_takeover_changes_no_file(
    commands, reference, tiny, place, suspend, moment, call, where
):
    command = ["recipes.imp", "-f", tiny("easy"), *SMALL]
    process = suspend(command, host="far", moment=moment, call=call)
    status, output = commands.run(*command, folder=place)
    assert status == 0, output
    left = contents("runs")
    os.kill(process.pid, signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "may have been taken over by another process" in err
    for part in Path("runs").rglob("*.part-*"):
        part.unlink()  # nothing reads it; the next holder removes it
    assert contents("runs") == left
    assert bits("runs") == bits(reference / "runs")
    assert list(verify(Path("runs"))) == []
    assert not list(Path("runs").rglob(".holder-*"))
    check_mlflow()


@pytest.mark.parametrize(
    "moment",
    ["before points are logged to MLflow", pytest.param("before a row is appended", marks=pytest.mark.faults)],
)
def test_a_suspended_process_on_the_same_host_is_killed_when_another_takes_over(
    commands, reference, tiny, place, suspend, moment
):
    command = ["recipes.imp", "-f", tiny("easy"), *SMALL]
    process = suspend(command, moment=moment, call=1)
    status, output = commands.run(*command, folder=place)
    assert status == 0, output
    assert f"locked by process {process.pid}, which was suspended; it was killed" in output
    assert process.wait() == -signal.SIGKILL
    assert bits("runs") == bits(reference / "runs")
    check_mlflow()
