"""Instability analysis: what it trains, what it measures, and that nothing is lost by a kill."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from faults.runs import bits
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from safetensors.torch import load_file
from torch.optim.swa_utils import update_bn

from lth_diet.config import loading
from lth_diet.config.instability import load_instability
from lth_diet.data.loader import StackedLoader
from lth_diet.data.seeds import derive_seed, generator
from lth_diet.errors import UserError
from lth_diet.files import read_json, write_json
from lth_diet.instability import (
    ERROR_IMAGES,
    POINTS,
    STATISTICS_IMAGES,
    Line,
    RewindPoints,
    copy_scope,
    error_barrier,
    error_percent,
    interpolate,
)
from lth_diet.launch import instability as results
from lth_diet.launch.arms import open_arms, tasks_of
from lth_diet.launch.processes import ProcessInfo
from lth_diet.launch.worker import train_replicates
from lth_diet.masks.mask import Mask
from lth_diet.runs.config_directory import read_config
from lth_diet.runs.instability_directory import InstabilityDirectory
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.runs.verify import verify
from lth_diet.tracking import mlflow_store, sync
from lth_diet.training.builders import Builder
from lth_diet.training.composer_internals import LeanTrainer
from lth_diet.training.progress import Progress
from recipes import imp, instability

PROCESS = ProcessInfo(0, 1, 0, "127.0.0.1", 0)
ERRORS = st.lists(st.floats(0, 100), min_size=2, max_size=20)


@pytest.fixture(autouse=True)
def few_points(monkeypatch):
    """Measure errors at three points, on few images."""
    for name, number in {"POINTS": 3, "STATISTICS_IMAGES": 100, "ERROR_IMAGES": 200}.items():
        monkeypatch.setattr(f"lth_diet.instability.{name}", number)


@pytest.fixture
def launch(tiny):
    """Runs an analysis in this process; returns its directory, the exit status and the messages."""

    def start(*overrides, arm="random", steps="[0,4]"):
        (opened,) = open_arms([load_instability(tiny(arm), [f"steps={steps}", *overrides])], PROCESS)
        opened.run.create()
        progress = Progress([], 0)
        return opened.run, train_replicates(tasks_of([opened]), PROCESS, progress), progress.messages

    return start


@pytest.fixture
def interrupted(launch):
    """Launches and ends before the n-th call of a method, as a kill would; False if there are fewer calls."""

    def start(owner, name, call, *overrides):
        original, left = getattr(owner, name), [call]

        def method(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return original(*arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, method)
            try:
                launch(*overrides)
            except KeyboardInterrupt:
                return True
        return False

    return start


@given(ERRORS)
def test_the_barrier_is_the_highest_error_minus_the_mean_of_the_ends(errors):
    barrier = error_barrier(errors)
    assert barrier == pytest.approx(max(errors) - np.mean([errors[0], errors[-1]]))
    assert barrier >= abs(errors[0] - errors[-1]) / 2 - 1e-9
    assert error_barrier(errors[::-1]) == pytest.approx(barrier)
    assert error_barrier([each + 7 for each in errors]) == pytest.approx(barrier)


def test_a_line_without_a_hill_has_the_barrier_zero():
    assert error_barrier([5, 5, 5]) == error_barrier([5, 1, 5]) == 0
    assert error_barrier([10, 40, 20]) == 25


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=5), st.floats(0, 1))
def test_interpolation_is_linear_exact_at_its_ends_and_keeps_pruned_weights_at_zero(values, fraction):
    first = {"w": torch.tensor([0.0, *values]), "n": torch.tensor(3)}
    second = {"w": torch.tensor([0.0, *reversed(values)]), "n": torch.tensor(5)}
    assert torch.equal(interpolate(first, second, 0)["w"], first["w"])
    assert torch.equal(interpolate(first, second, 1)["w"], second["w"])
    between = interpolate(first, second, fraction)
    expected = (1 - fraction) * first["w"].double() + fraction * second["w"].double()
    assert torch.allclose(between["w"].double(), expected, atol=1e-3) and between["w"][0] == 0
    assert between["w"].dtype == torch.float32 and between["n"] == 3


def test_streams_of_the_copies_differ_from_each_other_and_from_all_others():
    scopes = [*range(3), "all", "network_0", "network_1", *(copy_scope(r, c) for r in range(3) for c in range(3))]
    found = [derive_seed(42, scope, purpose) for scope in scopes for purpose in ("order", "augmentation", "init")]
    assert len(set(found)) == len(found)


def test_an_analysis_trains_from_the_networks_that_imp_rewinds_to_and_measures_the_copies_at_the_ends(launch, tiny):
    run, status, messages = launch()
    assert (status, messages) == (0, [])
    (replicate,) = run.replicates()
    assert imp.main(["-f", str(tiny()), "prune.levels=0"]) == 0  # t_r = 4
    rewind_point = load_file(
        RunDirectory(loading.load_config(tiny())).replicate(0).pretrain.path / "weights.safetensors"
    )
    saved = load_file(replicate.pretraining_with(4).verified("weights_4.safetensors"))
    assert all(torch.equal(saved[name], rewind_point[name]) for name in rewind_point)

    builder = Builder(run.config, 0)
    line, network = Line(builder), builder.build_network().module
    initial = load_file(replicate.pretraining_with(0).verified("weights_0.safetensors"))
    assert all(torch.equal(initial[name], value) for name, value in network.state_dict().items())
    result = replicate.barrier(4).result()
    assert (result["fractions"], result["pairs"]) == ([0, 0.5, 1], [[0, 1]])
    assert (result["statistics_images"], result["train_images"], result["test_images"]) == (100, 200, 355)
    assert (POINTS, STATISTICS_IMAGES, ERROR_IMAGES) == (11, 2048, 5000)  # where nothing is patched
    for number, end in ((0, 0), (1, -1)):
        network.load_state_dict(load_file(replicate.copy(4, number).verified("weights.safetensors")))
        update_bn(line.statistics, network)
        for name, loader in line.loaders.items():
            assert result[f"{name}_error_percent"][0][end] == error_percent(network, loader)
    for name in ("train", "test"):
        barrier = error_barrier(result[f"{name}_error_percent"][0])
        assert result[f"{name}_barrier"] == pytest.approx(barrier, abs=1e-4)
    copies = [load_file(replicate.copy(4, number).path / "weights.safetensors") for number in range(2)]
    assert not torch.equal(copies[0]["fc.weight"], copies[1]["fc.weight"])
    assert [row.step for row in results.barriers(run)] == [0, 4]


def test_the_images_of_the_errors_are_the_same_for_all_replicates_and_mixed(tiny):
    config = loading.load_config(tiny("all"))
    first, second = (Line(Builder(config, index)) for index in (0, 1))
    assert torch.equal(first.statistics.images, second.statistics.images)
    order = generator(derive_seed(42, "all", "interpolation")).permutation(1442)[:100]
    assert np.array_equal(first.statistics.labels, Builder(config).data.train.labels[order])
    assert len(set(first.statistics.labels.tolist())) == 10


def test_steps_are_added_to_an_analysis_with_the_bits_that_they_have_in_one_launch(launch, tiny):
    for steps in ("[4]", "[0,6]", "[0,4,6]"):
        run, status, _ = launch(steps=steps)
        assert status == 0
    planned = load_instability(tiny("random"), ["steps=[0,4,6,8]"])
    sync.sync_replicate(InstabilityDirectory(planned).replicate(0))
    assert statuses() == {"RUNNING"}, "step 8 is planned"
    launch("runs=whole", steps="[0,4,6]")
    (replicate,) = run.replicates()
    assert {path.name for path in replicate.path.glob("pretrain_*")} == {"pretrain_4", "pretrain_0-6"}
    for step in (0, 4, 6):
        parts = f"instability/{run.path.name}/replicate_0/step_{step}"
        assert bits(f"runs/{parts}") == bits(f"whole/{parts}")


def test_replicates_of_a_stack_have_nearly_the_barriers_of_single_ones(launch):
    run, status, _ = launch("replicates=2", "stack=2")
    single, _, _ = launch("replicates=2", "runs=single")
    assert status == 0 and run.done and single.done
    for ours, theirs in zip(run.replicates(), single.replicates(), strict=True):
        ours, theirs = (load_file(each.copy(4, 1).path / "weights.safetensors") for each in (ours, theirs))
        assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in ours)


def measured(root):
    """Errors and barriers below a folder."""
    keys = ("train_error_percent", "test_error_percent", "train_barrier", "test_barrier")
    found = [PhaseDirectory(path.parent).result() for path in sorted(Path(root).rglob("barrier/result.json"))]
    return [[result[key] for key in keys] for result in found]


def check_kills(launch, interrupted, moments, *settings):
    launch("runs=whole", *settings)
    for owner, name, call in moments:
        folder = f"{name}{call}"
        assert interrupted(owner, name, call, f"runs={folder}", *settings), folder
        assert launch(f"runs={folder}", *settings)[1] == 0
        assert bits(folder) == bits("whole") and measured(folder) == measured("whole"), folder


def test_an_analysis_killed_within_and_between_phases_resumes_to_the_same_bits(launch, interrupted):
    moments = [(LeanTrainer, "_train_batch", 4), (LeanTrainer, "_train_batch", 21), (PhaseDirectory, "finish", 2)]
    check_kills(launch, interrupted, moments)


@pytest.mark.integration
def test_an_analysis_in_stacks_killed_anywhere_resumes_to_the_same_bits(launch, interrupted):
    moments = [(LeanTrainer, "_train_batch", call) for call in (1, 4, 14, 20)]
    moments += [(PhaseDirectory, "finish", call) for call in range(1, 15)]
    moments += [(PhaseDirectory, "commit_checkpoint", 1), (RewindPoints, "apply", 2), (Line, "errors", 2)]
    check_kills(launch, interrupted, moments, "replicates=2", "stack=2")


def test_masks_of_a_level_are_those_of_the_runs_that_rewind_to_the_steps(launch, tiny):
    with pytest.raises(UserError, match=r"level = 1: .*level_1 is not finished.*arm=init and prune\.levels=1"):
        results.check_instability([load_instability(tiny(), ["steps=[0,4]", "level=1"])])
    for overrides in (["arm=init"], []):
        assert imp.main(["-f", str(tiny()), "prune.levels=1", *overrides]) == 0
    run, status, messages = launch("level=1")
    assert (status, messages) == (0, [])
    (replicate,), mask = (
        run.replicates(),
        Mask.load(RunDirectory(loading.load_config(tiny())).replicate(0).level(1).path / "mask.safetensors"),
    )
    weights = load_file(replicate.copy(4, 0).path / "weights.safetensors")
    assert mask.is_zero_outside(weights) and mask.density == pytest.approx(0.8, abs=0.01)
    assert not mask.is_zero_outside(load_file(replicate.copy(0, 0).path / "weights.safetensors"))
    dense, _, _ = launch()
    assert dense.path != run.path


def test_a_replicate_with_a_copy_whose_loss_is_nan_fails_alone(launch, monkeypatch):
    settings = ("replicates=2", "stack=2")
    whole, _, _ = launch("runs=whole", *settings, steps="[4]")
    original = StackedLoader.batch

    def batch(loader, step):
        images, labels = original(loader, step)
        if len(loader.loaders) == 4 and step == 8:
            images[:, 1] = float("nan")  # of copy 1 of replicate 0
        return images, labels

    monkeypatch.setattr(StackedLoader, "batch", batch)
    run, status, (message,) = launch(*settings, steps="[4]")
    failed, other = run.replicates()
    assert status == 1 and re.search(r"replicate_0/step_4/copy_1: the loss is nan at step 9", message)
    assert (failed.given_up, failed.barrier(4).done, other.given_up) == (True, False, False)
    assert bits(other.path) == bits(whole.replicate(1).path)
    assert (
        other.barrier(4).result()["test_error_percent"] == whole.replicate(1).barrier(4).result()["test_error_percent"]
    )


def test_a_damaged_file_of_an_analysis_is_named_with_what_to_delete(launch):
    run, _, _ = launch(steps="[0]")
    assert list(verify(Path("runs"))) == []
    (replicate,) = run.replicates()
    path = replicate.copy(0, 1).path / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (found,) = verify(Path("runs"))
    remedy = f"delete {path.parents[1]}, then rerun the training command to recompute them"
    assert found == (path, f"damaged or missing; {remedy}")


def test_the_recipe_plans_runs_draws_and_has_nothing_left(tiny, capfd):
    path, other = str(tiny("all", "a.yaml")), str(tiny("random", "b.yaml"))
    command = ["-f", path, "-f", other, "steps=[0,4]"]
    assert instability.main([*command, "--plan"]) == 0
    planned = capfd.readouterr().out
    assert planned.count("copies    steps 4 to 12  to do") == 2 and "total of 2 arms: 48 steps to train" in planned, (
        planned
    )
    assert not Path("runs").exists()
    assert instability.main(command) == 0
    out = capfd.readouterr().out
    assert out.count("barrier of test error") == 2 and "figure: runs/instability/barriers.png" in out
    assert Path("runs/instability/barriers.png").read_bytes().startswith(b"\x89PNG")
    assert instability.main([*command, "--plan"]) == 0
    assert "total of 2 arms: 0 steps to train" in capfd.readouterr().out
    assert len(tracked()) == 2 and statuses() == {"FINISHED"} and all(each.info.end_time for each in tracked())
    for each in tracked():
        history = MlflowClient(mlflow_store.tracking_uri()).get_metric_history(each.info.run_id, "test_error_barrier")
        assert [point.step for point in history] == [0, 4]
    Path("runs/instability/barriers.png").unlink()
    Path("runs/instability/barriers.png").mkdir()
    assert instability.main([*command, "experiment=other"]) == 0
    assert "no figure: runs/instability/barriers.png: Is a directory" in capfd.readouterr().out
    assert {read_config(path)["experiment"] for path in Path("runs/instability").glob("digits_*")} == {"other"}


def tracked():
    client = MlflowClient(mlflow_store.tracking_uri())
    return client.search_runs([client.get_experiment_by_name("tiny").experiment_id])


def statuses():
    return {each.info.status for each in tracked()}


def test_subsets_of_different_scores_are_not_mixed_in_one_analysis(launch, tiny):
    assert imp.main(["-f", str(tiny("easy")), "prune.levels=0"]) == 0, "makes the scores"
    run, status, _ = launch(arm="easy", steps="[0,4]")
    assert status == 0
    (pretraining,) = run.replicate(0).pretrainings()
    path = pretraining.path / "result.json"
    write_json(path, read_json(path) | {"scores_sha256": "of other scores"})
    _, status, (message,) = launch(arm="easy", steps="[6]")
    assert status == 1 and "pretrain_0-4: its subset was selected by scores other than" in message


def test_the_plan_of_a_failed_replicate_has_its_reason_and_no_steps(tiny):
    run = InstabilityDirectory(load_instability(tiny("random"), ["steps=[4]", "replicates=2"]))
    run.replicate(0).path.mkdir(parents=True)
    write_json(run.replicate(0).path / "failed.json", {"reason": "the loss is nan", "final": True})
    planned = results.plan_instability(run)
    assert "replicate 0: 0 steps to train (" in planned and "the loss is nan" in planned
