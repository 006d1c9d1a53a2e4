import io
import re

import pytest
from helpers import MEASURED
from rich.console import Console

from lth_diet.config import loading
from lth_diet.launch import plan
from lth_diet.launch.screen import Screen
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.training import progress as progress_module
from lth_diet.training.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that tells what it is set to."""
    times = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: times[0])
    return times


def two_ranks(clock):
    """Accounts of two ranks: one in the middle of level 1, one not begun."""
    notices = {}
    first = Progress(["replicate_0", "replicate_2"], 300, lambda notice: notices.update({0: notice}))
    second = Progress(["replicate_1"], 200, lambda notice: notices.update({1: notice}))
    first.report_accuracy("replicate_0", "level_0", 91.254, 100.0)
    first.start_phase("replicate_0", "level_1", 80.0)
    first.start_training(10, 110)
    clock[0] += 5
    first.step(60)
    return notices, first, second


def screen(notices, **console):
    out = io.StringIO()
    return out, Screen(lambda: notices, "run", Console(file=out, width=140, highlight=False, **console))


def test_plain_lines_tell_replicate_level_weights_step_pace_and_times_left(clock):
    notices, first, _ = two_ranks(clock)
    out, shown = screen(notices)
    shown.refresh()
    shown.refresh()
    first.report_accuracy("replicate_0", "level_1", 90.0, 80.0)
    shown.refresh()
    assert out.getvalue().splitlines() == [
        "replicate 0  level 0   100.0 % of weights  test accuracy 91.25 %",
        "replicate 0  level 1    80.0 % of weights  step 60/110  10.0 steps/s  ETA phase 0:00:05, run 0:00:25",
        "replicate 0  level 1    80.0 % of weights  test accuracy 90.00 %",
    ]


def test_the_table_on_a_terminal_has_the_replicates_of_all_ranks(clock):
    notices, _, second = two_ranks(clock)
    second.set_state("replicate_1", "failed")
    out, shown = screen(notices, force_terminal=True, color_system=None)
    with shown:
        pass
    lines = [re.sub("[ │┃]+", " ", line).strip() for line in out.getvalue().splitlines()]
    assert "replicate 0 level 1 80.0 % 60/110 10.0 0:00:05 91.3" in lines
    assert "replicate 1 failed" in lines
    assert "replicate 2 waiting" in lines
    assert "ETA of the run 0:00:25" in lines


def test_messages_of_every_rank_are_shown_once_on_standard_error(clock, capsys):
    notices, first, second = two_ranks(clock)
    second.log("warning: from rank 1")
    first.log("warning: from rank 1")
    _, shown = screen(notices)
    shown.refresh()
    first.log("from rank [0]")
    shown.refresh()
    assert capsys.readouterr().err == "warning: from rank 1\nfrom rank [0]\n"


def test_a_rank_posts_at_intervals_and_at_the_end_of_a_phase(clock):
    posts = []
    progress = Progress(["replicate_0"], 20, posts.append)
    progress.start_phase("replicate_0", "level_0", 100.0)
    progress.start_training(0, 20)
    before = len(posts)
    for step in range(1, 20):
        clock[0] += 0.1
        progress.step(step)
    assert 2 <= len(posts) - before <= 4
    progress.step(20)
    assert posts[-1]["rows"][0]["step"] == 20
    assert posts[-1]["left"] == 0


def test_the_table_has_mean_and_standard_deviation_over_the_replicates_so_far(tiny):
    run = RunDirectory(loading.load_config(tiny(), ["replicates=3"]))
    assert plan.table(run) == "no level is done yet"
    for index, accuracies in enumerate([[90.0, 80.0], [92.0]]):
        for level, accuracy in enumerate(accuracies):
            phase = run.replicate(index).level(level)
            phase.write("curve.jsonl", b"")
            measured = {"weights_remaining_percent": 100 * 0.8**level, "test_accuracy_percent": accuracy}
            phase.finish(MEASURED | measured)
    rows = [re.sub(" +", " ", line.strip()) for line in plan.table(run).splitlines()[1:]]
    assert rows == ["0 100.0 % 91.00 ± 1.41 % 2", "1 80.0 % 80.00 % 1"]
