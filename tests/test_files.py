import signal
import subprocess
import sys

import pytest

from lth_diet import files
from lth_diet.errors import UserError


def test_a_killed_write_leaves_the_old_content(place, monkeypatch):
    path = place / "file"
    files.write_atomically(path, "old")

    def killed(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, "new")
    assert path.read_text() == "old"


def test_a_failed_write_leaves_no_file_behind(place, monkeypatch):
    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomically(place / "file", "content")
    assert not list(place.iterdir())


def test_partial_files_of_a_killed_writer_are_removed(place):
    part = place / "run/level_0/.weights.safetensors.part-123"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"half")
    with files.lock(place / "run", 0):
        files.remove_partial_files(place / "run")
    assert not part.exists()


def test_a_modified_json_file_is_rejected(place):
    path = place / "a.json"
    files.write_json(path, {"accuracy": 91.5, "name": "ü", "list": [1, None]})
    assert files.read_json(path) == {"accuracy": 91.5, "name": "ü", "list": [1, None]}
    path.write_text(path.read_text().replace("91.5", "92.5"))
    with pytest.raises(UserError, match=r"a\.json is damaged or was not written by lth_diet"):
        files.read_json(path)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{}", "\0", '{"checksum": 3}'])
def test_json_that_lth_diet_did_not_write_is_rejected(place, content):
    (place / "a.json").write_text(content)
    with pytest.raises(UserError, match=r"a\.json is damaged or was not written by lth_diet"):
        files.read_json(place / "a.json")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({}, "steps is missing, expected int"),
        ({"steps": "4"}, "steps is '4', expected int"),
        ({"steps": True}, "steps is True, expected int"),
        ({"steps": 4, "size": []}, r"size is \[\], expected int \| None"),
    ],
)
def test_a_json_value_of_the_wrong_type_is_reported(place, content, sentence):
    files.write_json(place / "a.json", content)
    with pytest.raises(UserError, match=f"a\\.json: {sentence}"):
        files.read_json(place / "a.json", {"steps": int, "size": int | None})


LOCK_AND_SLEEP = """
import socket, sys, time
from pathlib import Path
socket.gethostname = lambda: sys.argv[1]
from lth_diet import files
files.LEASE_SECONDS = 3.0
with files.lock(Path("run"), -1):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def start_holder(place, monkeypatch):
    """Starts a process that pretends to run on another host and locks the folder `run`."""
    monkeypatch.setattr(files, "LEASE_SECONDS", 3.0)
    started = []

    def start(host):
        process = subprocess.Popen(
            [sys.executable, "-c", LOCK_AND_SLEEP, host], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "locked\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_the_error_names_the_process_and_host_that_hold_the_lock(start_holder, place):
    process = start_holder("far")
    for timeout in (0, 4):
        with (
            pytest.raises(UserError, match=rf"run is .* another process \(process {process.pid} on far.*\)"),
            files.lock(place / "run", timeout),
        ):
            pass


def test_the_lock_of_a_dead_process_on_another_host_expires(start_holder, place):
    process = start_holder("far")
    process.kill()
    process.wait()
    with pytest.raises(files.LockedError), files.lock(place / "run", 0):
        pass
    with files.lock(place / "run", 0.1):
        pass


def test_a_suspended_process_that_lost_its_lock_exits(start_holder, place):
    process = start_holder("far")
    process.send_signal(signal.SIGSTOP)
    with files.lock(place / "run", 0.1):
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "run may have been taken over by another process (owner-changed); this one exits" in err
