"""RunStore, ObjectStore and StoreLease on an in-memory store; test_s3.py has a real server and killed processes."""

import copy
import os
import threading
from pathlib import Path

import fsspec
import pytest
from faults.runs import bits
from helpers import MEASURED

from lth_diet import files as file_locks
from lth_diet.config import loading
from lth_diet.errors import UserError
from lth_diet.files import LockedError
from lth_diet.imp import IMP
from lth_diet.runs import object_store, run_store, store_lease
from lth_diet.runs.block import lock_replicates
from lth_diet.runs.instability_directory import mask_path
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.runs.scores_directory import ScoresDirectory
from lth_diet.scoring import Scoring
from lth_diet.training.progress import Progress

URL = "memory://bucket/runs"
SMALL = ["prune.levels=1", "replicates=1"]


@pytest.fixture
def memory():
    """Objects of the store, by path."""
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    return filesystem.store


@pytest.fixture
def node(place, monkeypatch, memory):
    """Moves this process to another node with its own cache; returns the folder `unit` of the runs there."""
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
    current = object_store.current_objects(dict.fromkeys(found, "1"))
    return {name: found[key].decode() for name, (key, _) in current.items() if not name.startswith(".")}


def test_a_node_starts_from_what_the_previous_one_uploaded(node):
    with node("one").lock(0) as _, pytest.raises(AttributeError):
        raise AttributeError  # an exception releases the lock
    first = node("one")
    with first.lock(0):
        write(first.path, **{"a.txt": "1", "b/c.txt": "2"})
        first.upload()
        write(first.path, **{"a.txt": "not uploaded"})
    second = node("two")
    assert second.path != first.path
    with second.lock(0):
        assert files(second.path) == {"a.txt": "1", "b/c.txt": "2"}
        (second.path / "a.txt").unlink()
        write(second.path, **{"b/c.txt": "3"})
        second.upload()
    with node("one").lock(0):
        assert files(first.path) == {"b/c.txt": "3"}, "the store is the source of truth"


def test_a_store_is_shown_as_the_user_knows_it(node):
    assert str(node("one")) == f"{URL}/unit"
    assert str(run_store.open_run_store("runs") / "unit") == "runs/unit"


def test_only_changed_files_are_uploaded_and_downloaded(node, monkeypatch):
    transfers = []
    for method in ("upload", "download"):
        original = getattr(object_store.ObjectStore, method)

        def recorded(self, *args, method=method, original=original):
            transfers.append((method, next(arg for arg in args if isinstance(arg, str))))
            original(self, *args)

        monkeypatch.setattr(object_store.ObjectStore, method, recorded)
    one, two = node("one"), node("two")
    with one.lock(0):
        write(one.path, a="1", b="2")
        one.upload()
    two.pull()
    with one.lock(0):
        write(one.path, b="22")
        one.upload()
    two.pull()
    assert [name for method, name in transfers if method == "upload"] == ["unit/a", "unit/b", "unit/b"]
    assert [name for method, name in transfers if method == "download"] == ["unit/a", "unit/b", "unit/b"]


def test_manifests_are_uploaded_after_the_files_they_refer_to(node, monkeypatch):
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


def test_hidden_files_and_separately_locked_folders_are_not_uploaded(node, memory):
    one = node("one")
    with one.lock(0):
        write(one.path, **{"config.json": "{}", "replicate_0/x": "mine", ".part": "", "network_3/x": "mine"})
        one.upload()
    assert objects(memory) == {"config.json": "{}"}
    with (one / "replicate_0").lock(0) as _:
        assert files(one.path / "replicate_0") == {}, "it was never uploaded"


def test_an_object_whose_name_leaves_its_folder_is_not_downloaded(node, monkeypatch):
    one = node("one")
    names = ["../x", ".hidden", "a/../../x", "/x", "fine"]
    monkeypatch.setattr(object_store.ObjectStore, "list", lambda self, folder: dict.fromkeys(names, "1"))
    downloaded = []
    monkeypatch.setattr(object_store.ObjectStore, "download", lambda self, name, path: downloaded.append(name))
    one.pull()
    assert downloaded == ["unit/fine"]
    downloaded.clear()
    object_store.pull(URL, one.path)
    assert downloaded == ["fine"]


def test_a_url_without_files_is_not_pulled(memory):
    with pytest.raises(UserError, match="memory://bucket/nothing: no files; expected the runs of a training"):
        object_store.pull("memory://bucket/nothing", Path("pulled"))


def test_the_error_names_the_holder_on_another_node(node):
    with node("one").lock(0):
        for timeout in (0, 0.1):
            other, sentence = node("two"), rf"{URL}/unit is .* another process \(process \d+ on .+\)"
            with pytest.raises(LockedError, match=sentence), other.lock(timeout):
                pass
    with node("two").lock(0):
        pass


@pytest.fixture
def exits(monkeypatch):
    """Folders whose lock was lost, for each of which the process would have exited."""
    folders = []

    def exit_without_lock(folder, reason):
        folders.append(folder)
        raise SystemExit

    monkeypatch.setattr(file_locks, "exit_without_lock", exit_without_lock)
    return folders


def test_masks_that_another_node_found_are_downloaded(node, tiny):
    node("one")
    config = loading.load_config(tiny("init"), [f"runs={URL}", *SMALL])
    run = RunDirectory(config)
    run.create()
    replicate = run.replicate(0)
    with lock_replicates([replicate]):
        level = replicate.level(1)
        level.write("mask.safetensors", b"mask")
        level.finish(MEASURED)
    node("two")
    assert mask_path(config, replicate=0, step=0, level=1).read_bytes() == b"mask"


def lock_without_renewal(folder, monkeypatch):
    """Lock a folder like a process that was suspended or killed; returns the lock."""
    lock = folder.lock(0)
    with monkeypatch.context() as patch:
        patch.setattr(store_lease.StoreLease, "_renew", lambda self: None)
        lock.__enter__()
    return lock


def test_a_lock_without_renewal_is_taken_over_and_its_suspended_holder_exits(node, monkeypatch, exits, memory):
    one, two = node("one"), node("two")
    lock = lock_without_renewal(one, monkeypatch)
    with two.lock(0.1):
        write(two.path, a="two")
        two.upload()
        write(one.path, a="one")
        with pytest.raises(SystemExit):
            one.upload()
        assert exits == [str(one)]
        assert objects(memory) == {"a": "two"}
        lock.__exit__(None, None, None)
        two.upload()
    with node("three").lock(0):
        pass


def test_what_a_suspended_process_uploads_or_deletes_after_a_takeover_does_not_count(node, monkeypatch, exits, memory):
    one, two = node("one"), node("two")
    lock = lock_without_renewal(one, monkeypatch)
    write(one.path, **{"curve.jsonl": "old", "weights": "old", "gone": "old"})
    one.upload()
    with two.lock(0.1):
        write(two.path, **{"curve.jsonl": "new"})
        two.upload()
        with monkeypatch.context() as patch:  # one is stopped between its check and its uploads
            patch.setattr(store_lease.StoreLease, "check", lambda self: None)
            write(one.path, **{"curve.jsonl": "late", "weights": "late", "more": "late"})
            (one.path / "gone").unlink()
            one.upload()
        lock.__exit__(None, None, None)
    expected = {"curve.jsonl": "new", "weights": "old", "gone": "old"}
    assert objects(memory) == expected
    object_store.pull(URL, Path("pulled"))
    assert files("pulled/unit") == expected
    three = node("three")
    with three.lock(0):
        assert files(three.path) == expected
    plain = {name for name in memory if name.startswith("/bucket/runs/unit/") and "/." not in name}
    assert not plain, "the next holder deletes what does not count"


def test_the_lock_of_a_dead_process_on_the_same_node_is_taken_over_at_once(node, monkeypatch, memory):
    lock = lock_without_renewal(node("one"), monkeypatch)
    stale = copy.copy(memory)
    lock.__exit__(None, None, None)
    memory.update(stale)
    with node("one").lock(0):
        pass


def test_only_one_of_several_nodes_takes_over_a_lock(node, monkeypatch):
    lock = lock_without_renewal(node("dead"), monkeypatch)
    inside, counts, begin = [], [], threading.Barrier(6)

    def contend(folder):
        begin.wait()
        with folder.lock(-1):
            inside.append(1)
            counts.append(len(inside))
            inside.pop()

    threads = [threading.Thread(target=contend, args=(node(f"node{n}"),)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert counts == [1] * 6
    lock.__exit__(None, None, None)


def test_a_holder_that_cannot_renew_its_lease_exits_before_it_expires(node, monkeypatch, exits):
    one = node("one")
    failed = threading.Event()

    def unreachable(self, folder):
        failed.set()
        raise OSError(5, "the object store cannot be reached", "memory://")

    with one.lock(0), monkeypatch.context() as patch:
        patch.setattr(object_store.ObjectStore, "list", unreachable)
        patch.setattr(threading, "excepthook", lambda args: None)
        assert failed.wait(10)
        for _ in range(100):
            if not exits:
                threading.Event().wait(0.05)
    assert exits == [str(one)]


def test_calls_are_retried_once_the_store_has_been_reached(node, monkeypatch, memory):
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


def test_a_store_without_conditional_writes_is_rejected(node, monkeypatch):
    node("one").check()
    monkeypatch.setattr(object_store.ObjectStore, "create", lambda self, name, content: True)
    with pytest.raises(UserError, match="this store overwrites existing objects"):
        node("one").check()


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("nope://bucket/x", "runs = 'nope://bucket/x': cannot be used (Protocol not known: nope); expected a folder"),
        ("s3://key:secret@bucket/x", "runs: a URL must not contain @; set credentials in the environment"),
    ],
)
def test_an_unusable_url_is_reported_without_secrets(node, url, sentence):
    with pytest.raises(UserError) as raised:
        run_store.open_run_store(url)
    assert str(raised.value).startswith(sentence) and "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (PermissionError("AKIA123 is forbidden"), "access denied; set credentials in the environment"),
        (FileNotFoundError("x"), "no such bucket"),
        (RuntimeError("AKIA123"), r"the object store cannot be reached \(RuntimeError\)"),
    ],
)
def test_an_error_of_the_store_is_reported_without_its_message(node, monkeypatch, error, sentence):
    def fail(*args, **kwargs):
        raise error

    one = node("one")
    monkeypatch.setattr(file_locks, "LEASE_SECONDS", 0)
    for name in ("find", "pipe_file"):
        monkeypatch.setattr(type(fsspec.filesystem("memory")), name, fail)
    with pytest.raises(OSError, match=sentence) as raised:
        one.refresh_index()
    assert "AKIA" not in str(raised.value)
    with pytest.raises(UserError, match=f"runs = '{URL}': cannot be written .{sentence}") as raised:
        one.check()
    assert "AKIA" not in str(raised.value)


def train(path, *overrides, runs=URL):
    """Train a run in this process, as a launch does."""
    loaded = loading.load_config(path, [*SMALL, f"runs={runs}", *overrides])
    run = RunDirectory(loaded)
    progress = Progress([*(replicate.name for replicate in run.replicates()), "network_0", "network_1"], 0)
    run.create()
    if loaded.needs_scores:
        ScoresDirectory(loaded).create()
        Scoring(loaded, progress, lambda: None, range(len(loaded.scoring_blocks))).run()
    replicates = run.replicates()
    with lock_replicates(replicates, -1):
        IMP(loaded, replicates, progress, lambda: None).run()
    return run.path.parent


def record_snapshots(memory, monkeypatch, work):
    """Contents of the store after each of its changes, except renewals."""
    snapshots = []
    for name in ("upload", "delete", "create"):
        original = getattr(object_store.ObjectStore, name)

        def recorded(self, *args, original=original):
            result = original(self, *args)
            snapshots.append({path: bytes(file.getvalue()) for path, file in [*memory.items()]})
            return result

        monkeypatch.setattr(object_store.ObjectStore, name, recorded)
    with monkeypatch.context() as patch:
        patch.setattr(file_locks, "LEASE_SECONDS", 60)
        work()
    return snapshots


def select(snapshots, phases):
    """Indices of a few snapshots and of those right after a phase was done; of all of them in `make faults`."""
    done = [{name for name in snapshot if name.endswith("result.json")} for snapshot in snapshots]
    new = {number for number in range(1, len(snapshots)) if done[number] - done[number - 1]}
    assert len(new) == phases
    if "KILLS" in os.environ:
        return [*range(len(snapshots))]
    every, some = (27, new) if phases == 5 else (72, sorted(new)[::2])
    return sorted({*range(0, len(snapshots), every), *some})


@pytest.mark.parametrize(("stack", "phases"), [(1, 2 + 3), (2, 2 + 2 * 3)])
def test_a_run_killed_between_any_two_uploads_resumes_on_another_node_bit_identically(
    node, memory, monkeypatch, tiny, place, stack, phases
):
    path, replicates = tiny("easy"), (f"replicates={stack}", f"stack={stack}")
    expected = bits(train(path, *replicates, runs=place / "local"))
    node("first")
    with monkeypatch.context() as patch:
        snapshots = record_snapshots(memory, patch, lambda: train(path, *replicates))
    assert len(snapshots) > 20
    monkeypatch.setattr(file_locks, "LEASE_SECONDS", 0.3)
    for number in select(snapshots, phases):
        memory.clear()
        filesystem = fsspec.filesystem("memory")
        for name, content in snapshots[number].items():
            filesystem.pipe_file(name, content)
        node(f"node{number}")
        monkeypatch.setattr(file_locks, "LEASE_SECONDS", 0.3)
        train(path, *replicates)
        object_store.pull(URL, Path(f"pulled{number}"))
        assert bits(f"pulled{number}") == expected, f"after {number} of {len(snapshots)}"
        assert not [name for name in memory if "checkpoint" in name]


def test_progress_on_other_nodes_is_seen_without_their_weights(node, tiny, memory):
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


def test_a_failure_is_seen_on_other_nodes_until_the_next_attempt(node, tiny):
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


def test_a_different_configuration_in_the_same_directory_is_rejected_on_every_node(node, tiny, memory):
    path = tiny("init")
    node("first")
    run = RunDirectory(loading.load_config(path, [*SMALL, f"runs={URL}"]))
    run.create()
    content = file_locks.read_json(run.path / "config.json")
    content["identity"]["train.lr"] = 0.7
    file_locks.write_json(run.path / "config.json", content)
    with run.store.lock(0) as _:
        pass
    file_locks.write_json(run.path / "config.json", content)
    run.store.upload_file("config.json")
    node("second")
    with pytest.raises(UserError, match=r"was created with a different configuration: train\.lr is 0\.7 there"):
        RunDirectory(loading.load_config(path, [*SMALL, f"runs={URL}"]))


def test_missing_pictures_of_scores_are_drawn_by_another_node(node, tiny, memory):
    loaded = loading.load_config(tiny("easy"), [*SMALL, f"runs={URL}"])
    for name in ("first", "second"):
        node(name)
        scoring = Scoring(loaded, Progress([], 0), lambda: None, range(2))
        scoring.folder.create()
        scoring.run()
        (summary,) = (path for path in memory if path.endswith("examples/summary.json"))
        del memory[summary]
