import json
import shutil
import threading

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lth_diet.config import loading
from lth_diet.config.run_ids import scores_identity
from lth_diet.data import catalog, dataset, label_noise, seeds
from lth_diet.data.loader import EvaluationLoader
from lth_diet.errors import UserError
from lth_diet.files import lock, read_json, write_json
from lth_diet.runs.scores_directory import ScoresDirectory
from lth_diet.scores import artifact
from lth_diet.scoring import Scoring, probabilities
from lth_diet.training import trainer
from lth_diet.training.builders import Builder
from lth_diet.training.progress import Progress


@pytest.fixture
def make_scoring(tiny):
    """Creates a Scoring of the digits with two networks of six steps."""

    def make(*overrides):
        scoring = Scoring(loading.load_config(tiny("easy"), overrides), Progress([], 0), lambda: None, range(2))
        scoring.folder.create()
        return scoring

    return make


def test_probabilities_equal_those_of_single_images_in_evaluation_mode(make_scoring):
    builder = Builder(make_scoring().config, "network_0")
    network, data = builder.build_network().module, builder.data
    network.train()
    outputs = probabilities(network, builder.build_evaluation_loader(data.train))[:, 0]
    assert outputs.shape == (1442, 10) and outputs.dtype == np.float64
    assert outputs.sum(1) == pytest.approx(1)
    few = dataset.Split(data.train.images[:3], data.train.labels[:3])
    images, _ = next(iter(EvaluationLoader(data, few)))
    for image, row in zip(images, outputs, strict=False):
        with torch.no_grad():
            assert row == pytest.approx(network(image[None]).double().softmax(1)[0].numpy(), rel=1e-4)


def test_artifact_has_the_scores_of_every_network_and_their_settings(make_scoring):
    scoring = make_scoring("pretrain.label_noise=0.5")
    scoring.run()
    assert scoring.folder.done
    clean = catalog.load("digits", "unused").train.labels
    labels = label_noise.randomize_labels(clean, 0.5, 10, seeds.derive_seed(42, "all", "noise"))
    loaded = artifact.load_scores(scoring.folder.path / "scores.safetensors", labels)
    assert loaded.el2n.shape == (2, 1442)
    assert loaded.el2n.min() >= 0 and loaded.el2n.max() <= 2**0.5
    assert not np.array_equal(*loaded.el2n), "networks differ in initialization and data order"
    for number, row in enumerate(loaded.el2n):
        assert np.array_equal(load_file(scoring.folder.network(number).path / "el2n.safetensors")["el2n"], row)
    manifest = loaded.manifest
    assert (manifest["dataset"], manifest["networks"], manifest["steps"], manifest["seed"]) == ("digits", 2, 6, 42)
    assert (manifest["label_noise"], manifest["model"], manifest["examples"]) == (0.5, "ResNet-8 width 2", 1442)
    assert manifest["network_seeds"] == [seeds.derive_seed(42, f"network_{k}", "init") for k in range(2)]
    assert len(manifest["test_accuracy_percent"]) == 2 and manifest["versions"]["torch"]
    assert manifest["identity"] == json.loads(json.dumps(scores_identity(scoring.config)))
    names = {path.name for path in (scoring.folder.path / "examples").iterdir()}
    assert names == {"histogram.png", "easiest.png", "hardest.png", "summary.json"}


def test_networks_train_on_noisy_labels_with_the_train_settings_from_step_0(make_scoring, monkeypatch):
    calls, original = [], trainer.train

    def train(model, loader, evaluation, schedule, algorithms, *rest):
        calls.append((loader.labels.clone(), schedule, list(algorithms)))
        return original(model, loader, evaluation, schedule, algorithms, *rest)

    monkeypatch.setattr(trainer, "train", train)
    scoring = make_scoring("pretrain.label_noise=0.5", "train.lr=0.3", "train.milestones=[3, 9]")
    scoring.run()
    assert len(calls) == 2
    for labels, schedule, algorithms in calls:
        assert np.array_equal(labels.numpy(), Builder(scoring.config, "all").noisy_data.train.labels)
        assert schedule == trainer.Schedule(0, 6, 0.3, (3, 9)) and algorithms == []


def test_finished_artifacts_and_networks_are_not_computed_again(make_scoring, monkeypatch):
    scoring = make_scoring()
    scoring.run()
    before = {path: path.stat().st_mtime_ns for path in scoring.folder.path.rglob("*") if path.name != ".lease"}
    monkeypatch.setattr(trainer, "train", lambda *args: pytest.fail("trained again"))
    make_scoring().run()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (scoring.folder.path / "manifest.json").unlink()
    content = (scoring.folder.path / "scores.safetensors").read_bytes()
    make_scoring().run()
    assert (scoring.folder.path / "scores.safetensors").read_bytes() == content


def test_pictures_are_restored_from_the_scores_without_the_networks(make_scoring, monkeypatch):
    scoring = make_scoring()
    scoring.run()
    for name in ("network_0", "network_1", "examples"):
        shutil.rmtree(scoring.folder.path / name)
    monkeypatch.setattr(trainer, "train", lambda *args: pytest.fail("trained again"))
    make_scoring().run()
    assert len(list((scoring.folder.path / "examples").iterdir())) == 4


def test_an_error_in_drawing_is_a_warning(make_scoring, monkeypatch):
    scoring = make_scoring()
    monkeypatch.setattr("lth_diet.scores.pictures.save_scores_pictures", lambda *args: 1 / 0)
    scoring.run()
    assert scoring.folder.done
    assert scoring.progress.messages == [
        "warning: cannot draw the pictures of the scores (ZeroDivisionError: division by zero)"
    ]


def test_scores_of_another_configuration_are_rejected_with_a_remedy(make_scoring):
    scoring, other = make_scoring(), make_scoring("train.lr=0.3")
    scoring.run()
    labels = Builder(scoring.config, "all").data.train.labels
    for name in ("scores.safetensors", "manifest.json"):
        shutil.copy(scoring.folder.path / name, other.folder.path)
    with pytest.raises(
        UserError, match=r"the scores were computed with a different configuration; delete .*manifest\.json"
    ):
        other.folder.load(labels)


def test_scores_written_before_a_setting_existed_have_its_default(make_scoring):
    scoring = make_scoring()
    scoring.run()
    path = scoring.folder.path / "manifest.json"
    manifest = read_json(path)
    del manifest["identity"]["compile"]
    write_json(path, manifest)
    labels = Builder(scoring.config, "all").noisy_data.train.labels
    assert len(scoring.folder.load(labels).el2n) == 2


def test_concurrent_creation_of_one_folder_is_safe(make_scoring):
    folder = make_scoring().folder
    shutil.rmtree(folder.path)
    threads = [threading.Thread(target=ScoresDirectory(folder.config).create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_json(folder.path / "config.json")["scores_id"] == folder.path.name
    assert {path.name for path in folder.path.iterdir()} <= {"config.json"}


def test_a_network_locked_by_another_process_is_skipped(make_scoring):
    scoring = make_scoring()
    with lock(scoring.folder.network(1).path, 0):
        assert scoring.train(0)
        assert not scoring.train(1)
    assert scoring.train(1)
    assert not scoring.train(1)


def test_a_network_does_not_depend_on_the_other_networks_or_their_number(make_scoring):
    few, more = make_scoring(), make_scoring("scores.networks=3")
    assert few.folder.path != more.folder.path
    few.train(1)
    more.train(1)
    name = "network_1/el2n.safetensors"
    assert (few.folder.path / name).read_bytes() == (more.folder.path / name).read_bytes()


def test_a_damaged_network_is_named_in_the_error(make_scoring):
    scoring = make_scoring()
    for number in range(2):
        scoring.train(number)
    path = scoring.folder.network(0).path / "el2n.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"network_0/el2n\.safetensors: missing or damaged"):
        scoring.run()
    assert not scoring.folder.done


def test_an_artifact_keeps_the_experiment_of_its_first_launch(make_scoring):
    first = make_scoring()
    make_scoring("experiment=later")
    about = json.loads((first.folder.path / "config.json").read_text())
    assert about["experiment"] == "tiny"
    assert ScoresDirectory(first.config).path == first.folder.path
