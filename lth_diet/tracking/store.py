"""The MLflow store: where it is, how it is created and locked."""

import contextlib
import glob
import os
import re
import secrets
import shlex
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock
from mlflow import MlflowClient
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

_MAX_FOLDER_NAME = 60  # characters, of up to four bytes each


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or a SQLite store in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


def describe_store() -> str:
    """What shows the store: a command for a local one, else its address without what is secret in it."""
    if database := _sqlite_path():
        return f"mlflow ui --backend-store-uri {shlex.quote(f'sqlite:///{database}')}"
    return without_secrets(tracking_uri())


def without_secrets(text: str) -> str:
    """A text without the names, passwords and options of the addresses in it."""
    return re.sub(r"(?<=://)\S*@|(?<=\S)\?\S*", "", text)


def _sqlite_path() -> Path | None:
    """The file of a local store; None if the store is a server."""
    where, _, _ = tracking_uri().partition("?")  # options of SQLAlchemy
    return Path(where.removeprefix("sqlite:///")).resolve() if where.startswith("sqlite:///") else None


def open_client() -> MlflowClient:
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # with the password, if it is in the address
    return MlflowClient(tracking_uri())


@contextlib.contextmanager
def lock_store() -> Iterator[None]:
    """SQLite can neither be created nor written by two processes at once."""
    database = _sqlite_path()
    with FileLock(f"{database}.lock") if database else contextlib.nullcontext():
        if database and not database.exists():
            _create_sqlite(database)
        yield


def _create_sqlite(database: Path) -> None:
    """Make a local store whole or not at all: MLflow makes it in many steps, and does not go on with half of them."""
    part = f".part-{secrets.token_hex(8)}"
    where, mark, options = tracking_uri().partition("?")
    try:
        # MlflowClient would put the working folder's name into SQL as it is
        SqlAlchemyStore(f"{where}{part}{mark}{options}", (database.parent / "mlartifacts").as_uri())
        Path(f"{database}{part}").rename(database)
    finally:
        for rest in database.parent.glob(f"{glob.escape(database.name)}.part-*"):  # also of one that was killed
            rest.unlink()


def artifact_location(experiment: str) -> str | None:
    """Artifacts of a SQLite store lie beside it, wherever a launch was started; a server has its own place.

    An experiment's name may be anything, such as ../../home: its folder is one below mlartifacts, whatever it is.
    """
    database = _sqlite_path()
    folder = re.sub(r"[^\w -]", "_", experiment)[:_MAX_FOLDER_NAME]  # several may share one: each run has its own below
    return (database.parent / "mlartifacts" / folder).as_uri() if database else None
