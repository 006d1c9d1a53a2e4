import os
import warnings

import pytest
from helpers import TINY
from hypothesis import settings

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
warnings.filterwarnings("ignore")

settings.register_profile("project", deadline=None, max_examples=30)
settings.load_profile("project")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The data cache, shared by the tests of a session; subprocesses inherit it."""
    os.environ["LTH_DIET_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """Each test works in an empty folder, with an MLflow store of its own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")  # MLflow keeps stores open by URI
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny(place):
    """Writes a small configuration (three levels of eight steps on the digits, two networks that score); its path."""

    def write(arm="random", name="tiny.yaml"):
        path = place / name
        path.write_text(TINY.format(arm=arm))
        return path

    return write
