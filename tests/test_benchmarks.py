"""The benchmarks run on tiny networks and write their measurements."""

import argparse
import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import ROOT

from lth_diet.training import devices

pytestmark = pytest.mark.integration


PEERS = ("composer", "open_lth")


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
    precisions = ["fp32", *(["bf16"] if devices.describe().has_bf16 else [])]
    peers = ("ours, {}", "bare, {}", *(f"{name}, {{}}, {workers} workers" for name in PEERS for workers in (0, 2)))
    assert set(found["milliseconds"]) == {name.format(precision) for name in peers for precision in precisions}
    assert all(len(times) == 2 and min(times) > 0 for times in found["milliseconds"].values())


def test_roofline_counts_a_step_and_compares_it_with_the_limits_of_the_machine(place):
    found = figures(place, "roofline", "--depth", "8", "--batch-size", "8", "--steps", "1", "--repeats", "1")
    assert set(found["limits"]) == {"fp32", *(["bf16"] if devices.describe().has_bf16 else [])}
    limits = found["limits"]["fp32"]
    forward = 9 * (3 * 16 + 2 * 16 * 16) * 32**2 + 9 * (16 * 32 + 32 * 32) * 16**2 + 9 * (32 * 64 + 64 * 64) * 8**2
    forward += 16 * 32 * 16**2 + 32 * 64 * 8**2 + 64 * 10
    to_images = 9 * 3 * 16 * 32**2  # the first layer passes no gradient on
    assert limits["operations"] == 2 * 8 * (3 * forward - to_images)
    assert 0 < limits["fused_bytes"] < sum(limits["bytes"].values())
    assert limits["least_seconds"]["arithmetic"] == limits["operations"] / limits["operations_a_second"]
    assert sum(limits["profile"].values()) == pytest.approx(1)


def test_stacking_measures_every_stack_and_repeat(place):
    small = ("--only", "digits", "--precisions", "fp32", "--stacks", "1", "2", "--warmup", "1", "--steps", "2")
    found = figures(place, "stacking", *small, "--repeats", "2")
    assert [(row["stack"], len(row["all"])) for row in found["rows"]] == [(1, 2), (2, 2)]
    assert all(row["ms_per_replicate"] > 0 and row["mib"] > 100 for row in found["rows"])


def test_parts_of_the_breakdown_add_up_to_the_step(place):
    found = figures(place, "breakdown", "--warmup", "2", "--steps", "20", "--tested", "6000")
    parts = found["milliseconds"]
    assert sum(parts.values()) == pytest.approx(found["step"], rel=0.02)
    arithmetic = parts["forward"] + parts["backward"] + parts["optimizer"]
    assert found["overhead"] == pytest.approx(sum(parts.values()) - arithmetic)
    assert all(parts[part] > 0 for part in ("data", "Algorithms", "callbacks", "Composer's events", "the rest"))
    assert found["evaluation_seconds"] > 0 and found["evaluated_images"] == 6000 > 5120, "more than training images"


def test_start_up_measures_both_launchers_against_the_import_of_composer(place):
    found = figures(place, "start_up", "--repeats", "1")
    for unit in ("seconds", "cpu_seconds"):
        alone, one, two = (found[unit][name][0] for name in ("import composer", "python", "composer -n 2"))
        assert 0 < alone < two and 0 < one < two
    excess = found["medians"]["python"][1] - found["medians"]["import composer"][1]
    assert found["beyond_import"]["python"][1] == pytest.approx(excess)


def test_throughput_measures_every_number_of_replicates(place):
    found = figures(place, "throughput", "--depth", "8", "--warmup", "1", "--steps", "3", "--most", "2")
    assert [row["replicates"] for row in found["rows"]] == [1, 2]
    assert all(row["steps_a_second"] > 0 and row["mebibytes"] > 100 for row in found["rows"])


@pytest.fixture
def throughput(place, monkeypatch):
    """The module, and arguments of its measurement."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    names = {"depth": 8, "device": "cpu", "threads": 1, "warmup": 1, "steps": 1, "compile": False, "timeout": 200}
    return importlib.import_module("throughput"), argparse.Namespace(**names)


def test_a_process_that_is_killed_raises_or_takes_too_long_ends_the_measurement(throughput):
    module, arguments = throughput

    def kill():
        while not (children := multiprocessing.active_children()):
            time.sleep(0.01)
        children[0].kill()

    threading.Thread(target=kill).start()
    with pytest.raises(module.ReplicateError, match=r"^exit status -9, without a message$"):
        module.steps_per_second(arguments, 2)
    arguments.timeout = 0.1
    with pytest.raises(module.ReplicateError, match=r"^no result after 0\.1 s$"):
        module.steps_per_second(arguments, 2)
    arguments.depth, arguments.timeout = 7, 200
    with pytest.raises(module.ReplicateError, match=r"^ValidationError: .*model\.depth"):
        module.steps_per_second(arguments, 2)
    assert not multiprocessing.active_children()


def test_throughput_writes_what_it_measured_before_a_process_failed(throughput, monkeypatch, capsys):
    module, _ = throughput

    def steps_per_second(arguments, count):
        if count == 4:
            raise module.ReplicateError("out of memory")
        return 10.0 * count, 1000.0

    monkeypatch.setattr(module, "steps_per_second", steps_per_second)
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--most", "16", "-o", "figures.json"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit, match=r"^error: one of 4 replicates failed: out of memory$"):
        module.main()
    measured = json.loads(Path("figures.json").read_text())
    assert [row["replicates"] for row in measured["rows"]] == [1, 2]
    assert (
        measured["failure"] == "one of 4 replicates failed: out of memory"
        and "relative to one" in capsys.readouterr().out
    )


def test_a_benchmark_on_a_gpu_that_is_not_there_is_rejected_and_one_on_the_cpu_hides_gpus(place, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    workload = importlib.import_module("workload")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit, match="^error: --device gpu: PyTorch finds no GPU; use --device cpu$"):
        workload.select_device("gpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    workload.select_device("cpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


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
