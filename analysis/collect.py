"""Collects results in one tidy table, one row per replicate and level.

python -m analysis.collect --tracking-uri sqlite:///mlflow.db --experiment cifar10 -o results.csv

The table comes from MLflow, from a CSV file or from the published curves. A running sweep can be collected too;
incomplete replicates are listed. Accuracies are in percent, differences and margins in percentage points.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from lth_diet.errors import Parser, UserError, print_error
from lth_diet.program import run_program
from lth_diet.tracking.mlflow_store import describe_move, failure_reason, tracking_uri, without_secrets

from .arms import Arm

COLUMNS = {
    "dataset": str,
    "model": str,
    "arm": str,
    "subset_size": "Int64",
    "rewind_steps": "int64",
    "label_noise": float,
    "seed": "Int64",
    "replicate": "int64",
    "level": "int64",
    "planned_levels": "Int64",
    "train_steps": "Int64",
    "weights_remaining_percent": float,
    "test_accuracy_percent": float,
    "run_id": str,
}
"""Columns and their types. subset_size is empty for all examples and for no pre-training."""

OPTIONAL = ("seed", "planned_levels", "train_steps")
"""Columns that a CSV file may lack. Without seeds, replicates are identified by their number."""

SUMMARY = {name: COLUMNS[name] for name in ("dataset", "model", "arm", "subset_size", "rewind_steps", "label_noise")}
SUMMARY |= {"level": "int64", "weights_remaining_percent": float, "mean": float, "sd": float, "n": "int64"}
"""Columns of a table of means; sd is the sample standard deviation over n replicates, in percentage points."""

_ORDER = ["dataset", "model", "label_noise", "arm", "rewind_steps", "subset_size"]
_PUBLISHED = Path(__file__).with_name("reference") / "paper_curves.csv"


def collect(tracking_uri: str, experiment: str | None = None) -> pd.DataFrame:
    """Collects the finished levels of every replicate from MLflow.

    Args:
        tracking_uri: URI of the MLflow store.
        experiment: Name of the experiment; None for all experiments of the store.

    Returns:
        One row per replicate and level, with `COLUMNS`.

    Raises:
        UserError: If the store or experiment does not exist, or no level is finished.
    """
    client, experiments = open_store(tracking_uri, experiment)
    rows = [row for run in search_runs(client, experiments, "tags.phase = 'all'") for row in _levels(client, run)]
    if not rows:
        where = f"experiment {experiment!r}" if experiment else "any experiment"
        raise UserError(f"no level is finished yet in {where} of the MLflow store")
    source = f"MLflow experiment {experiment!r}" if experiment else "the MLflow store"
    return _typed(pd.DataFrame(rows, columns=list(COLUMNS)).drop_duplicates(), COLUMNS, source)


def open_store(tracking_uri: str, experiment: str | None) -> tuple[MlflowClient, list[str]]:
    """Opens an MLflow store; returns a client and the ids of the experiment, or of all experiments.

    Raises:
        UserError: If the store cannot be read or the experiment does not exist.
    """
    local = next(
        (tracking_uri.removeprefix(kind) for kind in ("sqlite:///", "file://") if tracking_uri.startswith(kind)),
        tracking_uri if "://" not in tracking_uri else None,
    )
    exists = Path.is_file if tracking_uri.startswith("sqlite:") else Path.is_dir
    if local is not None and not (local and exists(Path(local))):  # MLflow would create it
        raise UserError(f"no MLflow store at {local}; expected sqlite:///<existing file> or http://<server>")
    try:
        client = MlflowClient(tracking_uri)
        found = {entry.name: entry.experiment_id for entry in client.search_experiments()}
    except (MlflowException, SQLAlchemyError, ValueError) as error:  # an invalid URL raises ValueError
        raise UserError(
            f"the MLflow store {without_secrets(tracking_uri)} cannot be read: {failure_reason(error)}"
        ) from None
    if experiment is not None and experiment not in found:
        raise UserError(f"no experiment {experiment!r} in the MLflow store; expected one of {', '.join(found)}")
    return client, [found[experiment]] if experiment is not None else list(found.values())


def search_runs(client: MlflowClient, experiments: list[str], query: str) -> list[Run]:
    """Returns all runs that match a query, from all pages of results."""
    runs, token = [], None
    while token != "":
        page = client.search_runs(experiments, query, page_token=token)
        runs += page
        token = page.token or ""
    return runs


def _levels(client: MlflowClient, run: Run) -> list[dict]:
    names = ("test_accuracy_percent", "weights_remaining_percent")
    histories = [
        {m.step: m.value for m in client.get_metric_history(run.info.run_id, name)} if name in run.data.metrics else {}
        for name in names
    ]
    tags = {column: run.data.tags.get(column) for column in COLUMNS if column not in ("level", *names)}
    return [
        {**tags, "level": level} | {name: history[level] for name, history in zip(names, histories, strict=True)}
        for level in sorted(set(histories[0]) & set(histories[1]))
    ]


def load(path: str | Path) -> pd.DataFrame:
    """Reads a CSV file with the columns of `COLUMNS`, as `collect` returns them, or of `SUMMARY`.

    Raises:
        UserError: If the file cannot be read or a value is invalid; names the file, row, column and value.
    """
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=["", "nan", "NaN", "NA"])
    except (OSError, ValueError) as error:  # pandas raises ValueErrors for malformed text
        reason = error.strerror if isinstance(error, OSError) else "not a CSV table"
        raise UserError(
            f"{path} cannot be read: {reason}; expected a CSV file written by python -m analysis.collect"
        ) from None
    columns = SUMMARY if {"mean", "sd"} <= set(frame.columns) else COLUMNS
    needed = [name for name in columns if name not in OPTIONAL]
    missing = [name for name in needed if name not in frame]
    if missing:
        raise UserError(f"{path}: column {missing[0]} is missing; expected columns {', '.join(needed)}")
    if frame.empty:
        raise UserError(f"{path}: no rows; expected one row per replicate and level")
    return _typed(frame.reindex(columns=list(columns)), columns, str(path))


def published() -> pd.DataFrame:
    """Returns the published curves of the paper, with the columns of `SUMMARY` (analysis/reference/README.md)."""
    return load(_PUBLISHED)


def _typed(frame: pd.DataFrame, columns: dict, source: str) -> pd.DataFrame:
    """Validates all values, converts the columns to their types and sorts the rows."""
    frame = frame.reset_index(drop=True)

    def reject(bad: pd.Series, column: str, expected: str) -> None:
        if bad.any():
            row = int(bad.idxmax())
            value = frame.loc[row, column]
            shown = "is empty or NaN" if pd.isna(value) else f"= {value!r}"
            raise UserError(f"{source}: row {row + 1}: {column} {shown}: must be {expected}")

    typed = {}
    no_subset = frame.arm.isin(["init", "all"])
    for column, kind in columns.items():
        values = frame[column]
        if kind is str:
            reject(values.isna(), column, "text")
            typed[column] = values.astype(str)
            continue
        numbers = pd.to_numeric(values, errors="coerce").astype(float)
        numbers = numbers.where(numbers.abs() < 1e15)  # excludes infinity
        if column in ("label_noise", "rewind_steps"):
            numbers = numbers.where(frame.arm != "init", 0.0)  # no pre-training
        empty_allowed = values.isna() & (no_subset if column == "subset_size" else column in OPTIONAL)
        reject(numbers.isna() & ~empty_allowed, column, "a number")
        low, high, expected = _RANGES.get(column, (0, float("inf"), "0 or more"))
        reject((numbers < low) | (numbers > high), column, expected)
        if kind is not float:
            reject((numbers % 1 != 0) & numbers.notna(), column, "a whole number")
        if column == "subset_size":
            numbers = numbers.where(~no_subset)
        typed[column] = numbers.astype(kind)
    result = pd.DataFrame(typed)
    keys = [name for name in (*_ORDER, "run_id", "seed", "replicate", "level") if name in result]
    duplicated = result.duplicated(keys)
    if duplicated.any():
        row = result[duplicated].iloc[0]
        raise UserError(f"{source}: {row.arm}, level {row.level}: two rows for the same replicate and level")
    return result.sort_values(keys, ignore_index=True)


_RANGES: dict[str, tuple[float, float, str]] = {
    "test_accuracy_percent": (0, 100, "0 to 100"),
    "mean": (0, 100, "0 to 100"),
    "weights_remaining_percent": (1e-9, 100, "greater than 0 and at most 100"),
    "label_noise": (0, 1, "0 to 1"),
    "n": (1, float("inf"), "1 or more"),
}


def select(frame: pd.DataFrame, dataset: str | None, model: str | None) -> pd.DataFrame:
    """Returns the rows of a data set and a model; None selects all.

    Raises:
        UserError: If the data set or the model is not in the table.
    """
    for column, wanted in (("dataset", dataset), ("model", model)):
        available = sorted(frame[column].unique())
        if wanted is not None and wanted not in available:
            raise UserError(f"--{column} = {wanted!r}: not in these results; expected one of {', '.join(available)}")
        frame = frame if wanted is None else frame[frame[column] == wanted]
    return frame


def select_one(frame: pd.DataFrame, dataset: str | None, model: str | None) -> pd.DataFrame:
    """Returns the rows of exactly one data set and model.

    Raises:
        UserError: If the selection is not in the table, or still has several data sets or models.
    """
    frame = select(frame, dataset, model)
    for column in ("dataset", "model"):
        available = sorted(frame[column].unique())
        if len(available) > 1:
            raise UserError(f"these results mix {column}s; choose one with --{column} {' | '.join(available)}")
    return frame


def describe_incomplete(frame: pd.DataFrame) -> list[str]:
    """Describes each replicate that lacks planned levels, or levels that others of its data set have."""
    sentences = []
    if "replicate" not in frame:
        return sentences
    for (dataset, _), rows in frame.groupby(["dataset", "model"]):
        keys = ["arm", "subset_size", "rewind_steps", "label_noise", "run_id", "seed", "replicate"]
        for (name, size, steps, noise, *_, replicate), levels in rows.groupby(keys, dropna=False):
            planned = levels.planned_levels.max()
            last = rows.level.max() if pd.isna(planned) else int(planned)
            missing = sorted(set(range(last + 1)) - set(levels.level))
            if missing:
                arm = Arm(name, None if pd.isna(size) else int(size), int(steps), noise)
                which = f"level{'s' * (len(missing) > 1)} {format_levels(missing)} of {last}"
                sentences.append(f"{dataset}, {arm}, replicate {replicate}: {which} not finished")
    return sentences


def format_levels(levels: list[int]) -> str:
    """Formats sorted levels, such as `3 to 12` or `3, 5`."""
    consecutive = levels == list(range(levels[0], levels[-1] + 1))
    return f"{levels[0]} to {levels[-1]}" if consecutive and len(levels) > 2 else ", ".join(map(str, levels))


def catch_user_errors(command: Callable[[Sequence[str] | None], int]) -> Callable[[Sequence[str] | None], int]:
    """Decorates a command so that invalid input prints one sentence and exits with status 2."""

    def run(argv: Sequence[str] | None = None) -> int:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # an unreachable server fails in seconds
        try:
            return command(argv)
        except (MlflowException, SQLAlchemyError) as error:  # the server became unreachable
            return print_error(UserError(f"lost the connection to the MLflow store: {failure_reason(error)}"))
        except UserError as error:
            return print_error(error)

    return run


def print_incomplete(frame: pd.DataFrame) -> None:
    """Prints incomplete replicates on standard error."""
    for sentence in describe_incomplete(frame):
        print(f"incomplete: {sentence}", file=sys.stderr)


def print_moves(tracking_uri: str, experiment: str | None) -> None:
    """Prints on standard error why a store that was moved has no pictures."""
    client, experiments = open_store(tracking_uri, experiment)
    for move in filter(None, (describe_move(client, client.get_experiment(each)) for each in experiments)):
        print(f"warning: there are no pictures: {move}", file=sys.stderr)


@catch_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m analysis.collect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tracking-uri", default=tracking_uri(), help="MLflow store")
    parser.add_argument("--experiment", help="default: all experiments of the store")
    parser.add_argument("-o", "--output", type=Path, required=True, help="CSV file to write")
    arguments = parser.parse_args(argv)
    results = collect(arguments.tracking_uri, arguments.experiment)
    write(arguments.output, lambda path: results.to_csv(path, index=False))
    print_incomplete(results)
    replicates = results.groupby([*_ORDER, "run_id", "seed", "replicate"], dropna=False).ngroups
    print(f"{len(results)} levels of {replicates} replicates: {arguments.output}")
    return 0


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Calls `writer(path)`.

    Raises:
        UserError: If it fails with an OSError.
    """
    try:
        writer(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; expected a path in an existing folder") from None


if __name__ == "__main__":
    run_program(main)
