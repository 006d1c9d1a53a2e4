"""Ranks of a launch, and how they report invalid input under the launcher."""

import datetime
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time

import pytest
import torch
from helpers import COMPOSER, ROOT, check_launcher_output
from torch.distributed import DistError

from lth_diet.errors import UserError
from lth_diet.launch.processes import LAUNCHER_VARIABLES, ProcessInfo
from lth_diet.launch.status_board import StatusBoard
from lth_diet.training import devices


@pytest.mark.parametrize(
    ("size", "shares"), [(1, [[0, 1, 2, 3, 4]]), (2, [[0, 2, 4], [1, 3]]), (4, [[0, 4], [1], [2], [3]])]
)
def test_replicates_are_sharded_over_ranks(size, shares):
    ranks = [ProcessInfo(rank, size, rank, "127.0.0.1", 0) for rank in range(size)]
    assert [rank.shard(range(5)) for rank in ranks] == shares


def test_a_detached_rank_is_a_single_process_world(monkeypatch):
    for key in LAUNCHER_VARIABLES:
        monkeypatch.setenv(key, "3")
    for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(key, "4")
    ProcessInfo.from_environment().detach()
    values = {
        key: os.environ.get(key) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    }
    assert values == {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": None}


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_never_start_are_reported_with_the_variables_that_announce_them(rank):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.raises(
        UserError, match=f"WORLD_SIZE=2, .* and MASTER_PORT={port} .*: the 2 ranks have not all started"
    ):
        StatusBoard(ProcessInfo(rank, 2, rank, "127.0.0.1", port), datetime.timedelta(seconds=1))


def test_a_port_in_use_is_named_as_the_reason():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"MASTER_PORT={port} in the environment: .*(EADDRINUSE|in use)"):
            StatusBoard(ProcessInfo(0, 2, 0, "127.0.0.1", port), datetime.timedelta(seconds=1))


def start_ranks(number, run):
    """Start ranks that call `run` with their number and a port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run, args=(rank, port)) for rank in range(number)]
    for rank in ranks:
        rank.start()
    return ranks


def test_a_status_of_any_length_reaches_rank_0():
    def publish(rank, port):
        board = StatusBoard(ProcessInfo(rank, 2, rank, "127.0.0.1", port))
        for length in range(10_000 if rank else 0):
            board.publish("x" * length)
            assert board.store.check(["status_1"])  # waits until the server has read the status
        board.wait_for_others()
        complete = rank == 1 or board.read() == {1: "x" * 9_999}
        board.barrier()
        os._exit(0 if complete else 1)

    ranks = start_ranks(2, publish)
    ranks[1].join(60)
    ranks[0].kill() if ranks[1].exitcode else ranks[0].join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]


def test_a_rank_that_loses_rank_0_reports_it_once_and_leaves():
    def run(rank, port):
        board = StatusBoard(ProcessInfo(rank, 2, rank, "127.0.0.1", port))
        if rank:
            with pytest.raises(DistError):
                while True:
                    board.publish("status")
                    time.sleep(0.01)
            board.publish("failed")
            board.barrier()
        os._exit(0)

    ranks = start_ranks(2, run)
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]


def test_a_rank_that_fails_at_the_end_leaves_the_others_their_status(monkeypatch):
    sleep = time.sleep

    def finish(rank, port):
        monkeypatch.setattr(time, "sleep", lambda seconds: sleep(seconds if rank == 1 else 1))
        board = StatusBoard(ProcessInfo(rank, 3, rank, "127.0.0.1", port))
        board.barrier()
        os._exit(75 if rank == 1 else 0)

    ranks = start_ranks(3, finish)
    ranks[1].join(60)
    for rank in ranks:
        rank.terminate()  # as the launcher does as soon as one rank has failed
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 75, 0]


@pytest.fixture
def launch(tiny, place):
    """Runs imp.py on two ranks with overrides, after some code; returns the exit status and all output."""

    def run(code, *overrides):
        (place / "recipe.py").write_text(
            f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\nfrom recipes import imp\n"
            f"arguments, rank = sys.argv[1:], os.environ['RANK']\n{code}\nsys.exit(imp.main(arguments))\n"
        )
        command = [COMPOSER, "-n", "2", "recipe.py", "-f", str(tiny()), "replicates=2", *overrides]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
        return done.returncode, done.stdout

    return run


@pytest.mark.parametrize("slow", ["0", "1"])
def test_invalid_input_of_all_ranks_is_reported_once_whichever_rank_is_slow(launch, slow):
    code, output = launch(f"time.sleep(3 * (rank == '{slow}'))", "train.lr=fast")
    assert code != 0
    check_launcher_output(output, "train.lr = 'fast' on the command line: must be a number")


def test_invalid_input_of_a_later_rank_alone_is_reported(launch):
    code, output = launch("arguments += ['train.lr=fast'] * (rank == '1')")
    assert code != 0
    assert output.count("error: train.lr = 'fast' on the command line: must be a number") == 1
    assert "Traceback" not in output


def test_invalid_input_without_a_launcher_is_the_last_line(tiny):
    command = [sys.executable, ROOT / "recipes/imp.py", "-f", str(tiny()), "train.lr=fast"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 2
    assert re.fullmatch("error: train.lr = 'fast' on the command line: must be a number.*\n", done.stdout)


def test_ranks_of_a_launch_share_its_name_and_single_processes_do_not():
    ranks = [ProcessInfo(rank, 2, rank, "127.0.0.1", 1234) for rank in (0, 1)]
    assert ranks[0].launch == ranks[1].launch != ProcessInfo(0, 2, 0, "127.0.0.1", 1235).launch
    assert ProcessInfo(0, 1, 0, "127.0.0.1", 0).launch != ProcessInfo(0, 1, 0, "127.0.0.1", 0).launch


def test_a_process_group_on_a_gpu_is_bound_to_the_gpu_of_this_process(monkeypatch):
    started = []
    monkeypatch.setattr(devices, "torch_device", lambda: torch.device("cuda", 3))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **options: started.append((backend, options))
    )
    ProcessInfo(3, 4, 3, "127.0.0.1", 1234).init_process_group(rank=3)
    assert started == [("nccl", {"device_id": torch.device("cuda", 3), "rank": 3})]
