import hashlib

import numpy as np
import pytest
from safetensors.numpy import save

from lth_diet.data.dataset import DatasetInfo
from lth_diet.errors import UserError
from lth_diet.files import write_json
from lth_diet.scores import artifact as artifacts

LABELS = np.arange(12) % 3


@pytest.fixture
def artifact(place):
    """Path of a scores file of two networks, and the scores."""
    values = np.random.default_rng(0).random((2, 12), np.float32)
    artifacts.save_scores(place / "made", values, LABELS, "digits", "digits", label_noise=0.1, seed=42)
    return place / "made/scores.safetensors", values


def test_loaded_scores_equal_the_saved_ones(artifact):
    path, values = artifact
    loaded = artifacts.load_scores(path, LABELS)
    assert np.array_equal(loaded.el2n, values)
    assert loaded.mean == pytest.approx(values.mean(0))
    assert loaded.mean.dtype == np.float32
    assert loaded.manifest["seed"] == 42 and loaded.manifest["examples"] == 12
    assert repr(loaded) == "Scores(2 networks, 12 examples)"


def test_scores_computed_with_other_labels_are_rejected(artifact):
    path, _ = artifact
    with pytest.raises(
        UserError, match=r"made/scores\.safetensors: computed with other labels \(label noise 0\.1, seed 42\)"
    ):
        artifacts.load_scores(path, LABELS[::-1])


def test_scores_of_other_data_are_rejected(artifact):
    path, _ = artifact
    artifacts.check_dataset(path, "digits", DatasetInfo(12, "digits", 10))
    with pytest.raises(
        UserError, match=r"scores\.safetensors: scores of digits \(digits\); expected scores of cifar10"
    ):
        artifacts.check_dataset(path, "cifar10", DatasetInfo(12, "cifar10", 10))


def test_scores_with_the_old_fingerprint_are_accepted_if_the_number_of_examples_and_the_labels_agree(place):
    artifacts.save_scores(place, np.full((1, 12), 0.5, np.float32), LABELS, "image_folder", "old")
    path = place / "scores.safetensors"
    artifacts.check_dataset(path, "image_folder", DatasetInfo(12, "new", 10, old_fingerprint="old"))
    for info in (
        DatasetInfo(13, "new", 10, old_fingerprint="old"),
        DatasetInfo(12, "new", 10, old_fingerprint="other"),
    ):
        with pytest.raises(UserError, match=r"scores of image_folder \(old\); expected scores of image_folder \(new\)"):
            artifacts.check_dataset(path, "image_folder", info)
    with pytest.raises(UserError, match="computed with other labels"):
        artifacts.load_scores(path, LABELS[::-1])


def test_a_modified_scores_file_is_rejected(artifact):
    path, _ = artifact
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for check in (artifacts.read_manifest, lambda path: artifacts.load_scores(path, LABELS)):
        with pytest.raises(UserError, match=r"scores\.safetensors: its checksum is not the one in manifest\.json"):
            check(path)


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"sha256": 1}', "{"])
def test_an_invalid_manifest_is_rejected(artifact, manifest):
    path, _ = artifact
    path.with_name("manifest.json").write_text(manifest)
    with pytest.raises(
        UserError, match=r"manifest\.json is damaged or was not written by lth_diet; expected the manifest"
    ):
        artifacts.read_manifest(path)


@pytest.mark.parametrize("name", ["manifest.json", "scores.safetensors"])
def test_a_missing_file_is_named_in_the_error(artifact, name):
    path, _ = artifact
    path.with_name(name).unlink()
    with pytest.raises(UserError, match=rf"made/{name} cannot be read \(No such file"):
        artifacts.read_manifest(path)


INVALID = [np.zeros((2, 11)), np.zeros(12), np.zeros((0, 12)), np.full((1, 12), np.nan)]


@pytest.mark.parametrize("values", [*(values.astype(np.float32) for values in INVALID), np.zeros((1, 12))])
def test_scores_of_invalid_shape_type_or_value_are_neither_saved_nor_loaded(place, values):
    with pytest.raises(ValueError, match="el2n is|el2n has NaN or infinite values"):
        artifacts.save_scores(place / "invalid", values, LABELS, "digits", "digits")
    assert not (place / "invalid").exists()
    with pytest.raises(UserError, match=r"by_hand/scores\.safetensors: not a scores file \("):
        artifacts.load_scores(by_hand(place / "by_hand", save({"el2n": values})), LABELS)


@pytest.mark.parametrize("content", [b"not scores", save({"other": np.zeros((1, 12), np.float32)})])
def test_a_file_without_scores_is_rejected_even_if_its_checksum_matches(place, content):
    with pytest.raises(UserError, match=r"by_hand/scores\.safetensors: not a scores file \("):
        artifacts.load_scores(by_hand(place / "by_hand", content), LABELS)


def by_hand(folder, content):
    """Write any bytes as a scores file with a matching manifest."""
    folder.mkdir()
    (folder / "scores.safetensors").write_bytes(content)
    manifest = {"dataset": "digits", "dataset_fingerprint": "digits", "labels_sha256": artifacts.hash_labels(LABELS)}
    manifest["sha256"] = hashlib.sha256(content).hexdigest()
    write_json(folder / "manifest.json", manifest)
    return folder / "scores.safetensors"
