import os
import shutil
import warnings

import pytest
from gpus import gpu  # noqa: F401  before what imports torch: it hides the GPUs
from helpers import SWEEP, TINY
from hypothesis import settings
from mlflow import MlflowClient
from seaweed import s3, s3_server  # noqa: F401

from lth_diet.sweep.grid import Sweep
from lth_diet.sweep.screen import Job
from lth_diet.training import callbacks

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
warnings.filterwarnings("ignore")

settings.register_profile("project", deadline=None, max_examples=30)
settings.load_profile("project")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """One data cache for all tests of a session and their subprocesses."""
    os.environ["LTH_DIET_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """An empty MLflow store to copy, because creating one takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch, empty_store):
    """Run each test in an empty working folder with its own MLflow store next to it."""
    store = shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")  # absolute: MLflow keeps stores open by URI
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(autouse=True)
def frequent_checkpoints(monkeypatch):
    """Save a checkpoint at each multiple of the interval; the trainings of tests take less than ten seconds."""
    monkeypatch.setattr(callbacks, "CHECKPOINT_SECONDS", 0.0)


@pytest.fixture
def tiny(place):
    """Write a small configuration (digits, three levels of eight steps, two scoring networks); returns its path."""

    def write(arm="random", name="tiny.yaml"):
        path = place / name
        path.write_text(TINY.format(arm=arm))
        return path

    return write


@pytest.fixture
def grid(place):
    """Write a sweep file based on TINY; returns its path."""

    def write(text=SWEEP, name="grid.yaml"):
        (place / "base.yaml").write_text(TINY.format(arm="all"))
        (place / name).write_text(text)
        return place / name

    return write


@pytest.fixture
def jobs(grid):
    """Jobs of SWEEP: one that computes scores and six runs."""
    work = Sweep(grid()).work()
    assert [each.recipe for each in work] == ["score"] + ["imp"] * 6
    return [Job(each, each.name) for each in work]
