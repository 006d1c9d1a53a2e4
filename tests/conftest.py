import os
import shutil
import warnings

import pytest
from helpers import SWEEP, TINY
from hypothesis import settings
from mlflow import MlflowClient
from seaweed import s3, s3_server  # noqa: F401

from lth_diet.sweep.grid import Sweep
from lth_diet.sweep.screen import Job

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
warnings.filterwarnings("ignore")

settings.register_profile("project", deadline=None, max_examples=30)
settings.load_profile("project")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The data cache, shared by the tests of a session; subprocesses inherit it."""
    os.environ["LTH_DIET_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """An MLflow store without experiments: to copy one takes no time, to make one takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch, empty_store):
    """Each test works in an empty folder, with an MLflow store of its own beside it."""
    store = shutil.copy(empty_store, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")  # absolute: MLflow keeps stores open by URI
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def tiny(place):
    """Writes a small configuration (three levels of eight steps on the digits, two networks that score); its path."""

    def write(arm="random", name="tiny.yaml"):
        path = place / name
        path.write_text(TINY.format(arm=arm))
        return path

    return write


@pytest.fixture
def grid(place):
    """Writes a sweep file over TINY; its path."""

    def write(text=SWEEP, name="grid.yaml"):
        (place / "base.yaml").write_text(TINY.format(arm="all"))
        (place / name).write_text(text)
        return place / name

    return write


@pytest.fixture
def jobs(grid):
    """Of SWEEP: one that makes scores, and six runs."""
    work = Sweep(grid()).work()
    assert [each.recipe for each in work] == ["score"] + ["imp"] * 6
    return [Job(each, each.name) for each in work]
