"""A run that an earlier commit started and that was killed in the middle of a phase resumes with the same bits.

killed_run/         two replicates of the random arm, started by commit 1b81b29 with a checkpoint every five steps:
                    replicate 0 was killed at step 35 of level 1 (steps 20 to 40), replicate 1 at step 15 of pre-training
yamls/              the settings of the digits until commit b5f4356
finished_run.json   run id, and the sha256 of every file of the same run, not killed, on the CPU and version of torch that it names
"""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from lth_diet.config import loading
from lth_diet.config.run_ids import run_id, run_name, scores_id
from lth_diet.imp import IMP
from lth_diet.masks.mask import Mask
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.training.progress import Progress

STORED = Path(__file__).parent / "killed_run"
CONFIGURATIONS = Path(__file__).parent / "yamls"
FINISHED = json.loads((Path(__file__).parent / "finished_run.json").read_text())
SETTINGS = [
    "model.width=2",
    "prune.levels=2",
    "train.steps=40",
    "train.milestones=[30]",
    "pretrain.steps=20",
    "pretrain.subset.size=256",
    "intervals.checkpoint=5",
    "intervals.log=5",
    "threads=1",
    "experiment=stored",
    "replicates=[0,1]",
]
REPLICATES = {"replicate_0": "level_1", "replicate_1": "pretrain"}


@pytest.fixture
def run(place):
    shutil.copytree(STORED, "runs")
    return RunDirectory(loading.load_config(CONFIGURATIONS / "digits_random.yaml", SETTINGS))


def cpu():
    """Name and features of this machine's CPU, on which the last bits of a weight depend."""
    keys = ("model name", "cpu family", "model", "stepping", "flags")
    lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    text = "\n".join(line for line in lines if line.partition(":")[0].strip() in keys)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def steps(path):
    return {row["step"]: row["timestamp"] for row in map(json.loads, path.read_text().splitlines())}


# Results of these configurations were reported: the files keep their ids.
IDS = {
    "digits_all": "digits_all-ccc3a7902e",
    "digits_all_half": "digits_all-77cd5ea0aa",
    "digits_easy": "digits_easy-8a730df21f",
    "digits_hard": "digits_hard-4ac852293e",
    "digits_init": "digits_init-3bab17aadb",
    "digits_noise10_all": "digits_all-94b3ea8ff9",
    "digits_noise10_all_half": "digits_all-69c62f3487",
    "digits_noise10_easy": "digits_easy-6f34aaf50e",
    "digits_noise10_random": "digits_random-3e607f8bbc",
    "digits_noise50_all": "digits_all-7ee1f607d3",
    "digits_noise50_all_half": "digits_all-1ab47b0ed0",
    "digits_noise50_easy": "digits_easy-885da835a8",
    "digits_noise50_random": "digits_random-883de58a82",
    "digits_random": "digits_random-d70d781e75",
}


def test_the_ids_of_earlier_configurations_stay():
    configs = {path.stem: loading.load_config(path) for path in CONFIGURATIONS.glob("*.yaml")}
    assert {name: run_name(config) for name, config in configs.items()} == IDS
    assert scores_id(configs["digits_easy"]) == "ddc3e3c142"


def test_the_run_id_of_a_configuration_stays(run):
    assert run_id(run.config) == FINISHED["run_id"]
    assert run.path.exists()


@pytest.mark.parametrize(("name", "killed"), REPLICATES.items())
def test_a_run_killed_before_an_upgrade_resumes_with_the_same_bits(run, name, killed):
    run.create()
    (replicate,) = [replicate for replicate in run.replicates() if replicate.name == name]
    _, step = replicate.phases()[-1].checkpoint()
    before = steps(replicate.path / killed / "curve.jsonl")
    untouched = {path: path.stat().st_mtime_ns for path in replicate.path.glob("*/result.json")}
    torch.set_num_threads(1)
    with replicate.lock():
        IMP(run.config, [replicate], Progress([name], 0), lambda: None).run()
    after = steps(replicate.path / killed / "curve.jsonl")
    assert {s: time for s, time in before.items() if s <= step} == {s: after[s] for s in before if s <= step}
    assert all(path.stat().st_mtime_ns == time for path, time in untouched.items())
    same_machine = (cpu(), torch.__version__) == (FINISHED["cpu"], FINISHED["torch"])
    expected = {path: digest for path, digest in FINISHED["files"].items() if path.startswith(name)}
    assert len(expected) == 8
    for path, digest in expected.items():
        if same_machine or not path.endswith("weights.safetensors"):  # weights depend on the CPU in their last bits
            assert hashlib.sha256((run.path / path).read_bytes()).hexdigest() == digest, path
    assert (
        Mask.load(replicate.level(2).path / "mask.safetensors").remaining
        < Mask.load(replicate.level(1).path / "mask.safetensors").remaining
    )
