"""The file format of scores.

<folder>/
    scores.safetensors      el2n: float32 (K, N), one row per network; mean: float32 (N,), over the networks
    manifest.json           data set, labels and settings, and the sha256 of the scores; written last
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from lth_diet.data.dataset import DatasetInfo
from lth_diet.errors import UserError
from lth_diet.files import read_json, write_atomically, write_json


def hash_labels(labels: np.ndarray) -> str:
    """SHA-256 of labels, as hexadecimal digits."""
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of all training examples.

    Attributes:
        el2n: Scores by each of K networks, float32 of shape (K, N).
        manifest: Content of manifest.json.
    """

    el2n: np.ndarray
    manifest: dict[str, Any]

    def __repr__(self) -> str:
        return "Scores({} networks, {:,} examples)".format(*self.el2n.shape)

    @property
    def name(self) -> str:
        """Name and range of the scores, for the axis of a figure."""
        return self.manifest.get("score", "EL2N score, 0 to √2")

    @property
    def mean(self) -> np.ndarray:
        """Mean over the networks, float32 of shape (N,)."""
        return self.el2n.mean(0, dtype=np.float64).astype(np.float32)


def save_scores(
    folder: Path, el2n: np.ndarray, labels: np.ndarray, dataset: str, dataset_fingerprint: str, **metadata: Any
) -> None:
    """Write scores and their manifest. Scores other than EL2N use the same format.

    Args:
        folder: Folder to write to; created if it is missing.
        el2n: Finite scores, float32 of shape (K, N); K is 1 or more.
        labels: Labels that the scores were computed with, including label noise, shape (N,).
        dataset: Name of the data set.
        dataset_fingerprint: Fingerprint of the data set, `catalog.info(...).fingerprint`.
        **metadata: More entries of the manifest. `score` names scores that are not EL2N.

    Raises:
        ValueError: If `el2n` has another shape or type, or a value that is not finite.
    """
    _validate(el2n, len(labels))
    folder.mkdir(parents=True, exist_ok=True)
    content = save_tensors({"el2n": np.ascontiguousarray(el2n), "mean": Scores(el2n, {}).mean})
    manifest = {
        "dataset": dataset,
        "dataset_fingerprint": dataset_fingerprint,
        "examples": len(labels),
        "labels_sha256": hash_labels(labels),
        **metadata,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    write_atomically(folder / "scores.safetensors", content)
    write_json(folder / "manifest.json", manifest)


_TYPES = {
    **dict.fromkeys(("sha256", "dataset", "dataset_fingerprint", "labels_sha256"), str),
    "score": str | None,
    "label_noise": float | int | None,
    "seed": int | None,
}
_MAX = {"label_noise": 1, "seed": 2**32 - 1}


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a scores.safetensors and verify the checksum of the scores.

    Args:
        path: Path of the scores.safetensors; its manifest.json is in the same folder.

    Raises:
        UserError: If either file is missing, damaged or modified.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected the path of the scores.safetensors in it")
    manifest_path = path.with_name("manifest.json")
    try:
        manifest = read_json(manifest_path, _TYPES)
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); expected a scores.safetensors with its manifest.json"
        ) from None
    except UserError as error:
        raise UserError(f"{error}; expected the manifest.json that was written with the scores") from None
    for key, maximum in _MAX.items():
        if not 0 <= (manifest.get(key) or 0) <= maximum:
            raise UserError(f"{key} = {manifest[key]!r} in {manifest_path}: must be between 0 and {maximum}")
    if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
        raise UserError(f"{path}: its checksum is not the one in manifest.json; expected the file as it was written")
    return manifest


def check_dataset(path: Path, dataset: str, info: DatasetInfo) -> None:
    """Check that scores belong to a data set, without reading its images.

    Scores with the fingerprint that earlier versions gave the images of an image folder are accepted if they are of as
    many examples; `load_scores` compares the labels.

    Args:
        path: Path of the scores.safetensors.
        dataset: Name of the data set.
        info: Fingerprints and size of the data set, `catalog.info(...)`.

    Raises:
        UserError: If the scores are invalid or were computed on other data.
    """
    manifest = read_manifest(path)
    theirs = manifest["dataset_fingerprint"]
    is_same = theirs == info.fingerprint
    is_same_under_old_name = theirs == info.old_fingerprint and manifest.get("examples") == info.train_size
    if manifest["dataset"] != dataset or not (is_same or is_same_under_old_name):
        raise UserError(
            f"{path}: scores of {manifest['dataset']} ({theirs}); expected scores of {dataset} ({info.fingerprint})"
        )


def load_scores(path: Path, labels: np.ndarray) -> Scores:
    """Read and validate scores.

    Args:
        path: Path of the scores.safetensors.
        labels: Labels of pre-training, shape (N,); the scores must have been computed with the same.

    Raises:
        UserError: If the file is invalid, or its scores were computed with other labels.
    """
    manifest = read_manifest(path)
    if manifest["labels_sha256"] != hash_labels(labels):
        raise UserError(
            f"{path}: computed with other labels (label noise {manifest.get('label_noise', 'unknown')}, seed "
            f"{manifest.get('seed', 'unknown')}); expected scores computed with the labels of pre-training"
        )
    try:
        values = load_tensors(path.read_bytes())["el2n"]
        _validate(values, len(labels))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a scores file ({error}); expected a file written by save_scores") from None
    return Scores(values, manifest)


def _validate(el2n: np.ndarray, examples: int) -> None:
    if el2n.dtype != np.float32 or el2n.ndim != 2 or not len(el2n) or el2n.shape[1] != examples:
        raise ValueError(
            f"el2n is {el2n.dtype} of shape {el2n.shape}; expected float32 of shape (networks, {examples})"
        )
    if not np.isfinite(el2n).all():
        raise ValueError("el2n has NaN or infinite values")
