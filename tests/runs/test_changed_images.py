import numpy as np
import pytest
from helpers import write_image_folder
from PIL import Image

from lth_diet.config import loading, run_ids
from lth_diet.data import catalog
from lth_diet.runs import changed_images
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.runs.scores_directory import ScoresDirectory
from lth_diet.scores.artifact import save_scores

SETTINGS = ("dataset.name=image_folder", "train.batch_size=16", "pretrain.subset.size=16")


@pytest.fixture
def load(tiny, place, monkeypatch):
    """Load a configuration of the arm easy on the image folder data/."""
    monkeypatch.setenv("LTH_DIET_CACHE", str(place / "cache"))
    write_image_folder(place / "data", {"train": 40, "test": 2})
    path = tiny("easy")

    def load(*overrides):
        catalog.info.cache_clear()
        return loading.load_config(path, [*SETTINGS, *overrides])

    return load


def change(place, count):
    for number in range(count):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(place / f"data/train/ant/{number:04d}.png")


def test_runs_and_scores_on_earlier_images_are_named_until_training_starts(load, place):
    config = load()
    run, scores = RunDirectory(config), ScoresDirectory(config)
    run.create()
    scores.create()
    catalog.load("image_folder", "data")
    assert changed_images.warnings(config) == []
    change(place, 2)
    new = load()
    expected = [
        f"the images in data are not those of {old.path}: 2 changed (such as train/ant/0000.png); this changes the run "
        f"id and starts {type(old)(new).path}, unless they are restored"
        for old in (run, scores)
    ]
    assert changed_images.warnings(new) == expected
    RunDirectory(new).create()
    ScoresDirectory(new).create()
    assert changed_images.warnings(new) == expected  # another rank may have created them
    RunDirectory(new).replicate(0).path.mkdir()
    ScoresDirectory(new).network(0).path.mkdir()
    assert changed_images.warnings(new) == []


def test_runs_with_other_settings_or_on_other_folders_are_not_named(load, place):
    RunDirectory(load()).create()
    catalog.load("image_folder", "data")
    write_image_folder(place / "other", {"train": 40, "test": 2}, seed=1)
    assert changed_images.warnings(load("dataset.root=other")) == []
    change(place, 1)
    assert changed_images.warnings(load("seed=1")) == []
    assert len(changed_images.warnings(load())) == 1


def test_runs_of_versions_that_identified_images_by_name_and_size_are_named(load, place, monkeypatch):
    config = load()
    info = catalog.info("image_folder", "data")
    name, identifier = run_ids.run_name(config), run_ids.scores_id(config)
    monkeypatch.setattr(catalog, "info", lambda *_: type(info)(info.train_size, info.old_fingerprint, info.classes))
    run, scores = RunDirectory(config), ScoresDirectory(config)
    run.create()
    scores.create()
    monkeypatch.undo()
    monkeypatch.setenv("LTH_DIET_CACHE", str(place / "cache"))
    monkeypatch.chdir(place)
    assert run.path.name != name and scores.path.name != identifier
    first, second = changed_images.warnings(config)
    assert first == (
        f"{run.path} was made by a version that identified images by name and size, and is not resumed: this version "
        f"identifies them by content and starts runs/{name}; resume it with the version that made it, or let this one "
        "start again"
    )
    assert second.startswith(f"{scores.path} was made by a version")
    labels = np.arange(80) // 40
    save_scores(scores.path, np.full((2, 80), 0.5, np.float32), labels, "image_folder", info.old_fingerprint)
    path = f"{scores.path}/scores.safetensors"
    assert changed_images.warnings(config)[1].endswith(f"set scores.file={path} to use its scores")
    assert load(f"scores.file={path}").scores.file == path
