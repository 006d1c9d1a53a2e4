import subprocess
import sys

import pytest
from helpers import MEASURED

from lth_diet.config import loading
from lth_diet.errors import UserError
from lth_diet.runs.run_directory import ReplicateDirectory, RunDirectory


def test_replicates_and_levels_can_be_added_later(tiny):
    RunDirectory(loading.load_config(tiny(), ["prune.levels=1"])).create()
    more = RunDirectory(loading.load_config(tiny(), ["prune.levels=5", "replicates=[3]"]))
    assert [replicate.index for replicate in more.replicates()] == [3]


def test_planned_levels_never_decrease(tiny):
    for levels in (5, 2):
        run = RunDirectory(loading.load_config(tiny(), [f"prune.levels={levels}"]))
        run.create()
    assert run.replicate(0).run_config["planned_levels"] == 5


LOCK_AND_SLEEP = """
import sys, time
from pathlib import Path
from lth_diet.runs.run_directory import ReplicateDirectory
with ReplicateDirectory(Path(sys.argv[1])).lock():
    print("locked", flush=True)
    time.sleep(60)
"""


def test_one_process_at_a_time_locks_a_replicate_and_its_death_releases_it(tiny):
    run = RunDirectory(loading.load_config(tiny()))
    run.create()
    command = [sys.executable, "-c", LOCK_AND_SLEEP, str(run.replicate(0).path)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match="replicate_0 is being trained by another process"), run.replicate(0).lock(0.1):
        pass
    holder.kill()
    holder.wait()
    with run.replicate(0).lock(0.1):
        pass


def test_a_replicate_is_finished_once_all_its_levels_are_and_failed_after_an_error(tiny):
    run = RunDirectory(loading.load_config(tiny(), ["prune.levels=1", "replicates=2"]))
    run.create()
    replicate = run.replicate(1)
    for number in range(2):
        replicate.level(number).write("curve.jsonl", b"")
        replicate.level(number).finish(MEASURED)
    assert [each.finished(1) for each in run.replicates()] == [False, True]
    assert [number for number, phase in replicate.levels() if phase.done] == [0, 1] and not replicate.failed
    replicate.record_failure("the loss is NaN")
    assert ReplicateDirectory(replicate.path).failed
