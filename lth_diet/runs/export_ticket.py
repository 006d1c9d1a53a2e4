"""Exports a lottery ticket (mask, rewind point and trained weights) to a folder that plain PyTorch can load."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from lth_diet.errors import UserError
from lth_diet.files import sha256
from lth_diet.masks.mask import Mask
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.run_directory import ReplicateDirectory


def export_ticket(path: Path, level: int, output: Path) -> dict[str, Any]:
    """Write mask.safetensors, rewind_point.safetensors, weights.safetensors and card.json to a new folder.

    Args:
        path: `runs/<run>/replicate_<r>`.
        level: Level whose mask and trained weights to export.
        output: New folder, created atomically.

    Returns:
        Content of card.json: origin of the ticket, test accuracy, layers, and the sha256 of each file.

    Raises:
        UserError: If the level is not finished, a file is damaged, or `output` exists.
    """
    replicate, phase = find_finished_level(path, level)
    if output.exists():
        raise UserError(f"{output}: already exists; choose a new folder")
    files = {
        "mask.safetensors": phase.verified("mask.safetensors"),
        "rewind_point.safetensors": replicate.pretrain.verified("weights.safetensors"),
        "weights.safetensors": phase.verified("weights.safetensors"),
    }
    keys = ("run_id", "dataset", "model", "arm", "subset_size", "rewind_steps", "label_noise", "seed", "train_steps")
    config = replicate.run_config
    card = {key: config[key] for key in keys}
    result = phase.result()
    measured = {key: float(result[key]) for key in ("weights_remaining_percent", "test_accuracy_percent")}
    card |= {
        "replicate": replicate.index,
        "level": level,
        **measured,
        "layers": Mask.load(files["mask.safetensors"]).table().to_dict("records"),
        "identity": config["identity"],
        "versions": result["versions"],
        "environment": result.get("environment"),
        "sha256": {name: sha256(source) for name, source in files.items()},
    }
    part = output.with_name(f".{output.name}.part-{os.getpid()}")
    try:
        part.mkdir(parents=True)
        for name, source in files.items():
            shutil.copyfile(source, part / name)
        (part / "card.json").write_text(json.dumps(card, indent=2))
        part.rename(output)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"{output}: cannot be written ({error.strerror}); choose a new folder") from None
    return card


def find_finished_level(path: Path, level: int) -> tuple[ReplicateDirectory, PhaseDirectory]:
    """Find a finished level of a replicate directory.

    Args:
        path: `runs/<run>/replicate_<r>`.
        level: Number of the level.

    Raises:
        UserError: If `path` is not a replicate directory or the level is not finished.
    """
    if not (path.parent / "config.json").exists() or not re.fullmatch(r"replicate_\d+", path.name):
        raise UserError(f"{path}: not a replicate directory; expected runs/<run>/replicate_<r>")
    replicate = ReplicateDirectory(path)
    done = [number for number, phase in replicate.levels() if phase.done]
    if level not in done:
        finished = ", ".join(map(str, done)) or "none yet"
        raise UserError(f"{path}: level {level} is not finished; finished levels: {finished}")
    return replicate, replicate.level(level)
