"""Errors of a user's input: reported in one sentence, with exit status 2. Warnings and paths of the input."""

import argparse
import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError

HOW_TO_RESUME = "; rerun the same command to resume"
"""The remedy at the end of a DeviceError's report."""


class UserError(Exception):
    """Invalid input. The message is one sentence that says what is wrong, where, and what to do.

    Input that the message quotes may be hostile: control characters, such as line ends and terminal escape sequences,
    are escaped as in Python strings.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """Escape control characters, such as line ends and terminal escape sequences, as in Python strings."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def expand_path(text: str) -> str:
    """Replace `~` or `~user` at the start of a path by the home folder.

    Raises:
        ValueError: If there is no such home folder, or the path has a variable such as `$HOME`, which is not expanded.
    """
    variable = re.search(r"\$([A-Za-z_]\w*|\{\w+\})", text)
    if variable and not Path(text).exists():
        raise ValueError(f"must be a path without variables; write the value of {variable[0]} instead")
    if not text.startswith("~"):
        return text
    user, slash, rest = text.partition("/")
    home = None
    with contextlib.suppress(RuntimeError):  # no such user
        home = Path(user).expanduser()
    if home is None or not home.is_absolute() or (user == "~" and os.environ.get("HOME") == ""):
        raise ValueError(f"must be a path; there is no home folder for {user}, so write the whole path")
    return f"{str(home).rstrip('/')}{slash}{rest}" or "/"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError for an invalid command line instead of printing the usage.

    Integers and numbers are decimal. `~` at the start of a `Path` is the home folder.
    """

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.register("type", int, _integer)
        self.register("type", float, _number)
        self.register("type", Path, _path)

    def error(self, message: str) -> NoReturn:
        message = re.sub("ignored explicit argument", "takes no value, not", message)
        raise UserError(f"command line: {message}; see --help")


def _integer(text: str) -> int:
    if not re.fullmatch("-?(0|[1-9][0-9]{0,18})", text):
        raise argparse.ArgumentTypeError(f"must be an integer, not {text!r}")
    return int(text)


def _number(text: str) -> float:
    with contextlib.suppress(ValueError):
        if text.isascii() and text == text.strip() and "_" not in text:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number, not {text!r}")


def _path(text: str) -> Path:
    try:
        return Path(expand_path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from None


def print_warnings(sentences: Iterable[str]) -> None:
    """Print each distinct warning once to stderr."""
    for sentence in dict.fromkeys(sentences):
        print(f"warning: {UserError(sentence)}", file=sys.stderr, flush=True)


def print_error(error: UserError | OSError) -> int:
    """Print an error to stderr and return the exit status for invalid input, 2."""
    if isinstance(error, OSError):
        error = UserError(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    print(f"error: {error}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def add_path_to_errors(path: Path) -> Iterator[None]:
    """Set the file name of an OSError raised inside: an OSError of a write has none."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


@contextlib.contextmanager
def raise_if_corrupt(path: Path, what: str) -> Iterator[None]:
    """Turn errors raised while a file is read and parsed into a UserError.

    Args:
        path: Path of the file, for the message.
        what: What the file should be, for the message; completes "expected ...".

    Raises:
        UserError: If the file cannot be read or its content is invalid.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); expected {what}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError):
        raise UserError(f"{path} is damaged; expected {what}") from None


class TrainingError(Exception):
    """Training cannot continue. The message says where it stopped and why."""


class DeviceError(Exception):
    """A GPU or the connection between ranks failed, which ends the process. Another attempt can succeed."""
