"""Starts the project's programs by forking a process that has imported everything (server.py): an import of Composer takes
seconds, which would be most of the time of the tests. The programs run as `__main__` in processes of their own."""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from helpers import ROOT

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MLFLOW_LOGGING_LEVEL": "ERROR", "MLFLOW_DISABLE_TELEMETRY": "true"}
"""What a launch sets before it imports PyTorch and MLflow."""


class Server:
    """The process that forks, where small disks are mounted if this machine allows it.

    Attributes:
        root: Where this process sees those disks.
        refusal: Why there can be none.
    """

    def __init__(self):
        probe = subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True, text=True
        )
        self.refusal = probe.stderr.strip() or "unknown" if probe.returncode else ""
        unshare = [] if self.refusal else ["unshare", "-rm"]
        self.process = subprocess.Popen(
            [*unshare, sys.executable, str(Path(__file__).with_name("server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        )
        self.root = Path(f"/proc/{self.process.pid}/root")
        self._lock = threading.Lock()

    def ask(self, **request):
        with self._lock:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())

    def system(self, *command):
        assert self.ask(run=[str(part) for part in command]) == 0

    def mount(self, folder, size):
        folder.mkdir(exist_ok=True)
        self.system("mount", "-t", "tmpfs", "-o", f"size={size}k", "none", folder)

    def remount(self, folder, options):
        self.system("mount", "-o", f"remount,{options}", folder)

    def run(self, module, *arguments, folder, fault=None):
        """Exit status and output of a module in a folder; for `fault` see faults/moments.py."""
        process = Process(["-m", module, *arguments], folder, fault)
        out, err = process.communicate()
        return process.returncode, err + out

    def end(self):
        self.process.stdin.close()
        self.process.wait()


class Process:
    """A program that runs in a fork; the part of subprocess.Popen that the tests use.

    Args:
        command: A script, or `-m` and a module, with arguments; or `composer -n <ranks>` before a script.
        folder: The working folder.
        fault: See faults/moments.py.
    """

    def __init__(self, command, folder=None, fault=None):
        self.args = [str(part) for part in command]
        self._folder = tempfile.TemporaryDirectory()  # deleted with this object
        self._files = Path(self._folder.name)
        self.returncode = None
        self.pid = server().ask(
            start=self.args,
            environment=dict(os.environ),
            folder=str(folder or Path.cwd()),
            output=[str(self._files / "out"), str(self._files / "err")],
            fault=fault,
        )

    def poll(self):
        if self.returncode is None:
            self.returncode = server().ask(poll=self.pid)
        return self.returncode

    def wait(self, timeout=300):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout=300):
        self.wait(timeout)
        return tuple((self._files / name).read_text(errors="surrogateescape") for name in ("out", "err"))

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


_server = None


def server():
    """The server of this process, started when it is first asked for."""
    global _server
    if _server is None:
        _server = Server()
        atexit.register(_server.end)
    return _server
