import io
import re

import pytest
from helpers import MEASURED
from rich.console import Console

from lth_diet.config import loading
from lth_diet.launch import results
from lth_diet.launch.screen import Screen
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.training import progress as progress_module
from lth_diet.training.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that shows the time it is set to."""
    times = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: times[0])
    return times


def two_ranks(clock):
    """Statuses of two ranks: one in the middle of level 1, one that has not started."""
    statuses = {}
    first = Progress(["replicate_0", "replicate_2"], 300, lambda status: statuses.update({0: status}))
    second = Progress(["replicate_1"], 200, lambda status: statuses.update({1: status}))
    first.report_accuracy("replicate_0", "level_0", 91.254, 100.0)
    first.start_phase(["replicate_0"], "level_1", 80.0)
    first.start_training(10, 110)
    clock[0] += 60  # the warm-up
    first.step(20)
    clock[0] += 4
    first.step(60)
    return statuses, first, second


def screen(statuses, **console):
    out = io.StringIO()
    return out, Screen(lambda: statuses, "run", Console(file=out, width=140, highlight=False, markup=False, **console))


def test_plain_lines_show_replicate_level_weights_step_rate_and_eta(clock):
    statuses, first, _ = two_ranks(clock)
    out, shown = screen(statuses)
    shown.refresh()
    shown.refresh()
    first.report_accuracy("replicate_0", "level_1", 90.0, 80.0)
    shown.refresh()
    assert out.getvalue().splitlines() == [
        "replicate 0  level 0   100.0 % of weights  test accuracy 91.25 %",
        "replicate 0  level 1    80.0 % of weights  step 60/110  10.0 steps/s  ETA phase 0:00:05, run 0:00:25",
        "replicate 0  level 1    80.0 % of weights  test accuracy 90.00 %",
    ]


def test_plain_lines_show_replicates_that_train_as_one_network_together(clock):
    statuses = {}
    names = [f"replicate_{index}" for index in (8, 9, 10)]
    progress = Progress([*names, "replicate_11"], 400, lambda status: statuses.update({0: status}))
    progress.start_phase(names, "level_0", 100.0)
    progress.start_training(0, 100)
    clock[0] += 60
    progress.step(10)
    clock[0] += 2
    progress.step(30)
    out, shown = screen(statuses)
    shown.refresh()
    for name, accuracy in zip(names, (91.0, 92.0, 93.5), strict=True):
        progress.report_accuracy(name, "level_0", accuracy, 100.0)
    progress.start_phase(names, "level_1", 80.0)
    shown.refresh()
    progress.report_accuracy(names[1], "level_1", 50.0, 80.0)
    shown.refresh()
    assert out.getvalue().splitlines() == [
        "replicates 8 to 10  level 0   100.0 % of weights  step 30/100  10.0 steps/s  ETA phase 0:00:07, run 0:00:10",
        "replicates 8 to 10  level 0   100.0 % of weights  test accuracy 91.00 92.00 93.50 %",
        "replicate 9  level 1    80.0 % of weights  test accuracy 50.00 %",
    ]


def test_the_table_on_a_terminal_has_the_replicates_of_all_ranks(clock):
    statuses, _, second = two_ranks(clock)
    second.set_state("replicate_1", "failed")
    out, shown = screen(statuses, force_terminal=True, color_system=None)
    with shown:
        pass
    lines = [re.sub("[ │┃]+", " ", line).strip() for line in out.getvalue().splitlines()]
    assert "replicate 0 level 1 80.0 % 60/110 10.0 0:00:05 91.3" in lines
    assert "replicate 1 failed" in lines
    assert "replicate 2 waiting" in lines
    assert "ETA of the run 0:00:25" in lines


def test_rows_of_several_arms_name_them_and_are_in_the_order_of_the_files(clock):
    statuses = {}
    progress = Progress([], 0, lambda status: statuses.update({0: status}))
    out, shown = screen(statuses, force_terminal=True, color_system=None)
    shown = Screen(shown.read, "2 arms", shown.console, arms=["b_[red]", "a"])
    progress.begin([("a", "replicate_0"), ("b_[red]", "replicate_10"), ("b_[red]", "replicate_9")], 30)
    for arm in ("a", "b_[red]"):
        progress.arm = arm
        progress.start_phase(["replicate_0"], "level_0")
        progress.report_accuracy("replicate_0", "level_0", 91.0)
        progress.set_state("replicate_0", "done")
    with shown:
        pass
    lines = [re.sub("[ │┃]+", " ", line).strip() for line in out.getvalue().splitlines()]
    rows = [f"b_[red] replicate {end}" for end in ("0 done 91.0", "9 waiting", "10 waiting")]
    assert [line for line in lines if "replicate" in line][-4:] == [*rows, "a replicate 0 done 91.0"]


def test_rows_of_several_arms_that_do_not_fit_are_those_that_train_or_failed(clock):
    statuses = {}
    progress = Progress([], 0, lambda status: statuses.update({0: status}))
    out = io.StringIO()
    console = Console(file=out, width=140, height=24, force_terminal=True, color_system=None)
    progress.begin([(arm, f"replicate_{index}") for arm in "abcd" for index in range(5)], 30)
    progress.arm = "c"
    for index, state in enumerate(("done", "failed", "training")):
        progress.start_phase([f"replicate_{index}"], "level_0")
        progress.start_training(0, 10)
        progress.set_state(f"replicate_{index}", state)
    with Screen(lambda: statuses, "4 arms", console, arms="abcd"):
        pass
    lines = [re.sub("[ │┃]+", " ", line).strip() for line in out.getvalue().splitlines()]
    assert {line[:13] for line in lines if "replicate" in line} == {"c replicate 1", "c replicate 2"}
    assert "not shown: 1 done, 17 waiting" in lines and "ETA of the run ?" in lines


def test_each_part_of_the_work_has_its_rows_and_keeps_messages_and_failures():
    progress = Progress(["replicate_0", "replicate_1"], 10)
    for number in (0, 1):
        progress.start_phase([f"network_{number}"], "scoring")
    progress.set_state("network_1", "done")
    progress.log("warning")
    progress.fail_unfinished(spare=[("", "replicate_1")])
    progress.begin([("", "replicate_1")], 20)
    states = {name: row["state"] for name, row in progress.rows.items()}
    assert states == {"replicate_1": "waiting", "replicate_0": "failed", "network_0": "failed"}
    assert (progress.messages, progress.left) == (["warning"], 20)


def test_a_result_is_printed_although_the_next_part_of_the_work_begins_before_the_next_refresh():
    statuses = {}
    progress = Progress([], 10, lambda status: statuses.update({0: status}))
    out, shown = screen(statuses)
    progress.start_phase(["network_0"], "scoring")
    progress.report_accuracy("network_0", "scoring", 91.0)
    for _ in range(2):
        progress.begin([("", "replicate_0")], 20)
        shown.refresh()
    assert out.getvalue() == "network 0  scoring   100.0 % of weights  test accuracy 91.00 %\n"
    assert [row["name"] for row in statuses[0]["rows"]] == ["replicate_0"]


def test_messages_of_all_ranks_are_printed_once_to_stderr(clock, capsys):
    statuses, first, second = two_ranks(clock)
    second.log("warning: from rank 1")
    first.log("warning: from rank 1")
    _, shown = screen(statuses)
    shown.refresh()
    first.log("from rank [0]")
    shown.refresh()
    assert capsys.readouterr().err == "warning: from rank 1\nfrom rank [0]\n"


def test_a_rank_publishes_at_intervals_and_at_the_end_of_a_phase(clock):
    published = []
    progress = Progress(["replicate_0"], 20, published.append)
    progress.start_phase(["replicate_0"], "level_0", 100.0)
    progress.start_training(0, 20)
    before = len(published)
    for step in range(1, 20):
        clock[0] += 0.1
        progress.step(step)
    assert 2 <= len(published) - before <= 4
    progress.step(20)
    assert published[-1]["rows"][0]["step"] == 20
    assert published[-1]["left"] == 0


def test_the_table_of_results_has_mean_and_standard_deviation_over_finished_replicates(tiny):
    run = RunDirectory(loading.load_config(tiny(), ["replicates=3"]))
    assert results.table(run) == "no level is finished yet"
    for index, accuracies in enumerate([[90.0, 80.0], [92.0]]):
        for level, accuracy in enumerate(accuracies):
            phase = run.replicate(index).level(level)
            phase.write("curve.jsonl", b"")
            measured = {"weights_remaining_percent": 100 * 0.8**level, "test_accuracy_percent": accuracy}
            phase.finish(MEASURED | measured)
    rows = [re.sub(" +", " ", line.strip()) for line in results.table(run).splitlines()[1:]]
    assert rows == ["0 100.0 % 91.00 ± 1.41 % 2", "1 80.0 % 80.00 % 1"]


def rates_of(clock, seconds_per_step, start=0):
    """The rate after each step, of steps that take some seconds each."""
    rates, progress = {}, Progress(["replicate_0"], 1000)
    progress.start_phase(["replicate_0"], "level_0")
    progress.start_training(start, 1000)
    for step, seconds in enumerate(seconds_per_step, start + 1):
        clock[0] += seconds
        progress.step(step)
        rates[step] = progress.rows["replicate_0"]["rate"]
    return rates, progress


def test_the_rate_is_unknown_during_the_warm_up_and_then_does_not_count_it(clock):
    rates, _ = rates_of(clock, [40.0, 2.0, 2.0, 2.0, 2.0, *[0.1] * 100], start=300)
    assert all(rates[step] is None for step in rates if step <= 305)
    known = [rate for step, rate in rates.items() if step > 306 and rate is not None]
    assert known and known == pytest.approx([10.0] * len(known))


def test_the_rate_is_an_average_over_half_a_minute(clock):
    rates, _ = rates_of(clock, [*[0.1] * 305, 3.0, *[0.1] * 20])
    assert rates[306] == pytest.approx(10, rel=0.12), "one slow step hardly changes it"
    rates, _ = rates_of(clock, [*[0.1] * 305, *[0.2] * 160])
    assert rates[max(rates)] == pytest.approx(5, rel=0.01), "a lasting change is shown"


def test_the_rate_of_the_last_phase_is_kept_during_the_warm_up_of_the_next(clock):
    _, progress = rates_of(clock, [0.1] * 100)
    progress.start_phase(["replicate_0"], "level_1")
    assert progress.rows["replicate_0"]["rate"] is None
    progress.start_training(100, 200)
    clock[0] += 40
    progress.step(101)
    assert progress.rows["replicate_0"]["rate"] == pytest.approx(10)


def test_a_rank_without_a_rate_counts_as_the_slowest_of_the_others(clock):
    statuses, _, second = two_ranks(clock)
    second.left = 400
    second.start_phase(["replicate_1"], "level_0")
    second.start_training(0, 110)
    out, shown = screen(statuses, force_terminal=True, color_system=None)
    with shown:
        pass
    assert "ETA of the run 0:00:40" in out.getvalue()


def test_a_step_of_a_block_is_one_of_each_replicate_in_the_steps_left_and_the_eta_of_the_run(clock):
    statuses = {}
    names = [f"replicate_{index}" for index in range(5)]
    progress = Progress(names, 500, lambda status: statuses.update({0: status}))
    progress.start_phase(names[:4], "level_1", [80.0, 80.0, 80.0, 79.94])
    progress.start_training(0, 100)
    clock[0] += 60
    progress.step(10)
    clock[0] += 4
    progress.step(50)
    out, shown = screen(statuses)
    shown.refresh()
    assert out.getvalue().splitlines() == [
        "replicates 0 to 3  level 1    80.0 % of weights  step 50/100  10.0 steps/s  ETA phase 0:00:05, run 0:00:08"
    ]
    assert (statuses[0]["left"], statuses[0]["rate"]) == (300, 40)
    progress.set_state("replicate_2", "failed")
    clock[0] += 5
    progress.step(100)
    assert (statuses[0]["left"], statuses[0]["rate"]) == (150, 30)
    assert [progress.rows[name].get("step") for name in names] == [100, 100, 50, 100, None]
    assert progress.rows["replicate_2"]["state"] == "failed"
    progress.start_phase(names[4:], "level_0")
    progress.start_training(0, 150)
    assert statuses[0]["rate"] == 10, "rows of the phase before do not count"


def test_a_table_without_any_rate_has_no_eta(clock):
    statuses = {}
    progress = Progress(["replicate_0"], 300, lambda status: statuses.update({0: status}))
    progress.start_phase(["replicate_0"], "level_0")
    progress.start_training(0, 110)
    clock[0] += 60
    progress.step(1)
    out, shown = screen(statuses, force_terminal=True, color_system=None)
    with shown:
        pass
    assert "ETA of the run ?" in out.getvalue()
