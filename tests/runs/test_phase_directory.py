import signal
import subprocess
import sys

import pytest
from helpers import MEASURED

from lth_diet import files
from lth_diet.errors import UserError
from lth_diet.runs.phase_directory import PhaseDirectory


@pytest.fixture
def phase(place):
    made = PhaseDirectory(place / "level_0")
    made.write("curve.jsonl", b'{"step": 2, "a": 1}\n{"step": 4, "a": 2}\n{"step": 6, "a"')
    return made


def test_a_write_that_is_killed_leaves_the_old_content(place, monkeypatch):
    path = place / "file"
    files.write_atomically(path, "old")

    def killed(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, "new")
    assert path.read_text() == "old"


def test_a_phase_is_done_when_its_result_is_written(phase):
    assert not phase.done
    phase.finish(MEASURED)
    assert phase.done
    assert phase.result()["level"] == 0
    assert phase.verified("curve.jsonl").exists()


def test_a_file_that_is_not_what_was_written_is_refused(phase):
    phase.finish(MEASURED)
    (phase.path / "curve.jsonl").write_text("else")
    with pytest.raises(UserError, match=r"level_0/curve\.jsonl: missing or damaged; delete "):
        phase.verified("curve.jsonl")


def test_the_curve_ends_at_a_torn_line_and_at_the_step_asked_for(phase):
    assert [row["step"] for row in phase.curve()] == [2, 4]
    assert [row["step"] for row in phase.curve(until=3)] == [2]
    phase.truncate_curve(2)
    assert (phase.path / "curve.jsonl").read_text() == '{"step": 2, "a": 1}\n'


def test_only_a_committed_whole_checkpoint_counts(phase):
    for step in (10, 20):
        phase.checkpoint_path(step).write_text(f"state {step}")
        phase.commit_checkpoint(step)
    assert phase.checkpoint() == (phase.checkpoint_path(20), 20)
    assert not phase.checkpoint_path(10).exists()
    phase.checkpoint_path(30).write_text("not committed")
    assert phase.checkpoint()[1] == 20
    phase.checkpoint_path(20).write_text("torn")
    assert phase.checkpoint() is None


def test_a_finished_phase_keeps_no_checkpoint(phase):
    phase.checkpoint_path(10).write_text("state")
    phase.commit_checkpoint(10)
    phase.finish(MEASURED)
    assert not list(phase.path.glob("checkpoint*"))


def test_a_json_file_that_was_altered_is_refused(place):
    path = place / "a.json"
    files.write_json(path, {"accuracy": 91.5, "name": "ü", "list": [1, None]})
    assert files.read_json(path) == {"accuracy": 91.5, "name": "ü", "list": [1, None]}
    path.write_text(path.read_text().replace("91.5", "92.5"))
    with pytest.raises(UserError, match=r"a\.json: damaged"):
        files.read_json(path)


def test_what_a_killed_writer_left_is_cleared(phase):
    part = phase.path / ".weights.safetensors.part-123"
    part.write_bytes(b"half")
    with files.lock(phase.path.parent, 0):
        files.remove_partial_files(phase.path.parent)
    assert not part.exists()


@pytest.mark.parametrize(
    "about", [{"file": "../trap.pt"}, {"file": "checkpoint-8.pt"}, {"step": "4"}, {"step": True}, {"sha256": None}]
)
def test_a_checkpoint_that_is_not_the_one_of_its_step_is_not_resumed_from(phase, about):
    for path in (phase.checkpoint_path(4), phase.path / "checkpoint-8.pt", phase.path / "../trap.pt"):
        path.write_bytes(b"the same")
    told = {"file": "checkpoint-4.pt", "step": 4, "sha256": files.sha256(phase.checkpoint_path(4))}
    files.write_json(phase.path / "checkpoint.json", told)
    assert phase.checkpoint() == (phase.checkpoint_path(4), 4)
    files.write_json(phase.path / "checkpoint.json", told | about)
    assert phase.checkpoint() is None


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{}", "\0", '{"checksum": 3}'])
def test_json_that_was_not_written_here_is_told(place, content):
    (place / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json: damaged, or not written by lth_diet"):
        files.read_json(place / "a.json")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({}, "no steps, where int has to be"),
        ({"steps": "4"}, "steps: '4', where int has to be"),
        ({"steps": True}, "steps: True, where int has to be"),
        ({"steps": 4, "size": []}, r"size: \[\], where int \| None has to be"),
    ],
)
def test_a_value_of_another_type_is_told(place, content, sentence):
    files.write_json(place / "a.json", content)
    with pytest.raises(UserError, match=f"a\\.json: {sentence}"):
        files.read_json(place / "a.json", {"steps": int, "size": int | None})


def test_a_write_that_fails_leaves_nothing_behind(place, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(place / "file", "content")
    assert not list(place.iterdir())


def test_the_checkpoint_of_a_phase_killed_as_it_finished_is_forgotten_later(phase):
    phase.checkpoint_path(10).write_text("state")
    phase.commit_checkpoint(10)
    phase.remove_stale_checkpoints()
    assert phase.checkpoint()[1] == 10, "a phase that is not done needs it"
    files.write_json(phase.path / "result.json", {"sha256": {}})
    phase.remove_stale_checkpoints()
    assert not list(phase.path.glob("checkpoint*"))


HOLDER = """
import socket, sys, time
from pathlib import Path
socket.gethostname = lambda: sys.argv[1]
from lth_diet import files
files.LEASE_SECONDS = 3.0
with files.lock(Path("run"), -1):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(place, monkeypatch):
    """Starts a process on a host that holds the folder `run`."""
    monkeypatch.setattr(files, "LEASE_SECONDS", 3.0)
    started = []

    def start(host):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, host], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_folder_held_on_another_host_is_refused_by_name_however_long_it_takes(holder, place):
    process = holder("far")
    for timeout in (0, 4):
        with (
            pytest.raises(UserError, match=rf"run is .* another process \(process {process.pid} on far.*\)"),
            files.lock(place / "run", timeout),
        ):
            pass


def test_what_a_process_held_on_another_host_is_free_some_time_after_it_died(holder, place):
    process = holder("far")
    process.kill()
    process.wait()
    with pytest.raises(files.LockedError), files.lock(place / "run", 0):
        pass
    with files.lock(place / "run", 0.1):
        pass


def test_a_process_that_was_stopped_until_another_took_over_ends(holder, place):
    process = holder("far")
    process.send_signal(signal.SIGSTOP)
    with files.lock(place / "run", 0.1):
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "run may have been taken over by another process (owner-changed); this one ends" in err


@pytest.mark.parametrize(
    "content", [b"", b'{"step": 2, "a": 3}\n{"step": 4, "a": 2}\n', b'{"step": 2, "a": 1}\n', b"\xff[", b"[]\n"]
)
def test_a_checkpoint_is_not_resumed_from_without_the_curve_that_leads_to_it(phase, content):
    phase.checkpoint_path(4).write_text("state")
    phase.commit_checkpoint(4)
    assert phase.checkpoint() == (phase.checkpoint_path(4), 4)
    (phase.path / "curve.jsonl").write_bytes(content)
    assert phase.checkpoint() is None
    phase.truncate_curve(-1)
    assert (phase.path / "curve.jsonl").read_bytes() == b""
