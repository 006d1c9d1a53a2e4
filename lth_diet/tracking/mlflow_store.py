"""The MLflow store: its location, creation and lock, and why it cannot be used."""

import contextlib
import glob
import os
import re
import secrets
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from filelock import FileLock, Timeout
from mlflow import MlflowClient
from mlflow.entities import Experiment
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from sqlalchemy import create_engine
from sqlalchemy.exc import ArgumentError

from lth_diet.errors import UserError

_ARTIFACTS = "mlartifacts"
LOCK_TIMEOUT = 60.0
"""Seconds to wait for another process that writes a local store."""
_CONNECT_TIMEOUT = 10.0  # seconds
_PORTS = {"postgresql": 5432, "mysql": 3306}
_MAX_FOLDER_NAME = 60  # characters, of up to four bytes each
_MAX_REASON = 400  # characters
_HAS_ARTIFACTS = "tags.phase = 'all' and attributes.status = 'FINISHED'"


class StoreError(Exception):
    """MLflow refuses. The message says why and what to do, and completes "MLflow is not up to date: ..."."""


DATABRICKS = ("databricks", "databricks-uc")
"""Stores that MLflow knows by name."""


def tracking_uri() -> str:
    """Return MLFLOW_TRACKING_URI, or by default a SQLite store in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"


_COMPARISON = "runs?compareRunsMode=CHART&workflowType=machine_learning&searchFilter=tags.phase%20%3D%20%27all%27"


def comparison_link(experiment: str, address: str | None = None) -> str | None:
    """Return the link to MLflow's charts of the replicates of an experiment.

    Args:
        experiment: Name of the experiment.
        address: Address of the UI. By default that of the store if it is a server, or of `mlflow ui`.

    Returns:
        The link without secrets; None if there is no such experiment or the store does not respond.
    """
    uri = tracking_uri()
    if uri.startswith(DATABRICKS):  # has another UI
        return None
    server = without_secrets(uri).rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    try:
        found = open_client().get_experiment_by_name(experiment)
    except Exception:  # MLflow, SQLAlchemy, requests and the file system each raise their own
        return None
    return f"{address or server}/#/experiments/{found.experiment_id}/{_COMPARISON}" if found else None


def experiment_names() -> list[str]:
    """Names of the experiments of the store, without MLflow's empty one."""
    return [found.name for found in open_client().search_experiments() if found.experiment_id != "0"]


def describe_store() -> str:
    """Return how to view the store: a command for a local store, the address without secrets for a server."""
    if database := _sqlite_path(tracking_uri()):
        return f"mlflow ui --backend-store-uri {shlex.quote(f'sqlite:///{database}')}"
    return without_secrets(tracking_uri())


def without_secrets(text: str) -> str:
    """Remove user names, passwords and options from the URLs in a text."""
    return re.sub(r"(?<=://)\S*@|(?<=\S)\?\S*", "", text)


def _sqlite_path(uri: str) -> Path | None:
    """Path of a local store; None if the store is a server."""
    where, _, _ = uri.partition("?")  # options of SQLAlchemy
    return Path(where.removeprefix("sqlite:///")).resolve() if where.startswith("sqlite:///") else None


def open_client() -> MlflowClient:
    """Open the store.

    Raises:
        StoreError: If MLFLOW_TRACKING_URI is a store that MLflow does not write, or that is lost with the process, or
            its driver is missing.
        Exception: Whatever MLflow raises if the URI is invalid or the store cannot be opened.
    """
    _check_uri(tracking_uri())
    check_database(tracking_uri())
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # the URL may contain a password
    return MlflowClient(tracking_uri())


def _check_uri(uri: str) -> None:
    remedy = "set it to sqlite:///<file> or http://<server>, or unset it for sqlite:///mlflow.db"
    if re.fullmatch(r"sqlite(:/{2,3}(:memory:)?)?(\?.*)?", uri):
        raise StoreError(f"MLFLOW_TRACKING_URI = {uri!r} keeps nothing; {remedy}")
    allowed = os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() in ("true", "1")  # a setting of MLflow
    if urlsplit(uri).scheme in ("", "file") and uri not in DATABRICKS and not allowed:
        raise StoreError(f"MLFLOW_TRACKING_URI = {uri!r} means a folder, which MLflow no longer writes; {remedy}")


def check_database(uri: str) -> None:
    """Try once to connect to a database server: MLflow tries for minutes, also where the driver is missing.

    Raises:
        StoreError: If the URI is no address of a database, or the driver is missing.
        OSError: If nothing answers.
    """
    if urlsplit(uri).scheme.partition("+")[0] not in ("postgresql", "mysql", "mssql"):
        return
    try:
        url = create_engine(uri).url
    except (ArgumentError, ImportError) as error:
        raise StoreError(f"the store {without_secrets(uri)!r} cannot be used: {error}") from None
    port = url.port or _PORTS.get(url.get_backend_name())
    if url.host and port and not url.query.keys() & {"host", "unix_socket"}:  # else the driver finds the server
        socket.create_connection((url.host, port), _CONNECT_TIMEOUT).close()


def responds() -> bool:
    """Whether the store can be read at all."""
    try:
        open_client().search_experiments(max_results=1)
    except Exception:  # MLflow, SQLAlchemy, requests and the file system each raise their own
        return False
    return True


def failure_reason(error: Exception) -> str:
    """Return in one line, without secrets, why MLflow could not be read or written."""
    if isinstance(error, StoreError | UserError):
        return str(UserError(str(error)))
    if isinstance(error, Timeout):
        return f"another process has locked {error.lock_file}"
    cause = error
    while cause:  # MLflow quotes requests, which quotes urllib3, which quotes the system
        if isinstance(cause, OSError) and (cause.strerror or isinstance(cause, TimeoutError)):
            return f"{cause.filename or without_secrets(tracking_uri())}: {cause.strerror or 'no response'}"
        cause = cause.__cause__ or cause.__context__
    text = without_secrets(str(UserError(str(error).strip().partition("\n")[0])).partition(" with exception")[0])
    return (text if len(text) <= _MAX_REASON else f"{text[:_MAX_REASON]} ...") or type(error).__name__


@contextlib.contextmanager
def lock_store() -> Iterator[None]:
    """Lock a local store, and create it if it is missing: SQLite allows only one process to create or write it.

    Raises:
        Timeout: If another process, which may be suspended, holds the lock for `LOCK_TIMEOUT`.
        OSError: If the folder of the store cannot be written.
    """
    _check_uri(tracking_uri())
    database = _sqlite_path(tracking_uri())
    if database:
        database.parent.mkdir(parents=True, exist_ok=True)
        Path(f"{database}.lock").touch()  # raises an error where FileLock would wait
    with FileLock(f"{database}.lock", timeout=LOCK_TIMEOUT) if database else contextlib.nullcontext():
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
    database = _sqlite_path(tracking_uri())
    return (database.parent / _ARTIFACTS / _folder_name(experiment)).as_uri() if database else None


def _folder_name(experiment: str) -> str:
    return re.sub(r"[^\w -]", "_", experiment)[:_MAX_FOLDER_NAME]  # experiments may share a folder


def check_experiment(client: MlflowClient, experiment: Experiment) -> None:
    """Check that runs and artifacts can be added to an experiment.

    Raises:
        StoreError: If the experiment is deleted, or its artifacts are in another folder because the local store was
            moved or copied. MLflow stores absolute paths.
    """
    if experiment.lifecycle_stage == "deleted":
        database = _sqlite_path(client.tracking_uri)
        uri = f"MLFLOW_TRACKING_URI={shlex.quote(f'sqlite:///{database}')} " if database else ""
        raise StoreError(
            f"the experiment {experiment.name!r} is deleted; restore it with `{uri}mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}`, or set experiment=<another name>"
        )
    if problem := describe_move(client, experiment):
        raise StoreError(problem)


def describe_move(client: MlflowClient, experiment: Experiment) -> str | None:
    """Describe that a local store was moved or copied since the experiment was created, and the remedy; else None.

    A store is still valid if only the database was moved, if it is found under another name of the same folder, such as
    a symbolic link, or if the user chose the folder of the artifacts.
    """
    database, artifacts = _sqlite_path(client.tracking_uri), _local_path(experiment.artifact_location)
    if database is None or artifacts is None:
        return None
    home = artifacts.parent.parent  # where the database was
    here = database.parent / _ARTIFACTS / artifacts.name
    if artifacts.parent.name == _ARTIFACTS and artifacts.name in (
        _folder_name(experiment.name),
        experiment.experiment_id,
    ):
        only_database = artifacts.exists() and not (home / database.name).exists() and not here.exists()
        moved = not only_database and not (home.exists() and home.samefile(database.parent))
    else:
        moved = not artifacts.exists() and bool(
            client.search_runs([experiment.experiment_id], _HAS_ARTIFACTS, max_results=1)
        )
    if not moved:
        return None
    return (
        f"the store {database} was moved or copied, but MLflow still keeps the artifacts of {experiment.name!r} in "
        f"{artifacts}; rename {database.name} and run `python -m lth_diet sync <folder of runs>` to write a new store "
        "(tags and notes that were added by hand are not kept)"
    )


def _local_path(uri: str) -> Path | None:
    parts = urlsplit(uri)
    return Path(url2pathname(parts.path)) if parts.scheme in ("", "file") else None
