"""Whole runs on the meta device, which stands for a GPU: no waits, no mixtures of devices, few launches."""

import json
from pathlib import Path

import numpy as np
import pytest
from forks.client import Process
from helpers import ROOT, TINY
from metagpu import META, meta_gpu

from lth_diet.config import loading
from lth_diet.data.dataset import Dataset, Split
from lth_diet.data.loader import EvaluationLoader, Loader, StackedLoader
from lth_diet.imp import IMP
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.scoring import Scoring
from lth_diet.training.progress import Progress

ROWS = ["intervals.log=4", "intervals.checkpoint=100", "intervals.evaluate=0", "train.steps=12", "prune.levels=1"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory, cache):
    """What the GPU was asked to do by scores, pre-training and two levels of the easy arm, with label noise."""
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "tiny.yaml").write_text(TINY.format(arm="easy"))
    overrides = [*ROWS, "pretrain.label_noise=0.1", f"runs={folder}/runs"]
    config = loading.load_config(folder / "tiny.yaml", overrides)
    run = RunDirectory(config)
    run.create()
    with meta_gpu() as gpu:
        scoring = Scoring(config, Progress([], 0), lambda: None, range(config.scores.networks))
        scoring.folder.create()
        scoring.run()
        IMP(config, [run.replicate(0)], Progress(["replicate_0"], 0), lambda: None).run()
    return gpu


def test_no_operator_mixes_tensors_of_host_and_gpu(ran):
    assert ran.trainings == 5 and ran.mixtures == []


def test_the_host_reads_nothing_from_the_gpu_between_two_rows_of_the_curve(ran):
    def waits(step):
        return [read for read in ran.reads if read.step == step] + [
            copy for copy in ran.copies if copy.step == step and copy.blocking
        ]

    quiet = {step for _, step in ran.ops if step is not None and step not in (3, 5, 7, 11)}
    assert quiet == {0, 1, 2, 4, 6, 8, 9, 10}
    assert [event for step in quiet for event in waits(step)] == []
    assert [read.op for read in ran.reads if read.step == 7] == []  # one row: the losses of four steps in one copy
    assert [(copy.source, copy.shape) for copy in waits(7)] == [("meta", (4, 1))] * 2


def test_each_batch_is_one_copy_from_pinned_memory_that_does_not_wait(ran):
    for step in (6, 9):
        copies = [copy for copy in ran.copies if copy.step == step]
        assert [(copy.target, copy.pinned, copy.blocking) for copy in copies] == [("meta", True, False)] * 2  # levels


def test_a_batch_of_a_stack_is_one_copy_and_as_many_launches_as_a_batch_of_one_loader():
    split = Split(np.zeros((50, 8, 8, 3), np.uint8), np.arange(50))
    data = Dataset("cifar10", split, split, (0.5,) * 3, (0.25,) * 3, ())
    with meta_gpu() as gpu:
        loaders = [Loader(data, 8, replicate, replicate, META) for replicate in range(3)]
        stacked, evaluation = StackedLoader(loaders), EvaluationLoader(data, split, 16, META, copies=3)
        loaders[0].batch(1)
        images, labels = stacked.batch(2)
        prepared, launches = len(gpu.copies), [dict(gpu.ops[0, step]) for step in (1, 2)]
        assert [(batch[0].shape[1:], batch[1].shape[1:]) for batch in evaluation] == [((9, 8, 8), (3,))] * 4
    assert images.shape == (8, 9, 8, 8) and labels.shape == (8, 3) and images.device == labels.device == META
    assert launches[0] == launches[1]
    assert [(copy.step, copy.pinned, copy.blocking) for copy in gpu.copies[-2:]] == [(1, True, False), (2, True, False)]
    assert gpu.reads == gpu.mixtures == [] and len(gpu.copies) == prepared
    assert [copy.shape for copy in gpu.copies if copy.is_of_images] == [(50, 8, 8, 3)]


def test_the_images_of_each_split_are_copied_to_the_gpu_once(ran):
    copies = [copy.shape for copy in ran.copies if copy.is_of_images]
    assert sorted(copies) == [(355, 8, 8, 1), (1442, 8, 8, 1)]


def test_a_data_parallel_step_has_one_collective_for_the_gradients_and_reads_nothing(tiny):
    script = ROOT / "tests/training/count_steps.py"
    process = Process(["composer", "-n", 2, script, "-f", tiny(), *ROWS, "prune.levels=0", "parallelism=data"])
    out, err = process.communicate()
    assert process.returncode == 0, out + err
    for rank in range(2):
        counts = json.loads(Path(f"rank_{rank}.json").read_text())
        assert [counts[step] for step in ("6", "8", "9")] == [{"c10d::allreduce_": 1}] * 3  # DDP starts at 4 and 5
