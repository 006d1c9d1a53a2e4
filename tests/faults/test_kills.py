"""A run that is killed at any moment and resumed is bit-identical to one that was never killed."""

import os
import random
from collections import Counter
from pathlib import Path

import pytest
from faults.moments import MOMENTS
from faults.runs import SMALL, STACKED, bits, check_mlflow

KILLS = int(os.environ.get("KILLS", 5))  # a sample of the moments; `make faults` runs all of them, many times
CALLS = {"training step": 28, "a file": 20, "MLflow": 7, "pruning": 1}  # latest call of a moment that kills


def plan(seed):
    """Every third moment, then those between; which call of a moment kills, and by which signal, is random."""
    draw = random.Random(seed)
    for number in range(KILLS):
        moment = sorted(MOMENTS, key=lambda moment: list(MOMENTS).index(moment) % 3)[number % len(MOMENTS)]
        calls = next((most for words, most in CALLS.items() if words in moment), 3)
        yield number, moment, draw.randint(1, calls), draw.choice(["SIGKILL", "SIGKILL", "SIGTERM"])


@pytest.mark.parametrize(("number", "moment", "call", "signal"), plan(7))
def test_a_killed_run_resumes_bit_identically(
    commands, reference, tiny, place, monkeypatch, record_property, number, moment, call, signal
):
    record_property("fault", (moment, signal))
    kill_and_resume(
        ["recipes.imp", "-f", tiny("easy"), *SMALL], commands, reference, place, monkeypatch, moment, call, signal
    )


@pytest.mark.parametrize(("number", "moment", "call", "signal"), plan(11))
def test_a_killed_stack_resumes_bit_identically(
    commands, stacked_reference, tiny, place, monkeypatch, record_property, number, moment, call, signal
):
    record_property("fault", (moment, signal))
    kill_and_resume(
        ["recipes.imp", "-f", tiny("easy"), *STACKED],
        commands,
        stacked_reference,
        place,
        monkeypatch,
        moment,
        call,
        signal,
    )


def kill_and_resume(command, commands, reference, place, monkeypatch, moment, call, signal):
    if moment == "while building the data cache":
        monkeypatch.setenv("LTH_DIET_CACHE", str(place / "cache"))
    status, _ = commands.run(*command, folder=place, fault={"moment": moment, "call": call, "signal": signal})
    assert status != 0, "the moment never came"
    status, output = commands.run(*command, folder=place)
    assert status == 0, output
    assert bits("runs") == bits(reference / "runs")
    check_mlflow()
    assert not list(Path("runs").rglob("*.part-*")) and not list(Path("runs").rglob("checkpoint*"))


def test_a_run_killed_six_times_resumes_bit_identically(commands, reference, tiny, place):
    command, draw, statuses = ["recipes.imp", "-f", tiny("easy"), *SMALL], random.Random(3), Counter()
    for _ in range(6):
        fault = {"moment": "in a training step", "call": draw.randint(1, 9), "signal": "SIGKILL"}
        status, _ = commands.run(*command, folder=place, fault=fault)
        statuses[status] += 1
    assert statuses[-9] > 3
    status, output = commands.run(*command, folder=place)
    assert status == 0, output
    assert bits("runs") == bits(reference / "runs")
    check_mlflow()
