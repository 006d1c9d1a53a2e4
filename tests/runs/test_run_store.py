"""The store is fsspec's in memory; test_s3.py has a real one, and processes that are killed."""

import copy
import os
import threading
from pathlib import Path

import fsspec
import pytest
from faults.runs import bits

from lth_diet import files as file_locks
from lth_diet.config import loading
from lth_diet.errors import UserError
from lth_diet.files import LockedError
from lth_diet.imp import IMP
from lth_diet.runs import object_store, run_store, store_lease
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.runs.scores_directory import ScoresDirectory
from lth_diet.scoring import Scoring
from lth_diet.training.progress import Progress

URL = "memory://bucket/runs"
SMALL = ["prune.levels=1", "replicates=1"]


@pytest.fixture
def memory():
    """The store's objects, by path."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    return filesystem.store


@pytest.fixture
def node(place, monkeypatch, memory):
    """Makes this process one of another node, whose cache is its own; gives the folder `unit` of the runs there."""
    monkeypatch.setattr(file_locks, "LEASE_SECONDS", 0.6)

    def become(name):
        monkeypatch.setenv("LTH_DIET_CACHE", str(place / name))
        return run_store.open_run_store(URL) / "unit"

    return become


def write(folder, **contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)


def files(folder):
    paths = sorted(Path(folder).rglob("*"))
    return {str(p.relative_to(folder)): p.read_text() for p in paths if p.is_file() and p.name[0] != "."}


def objects(memory, folder="unit"):
    root = f"/bucket/runs/{folder}/"
    found = {path.removeprefix(root): file.getvalue() for path, file in memory.items() if path.startswith(root)}
    return {name: content.decode() for name, content in found.items() if not name.startswith(".")}


def test_what_a_node_leaves_is_what_the_next_one_begins_with(node):
    with node("one").lock(0) as _, pytest.raises(AttributeError):
        raise AttributeError  # a failure lets go
    first = node("one")
    with first.lock(0):
        write(first.path, **{"a.txt": "1", "b/c.txt": "2"})
        first.upload()
        write(first.path, **{"a.txt": "not pushed"})
    second = node("two")
    assert second.path != first.path
    with second.lock(0):
        assert files(second.path) == {"a.txt": "1", "b/c.txt": "2"}
        (second.path / "a.txt").unlink()
        write(second.path, **{"b/c.txt": "3"})
        second.upload()
    with node("one").lock(0):
        assert files(first.path) == {"b/c.txt": "3"}, "the store is what counts"


def test_only_what_changed_is_sent_and_fetched(node, monkeypatch):
    moved = []
    for method in ("upload", "download"):
        original = getattr(object_store.ObjectStore, method)

        def noted(self, *args, method=method, original=original):
            moved.append((method, next(arg for arg in args if isinstance(arg, str))))
            original(self, *args)

        monkeypatch.setattr(object_store.ObjectStore, method, noted)
    one, two = node("one"), node("two")
    with one.lock(0):
        write(one.path, a="1", b="2")
        one.upload()
    two.pull()
    with one.lock(0):
        write(one.path, b="22")
        one.upload()
    two.pull()
    assert [name for method, name in moved if method == "upload"] == ["unit/a", "unit/b", "unit/b"]
    assert [name for method, name in moved if method == "download"] == ["unit/a", "unit/b", "unit/b"]


def test_a_file_that_names_others_is_sent_after_them_and_removed_before_them(node, monkeypatch):
    one = node("one")
    calls = []
    for name in ("upload", "delete"):
        monkeypatch.setattr(
            object_store.ObjectStore, name, lambda self, *args, name=name: calls.append((name, args[-1]))
        )
    with one.lock(0):
        phase = PhaseDirectory(one.path / "level_0", one.upload)
        phase.write("weights.safetensors", b"w")
        phase.checkpoint_path(3).write_text("state")
        phase.commit_checkpoint(3)
        phase.upload()
        calls.append("finish")
        phase.finish({})
    first, last = calls[: calls.index("finish")], calls[calls.index("finish") + 1 :]
    assert first[-1] == ("upload", "unit/level_0/checkpoint.json") and len(first) == 3
    assert [call for call in last if call[0] == "upload"][-1] == ("upload", "unit/level_0/result.json")


def test_folders_that_are_held_by_themselves_and_hidden_files_are_left_alone(node, memory):
    one = node("one")
    with one.lock(0):
        write(one.path, **{"config.json": "{}", "replicate_0/x": "mine", ".part": "", "network_3/x": "mine"})
        one.upload()
    assert objects(memory) == {"config.json": "{}"}
    with (one / "replicate_0").lock(0) as _:
        assert files(one.path / "replicate_0") == {}, "there is nothing of it on the store"


def test_an_object_whose_name_leads_elsewhere_is_not_fetched(node, monkeypatch):
    one = node("one")
    names = ["../x", ".hidden", "a/../../x", "/x", "fine"]
    monkeypatch.setattr(object_store.ObjectStore, "list", lambda self, folder: dict.fromkeys(names, "1"))
    fetched = []
    monkeypatch.setattr(object_store.ObjectStore, "download", lambda self, name, path: fetched.append(name))
    one.pull()
    assert fetched == ["unit/fine"]
    fetched.clear()
    object_store.pull(URL, one.path)
    assert fetched == ["fine"]


def test_the_holder_on_another_node_is_named_and_waited_for(node):
    with node("one").lock(0):
        for timeout in (0, 0.1):
            other, named = node("two"), rf"{URL}/unit is .* another process \(process \d+ on .+\)"
            with pytest.raises(LockedError, match=named), other.lock(timeout):
                pass
    with node("two").lock(0):
        pass


@pytest.fixture
def ended(monkeypatch):
    """Folders whose hold was lost, where the process would have ended."""
    told = []

    def end(folder, reason):
        told.append(folder)
        raise SystemExit

    monkeypatch.setattr(file_locks, "exit_without_lock", end)
    return told


def dead(place, monkeypatch):
    """Holds a folder as a process does that was stopped or killed."""
    hold = place.lock(0)
    with monkeypatch.context() as patch:
        patch.setattr(store_lease.StoreLease, "_renew", lambda self: None)
        hold.__enter__()
    return hold


def test_a_dead_holder_is_succeeded_and_if_it_was_only_stopped_it_ends(node, monkeypatch, ended, memory):
    one, two = node("one"), node("two")
    hold = dead(one, monkeypatch)
    with two.lock(0.1):
        write(two.path, a="two")
        two.upload()
        write(one.path, a="one")
        with pytest.raises(SystemExit):
            one.upload()
        assert ended == [str(one)]
        assert objects(memory) == {"a": "two"}
        hold.__exit__(None, None, None)
        two.upload()
    with node("three").lock(0):
        pass


def test_a_dead_holder_of_the_same_node_is_succeeded_at_once(node, monkeypatch, memory):
    hold = dead(node("one"), monkeypatch)
    stale = copy.copy(memory)
    hold.__exit__(None, None, None)
    memory.update(stale)
    with node("one").lock(0):
        pass


def test_of_those_who_succeed_a_dead_holder_at_a_time_one_does(node, monkeypatch):
    hold = dead(node("dead"), monkeypatch)
    inside, most, begin = [], [], threading.Barrier(6)

    def contend(place):
        begin.wait()
        with place.lock(-1):
            inside.append(1)
            most.append(len(inside))
            inside.pop()

    threads = [threading.Thread(target=contend, args=(node(f"node{n}"),)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == [1] * 6
    hold.__exit__(None, None, None)


def test_a_holder_that_cannot_renew_ends_when_others_may_take_over(node, monkeypatch, ended):
    one = node("one")
    failed = threading.Event()

    def unreachable(self, folder):
        failed.set()
        raise OSError(5, "it cannot be reached", "memory://")

    with one.lock(0), monkeypatch.context() as patch:
        patch.setattr(object_store.ObjectStore, "list", unreachable)
        patch.setattr(threading, "excepthook", lambda args: None)
        assert failed.wait(10)
        for _ in range(100):
            if not ended:
                threading.Event().wait(0.05)
    assert ended == [str(one)]


def test_an_outage_is_waited_out_once_the_store_was_reached(node, monkeypatch, memory):
    one = node("one")
    times = iter(range(3))
    original = type(fsspec.filesystem("memory")).put_file

    def flaky(self, *args, **kwargs):
        if next(times, None) is not None:
            raise ConnectionResetError
        return original(self, *args, **kwargs)

    with one.lock(0):
        monkeypatch.setattr(file_locks, "LEASE_SECONDS", 6)
        monkeypatch.setattr(type(fsspec.filesystem("memory")), "put_file", flaky)
        write(one.path, a="1")
        one.upload()
    assert objects(memory) == {"a": "1"}


def test_a_store_that_creates_over_what_is_there_is_refused(node, monkeypatch):
    node("one").check()
    monkeypatch.setattr(object_store.ObjectStore, "create", lambda self, name, content: True)
    with pytest.raises(UserError, match="creates an object over another"):
        node("one").check()


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("nope://bucket/x", "runs: 'nope://bucket/x' cannot be used (Protocol not known: nope); allowed: a folder"),
        ("s3://key:secret@bucket/x", "runs: a URL with an @ is not allowed; credentials come from the environment"),
    ],
)
def test_a_url_that_cannot_be_used_is_one_sentence_without_secrets(node, url, sentence):
    with pytest.raises(UserError) as told:
        run_store.open_run_store(url)
    assert str(told.value).startswith(sentence) and "secret" not in str(told.value)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PermissionError("AKIA123 is forbidden"), "access is denied; credentials come from the environment"),
        (FileNotFoundError("x"), "there is no such bucket"),
        (RuntimeError("AKIA123"), r"it cannot be reached \(RuntimeError\)"),
    ],
)
def test_a_store_that_fails_is_told_without_its_words(node, monkeypatch, error, sentence):
    def fail(*args, **kwargs):
        raise error

    one = node("one")
    monkeypatch.setattr(file_locks, "LEASE_SECONDS", 0)
    for name in ("find", "pipe_file"):
        monkeypatch.setattr(type(fsspec.filesystem("memory")), name, fail)
    with pytest.raises(OSError, match=sentence) as told:
        one.refresh_index()
    assert "AKIA" not in str(told.value)
    with pytest.raises(UserError, match=f"runs: '{URL}' cannot be written .{sentence}") as told:
        one.check()
    assert "AKIA" not in str(told.value)


def train(path, *overrides, runs=URL):
    """What a launch does, in this process."""
    loaded = loading.load_config(path, [*SMALL, f"runs={runs}", *overrides])
    run, progress = RunDirectory(loaded), Progress(["replicate_0", "network_0", "network_1"], 0)
    run.create()
    if loaded.needs_scores:
        ScoresDirectory(loaded).create()
        Scoring(loaded, progress, lambda: None, range(loaded.scores.networks)).run()
    replicate = run.replicate(0)
    with replicate.lock(-1):
        IMP(loaded, replicate, progress, lambda: None).run()
    return run.path.parent


def states(memory, monkeypatch, work):
    """What is on the store after each thing that happens to it, but renewals."""
    found = []
    for name in ("upload", "delete", "create"):
        original = getattr(object_store.ObjectStore, name)

        def noted(self, *args, original=original):
            result = original(self, *args)
            found.append({path: bytes(file.getvalue()) for path, file in [*memory.items()]})
            return result

        monkeypatch.setattr(object_store.ObjectStore, name, noted)
    with monkeypatch.context() as patch:
        patch.setattr(file_locks, "LEASE_SECONDS", 60)
        work()
    return found


def chosen(left):
    """Every ninth state, and those in which a phase has just been done; all of them in `make faults`."""
    done = [{name for name in state if name.endswith("result.json")} for state in left]
    new = {number for number in range(1, len(left)) if done[number] - done[number - 1]}
    assert len(new) == 5, "two networks, pre-training, two levels"
    return [number for number in range(len(left)) if "KILLS" in os.environ or number % 9 == 0 or number in new]


def test_a_run_killed_between_any_two_uploads_ends_elsewhere_with_the_same_bits(node, memory, monkeypatch, tiny, place):
    path = tiny("easy")
    expected = bits(train(path, runs=place / "local"))
    node("first")
    with monkeypatch.context() as patch:
        left = states(memory, patch, lambda: train(path))
    assert len(left) > 20
    monkeypatch.setattr(file_locks, "LEASE_SECONDS", 0.3)
    for number in chosen(left):
        memory.clear()
        filesystem = fsspec.filesystem("memory")
        for name, content in left[number].items():
            filesystem.pipe_file(name, content)
        node(f"node{number}")
        monkeypatch.setattr(file_locks, "LEASE_SECONDS", 0.3)
        train(path)
        object_store.pull(URL, Path(f"pulled{number}"))
        assert bits(f"pulled{number}") == expected, f"after {number} of {len(left)}"
        assert not [name for name in memory if "checkpoint" in name]


def test_what_others_have_done_is_seen_without_their_weights(node, tiny, memory):
    path = tiny("init")
    node("first")
    done = train(path)
    node("second")
    run = RunDirectory(loading.load_config(path, [*SMALL, f"runs={URL}"]))
    assert run.path.parent != done
    replicate = run.replicate(0)
    assert replicate.finished(1) and not list(run.path.rglob("*.safetensors"))
    assert replicate.level(1).result()["test_accuracy_percent"] is not None
    memory.clear()
    RunDirectory(loading.load_config(path, [*SMALL, f"runs={URL}"]))
    assert not replicate.level(0).done


def test_a_failure_is_seen_elsewhere_until_the_next_attempt(node, tiny):
    path = tiny("init")
    node("first")
    run = RunDirectory(loading.load_config(path, [*SMALL, f"runs={URL}"]))
    run.create()
    run.replicate(0).record_failure("the loss is nan")
    node("second")
    other = RunDirectory(loading.load_config(path, [*SMALL, f"runs={URL}"]))
    assert other.replicate(0).failed
    with other.replicate(0).lock():
        assert not other.replicate(0).failed
    node("first")
    assert not RunDirectory(loading.load_config(path, [*SMALL, f"runs={URL}"])).replicate(0).failed


def test_the_configuration_of_another_run_in_the_same_place_is_refused_on_every_node(node, tiny, memory):
    path = tiny("init")
    node("first")
    run = RunDirectory(loading.load_config(path, [*SMALL, f"runs={URL}"]))
    run.create()
    about = file_locks.read_json(run.path / "config.json")
    about["identity"]["train.lr"] = 0.7
    file_locks.write_json(run.path / "config.json", about)
    with run.store.lock(0) as _:
        pass
    file_locks.write_json(run.path / "config.json", about)
    run.store.upload_file("config.json")
    node("second")
    with pytest.raises(UserError, match=r"was made by another configuration: train\.lr: 0\.7 there"):
        RunDirectory(loading.load_config(path, [*SMALL, f"runs={URL}"]))


def test_scores_that_were_not_drawn_are_drawn_by_another_node(node, tiny, memory):
    loaded = loading.load_config(tiny("easy"), [*SMALL, f"runs={URL}"])
    for name in ("first", "second"):
        node(name)
        scoring = Scoring(loaded, Progress([], 0), lambda: None, range(2))
        scoring.folder.create()
        scoring.run()
        (summary,) = (path for path in memory if path.endswith("examples/summary.json"))
        del memory[summary]
