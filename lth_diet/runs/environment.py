"""What a result was computed with beyond its configuration: versions, code and device; and what differs."""

import ast
import contextlib
import functools
import hashlib
import io
import os
import platform
import subprocess
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lth_diet import __version__

PACKAGE = Path(__file__).parents[1]
_COMPUTES = (
    "networks",
    "algorithms",
    "masks",
    "data",
    "scores/el2n.py",
    "training",
    "imp.py",
    "scoring.py",
    "instability.py",
)
KEYS = ("device", "capability", "precision", "torch", "composer", "code")
"""What changes results beyond the configuration, in the order of messages."""

Environment = Mapping[str, str]
"""Values of `KEYS`: what a phase was trained with."""


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python, of the packages that train, and the commit of this repository, if known."""
    found = {"python": platform.python_version(), "lth_diet": __version__}
    found |= {name: metadata.version(package) for name, package in (("torch", "torch"), ("composer", "mosaicml"))}
    commit = os.environ.get("LTH_DIET_COMMIT") or _git_commit()  # a Docker image has no repository
    return found | ({"git_commit": commit} if commit else {})


def _git_commit() -> str:
    """Commit of the repository that tracks this package; empty if none does, as in a virtual environment."""
    with contextlib.suppress(OSError):
        git = functools.partial(subprocess.run, capture_output=True, text=True, cwd=PACKAGE)
        if git(["git", "ls-files", "--error-unmatch", "__init__.py"]).returncode == 0:
            return git(["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]).stdout.strip()
    return ""


@functools.cache
def code_hash(package: Path = PACKAGE) -> str:
    """Hash of the sources that compute results, without comments, docstrings and empty lines: 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for name in _COMPUTES:
        path = package / name
        for source in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{source.relative_to(package).as_posix()}\n".encode())
            digest.update(_without_comments(source.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()[:12]


def _without_comments(source: str) -> str:
    """Python source without comments, docstrings and empty lines."""
    lines = source.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            first, last = node.lineno - 1, node.end_lineno - 1
            beside = lines[first].encode()[: node.col_offset] + lines[last].encode()[node.end_col_offset :]
            if not beside.strip():
                lines[first : last + 1] = [""] * (last + 1 - first)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def environment_of(result: Mapping[str, Any]) -> Environment:
    """The environment in which a phase was trained, as far as its result or the entry of its checkpoint says."""
    return {**(result.get("versions") or {}), **(result.get("environment") or {})}


def merge(earlier: Environment, later: Environment) -> Environment:
    """Environment of a phase that was resumed from a checkpoint; a value that changed becomes `earlier, then later`."""
    merged = dict(later)
    for key, value in later.items():
        before = earlier.get(key, value)
        if before != value:
            merged[key] = before if before.endswith(f", then {value}") else f"{before}, then {value}"
    return merged


def differences(environments: Iterable[tuple[str, Environment]]) -> dict[str, dict[str, list[str]]]:
    """Find what differs between the environments of some phases.

    Args:
        environments: Name of each phase, and its environment. A value that is not known differs from none.

    Returns:
        For each of `KEYS` with several values: the names of the phases with each value.
    """
    found: dict[str, dict[str, list[str]]] = {key: {} for key in KEYS}
    for name, environment in environments:
        for key in (key for key in KEYS if key in environment):
            found[key].setdefault(environment[key], []).append(name)
    return {key: values for key, values in found.items() if len(values) > 1}


def describe(differences: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
    """Describe the result of `differences`, such as `torch = 2.6.0 (pretrain to level_2) and 2.7.0 (level_3)`."""
    return "; ".join(
        f"{key} = " + " and ".join(f"{value} ({_first_to_last(names)})" for value, names in values.items())
        for key, values in differences.items()
    )


def _first_to_last(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}, {len(names)} trainings"
