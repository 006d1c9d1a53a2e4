"""One of two ranks is killed, or their launcher: the launch fails, and the same command resumes bit-identically."""

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from faults.runs import bits, check_mlflow
from helpers import TINY, run, start

from lth_diet.runs.verify import verify

pytestmark = pytest.mark.integration

KILLS = max(2, int(os.environ.get("KILLS", 0)) // 12)  # `make faults` asks for more
LONGER = ["train.steps=100", "intervals.checkpoint=10", "prune.levels=1", "replicates=2"]


def plan():
    """Who is killed, by which signal, and in which level; drawn from a seed."""
    draw = random.Random(11)
    for number in range(KILLS):
        who = "the launcher" if number % 5 == 4 else "rank 1"
        yield ("replicates", "data")[number % 2], who, draw.choice(["SIGKILL", "SIGTERM"]), draw.randint(0, 1)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """Bits of a launch of two ranks that was never killed, by parallelism."""
    made = {}

    def reference(parallelism):
        if parallelism not in made:
            folder = tmp_path_factory.mktemp(parallelism)
            (folder / "tiny.yaml").write_text(TINY.format(arm="random"))
            code, _, err = run(
                folder / "tiny.yaml", *LONGER, f"parallelism={parallelism}", f"runs={folder}/runs", ranks=2
            )
            assert code == 0, err
            made[parallelism] = bits(folder / "runs")
        return made[parallelism]

    return reference


@pytest.mark.parametrize(("parallelism", "who", "kind", "level"), plan())
def test_a_launch_that_lost_a_rank_resumes_bit_identically(
    references, tiny, record_property, parallelism, who, kind, level
):
    record_property("fault", (f"{who} of two, parallelism: {parallelism}", kind))
    reference = references(parallelism)
    command = [tiny(), *LONGER, f"parallelism={parallelism}"]
    process = start(*command, ranks=2)
    replicate = 1 if parallelism == "replicates" else 0
    while not list(Path("runs").glob(f"*/replicate_{replicate}/level_{level}/checkpoint.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    launcher = psutil.Process(process.pid)
    ranks = sorted(launcher.children(), key=lambda child: child.pid)  # in the order in which they were started
    victim = launcher if who == "the launcher" else ranks[1]
    victim.send_signal(signal.Signals[kind])
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not list(Path("runs").glob(f"*/replicate_{replicate}/level_1/result.json"))
    code, _, err = run(*command, ranks=2)
    assert code == 0, err
    assert bits("runs") == reference
    check_mlflow()


def test_a_suspended_data_parallel_launch_changes_no_file_after_another_took_over(references, tiny, monkeypatch):
    reference = references("data")
    monkeypatch.setenv("LEASE_SECONDS", "1.0")
    command = [tiny(), *LONGER, "parallelism=data"]
    process = start(*command, ranks=2)
    while not list(Path("runs").glob("*/replicate_0/level_0/checkpoint.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    ranks = psutil.Process(process.pid).children()
    for rank in ranks:
        rank.suspend()
    code, out, err = run(*command, ranks=2)
    assert code == 0, out + err
    assert "which was suspended; it was killed" in out + err
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.resume()
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert bits("runs") == reference and list(verify(Path("runs"))) == []
    check_mlflow()
