import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from composer import Algorithm, Event
from safetensors.torch import load_file

from lth_diet import imp
from lth_diet.algorithms import ApplyMask, Rewind, SubsetSampling
from lth_diet.config import loading
from lth_diet.data import catalog, label_noise, seeds, subsets
from lth_diet.errors import TrainingError, UserError
from lth_diet.files import read_json, write_json
from lth_diet.masks.mask import Mask
from lth_diet.masks.pruning import prune_by_magnitude
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.scores import artifact
from lth_diet.scoring import Scoring
from lth_diet.training import composer_internals, trainer
from lth_diet.training.progress import Progress


@pytest.fixture
def run(tiny):
    """Runs replicate 0 of a small configuration and returns its directory."""

    def start(*overrides, arm="random"):
        directory = RunDirectory(loading.load_config(tiny(arm), overrides))
        directory.create()
        if directory.config.needs_scores and directory.config.scores.file is None:
            scoring = Scoring(directory.config, Progress([], 0), lambda: None, range(2))
            scoring.folder.create()
            scoring.run()
        replicate = directory.replicate(0)
        imp.IMP(directory.config, [replicate], Progress(["replicate_0"], 0), lambda: None).run()
        return replicate

    return start


def weights(phase):
    return load_file(phase.path / "weights.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_each_level_starts_at_exactly_mask_times_rewind_point(run, monkeypatch):
    starts = []

    class RecordsStart(ApplyMask):
        def match(self, event, state):
            if event == Event.BEFORE_FORWARD and state.timestamp.batch == 4:
                starts.append({name: tensor.clone() for name, tensor in state.model.module.state_dict().items()})
            return super().match(event, state)

    monkeypatch.setattr(imp, "ApplyMask", RecordsStart)
    replicate = run()
    rewind_point = weights(replicate.pretrain)
    assert float(rewind_point["bn1.running_mean"].abs().sum()) > 0
    for level, start in enumerate(starts):
        mask = Mask.load(replicate.level(level).path / "mask.safetensors")
        assert equal(start, {name: tensor * mask.get(name, 1) for name, tensor in rewind_point.items()})
    assert len(starts) == 3


def test_each_mask_prunes_the_trained_weights_of_the_previous_level(run):
    replicate = run()
    masks = [Mask.load(replicate.level(level).path / "mask.safetensors") for level in range(3)]
    assert masks[0].density == 1
    for level in range(2):
        assert masks[level + 1] == prune_by_magnitude(weights(replicate.level(level)), masks[level], 0.2)
    for level in range(3):
        trained = weights(replicate.level(level))
        assert all(bool((trained[name][~kept] == 0).all()) for name, kept in masks[level].items())
        assert replicate.level(level).result()["weights_remaining_percent"] == 100 * masks[level].density


def test_levels_train_from_the_rewind_step_to_the_last_step(run):
    replicate = run()
    assert replicate.pretrain.result()["steps"] == 4
    assert [replicate.level(level).result()["steps"] for level in range(3)] == [8, 8, 8]


def test_init_arm_rewinds_to_the_initialization(run):
    replicate = run(arm="init")
    network = (
        imp.IMP(loading.load_config("tiny.yaml"), [replicate], Progress(["replicate_0"], 0), lambda: None)
        .builder.build_network()
        .module
    )
    assert equal(weights(replicate.pretrain), network.state_dict())
    assert replicate.level(0).result()["steps"] == 12


def recorded_batches(monkeypatch, run, *overrides, arm="random"):
    """Indices and labels of every batch of each phase, recorded from its loader."""
    phases, original = [], trainer.train

    def train(model, loader, *rest):
        batches = []
        phases.append(batches)
        original_batch = loader.batch

        def batch(step):
            images, labels = original_batch(step)
            batches.append((loader.examples(step), labels.numpy()))
            return images, labels

        loader.batch = batch
        try:
            return original(model, loader, *rest)
        finally:
            loader.batch = original_batch

    monkeypatch.setattr(trainer, "train", train)
    run(*overrides, arm=arm)
    return [([examples for examples, _ in batches], [labels for _, labels in batches]) for batches in phases]


def test_pretraining_uses_epochs_of_the_random_subset_and_levels_use_all_examples(run, monkeypatch):
    batches = recorded_batches(monkeypatch, run)
    labels = catalog.load("digits", "unused").train.labels
    subset = subsets.random_subset(labels, 128, seeds.derive_seed(42, 0, "subset"))
    pretraining = batches[0][0]
    assert len(pretraining) == 4
    for epoch in range(2):  # 128 examples are two batches of 64
        assert sorted([*pretraining[2 * epoch], *pretraining[2 * epoch + 1]]) == subset.tolist()
    for level, _ in batches[1:]:
        assert len(level) == 8
        assert not {int(i) for batch in level for i in batch} <= set(subset.tolist())


def test_arms_of_a_replicate_share_the_data_order(run, monkeypatch):
    all_arm = recorded_batches(monkeypatch, run, arm="all")
    init_arm = recorded_batches(monkeypatch, run, arm="init")
    order = [batch.tolist() for batch in init_arm[0][0]]
    assert [batch.tolist() for batch in all_arm[0][0] + all_arm[1][0]] == order


@pytest.mark.parametrize("arm", ["all", "random", "easy", "hard"])
def test_pretraining_uses_noisy_labels_and_levels_use_true_labels(run, monkeypatch, arm):
    batches = recorded_batches(monkeypatch, run, "pretrain.label_noise=0.5", arm=arm)
    true = catalog.load("digits", "unused").train.labels
    noisy = label_noise.randomize_labels(true, 0.5, 10, seeds.derive_seed(42, "all", "noise"))
    phases = batches[2:] if arm in ("easy", "hard") else batches  # two scoring networks come first
    assert len(phases) == 4
    for number, (examples, labels) in enumerate(phases):
        for indices, given in zip(examples, labels, strict=True):
            assert np.array_equal(given, (true if number else noisy)[indices])
    pretraining = np.concatenate(phases[0][0])
    assert (noisy[pretraining] != true[pretraining]).any()


@pytest.mark.parametrize("arm", ["easy", "hard"])
def test_pretraining_uses_the_examples_with_the_lowest_or_highest_scores(run, monkeypatch, arm):
    options = ["pretrain.subset.class_balanced=true", "pretrain.subset.offset=20"]
    batches = recorded_batches(monkeypatch, run, *options, arm=arm)
    labels = catalog.load("digits", "unused").train.labels
    scores = artifact.load_scores(next(Path("runs/scores").glob("*/scores.safetensors")), labels)
    select = {"easy": subsets.easy, "hard": subsets.hard}[arm]
    expected = select(scores.mean, labels, 128, class_balanced=True, offset=20)
    assert sorted(np.concatenate(batches[2][0][:2])) == expected.tolist()
    saved = load_file(next(Path("runs").glob(f"digits_{arm}-*/replicate_0/pretrain/subset.safetensors")))
    assert saved["indices"].tolist() == expected.tolist()


def test_random_subset_is_balanced_over_the_noisy_labels(run):
    replicate = run("pretrain.label_noise=0.5", "pretrain.subset.size=130")
    summary = json.loads((replicate.pretrain.path / "subset.json").read_text())
    assert set(summary["classes"].values()) == {13}
    assert summary["wrong_labels_percent"]["subset"] > 20
    assert "subset.safetensors" in replicate.pretrain.result()["sha256"]


def test_a_subset_without_some_classes_is_one_warning_for_all_replicates_of_an_arm(run, tiny):
    overrides = ["prune.levels=0", "pretrain.subset.size=64"]
    run(*overrides, arm="easy")
    directory = RunDirectory(loading.load_config(tiny("easy"), overrides))
    progress = Progress(["replicate_1", "replicate_2"], 0)
    for index in (1, 2):
        imp.IMP(directory.config, [directory.replicate(index)], progress, lambda: None).run()
    (warning,) = set(progress.messages)  # the screen shows equal messages once
    assert re.fullmatch(r"warning: easy: no example of .* among the 64 easiest .*; see .*class_balanced", warning)


def test_replicates_with_subsets_from_different_scores_are_rejected(run, tiny):
    replicate = run("prune.levels=0", arm="easy")
    directory = RunDirectory(loading.load_config(tiny("easy"), ["prune.levels=0"]))
    path = replicate.pretrain.path / "result.json"
    write_json(path, read_json(path) | {"scores_sha256": "of other scores"})
    with pytest.raises(UserError, match=r"replicate_0/pretrain: its subset was selected by scores other than"):
        imp.IMP(directory.config, [directory.replicate(1)], Progress(["replicate_1"], 0), lambda: None).run()


def test_a_given_scores_file_replaces_scoring(run, place, monkeypatch):
    labels = catalog.load("digits", "unused").train.labels
    values = np.arange(1442, dtype=np.float32)[None]
    artifact.save_scores(place / "mine", values, labels, "digits", "digits")
    batches = recorded_batches(monkeypatch, run, "scores.file=mine/scores.safetensors", arm="easy")
    assert len(batches) == 4 and not Path("runs/scores").exists()
    assert sorted(np.concatenate(batches[0][0][:2])) == list(range(128))


class PhaseRecorder(Algorithm):
    """Records the arguments of a phase's Trainer, its learning rates and its first weights and batch."""

    def __init__(self, options):
        self.options = options
        self.group = {key: options["optimizers"].param_groups[0][key] for key in ("momentum", "weight_decay")}
        self.rates, self.first = [], None

    def match(self, event, state):
        return event == Event.BEFORE_FORWARD

    def apply(self, event, state, logger):
        self.rates.append((int(state.timestamp.batch), state.optimizers[0].param_groups[0]["lr"]))
        if self.first is None:
            weights = {name: tensor.clone() for name, tensor in state.model.module.state_dict().items()}
            self.first = weights, [tensor.clone() for tensor in state.batch]


@pytest.fixture
def phases(monkeypatch):
    """A PhaseRecorder for each phase that is trained."""
    recorders, original = [], composer_internals.LeanTrainer

    def build(algorithms, **options):
        recorders.append(PhaseRecorder(options))
        return original(algorithms=[*algorithms, recorders[-1]], **options)

    monkeypatch.setattr(composer_internals, "LeanTrainer", build)
    return recorders


def test_each_phase_uses_the_configured_hyperparameters(run, phases):
    overrides = ["train.lr=0.3", "pretrain.lr=0.2", "train.gamma=0.5", "train.momentum=0.8", "train.weight_decay=0.01"]
    run(*overrides, "prune.levels=0", "deterministic=true", "precision=fp32")
    pretraining, level = phases
    assert pretraining.rates == [(step, 0.2) for step in range(4)]
    expected = [0.3 * 0.5 ** ((step >= 6) + (step >= 9)) for step in range(4, 12)]
    assert level.rates == [(step, pytest.approx(rate)) for step, rate in zip(range(4, 12), expected, strict=True)]
    for phase in phases:
        assert phase.group == {"momentum": 0.8, "weight_decay": 0.01}
        assert phase.options["precision"] == "fp32" and phase.options["deterministic_mode"] is True


def test_arms_of_a_replicate_share_initial_weights_and_augmented_images(run, phases):
    run(arm="all")
    run(arm="init")
    (weights_of_all, batch_of_all), (weights_of_init, batch_of_init) = phases[0].first, phases[4].first
    assert equal(weights_of_all, weights_of_init)
    for tensor, other in zip(batch_of_all, batch_of_init, strict=True):
        assert torch.equal(tensor, other)


def test_replicates_differ_in_initial_weights_and_images(run, phases, tiny):
    run(arm="init")
    directory = RunDirectory(loading.load_config(tiny("init")))
    imp.IMP(directory.config, [directory.replicate(1)], Progress(["replicate_1"], 0), lambda: None).run()
    (weights_0, batch_0), (weights_1, batch_1) = phases[0].first, phases[3].first
    assert not torch.equal(weights_0["conv1.weight"], weights_1["conv1.weight"])
    assert not torch.equal(batch_0[0], batch_1[0])


class NoOp(Algorithm):
    def __init__(self, *args, **kwargs):
        pass

    def match(self, event, state):
        return False

    def apply(self, event, state, logger):
        pass


class SavesButDoesNotRewind(Rewind):
    def match(self, event, state):
        return event != Event.FIT_START and super().match(event, state)


@pytest.mark.parametrize(
    ("algorithm", "replacement"),
    [(SubsetSampling, NoOp), (Rewind, SavesButDoesNotRewind)],
)
def test_each_algorithm_changes_the_result(run, monkeypatch, algorithm, replacement):
    with_it = weights(run("runs=with", "prune.levels=1").level(1))
    monkeypatch.setattr(imp, algorithm.__name__, replacement)
    without = weights(run("runs=without", "prune.levels=1").level(1))
    assert not equal(with_it, without)


def test_nonzero_pruned_weights_are_an_error(run, monkeypatch):
    monkeypatch.setattr(imp, "ApplyMask", NoOp)
    with pytest.raises(UserError, match=r"level_1: weights pruned by its mask are not zero"):
        run("prune.levels=1")


def test_a_finished_run_is_not_trained_again(run, monkeypatch):
    replicate = run()
    before = {path: path.stat().st_mtime_ns for path in replicate.path.rglob("*")}

    monkeypatch.setattr(trainer, "train", lambda *args: pytest.fail("a finished phase was trained again"))
    run()
    assert {path: path.stat().st_mtime_ns for path in replicate.path.rglob("*")} == before


def test_extending_a_run_by_levels_equals_running_all_levels_at_once(run):
    run("prune.levels=1")
    extended = run("prune.levels=2")
    at_once = run("prune.levels=2", "runs=at_once")
    assert extended.path.parent.name == at_once.path.parent.name
    assert equal(weights(extended.level(2)), weights(at_once.level(2)))


def test_a_damaged_file_is_named_in_the_error(run):
    replicate = run("prune.levels=1")
    path = replicate.level(1).path / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00\x00")
    with pytest.raises(UserError, match=r"level_1/weights.safetensors: "):
        run("prune.levels=2")


def test_a_level_that_does_not_follow_from_the_previous_one_is_rejected(run):
    replicate, other = run("prune.levels=1"), run("prune.levels=1", "seed=1")
    shutil.rmtree(replicate.level(0).path)
    shutil.copytree(other.level(0).path, replicate.level(0).path)
    with pytest.raises(UserError, match=r"level_1: its mask is not the result of pruning level 0"):
        run("prune.levels=1")


def test_a_level_whose_weights_do_not_fit_its_mask_is_rejected(run):
    replicate = run("prune.levels=1")
    level = replicate.level(1)
    level.write("weights.safetensors", (replicate.level(0).path / "weights.safetensors").read_bytes())
    level.finish({key: value for key, value in level.result().items() if key not in ("sha256", "versions")})
    with pytest.raises(UserError, match=r"level_1: weights pruned by its mask are not zero"):
        run("prune.levels=1")


def test_a_layer_without_weights_is_a_warning_and_a_network_without_weights_an_error(tiny):
    directory = RunDirectory(loading.load_config(tiny(), ["prune.fraction=0.2"]))
    progress = Progress(["replicate_0"], 0)
    algorithm = imp.IMP(directory.config, [directory.replicate(0)], progress, lambda: None)
    weights = {"a": torch.tensor([0.1]), "b": torch.arange(1.0, 5.0)}
    dense = Mask({name: torch.ones(len(each)) > 0 for name, each in weights.items()})
    mask = algorithm.prune(7, {0: dense}, {0: weights})[0]
    assert mask.remaining == 4
    assert progress.messages == [f"warning: {directory.replicate(0).level(7).path}: no weight remains of a"]
    last = Mask({"a": [False], "b": [False, False, False, True]})
    with pytest.raises(TrainingError, match=r"level_8: pruning 0.2 of 1 remaining weights leaves none"):
        algorithm.prune(8, {0: last}, {0: weights})


def test_nan_in_the_last_step_is_an_error(run):
    with pytest.raises(TrainingError, match=r"level_0: the test loss is nan after step 12"):
        run("prune.levels=0", "train.milestones=[11]", "train.gamma=1e30")


def test_result_has_the_documented_keys(run):
    result = json.loads((run().level(2).path / "result.json").read_text())
    assert set(result) == {
        "test_accuracy_percent",
        "test_loss",
        "steps",
        "seconds",
        "timestamp",
        "level",
        "weights_remaining_percent",
        "phase",
        "environment",
        "versions",
        "sha256",
        "checksum",
    }
    assert set(result["sha256"]) == {"mask.safetensors", "weights.safetensors", "curve.jsonl"}
