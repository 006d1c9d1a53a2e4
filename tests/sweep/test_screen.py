import io
import re
from pathlib import Path

import pytest
from helpers import MEASURED
from rich.console import Console

from lth_diet.sweep import screen
from lth_diet.sweep.grid import Sweep
from lth_diet.sweep.screen import Job, Screen, _Rates


def shown(jobs, **terminal):
    console = Console(file=io.StringIO(), width=160, highlight=False, **terminal)
    with Screen(jobs, "grid.yaml", console, every=0) as screen:
        screen.refresh()
    code = screen.conclude()
    return code, console.file.getvalue()


@pytest.mark.parametrize("terminal", [{}, {"force_terminal": True}])
def test_the_screen_shows_counts_and_running_and_failed_jobs(jobs, place, terminal):
    for job, state in zip(jobs, ("done", "running", "failed"), strict=False):
        job.state = state
    jobs[1].logs = [Path("a.log"), Path("b.log")]
    jobs[2].reason, jobs[2].logs = "the loss is nan", [Path("c.log")]
    level = jobs[1].work.parts[0].folder.level(0)
    level.write("curve.jsonl", b'{"step": 8, "timestamp": 1}\n')
    code, out = shown(jobs, **terminal)
    assert code == 1
    assert re.search(r"1 running, 1 done, 1 failed, 4 waiting\s*\n", out), "no ETA before a rate is known"
    if terminal:
        assert jobs[1].work.name in out and "level 0" in out and "8/12" in out
    assert f"failed: {jobs[2].name} ({jobs[2].work.config.arm_description}): the loss is nan\n  log: c.log" in out


def test_counts_are_those_of_replicates_and_a_failed_block_may_have_some_that_are_done(grid):
    jobs = [Job(work, work.name) for work in Sweep(grid(), ["replicates=3", "stack=3"]).work()]
    for job, state in zip(jobs, ("done", "running", "failed"), strict=False):
        job.state = state
    replicate = jobs[2].work.parts[1].folder
    for phase in (replicate.pretrain, replicate.level(0), replicate.level(1)):
        phase.write("curve.jsonl", b"")
        phase.finish(MEASURED)
    code, out = shown(jobs)
    assert code == 1 and "3 running, 2 done, 2 failed, 3 waiting" in out
    assert f"failed: {jobs[2].name} " in out and jobs[2].name.endswith("replicate_0-2")
    level = jobs[1].work.parts[0].folder.level(0)
    for part in jobs[1].work.parts:
        part.folder.level(0).write("curve.jsonl", b'{"step": 8}\n')
    assert level.path.exists() and screen._progress_of(jobs[1].work) == ("level_0", 8, 12, 3 * (4 + 12))


def rates(*left, processes=1):
    """The rate of a process after each observation (seconds, steps left)."""
    found, result = _Rates(), []
    for now, steps in left:
        found.update({"run": steps}, {"run": processes}, now)
        result.append(found.of("run"))
    return result


def test_a_rate_is_measured_between_changes_and_does_not_count_the_start_of_a_process():
    assert rates((0, 100), (50, 100), (60, 90), (61, 90), (65, 80), (67, 80)) == [None] * 4 + [2, 2]


def test_a_rate_is_that_of_the_last_attempt():
    assert rates((10, 22), (12, 16), (14, 10), (16, 20), (40, 10), (42, 0)) == [None, None, 3, None, None, 5]


def test_a_rate_is_an_average_over_a_minute():
    steady = [(second, 10_000 - 10 * second) for second in range(100)]
    assert rates(*steady, (110, 9_000))[-1] == pytest.approx((10 * 50 + 10) / 61, rel=0.05)
    slow = [(100 * number, 1000 - number) for number in range(4)]
    assert rates(*slow)[-1] == pytest.approx(0.01), "two changes, however long that takes"


def test_processes_that_share_a_work_share_its_rate():
    assert rates((0, 100), (1, 90), (2, 80), processes=2) == [None, None, 5]


def test_the_rate_of_a_process_is_the_median_and_finished_ones_count():
    found = _Rates()
    assert found.per_process() is None
    for now in range(3):
        found.update(
            {f"run_{rate}": 1000 - rate * now for rate in (9, 10, 100)},
            dict.fromkeys(("run_9", "run_10", "run_100"), 1),
            now,
        )
    found.update({"run_new": 1000}, {"run_new": 1}, 3)
    assert found.per_process() == 10 and found.of("run_new") is None and found.of("run_9") is None


@pytest.fixture
def observed(jobs, monkeypatch):
    """Shows a sweep at a time, with the steps that each running job has left; returns the line."""
    clock, steps = [1000.0], {}
    monkeypatch.setattr(screen.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(screen, "_progress_of", lambda work: ("level_0", 0, 0, steps[work.name]))
    console = Console(file=io.StringIO(), width=160, highlight=False)
    shown = Screen(jobs, "grid.yaml", console, every=0)

    def look(seconds, *left):
        clock[0] += seconds
        running = [job for job in jobs if job.state == "running"]
        steps.update({job.work.name: count for job, count in zip(running, left, strict=True)})
        shown.refresh()
        return console.file.getvalue().splitlines()[-1]

    return look


def test_the_eta_counts_processes_that_have_not_trained_a_step_yet(jobs, observed):
    for job in jobs:
        job.state = "running"
        job.work.__dict__["steps_left"] = 1000
    eta = "7 running, 0 done, 0 failed, 0 waiting"
    assert observed(0, *[1000] * 7) == observed(30, *[1000] * 7) == observed(1, 990, *[1000] * 6) == eta
    assert observed(1, 980, *[1000] * 6) == f"{eta}; 10.0 steps/s per process, ETA 0:01:40"
    assert observed(1, 970, 800, *[1000] * 5) == f"{eta}; 10.0 steps/s per process, ETA 0:01:40"


def test_the_eta_is_shared_by_the_running_slots_and_at_least_that_of_the_longest_job(jobs, observed):
    for job in jobs:
        job.work.__dict__["steps_left"] = 1000
    jobs[0].state = jobs[1].state = "running"
    observed(1, 100, 1000)
    observed(1, 90, 990)
    assert observed(1, 80, 980).endswith("ETA 0:05:03"), "6,060 steps shared by two processes"
    for job in jobs[2:]:
        job.state = "done"
    assert observed(8, 0, 900).endswith("ETA 0:01:30")


def test_the_eta_of_processes_that_start_pause_and_write_curves_at_intervals_does_not_jump(jobs, observed):
    for job in jobs:
        job.state, job.work.__dict__["steps_left"] = "done", 1000
    jobs[0].state = jobs[1].state = "running"
    jobs[2].state = "waiting"
    etas = {}

    def left(second, started):
        trained = max(second - started - 8, 0) * 10  # after eight seconds a process takes ten steps a second,
        return 1000 - trained // 50 * 50  # and it writes its curve every fifty

    for second in range(100):
        line = observed(1, left(second, 0), left(second, 3))
        if "ETA" in line:
            minutes, seconds = line.rpartition("ETA 0:")[2].split(":")
            etas[second] = 60 * int(minutes) + int(seconds)
    assert min(etas) == 18, "the second change of the first process, which is ten seconds after its start"
    steps = {second: max((left(second, 0) + left(second, 3) + 1000) / 2, 1000) for second in etas}
    assert etas == pytest.approx({second: count / 10 for second, count in steps.items()}, rel=0.01, abs=0.5)


def test_the_steps_left_of_a_run_follow_its_curve(jobs):
    work = jobs[1].work
    assert screen._progress_of(work) == ("level_0", 0, 12, 24)
    work.parts[0].folder.level(0).write("curve.jsonl", b'{"step": 8}\n{"st')
    assert screen._progress_of(work) == ("level_0", 8, 12, 16)
