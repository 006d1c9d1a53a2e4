import re

from lth_diet import config, display
from lth_diet.runs import Run


def test_progress_tells_replicate_level_weights_step_rate_and_time_left(capsys, monkeypatch):
    clock = iter([0.0, 0.0, 2.0, 6.0, 10.0])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(clock))
    progress = display.Progress(steps=100, every=5.0)
    progress.begin(2, "level_3", 51.2)
    progress.step_from(0, 50)
    progress.step(10)  # too early for a line
    progress.step(30)
    progress.step(50)
    progress.end(91.25)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "replicate 2  level 3    51.2 % of weights  step 30/50     5.0 steps/s  ETA 0:00:14",
        "replicate 2  level 3    51.2 % of weights  step 50/50     5.0 steps/s  ETA 0:00:10",
        "replicate 2  level 3    51.2 % of weights  test accuracy 91.25 %",
    ]


def test_the_table_has_mean_and_standard_deviation_over_the_replicates_so_far(tiny):
    run = Run(config.load(tiny(), ["replicates=3"]))
    assert display.table(run) == "no level is done yet"
    for index, accuracies in enumerate([[90.0, 80.0], [92.0]]):
        for level, accuracy in enumerate(accuracies):
            phase = run.replicate(index).level(level)
            phase.write("curve.jsonl", b"")
            phase.finish({"weights_remaining_percent": 100 * 0.8**level, "test_accuracy_percent": accuracy})
    rows = [re.sub(" +", " ", line.strip()) for line in display.table(run).splitlines()[1:]]
    assert rows == ["0 100.0 % 91.00 ± 1.41 % 2", "1 80.0 % 80.00 % 1"]
