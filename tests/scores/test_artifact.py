import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import save

from lth_diet.errors import UserError
from lth_diet.files import write_json
from lth_diet.scores import artifact as artifacts
from lth_diet.scores.el2n import el2n

LOGITS = arrays.arrays(
    np.float64, st.tuples(st.integers(1, 20), st.integers(2, 8)), elements=st.floats(-60, 60, allow_nan=False)
)


def softmax(logits):
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


@given(LOGITS, st.data())
def test_el2n_is_the_norm_of_the_error_vector_and_within_its_bounds(logits, data):
    probabilities, (count, classes) = softmax(logits), logits.shape
    labels = np.array(data.draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count)))
    before = probabilities.copy()
    found = el2n(probabilities, labels)
    assert np.array_equal(probabilities, before)
    for row, label, score in zip(probabilities, labels, found, strict=True):
        naive = math.sqrt(sum((p - (c == label)) ** 2 for c, p in enumerate(row)))
        assert score == pytest.approx(naive, rel=1e-9, abs=1e-12)
        assert 0 <= score <= math.sqrt(2) * (1 + 1e-12)


def test_el2n_reaches_its_bounds():
    certain = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert el2n(certain, np.array([0, 1])).tolist() == [0, math.sqrt(2)]


LABELS = np.arange(12) % 3


@pytest.fixture
def artifact(place):
    """A folder with scores of two networks."""
    values = np.random.default_rng(0).random((2, 12), np.float32)
    artifacts.save_scores(place / "made", values, LABELS, "digits", "digits", label_noise=0.1, seed=42)
    return place / "made/scores.safetensors", values


def test_an_artifact_gives_back_what_was_saved(artifact):
    path, values = artifact
    loaded = artifacts.load_scores(path, LABELS)
    assert np.array_equal(loaded.el2n, values)
    assert loaded.mean == pytest.approx(values.mean(0))
    assert loaded.mean.dtype == np.float32
    assert loaded.manifest["seed"] == 42 and loaded.manifest["examples"] == 12


def test_scores_against_other_labels_are_refused_by_name(artifact):
    path, _ = artifact
    with pytest.raises(UserError, match=r"made/scores\.safetensors: scores against other labels \(label noise 0\.1"):
        artifacts.load_scores(path, LABELS[::-1])


def test_scores_of_other_data_are_refused_by_name(artifact):
    path, _ = artifact
    artifacts.check_dataset(path, "digits", "digits")
    with pytest.raises(UserError, match=r"scores\.safetensors: scores of digits \(digits\); allowed: of cifar10"):
        artifacts.check_dataset(path, "cifar10", "cifar10")


def test_altered_bytes_are_refused_by_name(artifact):
    path, _ = artifact
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for check in (artifacts.read_manifest, lambda path: artifacts.load_scores(path, LABELS)):
        with pytest.raises(UserError, match=r"scores\.safetensors: not the bytes that its manifest\.json tells of"):
            check(path)


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"sha256": 1}', "{"])
def test_a_manifest_that_is_not_one_is_refused_by_name(artifact, manifest):
    path, _ = artifact
    path.with_name("manifest.json").write_text(manifest)
    with pytest.raises(UserError, match=r"manifest\.json: damaged, or not written by lth_diet; allowed: the manifest"):
        artifacts.read_manifest(path)


@pytest.mark.parametrize("name", ["manifest.json", "scores.safetensors"])
def test_a_missing_file_is_named(artifact, name):
    path, _ = artifact
    path.with_name(name).unlink()
    with pytest.raises(UserError, match=rf"made/{name} cannot be read \(No such file"):
        artifacts.read_manifest(path)


ODD = [np.zeros((2, 11)), np.zeros(12), np.zeros((0, 12)), np.full((1, 12), np.nan)]


@pytest.mark.parametrize("values", [*(values.astype(np.float32) for values in ODD), np.zeros((1, 12))])
def test_scores_of_a_wrong_shape_type_or_value_are_neither_saved_nor_loaded(place, values):
    with pytest.raises(ValueError, match="el2n is|not a finite number"):
        artifacts.save_scores(place / "odd", values, LABELS, "digits", "digits")
    assert not (place / "odd").exists()
    with pytest.raises(UserError, match=r"by_hand/scores\.safetensors: not scores \("):
        artifacts.load_scores(by_hand(place / "by_hand", save({"el2n": values})), LABELS)


@pytest.mark.parametrize("content", [b"not scores", save({"other": np.zeros((1, 12), np.float32)})])
def test_a_file_that_holds_no_scores_is_refused_though_its_manifest_knows_it(place, content):
    with pytest.raises(UserError, match=r"by_hand/scores\.safetensors: not scores \("):
        artifacts.load_scores(by_hand(place / "by_hand", content), LABELS)


def by_hand(folder, content):
    """Any bytes as scores, with a manifest that fits them."""
    folder.mkdir()
    (folder / "scores.safetensors").write_bytes(content)
    about = {"dataset": "digits", "dataset_fingerprint": "digits", "labels_sha256": artifacts.hash_labels(LABELS)}
    about["sha256"] = hashlib.sha256(content).hexdigest()
    write_json(folder / "manifest.json", about)
    return folder / "scores.safetensors"
