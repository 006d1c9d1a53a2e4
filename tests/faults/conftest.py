"""Counts the faults that runs were made to meet, and how many of those runs ended with the same bits."""

import shutil
from collections import Counter

import pytest
from faults.runs import SMALL, STACKED, check_mlflow
from forks.client import server
from helpers import TINY


@pytest.fixture(scope="session")
def commands():
    return server()


@pytest.fixture(scope="session")
def reference(commands, tmp_path_factory, empty_store):
    """The folder of a run that never meets a fault."""
    return run_without_fault(commands, tmp_path_factory.mktemp("reference"), empty_store, SMALL)


@pytest.fixture(scope="session")
def stacked_reference(commands, tmp_path_factory, empty_store):
    """The folder of a run that never meets a fault, of two replicates in a stack."""
    return run_without_fault(commands, tmp_path_factory.mktemp("stacked"), empty_store, STACKED)


def run_without_fault(commands, folder, empty_store, settings):
    (folder / "tiny.yaml").write_text(TINY.format(arm="easy"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shutil.copy(empty_store, folder / 'mlflow.db')}")
        patch.chdir(folder)
        status, output = commands.run("recipes.imp", "-f", "tiny.yaml", *settings, folder=folder)
        assert status == 0, output
        check_mlflow()
    return folder


def pytest_terminal_summary(terminalreporter):
    faults, equal = Counter(), Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            for kind, (moment, signal) in report.user_properties:
                if kind == "fault" and report.when == "call":
                    faults[moment, signal] += 1
                    equal[moment] += outcome == "passed"
    if not faults:
        return
    terminalreporter.section("faults")
    terminalreporter.write_line(f"{'':<45} SIGKILL  SIGTERM  same bits")
    for moment in dict.fromkeys(moment for moment, _ in faults):
        kills = [faults[moment, signal] for signal in ("SIGKILL", "SIGTERM")]
        terminalreporter.write_line(f"{moment:<45} {kills[0]:>7}  {kills[1]:>7}  {equal[moment]:>9}")
    kills = [sum(n for (_, kind), n in faults.items() if kind == signal) for signal in ("SIGKILL", "SIGTERM")]
    terminalreporter.write_line(f"{'all':<45} {kills[0]:>7}  {kills[1]:>7}  {sum(equal.values()):>9}")
