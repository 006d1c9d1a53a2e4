"""Several arms in one launch."""

import os
import re
import time
from pathlib import Path

import pytest
from helpers import MEASURED, ROOT, run, start
from safetensors.numpy import load_file

from lth_diet.config import loading
from lth_diet.launch import command_line
from lth_diet.launch.arms import open_arms, share_of, tasks_of
from lth_diet.launch.processes import ProcessInfo
from recipes import imp


@pytest.fixture
def arms(tiny):
    """Writes one file per arm, with replaced text, and returns the command line that names them all."""

    def write(*names, **replaced):
        for name in names:
            path = tiny(name, f"{name}.yaml")
            path.write_text(path.read_text().replace(*replaced.get(name, ("", ""))))
        return [word for name in names for word in ("-f", f"{name}.yaml")]

    return write


def bits(root):
    """All tensors below a folder of runs, as bytes."""
    paths = sorted(Path(root).rglob("*.safetensors"))
    tensors = {str(path.relative_to(root)): load_file(path) for path in paths}
    assert tensors
    return {path: {name: array.tobytes() for name, array in arrays.items()} for path, arrays in tensors.items()}


def test_arms_of_one_launch_have_the_bits_of_separate_launches_and_share_their_scores(arms):
    files = arms("easy", "init", "hard", hard=("experiment: tiny", "experiment: other"))
    small = ["prune.levels=1", "replicates=2"]
    status, out, err = run(*files[1:], *small, ranks=2)
    assert status == 0 and "error" not in err, err
    networks = re.findall(r"^network (\d)  scoring .* test accuracy", out, re.M)
    assert sorted(networks) == ["0", "1"], "each scoring network is trained once"
    for arm in ("easy", "init", "hard"):
        for replicate in (0, 1):
            assert len(re.findall(f"^{arm}  replicate {replicate}  level 1 .* test accuracy", out, re.M)) == 1
        assert len(re.findall(f"^{arm}  runs/digits_{arm}-\\w+$", out, re.M)) == 1
        status, _, err = run(f"{arm}.yaml", *small, "runs=alone")
        assert status == 0, err
    assert bits("runs") == bits("alone")
    assert out.count("\ncompare in MLflow: ") == 1
    assert re.findall(r"^report: .*/runs/(\w+)\.html$", out, re.M) == ["tiny", "other"], "one for each experiment"


@pytest.mark.integration
def test_a_launch_of_several_arms_killed_within_one_is_resumed_bit_identically(arms):
    files = arms("init", "all", "hard")[1:]
    longer = ["train.steps=120", "intervals.checkpoint=10", "prune.levels=0", "replicates=2"]
    status, _, err = run(*files, *longer, "runs=whole", ranks=2)
    assert status == 0, err
    process = start(*files, *longer, ranks=2)
    while not list(Path("runs").glob("digits_all-*/replicate_1/level_0/checkpoint.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not list(Path("runs").glob("digits_hard-*/replicate_1/level_0/result.json"))
    status, out, err = run(*files, *longer, ranks=2)
    assert status == 0 and "network" not in out, err
    assert bits("runs") == bits("whole")
    trained = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.safetensors")}
    status, out, err = run(*files, *longer)
    assert status == 0 and "steps/s" not in out, err
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.safetensors")} == trained


def test_a_failed_replicate_and_failed_scores_stop_no_other_arm(arms):
    files = arms("easy", "init", "all", easy=("batch_size: 64,", "batch_size: 64, lr: 1.0e+30,"))
    _, out, _ = run("init.yaml", "--plan")
    run("init.yaml", "replicates=[1]", "prune.levels=0")
    obstacle = Path(out.split(":")[0]) / "replicate_0/level_0/mask.safetensors"
    obstacle.mkdir(parents=True)
    status, out, err = run(*files[1:], "prune.levels=0", "scores.steps=20")
    assert status == 1
    assert re.search(r"^error: scores: runs/scores/\w+/network_0: the loss is nan at step", err, re.M), err
    assert re.search("^error: init replicate 0: IsADirectoryError", err, re.M), err
    failed = re.findall(r"^replicate 0 failed: see runs/digits_(\w+)-\w+/replicate_0/failed.json$", out, re.M)
    assert failed == ["easy", "init"]
    assert list(Path("runs").glob("digits_all-*/replicate_0/level_0/result.json")), "the other arm is trained"


def test_the_plan_of_several_arms_has_shared_scores_once_and_the_total(arms, place, capsys):
    files = arms("easy", "random", "hard")
    before = sorted(place.rglob("*"))
    assert imp.main([*files, "--plan"]) == 0
    out = capsys.readouterr().out
    assert out.count("EL2N scores by 2 ") == 1
    assert re.findall("^total: .*", out, re.M) == [f"total: {steps} steps to train" for steps in (40, 28, 28)]
    assert out.endswith("\n\ntotal of 3 arms: 96 steps to train\n")
    assert sorted(place.rglob("*")) == before


def test_a_warning_names_its_file_and_an_override_that_one_arm_uses_causes_none(arms, capsys):
    files = arms("easy", "init", "all")
    assert imp.main([*files, "--plan", "scores.networks=3", "pretrain.subset.size=64"]) == 0
    assert "on the command line" not in capsys.readouterr().err
    assert imp.main([*files[2:], "--plan", "scores.networks=3", "threads=1000"]) == 0
    lines = capsys.readouterr().err.splitlines()
    for arm in ("init", "all"):
        assert f"warning: {arm}.yaml: scores.networks on the command line has no effect with arm: {arm}" in lines
    assert len([line for line in lines if line.startswith("warning: threads = 1000: ")]) == 1


def test_finished_runs_that_cannot_be_written_are_shown_and_the_other_arms_train(arms, capsys, monkeypatch):
    files, small = arms("init", "all"), ["prune.levels=0", "train.steps=6"]
    assert run("init.yaml", *small)[0] == 0
    (archive,) = Path("runs").glob("digits_init-*")
    before, access = {path: path.stat().st_mtime_ns for path in archive.rglob("*")}, os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != archive and access(path, mode))
    shown = []
    assert command_line.launch_imp([*files, *small], "", lambda runs, *_: shown.extend(runs)) == 0
    assert len(shown) == 2 and len(re.findall(r"^(?:init|all) +\d+\.\d\d  1$", capsys.readouterr().out, re.M)) == 2
    assert {path: path.stat().st_mtime_ns for path in archive.rglob("*")} == before


def test_each_block_of_replicates_is_one_task_dealt_to_one_rank(tiny):
    tiny("init", "a.yaml"), tiny("all", "b.yaml")
    files = [loading.load("a.yaml", ["replicates=[5,6,7,4,1,0,3,2]", "stack=4"]), loading.load("b.yaml")]
    arms = open_arms(files, ProcessInfo(0, 2, 0, "", 0))
    rows = [task.rows for task in tasks_of(arms)]
    assert rows == [[("a", f"replicate_{index}") for index in block] for block in ([4, 5, 6, 7], [0, 1, 2, 3])] + [
        [("b", "replicate_0")]
    ]
    shares = [share_of(arms, ProcessInfo(rank, 2, rank, "", 0)) for rank in (0, 1)]
    assert [[task.rows for task in share] for share in shares] == [rows[:2], rows[2:]]
    assert [task.steps_left() for share in shares for task in share] == [4 * 3 * 12, 4 * 3 * 12, 4 + 3 * 8]
    phase = shares[0][0].replicates[2].level(0)
    phase.write("curve.jsonl", b"")
    phase.finish(MEASURED)
    assert shares[0][0].steps_left() == 4 * 3 * 12 - 12, "each replicate has its own steps left"


@pytest.mark.parametrize(
    ("arms", "stack", "before", "after", "ranks"), [(6, 4, 4, 8, 2), (1, 1, 8, 12, 3), (5, 1, 2, 3, 4)]
)
def test_ranks_share_the_replicates_that_a_repeated_launch_adds(arms, stack, before, after, ranks):
    names = ("init", "all", "all_half", "random", "easy", "hard")[:arms]
    overrides = [f"replicates={after}", f"stack={stack}"]
    opened = open_arms(
        [loading.load(ROOT / f"yamls/digits_{name}.yaml", overrides) for name in names], ProcessInfo(0, ranks, 0, "", 0)
    )
    shares = [share_of(opened, ProcessInfo(rank, ranks, rank, "", 0)) for rank in range(ranks)]
    assert sum(map(len, shares)) == arms * after // stack
    new = [sum(task.replicates[0].index >= before for task in share) for share in shares]
    assert sum(new) == arms * (after - before) // stack and max(new) - min(new) <= 1


def test_files_of_one_name_in_two_folders_are_told_apart(tiny, place):
    for folder, arm in (("a", "init"), ("b", "all")):
        (place / folder).mkdir()
        tiny(arm, f"{folder}/tiny.yaml")
    files = [loading.load(name) for name in ("a/tiny.yaml", "b/tiny.yaml", tiny("easy", "c\x1b.yaml").name)]
    process = ProcessInfo(0, 1, 0, "", 0)
    assert [arm.name for arm in open_arms(files, process)] == ["a/tiny.yaml", "b/tiny.yaml", "c\\x1b"]
    assert [arm.name for arm in open_arms(files[:1], process)] == [""]
