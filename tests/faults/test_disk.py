"""Disks that are full or cannot be written, folders that move, names and bytes that nobody expects."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
from faults.runs import SMALL, bits, check_mlflow
from helpers import TINY, write_image_folder

from lth_diet.__main__ import main
from lth_diet.launch import command_line, tracker
from lth_diet.launch.processes import ProcessInfo
from lth_diet.launch.status_board import StatusBoard


@pytest.fixture
def rooms(commands):
    if commands.refusal:
        pytest.skip(f"no mounts of one's own on this machine: {commands.refusal}")
    return commands


def opening(name, disk=None):
    """The fault of a disk that is full, or of a process that is killed, when such a file is opened."""
    return {"opens": name, "disk": disk and str(disk)}


def finished(root):
    """When each file of the finished phases was written."""
    results = list(Path(root).rglob("result.json"))
    return {path: path.stat().st_mtime_ns for result in results for path in result.parent.iterdir()}


def told(output):
    """The only sentence among what a command said."""
    (sentence,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in output
    return sentence


WRITTEN = [  # in this order: a name that begins with a dot is that of a file which is not yet whole
    "/.config.json",
    "network_0/curve.jsonl",
    "network_0/.checkpoint-3.pt",
    "/.scores.safetensors",
    "pretrain/.weights.safetensors",
    "level_1/.result.json",
]
ALSO_WRITTEN = [
    "network_0/.curve.jsonl",
    "network_0/.checkpoint.json",
    "network_0/.el2n.safetensors",
    "network_1/curve.jsonl",
    "network_1/.result.json",
    "examples/.histogram.png",
    "examples/.summary.json",
    "/.manifest.json",
    "pretrain/.subset.safetensors",
    "pretrain/.subset.json",
    "pretrain/.images.png",
    "pretrain/curve.jsonl",
    "pretrain/.checkpoint-3.pt",
    "pretrain/.result.json",
    "level_0/.mask.safetensors",
    "level_0/.weights.safetensors",
    "level_1/.curve.jsonl",
    "level_1/curve.jsonl",
    "level_1/.checkpoint-6.pt",
    "level_1/.checkpoint.json",
    "level_1/.checkpoint-9.pt",
    "level_1/.weights.safetensors",
]


@pytest.mark.parametrize("names", [WRITTEN, pytest.param(ALSO_WRITTEN, marks=pytest.mark.faults)])
def test_a_run_whose_disk_is_full_again_and_again_ends_with_the_same_bits(
    rooms, reference, tiny, place, monkeypatch, names
):
    command = ["recipes.imp", "-f", tiny("easy"), *SMALL]
    room = place / "runs"
    rooms.mount(room, 4096)
    monkeypatch.chdir(f"{rooms.root}{place}")  # from where the small disk is seen
    before = {}
    for name in names:
        status, output = rooms.run(*command, folder=place, fault=opening(name, room))
        assert status in (1, 2), f"the disk was not filled at {name}"
        sentence = told(output)
        if name == "/.config.json":
            assert (
                sentence
                == "error: runs = 'runs': cannot be written (No space left on device); expected a writable folder"
            )
        elif "checkpoint" in name:
            assert re.search(rf"{Path(name).parent}/checkpoint-\d\.pt cannot be written \(", sentence)
            assert sentence.endswith("; rerun the same command to resume once there is room")
        else:
            assert sentence.endswith(f"{name.replace('/.', '/')}; rerun the same command to resume once there is room")
        assert not list(Path("runs").rglob("*.part-*"))
        assert all(finished("runs")[path] == time for path, time in before.items()), "what was finished is kept"
        before = finished("runs")
        rooms.system("rm", room / "ballast")
    status, output = rooms.run(*command, folder=place)
    assert status == 0, output
    assert finished("runs").items() >= before.items()
    assert bits("runs") == bits(reference / "runs")
    check_mlflow()
    assert not list(Path("runs").rglob("failed.json")) and not list(Path("runs").rglob("checkpoint*"))


def test_a_report_that_finds_no_room_leaves_the_old_one(rooms, reference, tiny, place, monkeypatch):
    command = ["recipes.imp", "-f", tiny("easy"), *SMALL]
    room = place / "runs"
    rooms.mount(room, 4096)
    rooms.system("cp", "-r", f"{reference}/runs/.", room)
    rooms.system("sh", "-c", f"echo old >{room}/tiny.html")
    status, output = rooms.run(*command, folder=place, fault=opening("/.tiny.html", room))
    assert status == 0 and "no report: runs/tiny.html cannot be written: No space left on device" in output
    monkeypatch.chdir(f"{rooms.root}{place}")
    assert Path("runs/tiny.html").read_text() == "old\n"


@pytest.mark.parametrize("size", [200, 700])
def test_mlflow_catches_up_once_its_full_disk_has_room(rooms, reference, tiny, place, monkeypatch, size):
    shutil.copytree(reference / "runs", place / "runs")
    tiny("easy")
    store = place / "store"
    rooms.mount(store, size)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}/mlflow.db")
    command = ["recipes.imp", "-f", "tiny.yaml", *SMALL]
    status, output = rooms.run(*command, folder=place)
    assert status == 0 and "Traceback" not in output
    assert output.count("warning: MLflow is not up to date") == 1
    rooms.remount(store, "size=64m")
    status, output = rooms.run(*command, folder=place)
    assert status == 0 and "warning" not in output
    rooms.system("cp", store / "mlflow.db", place)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/mlflow.db")
    check_mlflow()


@pytest.mark.parametrize("size", [60, *(pytest.param(size, marks=pytest.mark.integration) for size in (20, 92))])
def test_a_data_cache_that_finds_no_room_is_one_sentence_and_leaves_nothing(rooms, tiny, place, monkeypatch, size):
    cache = place / "cache"
    rooms.mount(cache, size)
    monkeypatch.setenv("LTH_DIET_CACHE", str(cache))
    command = ["recipes.score", "-f", tiny("easy"), "scores.networks=1"]
    status, output = rooms.run(*command, folder=place)
    assert status == 2
    assert told(output).endswith("; free some disk space or set LTH_DIET_CACHE to another folder")
    assert f"{cache}/digits: the cache of digits cannot be written (" in output
    assert not [path for path in Path(f"{rooms.root}{cache}").rglob("*") if path.suffix != ".lock"]
    assert not (place / "runs").exists()
    rooms.remount(cache, "size=4m")
    assert rooms.run(*command, folder=place)[0] == 0


def test_what_reads_works_where_nothing_can_be_written_and_what_writes_is_one_sentence(
    rooms, reference, tiny, place, monkeypatch
):
    tiny("easy")
    room = place / "runs"
    rooms.mount(room, 4096)
    rooms.system("cp", "-r", f"{reference}/runs/.", room)
    rooms.remount(room, "ro")
    run, scored = next((reference / "runs").glob("digits*")).name, next((reference / "runs/scores").iterdir()).name

    def outcome(module, *arguments):
        status, output = rooms.run(module, *arguments, folder=place)
        assert "Traceback" not in output
        return status, output

    plan = outcome("recipes.imp", "-f", "tiny.yaml", *SMALL, "--plan")
    assert plan[0] == 0 and plan[1].endswith("total: 0 steps to train\n")
    assert outcome("lth_diet.__main__", "verify", "runs")[0] == 0
    assert outcome("lth_diet.__main__", "show", f"runs/{run}/replicate_0", "1")[0] == 0
    assert outcome("lth_diet.__main__", "export", f"runs/{run}/replicate_0", "1", "-o", "ticket")[0] == 0
    assert outcome("analysis.examples", f"runs/scores/{scored}", "-o", "examples")[0] == 0
    assert outcome("lth_diet.__main__", "sync", "runs")[0] == 0
    assert outcome("analysis.report", "--experiment", "tiny", "-o", "report.html")[0] == 0
    status, output = outcome("recipes.imp", "-f", "tiny.yaml", *SMALL)  # finished: nothing has to be written
    assert status == 0 and "level  weights remaining  test accuracy" in output
    assert re.search("no report: runs/tiny.html cannot be written: Read-only file system", output)
    status, output = outcome("recipes.score", "-f", "tiny.yaml", *SMALL)
    assert status == 0 and f"\nruns/scores/{scored}\n{{" in output
    cannot = "cannot be written (Read-only file system)"
    for command in (
        ["recipes.imp", "-f", "tiny.yaml", *SMALL, "prune.levels=2"],
        ["recipes.imp", "-f", "tiny.yaml", "arm=init"],
        ["recipes.score", "-f", "tiny.yaml", *SMALL, "seed=1"],
    ):
        status, output = outcome(*command)
        assert (status, output) == (2, f"error: runs = 'runs': {cannot}; expected a writable folder\n")
    for module, *arguments in (
        ["lth_diet.__main__", "export", f"runs/{run}/replicate_0", "1", "-o", "runs/ticket"],
        ["analysis.report", "--experiment", "tiny", "-o", "runs/report.html"],
        ["analysis.collect", "--experiment", "tiny", "-o", "runs/results.csv"],
        ["analysis.examples", f"runs/scores/{scored}", "-o", "runs/examples"],
    ):
        status, output = outcome(module, *arguments)
        assert status == 2 and output.count("\n") == 1 and arguments[-1] in output and "Read-only" in output
    check_mlflow_of(rooms, place, monkeypatch)


def check_mlflow_of(rooms, place, monkeypatch):
    with monkeypatch.context() as patch:
        patch.chdir(f"{rooms.root}{place}")
        check_mlflow()


@pytest.mark.parametrize("move", [shutil.move, shutil.copytree])
def test_a_run_that_was_killed_and_taken_elsewhere_goes_on_there(commands, reference, tiny, place, monkeypatch, move):
    command = ["recipes.imp", "-f", tiny("easy"), *SMALL]
    assert commands.run(*command, folder=place, fault=opening("level_1/.checkpoint-9.pt"))[0] == -9
    before = {path.relative_to("runs"): time for path, time in finished("runs").items()}
    elsewhere = place / "another machine"
    elsewhere.mkdir()
    move("runs", elsewhere / "runs")
    monkeypatch.setenv("LTH_DIET_CACHE", str(elsewhere / "cache"))
    monkeypatch.chdir(elsewhere)
    status, output = commands.run(*command, "runs=another machine/runs", folder=place)
    assert status == 0, output
    after = {path.relative_to("runs"): time for path, time in finished("runs").items()}
    assert len(before) > 15 and after.items() >= before.items()
    assert bits("runs") == bits(reference / "runs")
    check_mlflow()


ODD = "-a b #c?d%20 {e} 'f' \"g\" ü:*"


@pytest.mark.integration
def test_names_that_mean_something_elsewhere_are_only_names(commands, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # the store is in the working folder
    ends = []
    for name in ("plain", ODD):
        folder = tmp_path / f"{name}."
        write_image_folder(folder / name, {"train": 80, "test": 10})
        settings = TINY.format(arm="easy") + f"runs: {json.dumps(f'{name}runs')}\n"
        dataset = f"dataset: {{name: image_folder, root: {json.dumps(name)}}}"
        (folder / f"{name}.yaml").write_text(settings.replace("dataset: {name: digits}", dataset))
        monkeypatch.setenv("LTH_DIET_CACHE", str(folder / f"{name}cache"))
        command = ["recipes.imp", f"-f{name}.yaml", *SMALL]
        assert commands.run(*command, folder=folder, fault=opening("level_1/.checkpoint-9.pt"))[0] == -9
        status, output = commands.run(*command, folder=folder)
        assert status == 0 and "warning" not in output and "no report" not in output, output
        for module, *arguments in (
            ["lth_diet.__main__", "verify", f"{folder}/{name}runs"],
            ["lth_diet.__main__", "sync", f"./{name}runs"],
            ["analysis.report", "--experiment", "tiny", f"-o{name}.html"],
        ):
            status, output = commands.run(module, *arguments, folder=folder)
            assert status == 0, output
        assert {path.name.replace(name, "") for path in folder.iterdir()} == {
            "", ".yaml", "cache", "runs", "mlflow.db", "mlflow.db.lock", "mlartifacts", ".html"
        }  # fmt: skip
        ends.append(bits(folder / f"{name}runs"))
    assert ends[0] == ends[1]


def flipped(content, draw):
    place = draw.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def truncated(content, draw):
    return content[: draw.randrange(len(content))]


DAMAGES = [flipped, truncated]


def artifacts(root):
    """Every file below a folder of finished runs, but those that nothing reads: pictures, pages and locks."""
    files = [path for path in sorted(Path(root).rglob("*")) if path.is_file()]
    return [path for path in files if path.suffix not in (".png", ".html", ".lock") and path.name != ".lock"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_exactly_the_file_that_is_damaged(reference, place, capsys, damage):
    shutil.copytree(reference / "runs", "runs")
    draw = random.Random(5)
    paths = artifacts("runs")
    assert len(paths) == 24
    for path in paths:
        content = path.read_bytes()
        for _ in range(5):
            path.write_bytes(damage(content, draw))
            assert main(["verify", "runs"]) == 1
            named, last = capsys.readouterr().out.splitlines()
            assert named.startswith(f"{path}: damaged or missing; ") and last.endswith(": 1 file is damaged")
        path.write_bytes(content)
    assert main(["verify", "runs"]) == 0


UNUSED = {  # by the command of a finished run, which warns of those of networks
    "pretrain/subset.json",
    *(f"network_{k}/{name}" for k in (0, 1) for name in ("curve.jsonl", "el2n.safetensors", "result.json")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_same_command_never_uses_a_damaged_file(reference, tiny, place, monkeypatch, capsys, damage):
    def command():
        status = command_line.launch_imp(["-f", str(path), *SMALL], "", lambda runs, command, ranks: None)
        return status, capsys.readouterr().err

    monkeypatch.setattr(command_line, "_start", lambda config, process: StatusBoard(process))
    monkeypatch.setattr(ProcessInfo, "detach", lambda ranks: None)
    monkeypatch.setattr(tracker.Tracker, "_sync", lambda tracker: None)
    path, draw = tiny("easy"), random.Random(9)
    shutil.copytree(reference / "runs", "runs")
    whole = {path: path.read_bytes() for path in artifacts("runs")}
    assert command() == (0, "")
    for file, content in whole.items():
        file.write_bytes(damage(content, draw))
        status, err = command()
        now = {path: path.read_bytes() for path in artifacts("runs")}
        name = f"{file.parent.name}/{file.name}"
        if status:
            assert err.startswith("error: ") and err.count("\n") == 1 and str(file) in err
        else:
            warned = f"warning: {file}: missing or damaged; `python -m lth_diet verify` says what to do\n"
            assert err == (warned if name.startswith("network_") else ""), name
            assert name in UNUSED or now[file] == content, name
        assert all(now[path] == whole[path] for path in whole if path != file)
        for left in now.keys() - whole.keys():
            assert left.name == "failed.json"
            left.unlink()
        file.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_mlflow_is_not_told_of_a_damaged_file(reference, place, capsys, damage):
    shutil.copytree(reference / "runs", "runs")
    draw = random.Random(2)
    for path in [path for path in artifacts("runs") if path.name in ("curve.jsonl", "mask.safetensors", "result.json")]:
        content = path.read_bytes()
        path.write_bytes(damage(content, draw))
        status, err = main(["sync", "runs"]), capsys.readouterr().err
        if status:
            assert (status, err.count("\n")) == (2, 1) and str(path) in err
        else:
            assert err == "" and path.parent.name not in ("level_0", "level_1"), "MLflow has it already"
        path.write_bytes(content)
    assert main(["sync", "runs"]) == 0
    check_mlflow()


@pytest.mark.integration
@pytest.mark.parametrize("damage", [flipped, pytest.param(truncated, marks=pytest.mark.faults)])
@pytest.mark.parametrize("name", ["checkpoint-6.pt", "checkpoint.json", "curve.jsonl", "mask.safetensors"])
def test_a_killed_run_whose_files_were_damaged_ends_with_the_same_bits(commands, reference, tiny, place, damage, name):
    command = ["recipes.imp", "-f", tiny("easy"), *SMALL]
    assert commands.run(*command, folder=place, fault=opening("level_1/.checkpoint-9.pt"))[0] == -9
    (path,) = Path("runs").glob(f"digits*/replicate_0/level_1/{name}")
    path.write_bytes(damage(path.read_bytes(), random.Random(4)))
    status, output = commands.run(*command, folder=place)
    assert status == 0, output
    assert bits("runs") == bits(reference / "runs")
