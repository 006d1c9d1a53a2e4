import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import MEASURED

from lth_diet.__main__ import main
from lth_diet.config import loading
from lth_diet.errors import UserError
from lth_diet.files import read_json, sha256, write_json
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.runs.scores_directory import ScoresDirectory
from lth_diet.scores import artifact


@pytest.fixture
def finished(tiny):
    """A run of two levels and its scores, as training leaves them, but without training."""
    config = loading.load_config(tiny("easy"), ["prune.levels=1"])
    run, scores = RunDirectory(config), ScoresDirectory(config)
    run.create()
    scores.create()
    replicate = run.replicate(0)
    for phase in (replicate.pretrain, replicate.level(0), replicate.level(1), *scores.networks()):
        phase.write("curve.jsonl", b"{}")
        phase.write("weights.safetensors", b"weights")
        phase.finish(MEASURED)
    artifact.save_scores(scores.path, np.zeros((2, 3), np.float32), np.zeros(3, int), "digits", "digits")
    return run, scores


def test_intact_runs_pass(finished, capsys):
    assert main(["verify", "runs"]) == 0
    assert capsys.readouterr().out == "1 runs and 1 sets of scores: all finished files are intact\n"


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink])
@pytest.mark.parametrize("name", ["weights.safetensors", "curve.jsonl"])
def test_each_damaged_file_is_named_with_the_phases_to_delete(finished, capsys, damage, name):
    run, _ = finished
    replicate = run.replicate(0)
    damage(replicate.level(0).path / name)
    assert main(["verify", "runs"]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{replicate.level(0).path / name}: damaged or missing; delete {replicate.level(0).path}, ")
    assert f"{replicate.level(1).path}, then rerun the training command to recompute them" in first
    assert last.endswith("1 file is damaged")
    assert main(["verify", str(run.path)]) == 1


def test_damaged_results_configurations_and_scores_are_found(finished, capsys):
    run, scores = finished
    damaged = [
        run.replicate(0).pretrain.path / "result.json",
        run.path / "config.json",
        scores.network(1).path / "weights.safetensors",
        scores.path / "scores.safetensors",
    ]
    for path in damaged:
        flip(path)
    assert main(["verify", "runs"]) == 1
    out = capsys.readouterr().out
    for path in damaged:
        assert f"{path}: damaged or missing; " in out
    assert out.endswith("4 files are damaged\n")


@pytest.mark.parametrize("during", [False, True])
def test_rows_of_a_suspended_process_are_found_by_verify_and_sync_and_removed_by_the_next_run(tiny, capsys, during):
    run = RunDirectory(loading.load_config(tiny("init"), ["prune.levels=0"]))
    run.create()
    replicate = run.replicate(0)
    replicate.pretrain.write("weights.safetensors", b"")
    replicate.pretrain.finish({"steps": 0})
    phase = replicate.level(0)
    rows = [json.dumps({"step": step, "timestamp": step, "train_loss": 1 / step}) + "\n" for step in range(4, 13, 2)]
    repeated = json.dumps({"step": 8, "timestamp": 99, "train_loss": 1 / 8}) + "\n"
    written = [*rows[:3], repeated, *rows[3:]] if during else rows
    phase.write("curve.jsonl", "".join(rows).encode())
    phase.finish(MEASURED)
    (phase.path / "curve.jsonl").write_text("".join(written))
    result = read_json(phase.path / "result.json")
    result["sha256"]["curve.jsonl"] = sha256(phase.path / "curve.jsonl")
    write_json(phase.path / "result.json", result)
    if not during:
        with open(phase.path / "curve.jsonl", "a") as file:
            file.write(repeated + '{"step": 10, "timest')
    curve = phase.path / "curve.jsonl"
    assert main(["verify", "runs"]) == 1
    remedy = "rerun the training command to remove rows of a suspended process"
    assert f"{curve}: damaged or missing; {remedy}" in capsys.readouterr().out
    assert main(["sync", "runs"]) == 2
    assert f"{curve}: missing or damaged; `python -m lth_diet verify` says what to do" in capsys.readouterr().err
    with replicate.lock():
        assert f"{curve}: removed rows that a suspended process had appended" in capsys.readouterr().err
    assert curve.read_text() == "".join(rows)
    assert main(["verify", "runs"]) == 0 and main(["sync", "runs"]) == 0


def test_a_result_that_is_gone_while_later_levels_have_theirs_is_found(tiny, capsys):
    run = RunDirectory(loading.load_config(tiny("init"), ["prune.levels=3"]))
    run.create()
    replicate = run.replicate(0)
    phases = [replicate.pretrain, *(replicate.level(number) for number in range(4))]
    for phase in phases[:-1]:
        phase.write("weights.safetensors", b"")
        phase.finish(MEASURED)
    phases[-1].write("curve.jsonl", b"")  # has started
    assert main(["verify", "runs"]) == 0
    (phases[2].path / "result.json").unlink()
    assert main(["verify", "runs"]) == 1
    later = ", ".join(str(phase.path) for phase in phases[2:])
    assert f"{phases[2].path}/result.json: damaged or missing; delete {later}, then rerun" in capsys.readouterr().out


def test_a_level_that_was_deleted_between_finished_ones_is_found(finished, capsys):
    run, _ = finished
    shutil.rmtree(run.replicate(0).level(0).path)
    assert main(["verify", "runs"]) == 1
    assert (
        f"level_0/result.json: damaged or missing; delete {run.replicate(0).level(1).path}, " in capsys.readouterr().out
    )


@pytest.mark.parametrize("name", ["pretrain", "level_0"])
def test_a_phase_of_another_replicate_is_found_and_not_trained_from(tiny, capsys, name):
    run = RunDirectory(loading.load_config(tiny("all"), ["prune.levels=0", "replicates=2"]))
    run.create()
    for replicate in run.replicates():
        for phase in (replicate.pretrain, replicate.level(0)):
            phase.write("weights.safetensors", b"")
            phase.finish(MEASURED | {"phase": replicate.name_of(phase)})
    assert main(["verify", "runs"]) == 0
    first, second = (replicate.path / name for replicate in run.replicates())
    first.rename("aside")
    second.rename(first)
    Path("aside").rename(second)
    capsys.readouterr()
    assert main(["verify", "runs"]) == 1
    out = capsys.readouterr().out
    run_id = run.path.name.partition("-")[2]
    assert (
        f"{first}/result.json: the result of {run_id}/replicate_1/{name}; put the right one back, or delete {first}"
        in out
    )
    assert f"{second}/result.json: the result of {run_id}/replicate_0/{name}; put the right one back, or delete " in out
    expected = f"{name}: its result is that of {run_id}/replicate_1/{name}"
    with pytest.raises(UserError, match=expected), run.replicate(0).lock():
        pass


def test_a_curve_with_two_values_of_one_step_stops_the_replicate(tiny, capsys):
    run = RunDirectory(loading.load_config(tiny("init"), ["prune.levels=0"]))
    run.create()
    phase = run.replicate(0).level(0)
    phase.write("curve.jsonl", b'{"step": 4, "train_loss": 1}\n{"step": 4, "train_loss": 2}\n')
    phase.finish(MEASURED)
    assert main(["verify", "runs"]) == 1
    assert f"delete {phase.path}, then rerun" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"curve\.jsonl: missing or damaged; delete "), run.replicate(0).lock():
        pass
