import hashlib
import os
import time

import pytest

from lth_diet.data import file_hashes
from lth_diet.data.file_hashes import hash_files

OLD = time.time_ns() - 10**10


@pytest.fixture
def files(place, monkeypatch):
    """Files a and b, and the names of the files that are read."""
    monkeypatch.setenv("LTH_DIET_CACHE", str(place / "cache"))
    monkeypatch.setattr(file_hashes, "_UNSETTLED_NS", 0)
    read = []
    original = file_hashes.sha256
    monkeypatch.setattr(file_hashes, "sha256", lambda path: read.append(path.name) or original(path))
    for name in "ab":
        (place / name).write_text(name)
    return read


def hashes(place):
    return hash_files(place, {name: (place / name).stat() for name in "ab"})


def test_an_unchanged_file_is_not_read_again(place, files):
    first = hashes(place)
    assert first == {name: hashlib.sha256(name.encode()).hexdigest() for name in "ab"}
    assert hashes(place) == first and files == ["a", "b"]


@pytest.mark.parametrize("how", ["in place", "with its old modification time", "by another file"])
def test_a_file_changed_to_the_same_size_is_read_again(place, files, how):
    before, status = hashes(place), (place / "a").stat()
    path = place / ("new" if how == "by another file" else "a")
    path.write_text("x")
    if how != "in place":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    path.rename(place / "a")
    assert hashes(place) == before | {"a": hashlib.sha256(b"x").hexdigest()}
    assert files == ["a", "b", "a"]


def test_a_file_that_may_still_change_within_a_tick_of_its_clock_is_not_remembered(place, files, monkeypatch):
    monkeypatch.setattr(file_hashes, "_UNSETTLED_NS", 10**12)
    hashes(place)
    hashes(place)
    assert files == ["a", "b", "a", "b"]


@pytest.mark.parametrize("damage", ["{", '{"files": {"a": []}}', "read-only"])
def test_without_usable_memory_the_files_are_read(place, files, monkeypatch, damage):
    first = hashes(place)
    if damage == "read-only":
        monkeypatch.setenv("LTH_DIET_CACHE", "/proc/nope")
    else:
        (memory,) = (place / "cache/file_hashes").glob("*.json")
        memory.write_text(damage)
    assert hashes(place) == first and files == ["a", "b", "a", "b"]
