"""Replicates that train as one stack: the same experiment, independent of each other, and never lost."""

import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from faults.runs import bits
from safetensors.torch import load_file

from lth_diet.config import loading
from lth_diet.data.loader import StackedLoader
from lth_diet.launch.arms import open_arms, tasks_of
from lth_diet.launch.processes import ProcessInfo
from lth_diet.launch.worker import compute_scores, train_replicates
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.runs.verify import verify
from lth_diet.runs.work_left import steps_left
from lth_diet.training import callbacks, trainer
from lth_diet.training.builders import Builder
from lth_diet.training.composer_internals import LeanTrainer
from lth_diet.training.progress import Progress

PROCESS = ProcessInfo(0, 1, 0, "127.0.0.1", 0)
STACK = ["stack=3", "replicates=3", "prune.levels=1"]


@pytest.fixture
def launch(tiny):
    """Trains the replicates of a configuration in this process; returns run directory, exit status and messages."""

    def start(*overrides, arm="random", settings=STACK):
        (opened,) = open_arms([loading.load(tiny(arm), [*settings, *overrides])], PROCESS)
        opened.run.create()
        progress, tasks = Progress([], 0), tasks_of([opened])
        if opened.scores is not None:
            opened.scores.create()
            assert compute_scores(opened.scores, PROCESS, progress, tasks) == 0
        return opened.run, train_replicates(tasks, PROCESS, progress), progress.messages

    return start


@pytest.fixture
def disturb(monkeypatch):
    """Changes the images of one replicate of every stack from a step on."""

    def start(replicate, change, first=0):
        original = StackedLoader.batch

        def batch(loader, step):
            images, labels = original(loader, step)
            if step >= first:
                change(images[:, replicate : replicate + 1])  # digits have one channel
            return images, labels

        monkeypatch.setattr(StackedLoader, "batch", batch)

    return start


@pytest.fixture
def interrupted(launch):
    """Launches and ends before the n-th call of a method, as a kill would."""

    def start(owner, name, call, *overrides, **options):
        original, left = getattr(owner, name), [call]

        def method(*arguments):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return original(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, method)
            with pytest.raises(KeyboardInterrupt):
                launch(*overrides, **options)

    return start


def of(run, *indices):
    """Bits of some replicates."""
    return {index: bits(run.replicate(index).path) for index in indices}


def test_a_stack_trains_on_the_batches_and_from_the_weights_of_single_replicates(launch, tiny, monkeypatch):
    seen, original = [], trainer.train

    def train(model, loader, evaluation, schedule, algorithms, *rest):
        batch, batches = loader.batch, []
        seen.append(({name: each.clone() for name, each in model.module.state_dict().items()}, batches))
        loader.batch = lambda step: batches.append((step, *batch(step))) or batches[-1][1:]
        try:
            return original(model, loader, evaluation, schedule, algorithms, *rest)
        finally:
            del loader.batch

    monkeypatch.setattr(trainer, "train", train)
    noisy = ["pretrain.label_noise=0.5", "prune.levels=0"]
    launch(*noisy)
    stacked, seen[:] = list(seen), []
    launch(*noisy, "stack=1")
    singles = [seen[index : index + 2] for index in (0, 2, 4)]
    assert len(seen) == 6 and len(stacked) == 2
    for phase, (state, batches) in enumerate(stacked):
        for replicate in range(3):
            single, alone = singles[replicate][phase]
            chunks = {name: each.chunk(3)[replicate] if each.dim() else each for name, each in state.items()}
            assert all(torch.equal(chunks[name], each) for name, each in single.items())
            assert [step for step, _, _ in batches] == [step for step, _, _ in alone] != []
            for (_, images, labels), (_, single_images, single_labels) in zip(batches, alone, strict=True):
                assert torch.equal(images[:, replicate : replicate + 1], single_images)
                assert torch.equal(labels[:, replicate], single_labels)


def test_replicates_of_a_stack_have_the_files_and_nearly_the_weights_of_single_replicates(launch):
    run, status, messages = launch()
    single, *_ = launch("stack=1")
    assert (status, messages) == (0, []) and run.path != single.path
    assert {path.relative_to(run.path) for path in run.path.rglob("*") if path.is_file()} == {
        path.relative_to(single.path) for path in single.path.rglob("*") if path.is_file()
    }
    assert list(verify(Path("runs"))) == []
    for replicate, alone in zip(run.replicates(), single.replicates(), strict=True):
        ours, theirs = (load_file(each.pretrain.path / "weights.safetensors") for each in (replicate, alone))
        assert all(torch.allclose(ours[name], each, rtol=1e-3, atol=1e-5) for name, each in theirs.items())
        assert replicate.level(1).result().keys() == alone.level(1).result().keys()
        rows = [
            [row["train_loss"] for row in each.level(0).curve() if "train_loss" in row] for each in (replicate, alone)
        ]
        assert rows[0] == pytest.approx(rows[1], rel=0.01)


def test_noise_in_one_replicate_changes_no_bit_of_the_others(launch, disturb):
    run, *_ = launch()
    before, all_bits = of(run, 0, 2), of(run, 1)
    shutil.rmtree("runs")
    disturb(1, lambda images: images.normal_())
    launch()
    assert of(run, 0, 2) == before and of(run, 1) != all_bits


def test_a_replicate_whose_loss_is_nan_fails_alone_and_is_not_trained_again_until_its_failure_is_deleted(
    launch, disturb
):
    run, *_ = launch()
    before = of(run, 0, 2)
    shutil.rmtree("runs")
    disturb(1, lambda images: images.fill_(torch.nan), first=7)
    run, status, messages = launch()
    assert status == 1 and len(messages) == 1
    assert "replicate_1: " in messages[0] and "level_0: the loss is nan at step 8" in messages[0]
    assert of(run, 0, 2) == before
    failed = run.replicate(1)
    assert failed.failed and failed.pretrain.done and not failed.level(0).done
    modified = {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    run, status, _ = launch()
    assert status == 1 and failed.failed
    assert modified == {path: path.stat().st_mtime_ns for path in run.path.rglob("*") if path.is_file()}
    (failed.path / "failed.json").unlink()
    run, status, messages = launch()
    assert status == 1 and messages[0].startswith("error: replicate_1: ") and failed.given_up
    assert of(run, 0, 2) == before


def test_on_a_gpu_a_loss_that_is_not_finite_ends_all_replicates_of_the_stack_but_not_for_good(
    launch, disturb, monkeypatch
):
    monkeypatch.setattr(callbacks, "devices", types.SimpleNamespace(is_gpu=lambda: True))
    disturb(1, lambda images: images.fill_(torch.nan), first=7)
    run, status, messages = launch()
    assert status == 1 and len(messages) == 1 and messages[0].startswith("error: replicates 0 to 2: ")
    assert "replicate_1/level_0: the loss is nan at step 8" in messages[0] and "stack=1: on a GPU" in messages[0]
    assert [(replicate.failed, replicate.given_up) for replicate in run.replicates()] == [(True, False)] * 3


def test_a_block_killed_between_two_results_continues_with_the_unfinished_replicates(launch, interrupted):
    reference, *_ = launch()
    expected = bits(reference.path)
    shutil.rmtree("runs")
    for call, left in ((2, [0, 1]), (5, [0]), (3, [0, 1])):  # in pre-training, level 0 and level 1
        interrupted(PhaseDirectory, "finish", call)
        assert [replicate.index for replicate in reference.replicates() if not replicate.phases()[-1].done] == left
    run, status, _ = launch()
    assert status == 0 and bits(run.path) == expected
    assert not list(run.path.rglob("checkpoint*"))


def test_a_block_has_one_checkpoint_and_every_replicate_knows_its_step(launch, interrupted):
    interrupted(LeanTrainer, "_train_batch", 4 + 4)  # after checkpoint 6 of level 0, which starts at step 4
    run = RunDirectory(loading.load_config("tiny.yaml", STACK))
    first, *others = (replicate.level(0) for replicate in run.replicates())
    assert len(list(run.path.rglob("checkpoint-*.pt"))) == 1
    assert {phase.checkpoint() for phase in (first, *others)} == {(first.checkpoint_path(6), 6)}
    assert {phase.environment()["precision"] for phase in (first, *others)} == {"fp32"}
    assert [steps_left(run.phases_of(replicate)) for replicate in run.replicates()] == [6 + 8] * 3
    rows = others[0].path / "curve.jsonl"
    rows.write_text(rows.read_text().replace("train_loss", "trained"))
    assert [phase.checkpoint() is None for phase in (first, *others)] == [False, True, False], "its curve is damaged"


@pytest.mark.parametrize("checkpoints", [["intervals.checkpoint=3"], ["intervals.checkpoint=2"]])
def test_the_replicate_with_the_checkpoint_fails_and_the_others_resume(launch, interrupted, disturb, checkpoints):
    run, *_ = launch()
    before = of(run, 1, 2)
    shutil.rmtree("runs")
    disturb(0, lambda images: images.fill_(torch.nan), first=7)
    interrupted(LeanTrainer, "_train_batch", 4 + 6, *checkpoints)  # replicate 0 fails at step 8, this is step 10
    assert run.replicate(0).given_up
    run, status, _ = launch(*checkpoints)
    assert status == 1 and of(run, 1, 2) == before


def test_a_level_of_one_replicate_that_was_deleted_is_trained_again_to_the_same_bits(launch):
    run, *_ = launch()
    expected = bits(run.path)
    shutil.rmtree(run.replicate(2).level(0).path)
    shutil.rmtree(run.replicate(2).level(1).path)
    modified = [
        path.stat().st_mtime_ns for index in (0, 1) for path in run.replicate(index).path.rglob("*.safetensors")
    ]
    run, status, _ = launch()
    assert status == 0 and bits(run.path) == expected
    assert modified == [
        path.stat().st_mtime_ns for index in (0, 1) for path in run.replicate(index).path.rglob("*.safetensors")
    ]


def test_a_block_whose_replicates_all_fail_ends(launch):
    run, status, messages = launch("train.lr=1e30", "train.milestones=[]")
    assert status == 1 and len(messages) == 3
    assert all(replicate.given_up and replicate.pretrain.done for replicate in run.replicates())


def test_scoring_networks_train_in_stacks_of_which_the_last_is_smaller(launch, interrupted, tiny):
    scoring = ["scores.networks=3", "stack=2", "replicates=2"]
    interrupted(LeanTrainer, "_train_batch", 5, *scoring, arm="easy")
    run, status, _ = launch(*scoring, arm="easy")
    (folder,) = Path("runs/scores").iterdir()
    assert status == 0 and len(list(folder.glob("network_*/result.json"))) == 3
    found = bits(folder)
    shutil.rmtree("runs")
    launch(*scoring, arm="easy")
    assert bits(folder) == found
    alone = Builder(run.config, "network_1")
    ours = load_file(folder / "network_1/el2n.safetensors")["el2n"]
    launch("scores.networks=3", "stack=1", "replicates=1", arm="easy")
    other = next(path for path in Path("runs/scores").iterdir() if path != folder)
    assert np.allclose(ours, load_file(other / "network_1/el2n.safetensors")["el2n"], atol=1e-3)
    assert alone.seeds("init") == Builder(run.config, "network_0", "network_1").seeds("init")[1:]
