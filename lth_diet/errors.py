"""Bad input, and how it is told: exit status 2 after one sentence."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from safetensors import SafetensorError

_DAMAGED = (ValueError, LookupError, TypeError, AttributeError, RecursionError)


class UserError(Exception):
    """Bad input, told in one sentence that names file, key, value and what is allowed; a recipe exits with 2.

    What it quotes may be hostile: line ends, terminal escape sequences and the like are told as in Python's strings.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Parser(argparse.ArgumentParser):
    """Raises a UserError for a bad command line, instead of printing how the command is used."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; see --help")


def print_error(error: UserError | OSError) -> int:
    """Print the sentence; returns the exit status of a command that was given bad input."""
    if isinstance(error, OSError):
        error = UserError(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    print(f"error: {error}", file=sys.stderr)
    return 2


@contextlib.contextmanager
def add_path_to_errors(path: Path) -> Iterator[None]:
    """While a file is written: an OSError of a write names no file; inside it names this one."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


@contextlib.contextmanager
def raise_if_corrupt(path: Path, what: str) -> Iterator[None]:
    """Whatever goes wrong while a file is read and taken apart means that it is not what it should be.

    Raises:
        UserError: That says so.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); allowed: {what}") from None
    except (*_DAMAGED, SafetensorError):
        raise UserError(f"{path}: damaged; allowed: {what}") from None


class TrainingError(Exception):
    """Training cannot go on; the sentence says where it stopped and why."""
