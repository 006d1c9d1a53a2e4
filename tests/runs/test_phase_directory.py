import pytest
from helpers import MEASURED

from lth_diet.errors import UserError
from lth_diet.files import sha256, write_json
from lth_diet.runs.phase_directory import PhaseDirectory


@pytest.fixture
def phase(place):
    made = PhaseDirectory(place / "level_0")
    made.write("curve.jsonl", b'{"step": 2, "a": 1}\n{"step": 4, "a": 2}\n{"step": 6, "a"')
    return made


def test_a_phase_is_done_once_its_result_is_written(phase):
    assert not phase.done
    phase.finish(MEASURED)
    assert phase.done
    assert phase.result()["level"] == 0
    assert phase.verified("curve.jsonl").exists()


def test_a_modified_file_is_rejected(phase):
    phase.finish(MEASURED)
    (phase.path / "curve.jsonl").write_text("else")
    with pytest.raises(UserError, match=r"level_0/curve\.jsonl: missing or damaged; delete "):
        phase.verified("curve.jsonl")


def test_the_curve_ends_before_a_torn_line_and_at_the_requested_step(phase):
    assert [row["step"] for row in phase.curve()] == [2, 4]
    assert [row["step"] for row in phase.curve(until=3)] == [2]
    with phase.open_curve(2):
        pass
    assert (phase.path / "curve.jsonl").read_text() == '{"step": 2, "a": 1}\n'


def test_only_a_committed_complete_checkpoint_is_resumed_from(phase):
    for step in (10, 20):
        phase.checkpoint_path(step).write_text(f"state {step}")
        phase.commit_checkpoint(step)
    assert phase.checkpoint() == (phase.checkpoint_path(20), 20)
    assert not phase.checkpoint_path(10).exists()
    phase.checkpoint_path(30).write_text("not committed")
    assert phase.checkpoint()[1] == 20
    phase.checkpoint_path(20).write_text("torn")
    assert phase.checkpoint() is None


@pytest.mark.parametrize(
    "change", [{"file": "../trap.pt"}, {"file": "checkpoint-8.pt"}, {"step": "4"}, {"step": True}, {"sha256": None}]
)
def test_a_checkpoint_that_does_not_match_its_step_is_ignored(phase, change):
    for path in (phase.checkpoint_path(4), phase.path / "checkpoint-8.pt", phase.path / "../trap.pt"):
        path.write_bytes(b"the same")
    entry = {"file": "checkpoint-4.pt", "step": 4, "sha256": sha256(phase.checkpoint_path(4))}
    write_json(phase.path / "checkpoint.json", entry)
    assert phase.checkpoint() == (phase.checkpoint_path(4), 4)
    write_json(phase.path / "checkpoint.json", entry | change)
    assert phase.checkpoint() is None


@pytest.mark.parametrize(
    "content", [b"", b'{"step": 2, "a": 3}\n{"step": 4, "a": 2}\n', b'{"step": 2, "a": 1}\n', b"\xff[", b"[]\n"]
)
def test_a_checkpoint_whose_curve_is_damaged_is_ignored(phase, content):
    phase.checkpoint_path(4).write_text("state")
    phase.commit_checkpoint(4)
    assert phase.checkpoint() == (phase.checkpoint_path(4), 4)
    (phase.path / "curve.jsonl").write_bytes(content)
    assert phase.checkpoint() is None
    with phase.open_curve(-1):
        pass
    assert (phase.path / "curve.jsonl").read_bytes() == b""


def test_a_finished_phase_has_no_checkpoint(phase):
    phase.checkpoint_path(10).write_text("state")
    phase.commit_checkpoint(10)
    phase.finish(MEASURED)
    assert not list(phase.path.glob("checkpoint*"))


def test_the_checkpoint_of_a_phase_killed_while_it_finished_is_removed_later(phase):
    phase.checkpoint_path(10).write_text("state")
    phase.commit_checkpoint(10)
    phase.remove_stale_checkpoints()
    assert phase.checkpoint()[1] == 10, "an unfinished phase keeps its checkpoint"
    write_json(phase.path / "result.json", {"sha256": {}})
    phase.remove_stale_checkpoints()
    assert not list(phase.path.glob("checkpoint*"))
