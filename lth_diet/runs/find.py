"""Finds the run directories and scores directories in a folder."""

import contextlib
import re
from pathlib import Path

from lth_diet.errors import UserError
from lth_diet.files import read_json


def find_directories(runs: Path) -> tuple[list[Path], list[Path]]:
    """Find run directories and scores directories.

    Args:
        runs: A folder of runs, or a single run directory or scores directory.

    Returns:
        Run directories, with those of instability analyses, and scores directories, each sorted by path.

    Raises:
        UserError: If there are none, or `runs` is a URL.
    """
    if re.match(r"\w+:/", str(runs)):
        raise UserError(f"{runs}: a URL, not a folder; copy it first with `python -m lth_diet pull <URL> <folder>`")
    configs = [*runs.glob("config.json"), *runs.glob("*/config.json"), *runs.glob("scores/*/config.json")]
    configs += runs.glob("instability/*/config.json")
    if not configs:
        raise UserError(f"{runs}: contains no runs; expected a run directory or a folder of run directories")
    found = sorted(config.parent for config in configs)
    scored = [folder for folder in found if _is_scores_directory(folder)]
    return [folder for folder in found if folder not in scored], scored


def _is_scores_directory(folder: Path) -> bool:
    with contextlib.suppress(UserError):
        return "scores_id" in read_json(folder / "config.json")
    return False
