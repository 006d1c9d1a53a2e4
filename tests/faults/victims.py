"""Runs commands that may meet a fault; beside mounts of its own, if it is started by `unshare -rm`.

A server that has imported everything forks a process a command. Reads a JSON object a line and answers with the exit
status (negative: the signal that ended it) on a line. {"run": [...]} is a command of the system. {"module", "arguments",
"environment", "folder", "output"} calls the module's main, with "fault" one of

{"moment", "call", "signal"}    the process ends itself the `call`-th time that a moment of MOMENTS comes
{"opens", "disk"}               when a file whose path ends so is opened, that disk is full from then on; null: SIGKILL
"""

import contextlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import traceback
from pathlib import Path

from composer.utils import checkpoint
from mlflow import MlflowClient

from analysis import report  # noqa: F401
from lth_diet import files, imp, scoring  # noqa: F401
from lth_diet.data import catalog, loader
from lth_diet.launch import command_line  # noqa: F401
from lth_diet.tracking import sync  # noqa: F401
from lth_diet.training import callbacks


class Fault:
    """Ends this process the `call`-th time it is asked to."""

    def __init__(self, call, number):
        self.left, self.number = call, number

    def __call__(self):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)
            signal.pause()  # SIGTERM is handled between two instructions


def before(owner, name):
    def patch(fault):
        original = getattr(owner, name)

        def patched(*args, **kwargs):
            fault()
            return original(*args, **kwargs)

        setattr(owner, name, patched)

    return patch


def after(owner, name):
    def patch(fault):
        original = getattr(owner, name)

        def patched(*args, **kwargs):
            result = original(*args, **kwargs)
            fault()
            return result

        setattr(owner, name, patched)

    return patch


def torn_checkpoint(fault):
    original = checkpoint.save_checkpoint

    def patched(state, name):
        original(state, name)
        path = Path(name)
        path.write_bytes(path.read_bytes()[:1000])
        fault()

    checkpoint.save_checkpoint = patched


def pruning(fault):
    original = imp.prune_by_magnitude

    def patched(*args):
        fault()
        return original(*args)

    imp.prune_by_magnitude = patched


MOMENTS = {
    "while building the data cache": before(catalog.np, "save"),
    "in a training step": before(loader.Loader, "batch"),
    "in an evaluation": before(loader.EvaluationLoader, "__iter__"),
    "before a file is written": before(files.os, "fsync"),
    "before a file gets its name": after(files.os, "fsync"),
    "after a file got its name": after(files.Path, "replace"),
    "while writing a checkpoint": torn_checkpoint,
    "between a checkpoint and its commit": after(checkpoint, "save_checkpoint"),
    "while pruning": pruning,
    "before MLflow takes a run": before(MlflowClient, "create_run"),
    "after MLflow took a run": after(MlflowClient, "create_run"),
    "before MLflow takes points": before(MlflowClient, "log_batch"),
    "after MLflow took points": after(MlflowClient, "log_batch"),
    "before MLflow takes an artifact": before(MlflowClient, "log_artifact"),
    "before MLflow ends a run": before(MlflowClient, "set_terminated"),
}


def fill(disk):
    """Leave no page of a small disk free."""
    with contextlib.suppress(OSError), open(Path(disk) / "ballast", "ab", buffering=0) as file:
        while True:
            file.write(bytes(1024))


def at_opening(name, disk):
    """Fill a disk just before a file is opened, so that its first bytes find no room, or end this process."""
    full = []

    def hook(event, arguments):
        if event == "open" and not full and re.sub(r"\.part-\w+$", "", str(arguments[0])).endswith(name):
            full.append(True)
            fill(disk) if disk else os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def arm(fault):
    if "moment" in fault:
        MOMENTS[fault["moment"]](Fault(fault["call"], signal.Signals[fault["signal"]]))
    else:
        at_opening(fault["opens"], fault["disk"])


def command(told):
    os.environ.update(told["environment"])
    os.chdir(told["folder"])
    output = os.open(told["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if told["fault"]:
        arm(told["fault"])
    try:
        return importlib.import_module(told["module"]).main(told["arguments"])
    except BaseException:
        traceback.print_exc()
        return 70


def main():
    callbacks.SYNC_SECONDS = 0.0
    for line in sys.stdin:
        told = json.loads(line)
        if "run" in told:
            status = subprocess.run(told["run"], stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode
        elif child := os.fork():
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        else:
            status = command(told)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(status, flush=True)


if __name__ == "__main__":
    main()
