"""Finds run directories and scores below a folder."""

import contextlib
import re
from pathlib import Path

from lth_diet.errors import UserError
from lth_diet.files import read_json


def find_directories(runs: Path) -> tuple[list[Path], list[Path]]:
    """Run directories and folders of scores below a folder, or at it.

    Raises:
        UserError: If there is none.
    """
    if re.match(r"\w+:/", str(runs)):
        raise UserError(f"{runs}: not a folder; `python -m lth_diet pull <URL> <folder>` makes one of a URL")
    configs = [*runs.glob("config.json"), *runs.glob("*/config.json"), *runs.glob("scores/*/config.json")]
    if not configs:
        raise UserError(f"{runs}: holds no run; allowed: a folder of run directories, or one of them")
    found = sorted(config.parent for config in configs)
    scored = [folder for folder in found if _says(folder, "scores_id")]
    return [folder for folder in found if folder not in scored], scored


def _says(folder: Path, key: str) -> bool:
    with contextlib.suppress(UserError):
        return key in read_json(folder / "config.json")
    return False
