"""A client of victims.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

from helpers import ROOT

SMALL = ["prune.levels=1", "pretrain.label_noise=0.1", "replicates=1"]


class Commands:
    """Runs commands in processes that fork from one (victims.py), where small disks are mounted if this machine allows it.

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
        self.server = subprocess.Popen(
            [*unshare, sys.executable, str(Path(__file__).with_name("victims.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"},
        )
        self.root = Path(f"/proc/{self.server.pid}/root")

    def _ask(self, **told):
        print(json.dumps(told), file=self.server.stdin, flush=True)
        return int(self.server.stdout.readline())

    def system(self, *command):
        assert self._ask(run=[str(part) for part in command]) == 0

    def mount(self, folder, size):
        folder.mkdir(exist_ok=True)
        self.system("mount", "-t", "tmpfs", "-o", f"size={size}k", "none", folder)

    def remount(self, folder, options):
        self.system("mount", "-o", f"remount,{options}", folder)

    def run(self, module, *arguments, folder, fault=None):
        """Exit status and output of a module's main, called in a folder; for `fault` see victims.py."""
        output = folder.parent / "output.txt"
        environment = {key: os.environ.get(key, "") for key in ("MLFLOW_TRACKING_URI", "LTH_DIET_CACHE")}
        told = {"environment": environment, "folder": str(folder), "output": str(output)}
        status = self._ask(module=module, arguments=[str(argument) for argument in arguments], fault=fault, **told)
        return status, output.read_text()

    def end(self):
        self.server.stdin.close()
        self.server.wait()
