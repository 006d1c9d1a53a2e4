"""An S3 server on this machine: SeaweedFS."""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import pytest

WEED = Path(sys.executable).with_name("weed")
KEYS = {"AWS_ACCESS_KEY_ID": "writer", "AWS_SECRET_ACCESS_KEY": "writers-secret"}
READER = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "readers-secret"}


def free_ports(number):
    """Ports that are free, and so are those 10,000 above them, where the server listens too."""
    sockets = []
    while len(sockets) < 2 * number:
        pair = [socket.socket(), socket.socket()]
        try:
            pair[0].bind(("127.0.0.1", 0))
            pair[1].bind(("127.0.0.1", pair[0].getsockname()[1] - 10_000))
            sockets += pair
        except (OSError, OverflowError):
            continue
    ports = [pair.getsockname()[1] for pair in sockets[1::2]]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    """Its endpoint."""
    folder = tmp_path_factory.mktemp("s3")
    identities = [
        {"name": keys["AWS_ACCESS_KEY_ID"], "credentials": [{"accessKey": keys["AWS_ACCESS_KEY_ID"], "secretKey": keys["AWS_SECRET_ACCESS_KEY"]}], "actions": actions}
        for keys, actions in ((KEYS, ["Admin", "Read", "Write", "List"]), (READER, ["Read", "List"]))
    ]  # fmt: skip
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    (folder / "data").mkdir()
    master, volume, filer, port = free_ports(4)
    command = [str(WEED), "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-master.port={master}", f"-volume.port={volume}", "-filer", f"-filer.port={filer}", "-s3"]
    command += [f"-s3.port={port}", f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += ["-volume.max=30", "-master.volumeSizeLimitMB=64"]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder)
    endpoint = f"http://127.0.0.1:{port}"
    try:
        options = {"key": KEYS["AWS_ACCESS_KEY_ID"], "secret": KEYS["AWS_SECRET_ACCESS_KEY"], "endpoint_url": endpoint}
        end = time.monotonic() + 60
        while True:
            try:
                fsspec.filesystem("s3", **options).mkdir("bucket")
                break
            except Exception:
                assert server.poll() is None and time.monotonic() < end, (folder / "log").read_text()
                time.sleep(0.2)
        yield endpoint
    finally:
        server.kill()  # to end by itself takes it half a minute
        server.wait()


@pytest.fixture
def s3(s3_server, monkeypatch, request):
    """A URL of its own for runs, with the environment to reach it."""
    for key, value in {**KEYS, "AWS_ENDPOINT_URL": s3_server, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(key, value)
    return f"s3://bucket/{abs(hash(request.node.nodeid)):x}"
