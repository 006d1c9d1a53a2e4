"""The server of compose.yaml, natively: the same command on a PostgreSQL that pip installed."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import yaml
from helpers import ROOT

USER, PASSWORD = "trainer", "correct-horse-Zq7"
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
VARIABLES = {
    "POSTGRES_PASSWORD": "a-database-Zq7-secret",
    "MLFLOW_TRACKING_USERNAME": USER,
    "MLFLOW_TRACKING_PASSWORD": PASSWORD,
    "MLFLOW_SECRET_KEY": "a-cookie-Zq7-secret",
}


def interpolated(text, variables):
    """What Compose makes of `${NAME:?why}` and `${NAME:-default}`."""

    def value(match):
        name, kind, rest = match.groups()
        assert kind == "-" or name in variables, f"{name}: {rest}"
        return variables.get(name) or rest

    return re.sub(r"\$\{(\w+):([?-])([^}]*)\}", value, text)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Server:
    """The service `mlflow` of compose.yaml, on loopback.

    Args:
        database: URI of the PostgreSQL that stands for the service `postgres`.
        folder: Stands for the service's working folder.
    """

    def __init__(self, database, folder):
        self.folder, self.port, self.log = folder, free_port(), folder / "log"
        service = COMPOSE["services"]["mlflow"]
        self.here = {
            "postgresql+psycopg://mlflow@postgres/mlflow": database,
            "/lth_diet/": f"{folder}/",
            "0.0.0.0": "127.0.0.1",
            "=5000": f"={self.port}",
        }
        (folder / "auth.ini").write_text(self._native(COMPOSE["configs"]["auth"]["content"]))
        self.command = [self._native(argument) for argument in (*service["entrypoint"], *service["command"])]
        own = {name: self._native(value) for name, value in service["environment"].items()}
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")} | own
        self.address = f"http://127.0.0.1:{self.port}"

    def _native(self, text):
        for there, native in self.here.items():
            text = text.replace(there, native)
        return interpolated(text, VARIABLES)

    def start(self):
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *self.command],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds=180):
        """Until it answers."""
        end = time.monotonic() + seconds
        while True:
            try:
                return urllib.request.urlopen(f"{self.address}/health", timeout=5).read()
            except OSError:
                assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-3000:]
                time.sleep(0.2)

    def signal(self, number):
        """To the server and its workers."""
        os.killpg(self.process.pid, number)

    def kill(self):
        """As a machine that loses power."""
        self.signal(signal.SIGKILL)
        self.process.wait(30)
