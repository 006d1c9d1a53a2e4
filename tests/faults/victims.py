"""Runs recipes in processes that die at a chosen moment: a server that has imported everything forks one a command.

Reads a JSON object a line, {"recipe", "arguments", "moment", "call", "signal"}; answers each with the exit status
(negative: the signal that ended it) on a line. `moment` is a key of MOMENTS or null; the process ends itself by
`signal` at the `call`-th time that moment comes.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
from pathlib import Path

from composer.utils import checkpoint
from mlflow import MlflowClient

from lth_diet import datasets, imp, launch, loader, phases, runs, scores, scoring, tracking, training  # noqa: F401


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
    "while building the data cache": before(datasets.np, "save"),
    "in a training step": before(loader.Loader, "batch"),
    "in an evaluation": before(loader.EvaluationLoader, "__iter__"),
    "before a file is written": before(phases.os, "fsync"),
    "before a file gets its name": after(phases.os, "fsync"),
    "after a file got its name": after(phases.Path, "replace"),
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


def victim(command):
    os.environ.update(command["environment"])
    os.chdir(command["folder"])
    output = os.open(command["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if command["moment"]:
        MOMENTS[command["moment"]](Fault(command["call"], signal.Signals[command["signal"]]))
    recipe = importlib.import_module(f"recipes.{command['recipe']}")
    return recipe.main(command["arguments"])


def main():
    training.TELL_SECONDS = 0.0
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 70
            with contextlib.suppress(BaseException):
                status = victim(json.loads(line))
            sys.stdout.flush()
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
