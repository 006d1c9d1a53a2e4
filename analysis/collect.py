"""Results as one tidy table, a row a (replicate, level): from MLflow, from a CSV file, or as published.

python -m analysis.collect --tracking-uri sqlite:///mlflow.db --experiment cifar10 -o results.csv

It works while a sweep runs, and says which replicates are incomplete. Accuracies are in percent, so that differences
and margins are in percentage points.
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

from analysis.arms import Arm
from lth_diet.errors import Parser, UserError, print_error
from lth_diet.tracking.store import tracking_uri, without_secrets

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
"""Column to type. subset_size is empty where all examples were seen or there was no pre-training."""

OPTIONAL = ("seed", "planned_levels", "train_steps")
"""May be absent from a CSV file; without seeds, replicates are known by their number."""

SUMMARY = {name: COLUMNS[name] for name in ("dataset", "model", "arm", "subset_size", "rewind_steps", "label_noise")}
SUMMARY |= {"level": "int64", "weights_remaining_percent": float, "mean": float, "sd": float, "n": "int64"}
"""Columns of a table of means: sd is the sample standard deviation over n replicates, in percentage points."""

_ORDER = ["dataset", "model", "label_noise", "arm", "rewind_steps", "subset_size"]
_PUBLISHED = Path(__file__).with_name("reference") / "paper_curves.csv"


def collect(tracking_uri: str, experiment: str | None = None) -> pd.DataFrame:
    """The levels that are done, of every replicate in MLflow.

    Args:
        tracking_uri: Of the store.
        experiment: Its name; None: all experiments of the store.

    Returns:
        One row a (replicate, level) with `COLUMNS`.

    Raises:
        UserError: If there is no such store or experiment, or no level is done.
    """
    client, experiments = store(tracking_uri, experiment)
    rows = [row for run in search(client, experiments, "tags.phase = 'all'") for row in _levels(client, run)]
    if not rows:
        raise UserError(f"no level is done yet in {experiment or 'any experiment'!r} of the MLflow store")
    source = f"MLflow experiment {experiment!r}" if experiment else "the MLflow store"
    return _typed(pd.DataFrame(rows, columns=list(COLUMNS)).drop_duplicates(), COLUMNS, source)


def store(tracking_uri: str, experiment: str | None) -> tuple[MlflowClient, list[str]]:
    """A client, and the ids of the experiments that are meant.

    Raises:
        UserError: If the store cannot be reached or has no such experiment.
    """
    local = next(
        (tracking_uri.removeprefix(kind) for kind in ("sqlite:///", "file://") if tracking_uri.startswith(kind)),
        tracking_uri if "://" not in tracking_uri else None,
    )
    there = Path.is_file if tracking_uri.startswith("sqlite:") else Path.is_dir
    if local is not None and not (local and there(Path(local))):  # MLflow would create it
        raise UserError(f"no MLflow store at {local}; allowed: sqlite:///<file> that is there, or http://<server>")
    try:
        client = MlflowClient(tracking_uri)
        found = {one.name: one.experiment_id for one in client.search_experiments()}
    except (MlflowException, SQLAlchemyError, ValueError) as error:  # a ValueError: of an address that is none
        raise UserError(f"the MLflow store {without_secrets(tracking_uri)} cannot be read: {_reason(error)}") from None
    if experiment is not None and experiment not in found:
        raise UserError(f"no experiment {experiment!r} in the MLflow store; allowed: {', '.join(found)}")
    return client, [found[experiment]] if experiment is not None else list(found.values())


def _reason(error: Exception) -> str:
    """Why a store cannot be read, without the password that its address may hold."""
    return without_secrets(str(error).splitlines()[0].partition(" with exception")[0])[:200]


def search(client: MlflowClient, experiments: list[str], query: str) -> list[Run]:
    """All runs that match, over as many pages as the store makes of them."""
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
    """Read a CSV file that `collect` wrote, or one with the columns of `SUMMARY`.

    Raises:
        UserError: With a sentence naming file, row, column, value and what is allowed.
    """
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=["", "nan", "NaN", "NA"])
    except (OSError, ValueError) as error:  # pandas' own errors and bad text are ValueErrors
        reason = error.strerror if isinstance(error, OSError) else "not a CSV table"
        raise UserError(f"{path} cannot be read: {reason}; allowed: a file of python -m analysis.collect") from None
    columns = SUMMARY if {"mean", "sd"} <= set(frame.columns) else COLUMNS
    needed = [name for name in columns if name not in OPTIONAL]
    missing = [name for name in needed if name not in frame]
    if missing:
        raise UserError(f"{path}: column {missing[0]} is missing; needed: {', '.join(needed)}")
    if frame.empty:
        raise UserError(f"{path}: no rows; allowed: a row a replicate and level")
    return _typed(frame.reindex(columns=list(columns)), columns, str(path))


def published() -> pd.DataFrame:
    """The curves of the paper, digitised (analysis/reference/README.md), with the columns of `SUMMARY`."""
    return load(_PUBLISHED)


def _typed(frame: pd.DataFrame, columns: dict, source: str) -> pd.DataFrame:
    """The table with its types, sorted; refused if a value cannot be."""
    frame = frame.reset_index(drop=True)

    def refuse(bad: pd.Series, column: str, allowed: str) -> None:
        if bad.any():
            row = int(bad.idxmax())
            value = frame.loc[row, column]
            shown = "empty or NaN" if pd.isna(value) else repr(value)
            raise UserError(f"{source}: row {row + 1}: {column}: {shown} is not allowed; allowed: {allowed}")

    typed = {}
    whole = frame.arm.isin(["init", "all"])
    for column, kind in columns.items():
        values = frame[column]
        if kind is str:
            refuse(values.isna(), column, "text")
            typed[column] = values.astype(str)
            continue
        numbers = pd.to_numeric(values, errors="coerce").astype(float)
        numbers = numbers.where(numbers.abs() < 1e15)  # also not infinite
        if column in ("label_noise", "rewind_steps"):
            numbers = numbers.where(frame.arm != "init", 0.0)  # no pre-training
        empty_allowed = values.isna() & (whole if column == "subset_size" else column in OPTIONAL)
        refuse(numbers.isna() & ~empty_allowed, column, "a number")
        low, high, words = _RANGES.get(column, (0, float("inf"), "0 or more"))
        refuse((numbers < low) | (numbers > high), column, words)
        if kind is not float:
            refuse((numbers % 1 != 0) & numbers.notna(), column, "a whole number")
        if column == "subset_size":
            numbers = numbers.where(~whole)
        typed[column] = numbers.astype(kind)
    result = pd.DataFrame(typed)
    keys = [name for name in (*_ORDER, "run_id", "seed", "replicate", "level") if name in result]
    again = result.duplicated(keys)
    if again.any():
        row = result[again].iloc[0]
        raise UserError(
            f"{source}: {row.arm}, level {row.level}: there is a second row of the same replicate and level"
        )
    return result.sort_values(keys, ignore_index=True)


_RANGES: dict[str, tuple[float, float, str]] = {
    "test_accuracy_percent": (0, 100, "0 to 100"),
    "mean": (0, 100, "0 to 100"),
    "weights_remaining_percent": (1e-9, 100, "above 0, to 100"),
    "label_noise": (0, 1, "0 to 1"),
    "n": (1, float("inf"), "1 or more"),
}


def select(frame: pd.DataFrame, dataset: str | None, model: str | None) -> pd.DataFrame:
    """The rows of a data set and a model; None: all.

    Raises:
        UserError: If there is no such one.
    """
    for column, wanted in (("dataset", dataset), ("model", model)):
        there = sorted(frame[column].unique())
        if wanted is not None and wanted not in there:
            raise UserError(f"--{column}: {wanted!r} is not in these results; allowed: {', '.join(there)}")
        frame = frame if wanted is None else frame[frame[column] == wanted]
    return frame


def one(frame: pd.DataFrame, dataset: str | None, model: str | None) -> pd.DataFrame:
    """The rows of one data set and model.

    Raises:
        UserError: If there is no such one, or several and none was named.
    """
    frame = select(frame, dataset, model)
    for column in ("dataset", "model"):
        there = sorted(frame[column].unique())
        if len(there) > 1:
            raise UserError(f"these results mix {column}s; choose one with --{column} {' | '.join(there)}")
    return frame


def incomplete(frame: pd.DataFrame) -> list[str]:
    """A sentence for each replicate that lacks levels which were planned, or which others of its data set have."""
    sentences = []
    if "replicate" not in frame:
        return sentences
    for (dataset, _), rows in frame.groupby(["dataset", "model"]):
        keys = ["arm", "subset_size", "rewind_steps", "label_noise", "run_id", "seed", "replicate"]
        for (name, size, steps, noise, *_, replicate), levels in rows.groupby(keys, dropna=False):
            planned = levels.planned_levels.max()
            last = rows.level.max() if pd.isna(planned) else int(planned)
            lacking = sorted(set(range(last + 1)) - set(levels.level))
            if lacking:
                arm = Arm(name, None if pd.isna(size) else int(size), int(steps), noise)
                words = f"level{'s' * (len(lacking) > 1)} {_span(lacking)} of {last}"
                sentences.append(f"{dataset}, {arm}, replicate {replicate}: {words} not done")
    return sentences


def _span(levels: list[int]) -> str:
    consecutive = levels == list(range(levels[0], levels[-1] + 1))
    return f"{levels[0]} to {levels[-1]}" if consecutive and len(levels) > 2 else ", ".join(map(str, levels))


def one_sentence(command: Callable[[Sequence[str] | None], int]) -> Callable[[Sequence[str] | None], int]:
    """A command whose bad input is one sentence and exit status 2."""

    def run(argv: Sequence[str] | None = None) -> int:
        os.environ.setdefault(
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"
        )  # a server that is not there: seconds, not minutes
        try:
            return command(argv)
        except (MlflowException, SQLAlchemyError) as error:  # of a server that went away
            return print_error(UserError(f"the MLflow store cannot be read any more: {_reason(error)}"))
        except UserError as error:
            return print_error(error)

    return run


def say_incomplete(frame: pd.DataFrame) -> None:
    """Tell on standard error what is not done yet."""
    for sentence in incomplete(frame):
        print(f"incomplete: {sentence}", file=sys.stderr)


@one_sentence
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m analysis.collect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tracking-uri", default=tracking_uri())
    parser.add_argument("--experiment", help="default: all experiments of the store")
    parser.add_argument("-o", "--output", type=Path, required=True, help="CSV file")
    arguments = parser.parse_args(argv)
    results = collect(arguments.tracking_uri, arguments.experiment)
    write(arguments.output, lambda path: results.to_csv(path, index=False))
    say_incomplete(results)
    replicates = results.groupby([*_ORDER, "run_id", "seed", "replicate"], dropna=False).ngroups
    print(f"{len(results)} levels of {replicates} replicates: {arguments.output}")
    return 0


def write(path: Path, writer: Callable[[Path], object]) -> None:
    """Call a writer of a file.

    Raises:
        UserError: If the file cannot be written.
    """
    try:
        writer(path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; allowed: a file in a folder that is there"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
