"""Runs commands, beside mounts of its own if it is started by `unshare -rm`.

A server that has imported everything forks a process a command. Reads a JSON object a line and answers with an exit
status on a line. {"run": [...]} is a command of the system. {"module", "arguments", "environment", "folder", "output"}
calls the module's main; with "fault", [the end of a path, a folder], the folder's disk is full from the moment on that
such a file is opened to be written; without a folder the process is killed then.
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

from analysis import report  # noqa: F401
from lth_diet import imp, launch, scoring, tracking  # noqa: F401


def fill(folder):
    """Leave no page of a small disk free."""
    with contextlib.suppress(OSError), open(Path(folder) / "ballast", "ab", buffering=0) as file:
        while True:
            file.write(bytes(1024))


def arm(name, folder):
    """Fill a disk just before a file is opened, so that its first bytes find no room, or end this process."""
    full = []

    def hook(event, arguments):
        if event == "open" and not full and re.sub(r"\.part-\w+$", "", str(arguments[0])).endswith(name):
            full.append(True)
            fill(folder) if folder else os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def command(told):
    os.environ.update(told["environment"])
    os.chdir(told["folder"])
    output = os.open(told["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if told["fault"]:
        arm(*told["fault"])
    try:
        return importlib.import_module(told["module"]).main(told["arguments"])
    except Exception:
        traceback.print_exc()
        return 1


def main():
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
