"""EL2N scores: from probabilities and labels to a number an example, and the artifact that keeps them.

<folder>/
    scores.safetensors      el2n: float32 (K, N), a row a network; mean: float32 (N,), over the networks
    manifest.json           of which examples and labels, how they were made, sha256 of the scores; written last
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from lth_diet.errors import UserError
from lth_diet.files import read_json, write_atomically, write_json


def hash_labels(labels: np.ndarray) -> str:
    """Tells two sets of labels apart."""
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of every training example.

    Attributes:
        el2n: Of each network, float32 (K, N).
        manifest: How they were made.
    """

    el2n: np.ndarray
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """What the numbers are."""
        return self.manifest.get("score", "EL2N score, 0 to √2")

    @property
    def mean(self) -> np.ndarray:
        """Over the networks, float32 (N,)."""
        return self.el2n.mean(0, dtype=np.float64).astype(np.float32)


def save_scores(
    folder: Path, el2n: np.ndarray, labels: np.ndarray, dataset: str, dataset_fingerprint: str, **about: Any
) -> None:
    """Write an artifact; scores of another kind than EL2N may be kept in the same form.

    Args:
        folder: Made if it is not there.
        el2n: float32 (K, N): a row a network, or one row.
        labels: That the scores were measured against, shape (N,), with their noise.
        dataset: Name of the data set.
        dataset_fingerprint: `datasets.facts(...).fingerprint`.
        about: What else the manifest is to tell; `score` names scores that are not EL2N.

    Raises:
        ValueError: If the scores are not finite numbers of that shape and type.
    """
    _check(el2n, len(labels))
    folder.mkdir(parents=True, exist_ok=True)
    content = save_tensors({"el2n": np.ascontiguousarray(el2n), "mean": Scores(el2n, {}).mean})
    manifest = {
        "dataset": dataset,
        "dataset_fingerprint": dataset_fingerprint,
        "examples": len(labels),
        "labels_sha256": hash_labels(labels),
        **about,
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    write_atomically(folder / "scores.safetensors", content)
    write_json(folder / "manifest.json", manifest)


_MANIFEST = {
    **dict.fromkeys(("sha256", "dataset", "dataset_fingerprint", "labels_sha256"), str),
    "score": str | None,
    "label_noise": float | int | None,
    "seed": int | None,
}
_MAX = {"label_noise": 1, "seed": 2**32 - 1}


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest that lies beside `path`, a scores.safetensors.

    Raises:
        UserError: If either file is missing or not what it should be, or the scores are not those that the manifest was
            written with.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; allowed: the path of the scores.safetensors in it")
    manifest = path.with_name("manifest.json")
    try:
        about = read_json(manifest, _MANIFEST)
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); allowed: a scores.safetensors with its manifest.json"
        ) from None
    except UserError as error:
        raise UserError(f"{error}; allowed: the manifest.json that was written beside the scores") from None
    for key, most in _MAX.items():
        if not 0 <= (about.get(key) or 0) <= most:
            raise UserError(f"{manifest}: {key}: {about[key]!r} is not allowed; allowed: 0 to {most}")
    if hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise UserError(f"{path}: not the bytes that its manifest.json tells of; allowed: the file as it was written")
    return about


def check_dataset(path: Path, dataset: str, dataset_fingerprint: str) -> None:
    """Check scores against a data set without reading the data.

    Raises:
        UserError: If they are damaged or of other examples.
    """
    about = read_manifest(path)
    if (about["dataset"], about["dataset_fingerprint"]) != (dataset, dataset_fingerprint):
        raise UserError(
            f"{path}: scores of {about['dataset']} ({about['dataset_fingerprint']}); "
            f"allowed: of {dataset} ({dataset_fingerprint})"
        )


def load_scores(path: Path, labels: np.ndarray) -> Scores:
    """Read an artifact.

    Args:
        path: Its scores.safetensors.
        labels: Those that pre-training will see, shape (N,).

    Raises:
        UserError: If the file is damaged, is not scores, or is of other labels.
    """
    about = read_manifest(path)
    if about["labels_sha256"] != hash_labels(labels):
        raise UserError(
            f"{path}: scores against other labels (label noise {about.get('label_noise', 'unknown')}, seed "
            f"{about.get('seed', 'unknown')}); allowed: scores against the labels that pre-training sees"
        )
    try:
        values = load_tensors(path.read_bytes())["el2n"]
        _check(values, len(labels))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not scores ({error}); allowed: a file that scores.save wrote") from None
    return Scores(values, about)


def _check(el2n: np.ndarray, examples: int) -> None:
    if el2n.dtype != np.float32 or el2n.ndim != 2 or not len(el2n) or el2n.shape[1] != examples:
        raise ValueError(f"el2n is {el2n.dtype} of shape {el2n.shape}; allowed: float32 (networks, {examples})")
    if not np.isfinite(el2n).all():
        raise ValueError("a score is not a finite number")
