import json
import subprocess
import sys

import pytest

from lth_diet import config
from lth_diet.errors import UserError
from lth_diet.runs import Run


def test_nothing_is_written_before_create(tiny, place):
    Run(config.load(tiny()))
    assert not (place / "runs").exists()


def test_a_directory_of_another_configuration_is_refused_with_the_key_named(tiny):
    run = Run(config.load(tiny()))
    run.create()
    path = run.path / "config.json"
    about = json.loads(path.read_text())
    about["identity"]["train.lr"] = 0.7
    path.write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"was made by another configuration: train\.lr: 0\.7 there, 0\.1 here"):
        Run(config.load(tiny()))


def test_a_run_made_before_a_field_existed_is_taken_as_having_its_default(tiny):
    run = Run(config.load(tiny()))
    run.create()
    path = run.path / "config.json"
    about = json.loads(path.read_text())
    del about["identity"]["deterministic"]
    path.write_text(json.dumps(about))
    assert Run(config.load(tiny())).path == run.path


@pytest.mark.parametrize("content", ["", "[]", '{"x": 1}'])
def test_a_config_that_is_not_one_is_refused(tiny, content):
    run = Run(config.load(tiny()))
    run.create()
    (run.path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json: not the config\.json of a run"):
        Run(config.load(tiny()))


def test_a_full_directory_that_is_no_run_is_refused(tiny):
    run = Run(config.load(tiny()))
    run.path.mkdir(parents=True)
    (run.path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a run directory"):
        Run(config.load(tiny()))


def test_a_directory_that_another_rank_is_creating_is_taken(tiny):
    run = Run(config.load(tiny()))
    run.path.mkdir(parents=True)
    (run.path / ".config.json.part-123").write_text("{")
    assert Run(config.load(tiny())).path == run.path


def test_replicates_and_levels_may_be_asked_for_later(tiny):
    Run(config.load(tiny(), ["prune.levels=1"])).create()
    more = Run(config.load(tiny(), ["prune.levels=5", "replicates=[3]"]))
    assert [replicate.index for replicate in more.replicates()] == [3]


def test_a_replicate_is_held_by_one_process_at_a_time_and_free_when_it_dies(tiny):
    run = Run(config.load(tiny()))
    run.create()
    script = "import sys, time; from pathlib import Path; from lth_diet.runs import Replicate\n"
    script += "with Replicate(Path(sys.argv[1])).held():\n    print('held', flush=True)\n    time.sleep(60)"
    command = [sys.executable, "-c", script, str(run.replicate(0).path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match="replicate_0 is being trained by another process"), run.replicate(0).held(0.1):
        pass
    holder.kill()
    holder.wait()
    with run.replicate(0).held(0.1):
        pass


def test_fewer_levels_asked_for_later_do_not_shrink_the_plan(tiny):
    for levels in (5, 2):
        run = Run(config.load(tiny(), [f"prune.levels={levels}"]))
        run.create()
    assert run.replicate(0).about["planned_levels"] == 5


@pytest.mark.parametrize("runs", ["/proc/nope", "tiny.yaml"])
def test_a_place_that_cannot_be_written_is_one_sentence(tiny, runs):
    with pytest.raises(UserError, match=r"runs: '.*' cannot be written \(.+\); allowed: a folder that can"):
        Run(config.load(tiny(), [f"runs={runs}"])).create()
