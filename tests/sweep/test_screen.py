import io
from pathlib import Path

import pytest
from rich.console import Console

from lth_diet.sweep import screen
from lth_diet.sweep.screen import Screen


def shown(jobs, **terminal):
    console = Console(file=io.StringIO(), width=160, highlight=False, **terminal)
    with Screen(jobs, "grid.yaml", console, every=0) as screen:
        screen.refresh()
    code = screen.conclude()
    return code, console.file.getvalue()


@pytest.mark.parametrize("terminal", [{}, {"force_terminal": True}])
def test_the_screen_counts_jobs_and_shows_what_runs_and_what_failed(jobs, place, terminal):
    for job, state in zip(jobs, ("done", "running", "failed"), strict=False):
        job.state = state
    jobs[1].logs = [Path("a.log"), Path("b.log")]
    jobs[2].reason, jobs[2].logs = "the loss is nan", [Path("c.log")]
    level = jobs[1].work.folder.level(0)
    level.write("curve.jsonl", b'{"step": 8, "timestamp": 1}\n')
    code, out = shown(jobs, **terminal)
    assert code == 1
    assert "1 running, 1 done, 1 failed, 4 waiting; 0.0 steps/s, ETA ?" in out
    if terminal:
        assert jobs[1].work.name in out and "level 0" in out and "8/12" in out
    assert f"failed: {jobs[2].name} ({jobs[2].work.config.arm_description}): the loss is nan\n  log: c.log" in out


def test_the_rate_is_that_of_the_last_attempt():
    screen = Screen([], "")
    assert [screen._rate("run", left, now) for left, now in ((22, 10), (16, 12), (20, 14), (10, 16))] == [0, 3, 0, 5]


def test_what_a_run_has_left_follows_its_curve(jobs):
    work = jobs[1].work
    assert screen._progress_of(work) == ("level_0", 0, 12, 24)
    work.folder.level(0).write("curve.jsonl", b'{"step": 8}\n{"st')
    assert screen._progress_of(work) == ("level_0", 8, 12, 16)
