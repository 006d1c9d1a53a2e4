"""Errors of a user's input: reported in one sentence, with exit status 2."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from safetensors import SafetensorError


class UserError(Exception):
    """Invalid input. The message is one sentence that says what is wrong, where, and what to do.

    Input that the message quotes may be hostile: control characters, such as line ends and terminal escape sequences,
    are escaped as in Python strings.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError for an invalid command line instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"command line: {message}; see --help")


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
