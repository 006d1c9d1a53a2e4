"""`make gpu-check`: one process per check, results after each; on the CPU what needs no GPU; on a GPU a part of it."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT

GPU_CHECK = ROOT / "benchmarks/gpu_check"
CHECKS = f"""
import os, signal, sys, time
sys.path.insert(0, {str(GPU_CHECK)!r})
import checks
from checks import Skip, check

checks.CHECKS.clear()


@check(limit=60, packages=())
def versions(work):
    "Machine."
    work.record(gpus=0)

@check(limit=60, packages=())
def crash(work):
    "Never reached."
    work.record("this was measured", measured=1)
    os.kill(os.getpid(), signal.SIGSEGV)

@check(limit=1, packages=())
def hang(work):
    "Never reached."
    work.record(measured=2)
    if not os.fork():
        open("child", "w").write(str(os.getpid()))
    time.sleep(600)

@check(limit=60, packages=())
def wrong(work):
    "Never reached."
    work.expect(False, "one is wrong")
    raise ValueError("another is wrong\\nwith details")

@check(limit=60, needs_gpus=2)
def two(work): "Never reached."

@check(limit=60, packages=("no_such_package",))
def absent(work): "Never reached."

@check(limit=60, packages=())
def imports(work):
    "Never reached."
    import no_such_package

@check(limit=60, packages=(), alone=True)
def slow(work):
    "Is slow."
    work.target(1.3, 1.05, "ours / bare")

@check(limit=60, packages=())
def right(work):
    "Everything is right."

if __name__ == "__main__":
    checks.main()
"""


@pytest.fixture
def runner(monkeypatch, place):
    """A function that returns the Runner of a file of checks, which writes to `place/out`."""
    for name in ("checks", "gpu_check_runner", "fake_checks"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(GPU_CHECK))

    def load(path, name):
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    def make(budget=100.0, text=CHECKS):
        program = load(GPU_CHECK / "__main__.py", "gpu_check_runner")
        program._LEAST_SECONDS, program._PATIENCE_ON_CPU = 0.5, 1
        script = place / "fake_checks.py"
        script.write_text(text)
        registry = load(script, "fake_checks").checks.CHECKS
        return program.Runner(registry, script, place / "out", budget, jobs=2)

    yield make
    for name in ("checks", "gpu_check_runner", "fake_checks"):
        sys.modules.pop(name, None)


def results(folder):
    return json.loads((folder / "gpu_check.json").read_text())["checks"]


def test_no_check_takes_another_with_it_and_the_results_say_why_each_ended(runner, place, capfd):
    assert runner().run() == 1
    found = results(place / "out")
    ends = {name: (result["status"], result["note"].partition("; see ")[0]) for name, result in found.items()}
    assert ends == {
        "versions": ("passed", ""),
        "crash": ("failed", f"its process ended with signal {signal.SIGSEGV.value}"),
        "hang": ("failed", "not finished within 1 s"),
        "wrong": ("failed", "one is wrong; another is wrong"),
        "two": ("skipped", "needs 2 GPUs, here: 0"),
        "absent": ("skipped", "the package no_such_package is not installed"),
        "imports": ("skipped", "the package no_such_package is not installed"),
        "slow": ("target missed", "ours / bare 1.3, target at most 1.05"),
        "right": ("passed", ""),
    }
    assert found["crash"]["findings"] == {"measured": 1} and found["hang"]["findings"] == {"measured": 2}
    assert "with details" in (place / "out/wrong.log").read_text()
    table = (place / "out/gpu_check.txt").read_text()
    assert "right     passed" in table and "Everything is right" in table and "  two: needs 2 GPUs, here: 0" in table
    assert table in capfd.readouterr().out + "\n"
    child = int(Path("child").read_text())
    assert not Path(f"/proc/{child}").exists() or "State:\tZ" in Path(f"/proc/{child}/status").read_text()


def test_results_are_complete_after_each_check_also_if_it_is_interrupted(runner, place):
    text = CHECKS.replace("limit=1,", "limit=500,")
    seen = []
    run = runner(text=text)
    original = run._write

    def write():
        original()
        seen.append({name: result["status"] for name, result in results(place / "out").items()})
        if seen[-1]["crash"] == "failed":
            raise KeyboardInterrupt

    run._write = write
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert time.monotonic() - began < 60
    run._write = original
    run.write()
    found = results(place / "out")
    assert seen[0]["versions"] == "passed" and seen[0]["right"] == "not run"
    assert found["crash"]["status"] == "failed" and found["slow"]["status"] == "not run"


def test_a_budget_that_is_spent_skips_the_rest(runner, place):
    assert runner(budget=0.1).run() == 1
    assert {each["status"] for each in results(place / "out").values()} == {"skipped"}
    assert results(place / "out")["versions"]["note"] == "no time is left of the 0.1 s of --budget"


def test_it_starts_where_nothing_but_python_is_installed(place):
    """Such as by a mistake in PYTHON: every check is listed with the reason."""
    command = [sys.executable, "-S", str(GPU_CHECK), "--out", "out"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    found = results(place / "out")
    assert done.returncode == 1
    assert found["versions"]["note"] == "the package torch is not installed"
    assert {each["note"] for name, each in found.items() if name != "versions"} == {"versions did not pass"}


def test_make_gpu_check_uses_the_given_python_without_installing_anything(place):
    command = [
        "make",
        "--no-print-directory",
        "-n",
        "-f",
        str(ROOT / "Makefile"),
        "gpu-check",
        "PYTHON=python3",
        "OPTIONS=--only steps",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "python3 benchmarks/gpu_check --only steps\n"


def test_tests_see_no_gpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


@pytest.mark.gpu
def test_runs_on_this_gpu_are_on_the_right_device_and_repeat_bit_for_bit(gpu, place):
    checks = ("devices", "cpu", "steps", "deterministic", "resume", "rejections")
    command = [sys.executable, str(GPU_CHECK), "--device", "gpu", "--out", "out", "--only", *checks]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def run(*only, device="cpu"):
    """Results of some checks, or of all, with small networks."""
    options = ["--device", device, "--small", "--out", "out", "--budget", "3000", "--patience", "3"]
    command = [sys.executable, str(GPU_CHECK), *options, *(["--only", *only] if only else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert [path.name for path in Path("out").glob("work-*")] == [], "only failed checks leave files"
    return {name: result["status"] for name, result in results(Path("out")).items()}


@pytest.mark.integration
def test_checks_of_the_device_and_of_waits_run_on_the_cpu(place):
    names = ("cpu", "steps", "rejections")
    passed = dict.fromkeys(("versions", *names), "passed")
    assert run(*names) == passed | {"rejections": "skipped"}


@pytest.mark.faults
def test_all_checks_that_need_no_gpu_run_on_the_cpu(place):
    ended = run()
    skipped = {"rejections", "gpu_fault", "throughput_mps", "out_of_memory", "neighbor"}
    assert {name for name in ended if ended[name] == "skipped"} == skipped
    assert set(ended.values()) == {"passed", "skipped"}


@pytest.mark.faults
def test_checks_for_gpus_run_on_the_meta_device(place, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("FAKE_GPUS", "2")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'tests/fake_gpu'}:{ROOT / 'tests'}")
    names = ("devices", "cpu", "rejections", "steps", "deterministic", "memory")
    assert run(*names, device="gpu") == dict.fromkeys(("versions", *names), "passed")
    assert results(place / "out")["devices"]["findings"]["devices, bf16"] == [0, 1]
