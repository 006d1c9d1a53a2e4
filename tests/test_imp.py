import json
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
    """Runs the first replicate of a small configuration; returns its directory."""

    def start(*overrides, arm="random"):
        made = RunDirectory(loading.load_config(tiny(arm), overrides))
        made.create()
        if made.config.needs_scores and made.config.scores.file is None:
            scoring = Scoring(made.config, Progress([], 0), lambda: None, range(2))
            scoring.folder.create()
            scoring.run()
        replicate = made.replicate(0)
        imp.IMP(made.config, replicate, Progress(["replicate_0"], 0), lambda: None).run()
        return replicate

    return start


def weights(phase):
    return load_file(phase.path / "weights.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_each_level_starts_at_mask_times_rewind_point_bit_for_bit(run, monkeypatch):
    starts = []

    class Watched(ApplyMask):
        def match(self, event, state):
            if event == Event.BEFORE_FORWARD and state.timestamp.batch == 4:
                starts.append({name: tensor.clone() for name, tensor in state.model.module.state_dict().items()})
            return super().match(event, state)

    monkeypatch.setattr(imp, "ApplyMask", Watched)
    replicate = run()
    rewind_point = weights(replicate.pretrain)
    assert float(rewind_point["bn1.running_mean"].abs().sum()) > 0
    for level, start in enumerate(starts):
        mask = Mask.load(replicate.level(level).path / "mask.safetensors")
        assert equal(start, {name: tensor * mask.get(name, 1) for name, tensor in rewind_point.items()})
    assert len(starts) == 3


def test_each_mask_prunes_the_weights_trained_at_the_level_before(run):
    replicate = run()
    masks = [Mask.load(replicate.level(level).path / "mask.safetensors") for level in range(3)]
    assert masks[0].density == 1
    for level in range(2):
        assert masks[level + 1] == prune_by_magnitude(weights(replicate.level(level)), masks[level], 0.2)
    for level in range(3):
        trained = weights(replicate.level(level))
        assert all(bool((trained[name][~left] == 0).all()) for name, left in masks[level].items())
        assert replicate.level(level).result()["weights_remaining_percent"] == 100 * masks[level].density


def test_levels_train_from_the_rewind_step_to_the_end(run):
    replicate = run()
    assert replicate.pretrain.result()["steps"] == 4
    assert [replicate.level(level).result()["steps"] for level in range(3)] == [8, 8, 8]


def test_init_rewinds_to_the_initialisation(run):
    replicate = run(arm="init")
    network = (
        imp.IMP(loading.load_config("tiny.yaml"), replicate, Progress(["replicate_0"], 0), lambda: None)
        .builder.build_network()
        .module
    )
    assert equal(weights(replicate.pretrain), network.state_dict())
    assert replicate.level(0).result()["steps"] == 12


def examples_seen(monkeypatch, run, **options):
    """The examples and labels of the batches of each phase, through the loader that it really used."""
    seen, original = [], trainer.train

    def watched(model, loader, *rest):
        batches = []
        seen.append(batches)
        real = loader.batch

        def batch(step):
            images, labels = real(step)
            batches.append((loader.examples(step), labels.numpy()))
            return images, labels

        loader.batch = batch
        try:
            return original(model, loader, *rest)
        finally:
            loader.batch = real

    monkeypatch.setattr(trainer, "train", watched)
    run(*options.pop("overrides", ()), **options)
    return [([examples for examples, _ in batches], [labels for _, labels in batches]) for batches in seen]


def test_pretraining_sees_the_random_subset_in_passes_and_levels_see_all(run, monkeypatch):
    seen = examples_seen(monkeypatch, run)
    labels = catalog.load("digits", "unused").train.labels
    subset = subsets.random_subset(labels, 128, seeds.derive_seed(42, 0, "subset"))
    pretraining = seen[0][0]
    assert len(pretraining) == 4
    for number in range(2):  # 128 examples are two batches of 64
        assert sorted([*pretraining[2 * number], *pretraining[2 * number + 1]]) == subset.tolist()
    for level, _ in seen[1:]:
        assert len(level) == 8
        assert not {int(i) for batch in level for i in batch} <= set(subset.tolist())


def test_arms_of_a_replicate_share_the_order_of_examples(run, monkeypatch):
    everything = examples_seen(monkeypatch, run, arm="all")
    fresh = examples_seen(monkeypatch, run, arm="init")
    order = [batch.tolist() for batch in fresh[0][0]]
    assert [batch.tolist() for batch in everything[0][0] + everything[1][0]] == order


@pytest.mark.parametrize("arm", ["all", "random", "easy", "hard"])
def test_pretraining_sees_noisy_labels_and_every_level_the_true_ones(run, monkeypatch, arm):
    seen = examples_seen(monkeypatch, run, arm=arm, overrides=["pretrain.label_noise=0.5"])
    true = catalog.load("digits", "unused").train.labels
    noisy = label_noise.randomize_labels(true, 0.5, 10, seeds.derive_seed(42, "all", "noise"))
    phases = seen[2:] if arm in ("easy", "hard") else seen  # two networks score first
    assert len(phases) == 4
    for number, (examples, labels) in enumerate(phases):
        for positions, given in zip(examples, labels, strict=True):
            assert np.array_equal(given, (true if number else noisy)[positions])
    pretraining = np.concatenate(phases[0][0])
    assert (noisy[pretraining] != true[pretraining]).any()


@pytest.mark.parametrize("arm", ["easy", "hard"])
def test_pretraining_sees_the_examples_at_one_end_of_the_scores(run, monkeypatch, arm):
    options = ["pretrain.subset.class_balanced=true", "pretrain.subset.offset=20"]
    seen = examples_seen(monkeypatch, run, arm=arm, overrides=options)
    labels = catalog.load("digits", "unused").train.labels
    scored = artifact.load_scores(next(Path("runs/scores").glob("*/scores.safetensors")), labels)
    choose = {"easy": subsets.easy, "hard": subsets.hard}[arm]
    expected = choose(scored.mean, labels, 128, class_balanced=True, offset=20)
    assert sorted(np.concatenate(seen[2][0][:2])) == expected.tolist()
    record = load_file(next(Path("runs").glob(f"digits_{arm}-*/replicate_0/pretrain/subset.safetensors")))
    assert record["indices"].tolist() == expected.tolist()


def test_a_random_subset_under_noise_is_balanced_over_the_labels_that_pretraining_sees(run):
    replicate = run("pretrain.label_noise=0.5", "pretrain.subset.size=130")
    record = json.loads((replicate.pretrain.path / "subset.json").read_text())
    assert set(record["classes"].values()) == {13}
    assert record["wrong_labels_percent"]["subset"] > 20
    assert "subset.safetensors" in replicate.pretrain.result()["sha256"]


def test_replicates_that_would_choose_by_other_scores_are_refused(run, tiny):
    replicate = run("prune.levels=0", arm="easy")
    made = RunDirectory(loading.load_config(tiny("easy"), ["prune.levels=0"]))
    path = replicate.pretrain.path / "result.json"
    write_json(path, read_json(path) | {"scores_sha256": "of other scores"})
    with pytest.raises(UserError, match=r"replicate_0/pretrain chose by other scores"):
        imp.IMP(made.config, made.replicate(1), Progress(["replicate_1"], 0), lambda: None).run()


def test_a_score_file_by_hand_takes_the_place_of_scoring(run, place, monkeypatch):
    labels = catalog.load("digits", "unused").train.labels
    values = np.arange(1442, dtype=np.float32)[None]
    artifact.save_scores(place / "mine", values, labels, "digits", "digits")
    given = ["scores.file=mine/scores.safetensors"]
    seen = examples_seen(monkeypatch, run, arm="easy", overrides=given)
    assert len(seen) == 4 and not Path("runs/scores").exists()
    assert sorted(np.concatenate(seen[0][0][:2])) == list(range(128))


class Settings(Algorithm):
    """Notes what each phase trains with: the arguments of its Trainer, and every forward."""

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
    """The settings of every phase that is trained."""
    seen, real = [], composer_internals.LeanTrainer

    def build(algorithms, **options):
        seen.append(Settings(options))
        return real(algorithms=[*algorithms, seen[-1]], **options)

    monkeypatch.setattr(composer_internals, "LeanTrainer", build)
    return seen


def test_each_phase_trains_with_what_the_configuration_says(run, phases):
    given = ["train.lr=0.3", "pretrain.lr=0.2", "train.gamma=0.5", "train.momentum=0.8", "train.weight_decay=0.01"]
    run(*given, "prune.levels=0", "deterministic=true", "precision=fp32")
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
    (first_weights, first_batch), (weights_of_init, batch_of_init) = phases[0].first, phases[4].first
    assert equal(first_weights, weights_of_init)
    for mine, other in zip(first_batch, batch_of_init, strict=True):
        assert torch.equal(mine, other)


def test_replicates_differ_in_initial_weights_and_images(run, phases, tiny):
    run(arm="init")
    made = RunDirectory(loading.load_config(tiny("init")))
    imp.IMP(made.config, made.replicate(1), Progress(["replicate_1"], 0), lambda: None).run()
    (weights_0, batch_0), (weights_1, batch_1) = phases[0].first, phases[3].first
    assert not torch.equal(weights_0["conv1.weight"], weights_1["conv1.weight"])
    assert not torch.equal(batch_0[0], batch_1[0])


class Nothing(Algorithm):
    def __init__(self, *args, **kwargs):
        pass

    def match(self, event, state):
        return False

    def apply(self, event, state, logger):
        pass


class KeepsButDoesNotRewind(Rewind):
    def match(self, event, state):
        return event != Event.FIT_START and super().match(event, state)


@pytest.mark.parametrize(
    ("algorithm", "removed"),
    [(SubsetSampling, Nothing), (Rewind, KeepsButDoesNotRewind)],
)
def test_a_run_without_one_of_the_algorithms_is_another_run(run, monkeypatch, algorithm, removed):
    with_it = weights(run("runs=with", "prune.levels=1").level(1))
    monkeypatch.setattr(imp, algorithm.__name__, removed)
    without = weights(run("runs=without", "prune.levels=1").level(1))
    assert not equal(with_it, without)


def test_a_run_without_masks_is_refused(run, monkeypatch):
    monkeypatch.setattr(imp, "ApplyMask", Nothing)
    with pytest.raises(UserError, match=r"level_1: weights that its mask prunes are not zero"):
        run("prune.levels=1")


def test_a_finished_run_is_not_computed_again(run, monkeypatch):
    replicate = run()
    before = {path: path.stat().st_mtime_ns for path in replicate.path.rglob("*")}

    def trained_again(*args):
        raise AssertionError("a finished phase was trained again")

    monkeypatch.setattr(trainer, "train", trained_again)
    run()
    assert {path: path.stat().st_mtime_ns for path in replicate.path.rglob("*")} == before


def test_more_levels_extend_a_run_to_what_it_would_have_been(run):
    run("prune.levels=1")
    extended = run("prune.levels=2")
    whole = run("prune.levels=2", "runs=whole")
    assert extended.path.parent.name == whole.path.parent.name
    assert equal(weights(extended.level(2)), weights(whole.level(2)))


def test_a_damaged_file_is_refused_by_name(run):
    replicate = run("prune.levels=1")
    path = replicate.level(1).path / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00\x00")
    with pytest.raises(UserError, match=r"level_1/weights.safetensors: "):
        run("prune.levels=2")


def test_a_level_that_does_not_follow_from_the_one_before_is_refused_by_name(run):
    replicate, other = run("prune.levels=1"), run("prune.levels=1", "seed=1")
    shutil.rmtree(replicate.level(0).path)
    shutil.copytree(other.level(0).path, replicate.level(0).path)
    with pytest.raises(UserError, match=r"level_1: its mask is not what pruning level 0 leaves"):
        run("prune.levels=1")


def test_a_level_whose_mask_and_weights_disagree_is_refused_by_name(run):
    replicate = run("prune.levels=1")
    level = replicate.level(1)
    level.write("weights.safetensors", (replicate.level(0).path / "weights.safetensors").read_bytes())
    level.finish({key: value for key, value in level.result().items() if key not in ("sha256", "versions")})
    with pytest.raises(UserError, match=r"level_1: weights that its mask prunes are not zero"):
        run("prune.levels=1")


def test_a_network_that_ends_with_weights_that_are_no_numbers_is_no_result(run):
    with pytest.raises(TrainingError, match=r"level_0: the test loss is nan after step 12"):
        run("prune.levels=0", "train.milestones=[11]", "train.gamma=1e30")


def test_results_say_what_was_measured(run):
    result = json.loads((run().level(2).path / "result.json").read_text())
    assert set(result) == {
        "test_accuracy_percent",
        "test_loss",
        "steps",
        "seconds",
        "timestamp",
        "level",
        "weights_remaining_percent",
        "versions",
        "sha256",
        "checksum",
    }
    assert set(result["sha256"]) == {"mask.safetensors", "weights.safetensors", "curve.jsonl"}
