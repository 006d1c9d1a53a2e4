"""A GPU fails while a run trains: nothing is recorded as failed, and the same command resumes bit-identically."""

import random
import re
from pathlib import Path

import pytest
from faults.moments import MOMENTS
from faults.runs import SMALL, bits, check_mlflow
from forks.client import Process
from helpers import ROOT, run

from lth_diet.program import DEVICE_FAULT

LAUNCH_FAILURE = "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported\n"
ERROR = r"error: (scores|replicate \d): the GPU of \S+ failed \(CUDA error: unspecified launch failure\); "
ERROR += "rerun the same command to resume"
CALLS = {"in a training step": 28, "in an evaluation": 5, "between a checkpoint and its commit": 8, "while pruning": 1}


@pytest.mark.parametrize("moment", [moment for moment in CALLS if moment in MOMENTS])
def test_a_run_whose_gpu_fails_is_not_recorded_as_failed_and_resumes_bit_identically(
    commands, reference, tiny, place, moment
):
    command = ["recipes.imp", "-f", tiny("easy"), *SMALL]
    fault = {"moment": moment, "call": random.Random(moment).randint(1, CALLS[moment]), "error": LAUNCH_FAILURE}
    status, output = commands.run(*command, folder=place, fault=fault)
    assert status == DEVICE_FAULT, output
    assert len(re.findall(f"^{ERROR}$", output, re.M)) == 1 and "Traceback" not in output
    assert not list(Path("runs").rglob("failed.json"))
    status, output = commands.run(*command, folder=place)
    assert status == 0, output
    assert bits("runs") == bits(reference / "runs")
    check_mlflow()


def test_after_a_fault_of_the_gpu_a_process_starts_no_other_replicate(commands, tiny, place):
    command = ["recipes.imp", "-f", tiny("init"), "prune.levels=0", "replicates=2"]
    fault = {"moment": "in a training step", "call": 5, "error": LAUNCH_FAILURE}
    status, output = commands.run(*command, folder=place, fault=fault)
    assert status == DEVICE_FAULT and "replicate 1" not in output
    assert [path.name for path in Path("runs").glob("*/replicate_*")] == ["replicate_0"]


@pytest.mark.integration
@pytest.mark.parametrize("parallelism", ["replicates", "data"])
def test_a_rank_whose_gpu_fails_stops_no_rank_that_trains_alone(tiny, place, parallelism):
    (place / "recipe.py").write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom faults import moments\nfrom recipes import imp\n"
        "from lth_diet.program import run_program\n"
        "fault = {'moment': 'in a training step', 'call': 5, 'error': 'CUDA error: unspecified launch failure'}\n"
        "if os.environ['RANK'] == '1':\n    moments.arm(fault)\nrun_program(imp.main)\n"
    )
    options = ["-f", tiny("init"), "replicates=2", "prune.levels=0", f"parallelism={parallelism}"]
    process = Process(["composer", "-n", 2, place / "recipe.py", *options])
    out, err = process.communicate()
    assert re.search(ERROR, out + err) and "Traceback" not in out + err
    assert not list(Path("runs").rglob("failed.json"))
    if parallelism == "replicates":
        assert process.returncode == DEVICE_FAULT
        assert re.search("^report: .*/runs/tiny.html$", out, re.M), "rank 0 reports what the other ranks have finished"
        (result,) = Path("runs").glob("*/*/level_0/result.json")
        assert result.parents[1].name == "replicate_0"
    else:
        assert process.returncode != 0
    code, out, err = run(*options[1:], ranks=2)
    assert code == 0, out + err
