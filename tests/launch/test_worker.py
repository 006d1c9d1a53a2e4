"""What a rank does when its training raises an error."""

import json

import pytest
import torch

from lth_diet.config import loading
from lth_diet.launch.arms import open_arms, tasks_of
from lth_diet.launch.processes import ProcessInfo
from lth_diet.launch.status_board import StatusBoard
from lth_diet.launch.worker import compute_scores, train_replicates
from lth_diet.program import DEVICE_FAULT
from lth_diet.training import trainer
from lth_diet.training.progress import Progress

PROCESS = ProcessInfo(0, 1, 0, "127.0.0.1", 0)
GIB = 2**30


@pytest.fixture
def train(tiny, monkeypatch):
    """Runs the work of a rank whose training raises an error: scores for two replicates, or the replicates."""

    left = []

    def run(error, what="replicates"):
        def fail(*arguments):
            left.append(progress.left)
            raise error

        file = loading.load(tiny("easy"), ["replicates=2"] + ["arm=all"] * (what == "replicates"))
        (arm,), board = open_arms([file], PROCESS), StatusBoard(PROCESS)
        arm.run.create()
        monkeypatch.setattr(trainer, "train", fail)
        tasks, progress = tasks_of([arm]), Progress([], 0, board.publish)
        if what == "scores":
            arm.scores.create()
            status = compute_scores(arm.scores, PROCESS, progress, tasks)
        else:
            status = train_replicates(tasks, PROCESS, progress)
        files = [each.path / "failed.json" for task in tasks for each in task.replicates]
        reasons = [json.loads(file.read_text())["reason"] for file in files if file.exists()]
        return status, reasons, board.read()[0]["messages"]

    run.left = left
    return run


@pytest.mark.parametrize("what", ["replicates", "scores"])
def test_a_fault_of_the_gpu_is_not_recorded_and_ends_the_work_of_the_process(train, what):
    status, reasons, messages = train(RuntimeError("CUDA error: uncorrectable ECC error encountered\nmore"), what)
    assert (status, reasons, len(messages)) == (DEVICE_FAULT, [], 1)
    assert messages[0].endswith(
        "failed (CUDA error: uncorrectable ECC error encountered); rerun the same command to resume"
    )


@pytest.mark.parametrize("what", ["replicates", "scores"])
@pytest.mark.parametrize("others", [1, 40])
def test_out_of_memory_is_final_unless_other_processes_use_the_gpu(train, monkeypatch, what, others):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: (80 - others) * GIB)
    status, reasons, messages = train(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), what)
    if others == 1:
        assert status == 1 and len(reasons) == 2 and len(messages) == (2 if what == "replicates" else 1)
        assert all("reduce train.batch_size or model.width" in text for text in reasons + messages)
    else:
        assert (status, reasons, len(messages)) == (DEVICE_FAULT, [], 1)
        assert "start fewer processes per GPU" in messages[0] and messages[0].endswith(
            "; rerun the same command to resume"
        )


def test_an_error_of_the_code_is_recorded_for_each_replicate_with_its_traceback(train):
    status, reasons, messages = train(RuntimeError("shapes cannot be multiplied"))
    assert (status, reasons) == (1, ["RuntimeError: shapes cannot be multiplied"] * 2)
    assert all("Traceback" in message for message in messages)


def test_the_steps_left_are_those_of_the_replicates_that_are_not_yet_trained(train):
    train(RuntimeError("shapes cannot be multiplied"))
    first, second = train.left
    assert first == 2 * second > 0
