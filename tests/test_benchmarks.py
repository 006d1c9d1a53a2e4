"""The benchmarks run on tiny networks and write their measurements."""

import json
import subprocess
import sys

import pytest
from helpers import ROOT

pytestmark = pytest.mark.integration


def figures(place, name, *arguments):
    command = [sys.executable, str(ROOT / f"benchmarks/{name}.py"), "-o", "figures.json", *arguments]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((place / "figures.json").read_text())
    assert {"command", "hardware", "cores", "python", "torch", "composer"} <= set(found)
    return found


def test_step_time_measures_every_contender_and_repeat(place):
    small = ("--depth", "8", "--batch-size", "8", "--warmup", "1", "--steps", "2", "--repeats", "2")
    found = figures(place, "step_time", *small)
    assert set(found["milliseconds"]) == {"ours", "composer, 0 workers", "composer, 2 workers", "bare"}
    assert all(len(times) == 2 and min(times) > 0 for times in found["milliseconds"].values())


def test_parts_of_the_breakdown_add_up_to_the_step(place):
    found = figures(place, "breakdown", "--warmup", "2", "--steps", "20")
    parts = found["milliseconds"]
    assert sum(parts.values()) == pytest.approx(found["step"], rel=0.02)
    arithmetic = parts["forward"] + parts["backward"] + parts["optimizer"]
    assert found["overhead"] == pytest.approx(sum(parts.values()) - arithmetic)
    assert all(parts[part] > 0 for part in ("data", "Algorithms", "callbacks", "Composer's events", "the rest"))
    assert found["evaluation_seconds"] > 0


def test_throughput_measures_every_number_of_replicates(place):
    found = figures(place, "throughput", "--depth", "8", "--warmup", "1", "--steps", "3", "--most", "2")
    assert [row["replicates"] for row in found["rows"]] == [1, 2]
    assert all(row["steps_a_second"] > 0 and row["mebibytes"] > 100 for row in found["rows"])


@pytest.mark.faults
def test_scaling_measures_every_level(place):
    found = figures(place, "scaling")
    assert len(found["seconds_a_level"]) == 20
    assert set(found["replicates"]) == {"1", "2", "4"} and set(found["batch"]) == {"10000", "50000", "180000"}


@pytest.mark.faults
def test_scheduling_counts_attempts_and_compares_all_three_sweeps(grid, place):
    path = grid("base: base.yaml\narms: [{arm: init}]\nprune: {levels: 0}\ngpus_per_run: 0\nreplicates: 2\n")
    found = figures(place, "scheduling", "-f", str(path))
    assert len(found["cluster"]["attempts"]) == 2 and found["files"] == 6
    assert all(found[each]["seconds"] > 0 for each in ("serial", "cluster", "killed"))
