import socket
import time

import pytest
from tracking.runs import create_run, finish

from lth_diet.launch import tracker
from lth_diet.tracking import sync
from lth_diet.training.progress import Progress


@pytest.fixture
def run(tiny):
    """The directory of a small run without training."""
    return create_run(tiny())


def test_an_unreachable_store_gives_one_warning_with_the_reason(run, monkeypatch):
    finish(run.replicate(0).level(0), 0, level=0)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/no/such/place.db")
    progress = Progress(["replicate_0"], 0)
    track = tracker.Tracker(lambda: sync.sync_replicate(run.replicate(0)), run.path.parent, progress)
    track()
    track()
    (message,) = progress.messages
    assert message.startswith(
        "warning: MLflow is not up to date: /proc/no: No such file or directory; training continues"
    )
    assert "lth_diet sync runs" in message


@pytest.fixture
def silent(monkeypatch):
    """A server that accepts connections and never responds; a request times out after a second."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        yield


def test_a_server_that_does_not_respond_costs_little_time_and_is_tried_again_at_the_end(run, silent):
    def attempt():
        tried.append(time.monotonic())
        sync.sync_replicate(run.replicate(0))

    tried, progress = [], Progress(["replicate_0"], 0)
    finish(run.replicate(0).level(0), 0, level=0)
    track = tracker.Tracker(attempt, run.path.parent, progress)
    begin = time.monotonic()
    for _ in range(100):
        track()
    assert len(tried) == 1 and time.monotonic() - begin < 5  # two requests of a second, and MLflow's jitter
    track.finish()
    assert len(tried) == 2 and len(progress.messages) == 1
    track.finish()
    assert len(tried) == 2


def test_updates_resume_after_the_backoff(run):
    def attempt():
        tried.append(True)
        if len(tried) == 1:
            time.sleep(0.01)
            raise ConnectionError

    tried = []
    track = tracker.Tracker(attempt, run.path.parent, Progress(["replicate_0"], 0))
    track()
    track()
    assert len(tried) == 1
    time.sleep(0.02 * tracker.BACKOFF_FACTOR)
    track()
    track.finish()
    assert len(tried) == 2
