import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import botocore.session
import psutil
import pytest
import yaml
from botocore.validate import ParamValidator
from helpers import ROOT
from jsonschema import ValidationError

from lth_diet.config import loading
from lth_diet.runs.run_store import RunStore
from lth_diet.sweep import scheduler
from lth_diet.sweep.grid import Sweep

LONGER = ["train.steps=400", "intervals.checkpoint=10"]


@pytest.fixture
def launcher(place, monkeypatch):
    """Replace `composer` with a shell script."""

    def write(script):
        (place / "bin").mkdir()
        (place / "bin/composer").write_text(f"#!/bin/sh\n{script}\n")
        (place / "bin/composer").chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(place / "bin/python"))

    return write


def start(*arguments):
    command = [sys.executable, ROOT / "recipes/sweep.py", "-f", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(found, process, seconds=300):
    """Wait until `found` returns something true, and return it."""
    end = time.monotonic() + seconds
    while not (value := found()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def trainers(place):
    """Launchers and ranks that run in a folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(place) and any("recipes/imp.py" in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("exit 0", 0),
        ("exit 75", scheduler.DEVICE_FAULT),
        ("exit 2", 2),
        ("exit 247", -9),
        ("exit 143", -15),
        ("kill -TERM $$", -15),
    ],
)
def test_an_attempt_returns_the_exit_status_or_the_signal_that_killed_the_launcher_or_its_rank(
    launcher, place, script, status
):
    launcher(script)
    assert scheduler._run_attempt(["-n", "1"], str(place), {}, RunStore(place), "log") == status


def test_an_attempt_logs_its_host_its_command_and_all_output(launcher, place):
    launcher('echo "$WORD in $PWD"; echo wrong >&2')
    scheduler._run_attempt(["-n", "1", "a b"], str(place), {"WORD": "here"}, RunStore(place), "log")
    head, *lines, tail = (place / "log").read_text().splitlines()
    assert head.endswith(f": {place}/bin/composer -n 1 'a b'")
    assert lines == [f"here in {place}", "wrong"]
    assert re.fullmatch(r"status 0 after \d+\.\d s", tail)


def test_an_attempt_ignores_variables_of_another_launcher(launcher, place, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    launcher("exit ${WORLD_SIZE:-0}")
    assert scheduler._run_attempt([], str(place), {}, RunStore(place), "log") == 0


def test_a_canceled_attempt_kills_the_launcher_and_its_rank(launcher, place, monkeypatch):
    launcher("sleep 300 & echo $! > pid; wait")

    def cancel(seconds):
        if (place / "pid").exists() and (place / "pid").read_text():
            raise KeyboardInterrupt

    monkeypatch.setattr(scheduler.time, "sleep", cancel)
    with pytest.raises(KeyboardInterrupt):
        scheduler._run_attempt([], str(place), {}, RunStore(place), "log")
    monkeypatch.undo()
    rank = int((place / "pid").read_text())
    while psutil.pid_exists(rank) and psutil.Process(rank).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)


@pytest.mark.parametrize("killed", ["worker", "raylet"])
def test_a_launcher_ends_when_its_worker_or_raylet_is_killed(launcher, place, killed):
    python = sys.executable
    launcher("echo $$ > pid; exec sleep 300")
    code = f"import sys; from lth_diet.sweep import scheduler; sys.executable = {str(place / 'bin/python')!r}\n"
    code += "from pathlib import Path; from lth_diet.runs.run_store import RunStore\n"
    code += f"scheduler._run_attempt([], {str(place)!r}, {{}}, RunStore(Path({str(place)!r})), 'log')"
    path = os.environ | {"PYTHONPATH": str(ROOT)}
    raylet = subprocess.Popen(["sh", "-c", '"$0" -c "$1"; true', python, code], env=path)
    wait_for(lambda: (place / "pid").exists() and (place / "pid").read_text(), raylet)
    launched = psutil.Process(int((place / "pid").read_text()))
    (worker,) = psutil.Process(raylet.pid).children()
    {"worker": worker, "raylet": raylet}[killed].kill()
    launched.wait(30)
    psutil.wait_procs([worker], 30)
    raylet.wait(30)


@pytest.mark.integration
def test_a_local_ray_has_the_cpus_that_this_process_may_use(grid):
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        with scheduler._connected(Sweep(grid()).settings, None):
            import ray

            assert ray.cluster_resources()["CPU"] == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.integration
def test_a_temporary_folder_too_deep_for_rays_sockets_is_an_error_with_its_remedy(grid, place):
    folder = place / ("x" * 100)
    folder.mkdir()
    command = [sys.executable, ROOT / "recipes/sweep.py", "-f", grid()]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TMPDIR": str(folder)})
    assert done.returncode == 2 and done.stderr.splitlines()[-1] == (
        f"error: TMPDIR = '{folder}': too long for the sockets of Ray; set it to a shorter path, such as /tmp"
    )


def test_scores_start_first_with_one_job_per_network_and_then_the_longest(grid):
    work = Sweep(grid(), ["replicates=1", "scores.networks=3"]).work()
    jobs = scheduler.jobs_from(work[::-1], 2)
    assert [job.name.rpartition("/")[2] for job in jobs[:2]] == ["process_0", "process_1"]
    assert jobs[0].work is jobs[1].work is work[0]
    left = [job.work.steps_left for job in jobs[2:]]
    assert left == sorted(left, reverse=True) and left[0] > left[-1]
    assert [job.name for job in scheduler.jobs_from(work[:1], 1)] == [work[0].name]


def test_a_failure_that_another_attempt_would_repeat_is_not_a_crash(jobs, place):
    score, replicate = jobs[0], jobs[1]
    replicate.logs.append(place / "log")
    (place / "log").write_text("error: replicate 0: another process trains it\n")
    assert scheduler._crash(replicate, -9) == "killed by signal 9"
    assert scheduler._crash(replicate, 2) == "" and scheduler._crash(replicate, 0) == ""
    assert scheduler._crash(replicate, 1) == "replicate 0: another process trains it", "there is no failed.json"
    replicate.work.parts[0].folder.record_failure("the loss is nan")
    assert scheduler._crash(replicate, 1) == "" and scheduler._crash(score, 1) == ""


def test_a_block_is_one_job_with_its_replicates_and_the_failure_of_one_of_them_is_final(grid, place):
    overrides = ["replicates=4", "stack=2", "scores.networks=5"]
    work = Sweep(grid(), overrides).work()
    jobs = scheduler.jobs_from(work, 8)
    assert [job.work.recipe for job in jobs].count("score") == 3, "stacks of 2, 2 and 1 networks"
    blocks = [job for job in jobs if job.work.recipe == "imp"]
    names = [job.name.partition("/")[2] for job in blocks]
    assert names == ["replicate_0-1", "replicate_2-3"] * 3
    block = blocks[1]
    assert "replicates=[2,3]" in block.work.arguments
    _, path, *arguments = block.work.arguments
    assert loading.load_config(path, arguments).blocks == ((2, 3),)
    block.logs.append(place / "log")
    (place / "log").write_text("")
    assert scheduler._crash(block, 1) == "exit status 1"
    block.work.parts[1].folder.record_failure("the loss is nan")
    assert scheduler._crash(block, 1) == ""


def test_a_fault_of_the_gpu_is_a_crash_with_its_reason(jobs, place):
    (place / "log").write_text(
        "error: replicate 0: GPU 1 of a failed (CUDA error: x); rerun the same command to resume\n"
    )
    for job in jobs[:2]:
        job.logs.append(place / "log")
        reason = "replicate 0: GPU 1 of a failed (CUDA error: x)"
        assert scheduler._crash(job, scheduler.DEVICE_FAULT) == reason


def test_the_reason_for_a_failure_is_the_last_error_in_its_log(jobs, place):
    jobs[0].logs.append(place / "log")
    (place / "log").write_bytes(b"error: first\nerror: the loss is \x1b[31m nan\nReport: x\n\xff")
    assert scheduler._reason(jobs[0], 1) == "the loss is \\x1b[31m nan"
    (place / "log").write_text("Killed")
    assert scheduler._reason(jobs[0], 3) == "exit status 3"


def test_a_finished_sweep_starts_nothing(grid, capsys):
    sweep = Sweep(grid(), ["prune.levels=0"])
    for run in sweep.runs.values():
        run.create()
        for replicate in run.replicates():
            for phase in (replicate.pretrain, replicate.level(0)):
                phase.write("curve.jsonl", b"")
                phase.finish({})
    assert scheduler.run_sweep(sweep, None, ROOT / "recipes") == 0
    assert "everything is finished" in capsys.readouterr().out
    assert "ray" not in sys.modules or not sys.modules["ray"].is_initialized()


@pytest.mark.integration
def test_an_interrupted_sweep_leaves_no_process_and_is_resumed_by_a_rerun(grid, place):
    path = grid("base: base.yaml\narms: [{arm: init}]\nprune: {levels: 1}\ngpus_per_run: 0\nreplicates: 2\n")
    for number in (signal.SIGINT, signal.SIGTERM):
        process = start(path, "cpus=2", *LONGER)
        wait_for(lambda: len(trainers(place)) == 4 and list(Path("runs").glob("*/*/level_0/curve.jsonl")), process)
        process.send_signal(number)
        out, err = process.communicate(timeout=300)
        assert process.returncode == 130, out + err
        assert err == "interrupted: 0 of 2 are done; rerun the same command to resume\n"
        assert trainers(place) == []
    process = start(path, "cpus=2", *LONGER)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, out + err
    assert "0 running, 2 done, 0 failed, 0 waiting" in out
    assert len(list(Path("runs/sweep-logs").glob("*/replicate_0/attempt_*.log"))) == 3


@pytest.mark.integration
def test_a_crash_is_retried_and_a_failure_is_reported_and_does_not_stop_other_runs(grid, place):
    path = grid(
        "base: base.yaml\narms: [{arm: init, train.lr: [0.1, 1e30]}]\nprune: {levels: 0}\ngpus_per_run: 0\nretries: 1\n"
    )
    process = start(path, "cpus=2")
    for launched in wait_for(lambda: [p for p in trainers(place) if "train.lr=0.1" in p.cmdline()], process):
        launched.kill()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1, out + err
    assert out.count("killed by signal 9; restarts from its last checkpoint; log: ") == 1
    assert "0 running, 1 done, 1 failed, 0 waiting" in out
    assert out.count("the loss is") == 2, "when it happens and at the end"
    assert len(list(Path("runs/sweep-logs").glob("*/*/attempt_*.log"))) == 3


@pytest.mark.integration
def test_a_run_too_large_for_any_node_is_rejected(grid):
    process = start(grid(), "cpus_per_run=1024")
    _, err = process.communicate(timeout=600)
    assert process.returncode == 2
    assert "cpus_per_run: 1024 are more than any node has" in err and "Traceback" not in err


CLUSTERS = sorted((ROOT / "yamls/clusters").glob("*.yaml"))


def image(provider, node_config):
    """The image of a node, after a check of its configuration as far as that is possible without an account."""
    if provider == "aws":
        ec2 = botocore.session.get_session().get_service_model("ec2")
        request = {"MinCount": 1, "MaxCount": 1, **node_config}
        errors = ParamValidator().validate(request, ec2.operation_model("RunInstances").input_shape)
        assert not errors.has_errors(), errors.generate_report()
        return node_config["ImageId"]
    (disk,) = node_config["disks"]
    return disk["initializeParams"]["sourceImage"]


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_a_cluster_file_is_valid_for_ray_up_and_its_nodes_can_install_the_project(path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    text = path.read_text()
    cluster = yaml.safe_load(text)
    prepared = prepare_config(cluster)
    validate_config(prepared)
    with pytest.raises(ValidationError, match="clustername"):
        validate_config(prepare_config({**cluster, "clustername": "x"}))
    nodes = cluster["available_node_types"]
    assert nodes["gpus"]["min_workers"] == cluster["max_workers"]
    assert f"ray up -y yamls/clusters/{path.name}" in (ROOT / "docs/sweeps.md").read_text()
    (name,) = {image(cluster["provider"]["type"], node["node_config"]) for node in nodes.values()}
    head = text[: text.index("cluster_name")]
    if cluster["provider"]["type"] == "aws":  # ids of images differ between regions
        assert name == "ami-of-your-region" and f"# Replace {name} by" in head and "ubuntu-22.04/latest/ami-id" in head
    else:
        assert re.fullmatch(
            r"projects/deeplearning-platform-release/global/images/family/\S+-ubuntu-2204-nvidia-\d+", name
        )
        assert cluster["provider"]["project_id"] is None and "Set your project_id" in head
    for role in ("head", "worker"):
        (packages,) = [each.split() for each in prepared[f"{role}_setup_commands"] if "apt-get" in each]
        assert {"python3-venv", "python3-dev", "gcc", "g++", "make", "git"} <= set(packages)
        assert not [each for each in prepared[f"{role}_setup_commands"] if each.startswith("pip ")]
