"""Steps of cases.yaml that prepare the working folder: each function is called with the step's value."""

import hashlib
import json
import os
import pickle
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
from helpers import write_image_folder
from PIL import Image
from safetensors.numpy import save

from lth_diet.data import catalog
from lth_diet.files import read_json, write_json
from lth_diet.scores.artifact import hash_labels


def write(files):
    """Files by path, with their content: text, {hex: ...}, {pickle: ...}, or {repeat: [text, times]}."""
    for name, content in files.items():
        if isinstance(content, dict):
            ((kind, value),) = content.items()
            make = {"hex": bytes.fromhex, "pickle": pickle.dumps, "repeat": lambda pair: (pair[0] * pair[1]).encode()}
            content = make[kind](value)
        else:
            content = content.encode()
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)


def mkdir(paths):
    for path in paths:
        Path(path).mkdir(parents=True, exist_ok=True)


def link(links):
    for path, target in links.items():
        Path(path).symlink_to(target)


def pipe(path):
    os.mkfifo(path)


def remove(path):
    shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def rename(pair):
    Path(pair[0]).rename(pair[1])


def mode(modes):
    """Octal permissions, by path."""
    for path, bits in modes.items():
        Path(path).chmod(int(bits, 8))


def truncate(lengths):
    """Number of bytes to keep, by path."""
    for path, length in lengths.items():
        Path(path).write_bytes(Path(path).read_bytes()[:length])


def images(root):
    """A valid image folder: classes ant and bee, 8 x 8 pixels."""
    write_image_folder(Path(root))


def picture(about):
    """[path, width, height, Pillow's mode, format]."""
    path, width, height, colors, kind = about
    Image.new(colors, (width, height)).save(path, kind)


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_that_claims(about):
    """[path, width, height, bytes of compressed text]: a small PNG whose header claims a large image."""
    path, width, height, text = about
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    note = _chunk(b"zTXt", b"note\0\0" + zlib.compress(b" " * text))
    data = _chunk(b"IDAT", zlib.compress(b"\0" * 200))
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + header + note + data + _chunk(b"IEND", b""))


def scores(about):
    """Valid mine/scores.safetensors and mine/manifest.json for the digits, except for the changes in `about`.

    `name`, `dtype`, `shape` and `value` change the tensor; `bytes` replaces the safetensors file; `labels: zeros`
    changes the labels; other keys change the manifest, where null removes a key.
    """
    labels = np.zeros(1442, int) if about.pop("labels", None) else catalog.load("digits", "data").train.labels
    values = np.full(about.pop("shape", (1, 1442)), float(about.pop("value", 0.5)), about.pop("dtype", "float32"))
    content = save({about.pop("name", "el2n"): values})
    content = bytes.fromhex(about.pop("bytes", "")) or content
    manifest = {
        "dataset": "digits",
        "dataset_fingerprint": "digits",
        "labels_sha256": hash_labels(labels),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    Path("mine").mkdir()
    Path("mine/scores.safetensors").write_bytes(content)
    write_json(
        Path("mine/manifest.json"), {key: value for key, value in (manifest | about).items() if value is not None}
    )


def seal(phases):
    """Update the checksums in the result.json of these phase directories."""
    for phase in map(Path, phases):
        result = read_json(phase / "result.json")
        result["sha256"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in phase.iterdir()}
        write_json(phase / "result.json", result)


def change(files):
    """Values to set in new or existing JSON files, by path, with a valid checksum; null removes a key."""
    for path, values in zip(map(Path, files), files.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        about = (read_json(path) if path.exists() else {}) | values
        write_json(path, {key: value for key, value in about.items() if value is not None})


def mask(about):
    """[path, tensor name, dtype, remaining weights in the header]: a handmade mask file."""
    path, name, dtype, remaining = about
    header = {"mask": json.dumps({"remaining": remaining, "total": 4, "order": [name]})}
    Path(path).write_bytes(save({name: np.ones(4, dtype)}, header))
