"""The MLflow store: its location, creation and lock."""

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
    """Return MLFLOW_TRACKING_URI, or by default a SQLite store in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


def describe_store() -> str:
    """Return how to view the store: a command for a local store, the address without secrets for a server."""
    if database := _sqlite_path():
        return f"mlflow ui --backend-store-uri {shlex.quote(f'sqlite:///{database}')}"
    return without_secrets(tracking_uri())


def without_secrets(text: str) -> str:
    """Remove user names, passwords and options from the URLs in a text."""
    return re.sub(r"(?<=://)\S*@|(?<=\S)\?\S*", "", text)


def _sqlite_path() -> Path | None:
    """Path of a local store; None if the store is a server."""
    where, _, _ = tracking_uri().partition("?")  # options of SQLAlchemy
    return Path(where.removeprefix("sqlite:///")).resolve() if where.startswith("sqlite:///") else None


def open_client() -> MlflowClient:
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # the URL may contain a password
    return MlflowClient(tracking_uri())


@contextlib.contextmanager
def lock_store() -> Iterator[None]:
    """Lock a local store, and create it if it is missing: SQLite allows only one process to create or write it."""
    database = _sqlite_path()
    with FileLock(f"{database}.lock") if database else contextlib.nullcontext():
        if database and not database.exists():
            _create_sqlite(database)
        yield


def _create_sqlite(database: Path) -> None:
    """Create a local store atomically: MLflow takes many steps, and cannot continue from half of them."""
    part = f".part-{secrets.token_hex(8)}"
    where, mark, options = tracking_uri().partition("?")
    try:
        # MlflowClient would insert the name of the working folder into SQL unescaped
        SqlAlchemyStore(f"{where}{part}{mark}{options}", (database.parent / "mlartifacts").as_uri())
        Path(f"{database}{part}").rename(database)
    finally:
        for rest in database.parent.glob(f"{glob.escape(database.name)}.part-*"):  # including those of a killed process
            rest.unlink()


def artifact_location(experiment: str) -> str | None:
    """Return where a local store keeps the artifacts of an experiment; None if a server decides.

    This is a folder below `mlartifacts`, next to the store, for any name of an experiment, even `../../home`.
    """
    database = _sqlite_path()
    folder = re.sub(r"[^\w -]", "_", experiment)[:_MAX_FOLDER_NAME]  # experiments may share a folder
    return (database.parent / "mlartifacts" / folder).as_uri() if database else None
