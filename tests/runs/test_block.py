import subprocess
import sys

import pytest

from lth_diet.config import loading
from lth_diet.errors import UserError
from lth_diet.runs.block import BlockPhase, lock_replicates
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.run_directory import RunDirectory


@pytest.fixture
def block(place):
    """A phase of three replicates, with a row of the curve at steps 2 and 4."""

    def make(failed=(), on_failure=None):
        phases = [PhaseDirectory(place / f"replicate_{index}/level_0") for index in range(3)]
        for phase in phases:
            if not phase.path.exists():
                phase.write("curve.jsonl", b'{"step": 2}\n{"step": 4}\n')
        return BlockPhase(phases, failed, on_failure)

    return make


def save(block, step):
    block.leader.checkpoint_path(step).write_bytes(f"checkpoint {step}".encode())
    block.commit_checkpoint(step, {"device": "a CPU"})


def test_a_block_stores_one_checkpoint_to_which_the_other_replicates_point(block):
    stored = block()
    assert stored.checkpoint() is None
    for step in (2, 4):
        save(stored, step)
        assert stored.checkpoint() == (stored.leader.checkpoint_path(step), step)
    assert {phase.checkpoint() for phase in stored.phases} == {stored.checkpoint()}
    assert [phase.environment() for phase in stored.phases] == [{"device": "a CPU"}] * 3
    (stored.phases[1].path / "curve.jsonl").write_bytes(b'{"step": 2}\n{"step": 3}\n')
    assert stored.checkpoint() is None, "one of the curves is not that of the checkpoint"
    assert block(failed=[1]).checkpoint()[1] == 4


def test_if_the_replicate_with_the_checkpoint_fails_the_next_one_stores_the_following_checkpoints(block):
    failures = []
    going_on = block(on_failure=lambda *failure: failures.append(failure))
    save(going_on, 2)
    assert going_on.can_go_on_without(0, "its loss is nan") and failures == [(0, "its loss is nan")]
    assert going_on.checkpoint() == (going_on.phases[0].checkpoint_path(2), 2)
    save(going_on, 4)
    assert block(failed=[0]).checkpoint() == (going_on.phases[1].checkpoint_path(4), 4)
    assert block().checkpoint() is None, "the first replicate was not trained from step 2 to 4"


def test_pointers_are_written_before_the_checkpoint_so_that_a_kill_between_them_loses_none(block, monkeypatch):
    before = block(on_failure=lambda *failure: None)
    save(before, 2)
    before.can_go_on_without(0, "its loss is nan")
    before.leader.checkpoint_path(4).write_bytes(b"not committed")
    monkeypatch.setattr(PhaseDirectory, "_keep_only_checkpoint", None)
    monkeypatch.setattr("lth_diet.runs.phase_directory.sha256", None)  # an error in place of a kill
    with pytest.raises(TypeError):
        before.commit_checkpoint(4, {})
    monkeypatch.undo()
    assert block(failed=[0]).checkpoint() == (before.phases[0].checkpoint_path(2), 2)


def test_pointers_in_a_circle_are_no_checkpoint(block):
    circle = block()
    circle.phases[0]._point_to(circle.phases[1])
    circle.phases[1]._point_to(circle.phases[0])
    assert circle.phases[0].checkpoint() is None


LOCK_AND_SLEEP = """
import sys, time
from pathlib import Path
from lth_diet.runs.run_directory import ReplicateDirectory
with ReplicateDirectory(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    time.sleep(60)
"""


def test_the_replicates_of_a_block_are_locked_all_or_none(tiny):
    run = RunDirectory(loading.load_config(tiny(), ["stack=3", "replicates=3"]))
    run.create()
    replicates = run.replicates()
    command = [sys.executable, "-c", LOCK_AND_SLEEP, str(replicates[2].path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match="replicate_2 is being trained by another"), lock_replicates(replicates, 0.1):
        pass
    with lock_replicates(replicates[:2], 0.1):
        holder.kill()
        holder.wait()
    with lock_replicates(replicates, 0.1):
        pass
