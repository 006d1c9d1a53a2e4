import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import MEASURED

from lth_diet.__main__ import main
from lth_diet.config import loading
from lth_diet.errors import UserError
from lth_diet.files import read_json, write_json
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.runs.scores_directory import ScoresDirectory
from lth_diet.scores import artifact


def test_nothing_is_written_before_create(tiny, place):
    RunDirectory(loading.load_config(tiny()))
    assert not (place / "runs").exists()


def test_a_directory_of_another_configuration_is_refused_with_the_key_named(tiny):
    run = RunDirectory(loading.load_config(tiny()))
    run.create()
    path = run.path / "config.json"
    about = read_json(path)
    about["identity"]["train.lr"] = 0.7
    write_json(path, about)
    with pytest.raises(UserError, match=r"was made by another configuration: train\.lr: 0\.7 there, 0\.1 here"):
        RunDirectory(loading.load_config(tiny()))


def test_a_run_made_before_a_field_existed_is_taken_as_having_its_default(tiny):
    run = RunDirectory(loading.load_config(tiny()))
    run.create()
    path = run.path / "config.json"
    about = read_json(path)
    del about["identity"]["deterministic"]
    write_json(path, about)
    assert RunDirectory(loading.load_config(tiny())).path == run.path


@pytest.mark.parametrize("content", ["", "[]", '{"x": 1}'])
def test_a_config_that_is_not_one_is_refused(tiny, content):
    run = RunDirectory(loading.load_config(tiny()))
    run.create()
    (run.path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json: damaged, or not written by lth_diet; move it away"):
        RunDirectory(loading.load_config(tiny()))


def test_a_full_directory_that_is_no_run_is_refused(tiny):
    run = RunDirectory(loading.load_config(tiny()))
    run.path.mkdir(parents=True)
    (run.path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a run directory"):
        RunDirectory(loading.load_config(tiny()))


def test_a_directory_that_another_rank_is_creating_is_taken(tiny):
    run = RunDirectory(loading.load_config(tiny()))
    run.path.mkdir(parents=True)
    (run.path / ".config.json.part-123").write_text("{")
    assert RunDirectory(loading.load_config(tiny())).path == run.path


def test_replicates_and_levels_may_be_asked_for_later(tiny):
    RunDirectory(loading.load_config(tiny(), ["prune.levels=1"])).create()
    more = RunDirectory(loading.load_config(tiny(), ["prune.levels=5", "replicates=[3]"]))
    assert [replicate.index for replicate in more.replicates()] == [3]


def test_a_replicate_is_held_by_one_process_at_a_time_and_free_when_it_dies(tiny):
    run = RunDirectory(loading.load_config(tiny()))
    run.create()
    script = "import sys, time; from pathlib import Path; from lth_diet.runs.run_directory import ReplicateDirectory\n"
    script += "with ReplicateDirectory(Path(sys.argv[1])).lock():\n    print('held', flush=True)\n    time.sleep(60)"
    command = [sys.executable, "-c", script, str(run.replicate(0).path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="replicate_0 is being trained by another process"), run.replicate(0).lock(0.1):
        pass
    holder.kill()
    holder.wait()
    with run.replicate(0).lock(0.1):
        pass


def test_fewer_levels_asked_for_later_do_not_shrink_the_plan(tiny):
    for levels in (5, 2):
        run = RunDirectory(loading.load_config(tiny(), [f"prune.levels={levels}"]))
        run.create()
    assert run.replicate(0).about["planned_levels"] == 5


@pytest.mark.parametrize("where", ["/proc/nope", "tiny.yaml"])
def test_a_place_that_cannot_be_written_is_one_sentence(tiny, where):
    with pytest.raises(UserError, match=r"runs: '.*' cannot be written \(.+\); allowed: a folder that can"):
        RunDirectory(loading.load_config(tiny(), [f"runs={where}"])).create()


@pytest.fixture
def finished(tiny):
    """A run of two levels and its scores, as training leaves them, without training."""
    loaded = loading.load_config(tiny("easy"), ["prune.levels=1"])
    run, folder = RunDirectory(loaded), ScoresDirectory(loaded)
    run.create()
    folder.create()
    replicate = run.replicate(0)
    for phase in (replicate.pretrain, replicate.level(0), replicate.level(1), *folder.networks()):
        phase.write("curve.jsonl", b"{}")
        phase.write("weights.safetensors", b"weights")
        phase.finish(MEASURED)
    artifact.save_scores(folder.path, np.zeros((2, 3), np.float32), np.zeros(3, int), "digits", "digits")
    return run, folder


def test_a_whole_run_is_verified(finished, capsys):
    assert main(["verify", "runs"]) == 0
    assert capsys.readouterr().out == "1 runs and 1 sets of scores: every finished file is whole\n"


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, lambda path: path.write_bytes(path.read_bytes()[:-1]), Path.unlink])
@pytest.mark.parametrize("name", ["weights.safetensors", "curve.jsonl"])
def test_verify_names_each_damaged_file_and_what_follows_from_it(finished, capsys, damage, name):
    run, _ = finished
    replicate = run.replicate(0)
    damage(replicate.level(0).path / name)
    assert main(["verify", "runs"]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{replicate.level(0).path / name}: damaged or missing; delete {replicate.level(0).path}, ")
    assert f"{replicate.level(1).path}, and the same command computes them again" in first
    assert last.endswith("1 files are damaged")
    assert main(["verify", str(run.path)]) == 1


def test_verify_finds_damage_in_results_configurations_and_scores(finished, capsys):
    run, folder = finished
    flip(run.replicate(0).pretrain.path / "result.json")
    flip(run.path / "config.json")
    flip(folder.network(1).path / "weights.safetensors")
    flip(folder.path / "scores.safetensors")
    assert main(["verify", "runs"]) == 1
    out = capsys.readouterr().out
    for path in (
        run.replicate(0).pretrain.path / "result.json",
        run.path / "config.json",
        folder.network(1).path / "weights.safetensors",
        folder.path / "scores.safetensors",
    ):
        assert f"{path}: damaged or missing; " in out
    assert out.endswith("4 files are damaged\n")


def test_verify_refuses_a_folder_without_runs(place, capsys):
    assert main(["verify", str(place)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_url_is_told_to_be_copied_first(place, capsys):
    assert main(["verify", "s3://bucket/runs"]) == 2
    assert "python -m lth_diet pull <URL> <folder>" in capsys.readouterr().err
