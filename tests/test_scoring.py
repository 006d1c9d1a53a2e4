import json
import shutil
import threading

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from lth_diet.config import loading
from lth_diet.config.identity import scores_identity
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
def scoring(tiny):
    """Scoring of the digits by two networks of six steps."""

    def make(*overrides):
        made = Scoring(loading.load_config(tiny("easy"), overrides), Progress([], 0), lambda: None, range(2))
        made.folder.create()
        return made

    return make


def test_probabilities_are_those_of_single_images_in_evaluation_mode(scoring):
    builder = Builder(scoring().config, "network_0")
    network, data = builder.build_network().module, builder.data
    network.train()
    found = probabilities(network, builder.build_evaluation_loader(data.train))
    assert found.shape == (1442, 10) and found.dtype == np.float64
    assert found.sum(1) == pytest.approx(1)
    few = dataset.Split(data.train.images[:3], data.train.labels[:3])
    images, _ = next(iter(EvaluationLoader(data, few)))
    for image, row in zip(images, found, strict=False):
        with torch.no_grad():
            assert row == pytest.approx(network(image[None]).double().softmax(1)[0].numpy(), rel=1e-4)


def test_an_artifact_has_the_scores_of_every_network_and_tells_how_they_were_made(scoring):
    made = scoring("pretrain.label_noise=0.5")
    made.run()
    assert made.folder.done
    clean = catalog.load("digits", "unused").train.labels
    labels = label_noise.randomize_labels(clean, 0.5, 10, seeds.derive_seed(42, "all", "noise"))
    loaded = artifact.load_scores(made.folder.path / "scores.safetensors", labels)
    assert loaded.el2n.shape == (2, 1442)
    assert loaded.el2n.min() >= 0 and loaded.el2n.max() <= 2**0.5
    assert not np.array_equal(*loaded.el2n), "networks differ in initialisation and order"
    for number, row in enumerate(loaded.el2n):
        assert np.array_equal(load_file(made.folder.network(number).path / "el2n.safetensors")["el2n"], row)
    about = loaded.manifest
    assert (about["dataset"], about["networks"], about["steps"], about["seed"]) == ("digits", 2, 6, 42)
    assert (about["label_noise"], about["model"], about["examples"]) == (0.5, "ResNet-8 width 2", 1442)
    assert about["network_seeds"] == [seeds.derive_seed(42, f"network_{k}", "init") for k in range(2)]
    assert len(about["test_accuracy_percent"]) == 2 and about["versions"]["torch"]
    assert about["identity"] == json.loads(json.dumps(scores_identity(made.config)))
    names = {path.name for path in (made.folder.path / "examples").iterdir()}
    assert names == {"histogram.png", "easiest.png", "hardest.png", "summary.json"}


def test_networks_train_on_the_noisy_labels_as_train_says_from_the_first_step(scoring, monkeypatch):
    seen, original = [], trainer.train

    def watched(model, loader, evaluation, schedule, algorithms, *rest):
        seen.append((loader.labels.clone(), schedule, list(algorithms)))
        return original(model, loader, evaluation, schedule, algorithms, *rest)

    monkeypatch.setattr(trainer, "train", watched)
    made = scoring("pretrain.label_noise=0.5", "train.lr=0.3", "train.milestones=[3, 9]")
    made.run()
    assert len(seen) == 2
    for labels, schedule, algorithms in seen:
        assert np.array_equal(labels.numpy(), Builder(made.config, "all").noisy_data.train.labels)
        assert schedule == trainer.Schedule(0, 6, 0.3, (3, 9)) and algorithms == []


def test_a_finished_artifact_or_network_is_not_computed_again(scoring, monkeypatch):
    made = scoring()
    made.run()
    before = {path: path.stat().st_mtime_ns for path in made.folder.path.rglob("*") if path.name != ".lease"}
    monkeypatch.setattr(trainer, "train", lambda *args: pytest.fail("trained again"))
    scoring().run()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (made.folder.path / "manifest.json").unlink()
    content = (made.folder.path / "scores.safetensors").read_bytes()
    scoring().run()
    assert (made.folder.path / "scores.safetensors").read_bytes() == content


def test_an_artifact_outlives_its_networks_and_its_pictures(scoring, monkeypatch):
    made = scoring()
    made.run()
    for name in ("network_0", "network_1", "examples"):
        shutil.rmtree(made.folder.path / name)
    monkeypatch.setattr(trainer, "train", lambda *args: pytest.fail("trained again"))
    scoring().run()
    assert len(list((made.folder.path / "examples").iterdir())) == 4


def test_a_picture_that_fails_is_a_warning(scoring, monkeypatch):
    made = scoring()
    monkeypatch.setattr("lth_diet.scoring.save_scores_pictures", lambda *args: 1 / 0)
    made.run()
    assert made.folder.done
    assert made.progress.messages == ["warning: no pictures of the scores (ZeroDivisionError: division by zero)"]


def test_scores_that_another_configuration_made_are_refused_with_a_remedy(scoring):
    made, other = scoring(), scoring("train.lr=0.3")
    made.run()
    labels = Builder(made.config, "all").data.train.labels
    for name in ("scores.safetensors", "manifest.json"):
        shutil.copy(made.folder.path / name, other.folder.path)
    with pytest.raises(UserError, match=r"scores that another configuration made; delete .*manifest\.json"):
        other.folder.load(labels)


def test_scores_made_before_a_setting_existed_are_taken_at_its_default(scoring):
    made = scoring()
    made.run()
    path = made.folder.path / "manifest.json"
    manifest = read_json(path)
    del manifest["identity"]["compile"]
    write_json(path, manifest)
    labels = Builder(made.config, "all").noisy_data.train.labels
    assert len(made.folder.load(labels).el2n) == 2


def test_many_processes_may_create_one_folder_at_once(scoring):
    folder = scoring().folder
    shutil.rmtree(folder.path)
    threads = [threading.Thread(target=ScoresDirectory(folder.config).create) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_json(folder.path / "config.json")["scores_id"] == folder.path.name
    assert {path.name for path in folder.path.iterdir()} <= {"config.json"}


def test_a_network_that_another_process_holds_is_left_to_it(scoring):
    made = scoring()
    with lock(made.folder.network(1).path, 0):
        assert made.train(0)
        assert not made.train(1)
    assert made.train(1)
    assert not made.train(1)


def test_a_network_does_not_depend_on_the_others_or_on_their_number(scoring):
    few, more = scoring(), scoring("scores.networks=3")
    assert few.folder.path != more.folder.path
    few.train(1)
    more.train(1)
    name = "network_1/el2n.safetensors"
    assert (few.folder.path / name).read_bytes() == (more.folder.path / name).read_bytes()


def test_a_damaged_network_is_refused_by_name(scoring):
    made = scoring()
    for number in range(2):
        made.train(number)
    path = made.folder.network(0).path / "el2n.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"network_0/el2n\.safetensors: missing or damaged"):
        made.run()
    assert not made.folder.done


def test_the_experiment_of_an_artifact_is_that_of_the_first_launch(scoring):
    first = scoring()
    scoring("experiment=later")
    about = json.loads((first.folder.path / "config.json").read_text())
    assert about["experiment"] == "tiny"
    assert ScoresDirectory(first.config).path == first.folder.path
