"""Moments at which a process can be made to end or stop itself, and disks that can be made full.

{"moment", "call", "signal"}    the process ends itself the `call`-th time that a moment comes; SIGSTOP stops it
{"moment", "call", "error"}     from the `call`-th time on, the moment raises a RuntimeError with this text
{"host", ...}                   the process takes this for the name of its host
{"opens", "disk"}               when a file whose path ends so is opened, that disk is full from then on; null: SIGKILL
"""

import contextlib
import os
import re
import signal
import socket
import sys
from pathlib import Path

from composer.utils import checkpoint
from mlflow import MlflowClient

from lth_diet import files, imp
from lth_diet.data import catalog, loader
from lth_diet.runs import phase_directory
from lth_diet.training import callbacks, composer_internals


class Fault:
    """Ends this process the `call`-th time it is asked to, or raises an error from then on."""

    def __init__(self, call, number, error=None):
        self.left, self.number, self.error = call, number, error

    def __call__(self):
        self.left -= 1
        if self.error is not None:
            if self.left <= 0:
                raise RuntimeError(self.error)
        elif self.left == 0:
            os.kill(os.getpid(), self.number)
            if self.number != signal.SIGSTOP:
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
    "in a training step": before(composer_internals.LeanTrainer, "_train_batch"),
    "in an evaluation": before(loader.EvaluationLoader, "__iter__"),
    "before a file is written": before(files.os, "fsync"),
    "before a file is renamed into place": after(files.os, "fsync"),
    "after a file is renamed into place": after(files.Path, "replace"),
    "while writing a checkpoint": torn_checkpoint,
    "between a checkpoint and its commit": after(checkpoint, "save_checkpoint"),
    "while pruning": pruning,
    "before a run is created in MLflow": before(MlflowClient, "create_run"),
    "after a run is created in MLflow": after(MlflowClient, "create_run"),
    "before points are logged to MLflow": before(MlflowClient, "log_batch"),
    "after points are logged to MLflow": after(MlflowClient, "log_batch"),
    "before an artifact is logged to MLflow": before(MlflowClient, "log_artifact"),
    "before a run is ended in MLflow": before(MlflowClient, "set_terminated"),
}

STOPS = MOMENTS | {
    "before a row is appended": before(callbacks._Recorder, "_append"),
    "before a checkpoint is written": before(checkpoint, "save_checkpoint"),
    "before a checkpoint is removed": before(phase_directory, "remove"),
    "before a result is written": before(phase_directory, "write_json"),
}
"""Moments before which a process can be stopped: between its last check and its write."""


def fill(disk):
    """Leave no page of a small disk free."""
    with contextlib.suppress(OSError), open(Path(disk) / "ballast", "ab", buffering=0) as file:
        while True:
            file.write(bytes(1024))


def at_opening(name, disk):
    """Fill a disk just before a file is opened, so that its first bytes find no room, or end this process."""
    full = []

    def hook(event, arguments):
        if event == "open" and not full and re.sub(r"\.part-[\w.]+$", "", str(arguments[0])).endswith(name):
            full.append(True)
            fill(disk) if disk else os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    append = callbacks._Recorder._append

    def opened_again(recorder, member, *arguments):
        hook("open", [recorder.block.phases[member].path / "curve.jsonl"])
        append(recorder, member, *arguments)

    callbacks._Recorder._append = opened_again


def arm(fault):
    callbacks.SYNC_SECONDS = 0.0
    if "host" in fault:
        socket.gethostname = lambda: fault["host"]
    if "moment" in fault:
        number = signal.Signals[fault.get("signal", "SIGKILL")]
        STOPS[fault["moment"]](Fault(fault["call"], number, fault.get("error")))
    else:
        at_opening(fault["opens"], fault["disk"])
