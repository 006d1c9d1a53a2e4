"""Forks a process for each program that it is asked to start, after it has imported what they import.

`unshare -rm` gives it its own mounts. Each request and each answer is one line of JSON:

{"run": [...]}          runs a command of the system; its exit status
{"start": [...], "environment", "folder", "output": [out, err], "fault"}
                        starts a program; its process id. For `fault` see faults/moments.py.
{"poll": pid}           exit status of a program (negative: the signal that ended it), or null while it runs
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
import types
import warnings
from pathlib import Path

from composer.cli import launcher
from faults import moments

from analysis import report  # noqa: F401
from lth_diet import files, imp, scoring  # noqa: F401
from lth_diet.launch import command_line, screen  # noqa: F401
from lth_diet.scores import pictures  # noqa: F401
from lth_diet.tracking import sync
from lth_diet.training import callbacks


class Fork:
    """A program in a fork of this process; the part of subprocess.Popen that Composer's launcher uses."""

    def __init__(self, args, stdout=None, stderr=None, text=True):
        self.args, self.stdout, self.stderr, self.returncode = args, stdout, stderr, None
        self.pid = os.fork()
        if not self.pid:
            for stream, number in ((stdout, 1), (stdout if stderr == subprocess.STDOUT else stderr, 2)):
                if stream is not None:
                    os.dup2(stream.fileno(), number)
            end(execute(args[1:]))  # after the interpreter

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout=None):
        begin = time.monotonic()
        while self.poll() is None:
            if timeout is not None and time.monotonic() - begin > timeout:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.wait()


def execute(command):
    """Run a program as `__main__`; its exit status."""
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # that its module has been imported
    try:
        if command[0] == "composer":
            sys.argv = command
            launcher.subprocess = types.SimpleNamespace(**{**vars(subprocess), "Popen": Fork})
            return launcher.main()
        elif command[0] == "-m":
            sys.argv = command[1:]
            sys.path.insert(0, str(Path.cwd()))
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            sys.path.insert(0, str(Path(command[0]).parent))
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def end(status):
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def start(request):
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(request["output"], 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    callbacks.CHECKPOINT_SECONDS = 0.0
    files.LEASE_SECONDS = float(os.environ.get("LEASE_SECONDS", files.LEASE_SECONDS))
    sync._LOCK_TIMEOUT = min(sync._LOCK_TIMEOUT, 5 * files.LEASE_SECONDS)
    if request["fault"]:
        moments.arm(request["fault"])
    end(execute(request["start"]))


def main():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Composer's import has set a handler, which a new process has not
    running = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "run" in request:
            answer = subprocess.run(request["run"], stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode
        elif "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            running.discard(pid)
        else:
            answer = os.fork()
            if not answer:
                start(request)
            running.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
