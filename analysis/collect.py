"""Collects results in one tidy table, one row per replicate and level.

python -m analysis.collect --tracking-uri sqlite:///mlflow.db --experiment cifar10 -o results.csv

The table comes from MLflow, from a CSV file or from the published curves. A running sweep can be collected too;
incomplete replicates are listed. Accuracies are in percent, differences and margins in percentage points.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from lth_diet.config.fields import MAX_LEVELS
from lth_diet.errors import Parser, UserError, print_error, printable
from lth_diet.program import run_program
from lth_diet.tracking.mlflow_store import (
    DATABRICKS,
    StoreError,
    check_database,
    describe_move,
    failure_reason,
    tracking_uri,
    without_secrets,
)

from . import identities
from .arms import SAME_WEIGHTS, Results, curves_by_arm, rows_by_arm

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
    "identity": str,
}
"""Columns and their types. subset_size is empty for all examples and for no pre-training.

identity is a JSON object: the keys of the configuration that change the result and differ from their defaults.
"""

_FIRST_ROW = 2
"""Number of the first row below the header, as an editor or a spreadsheet shows it."""

OPTIONAL = ("seed", "planned_levels", "train_steps", "identity")
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
        One row per replicate and level, with `COLUMNS`. `attrs["left_out"]` has a sentence for each part of a run that
        was left out, because a value is invalid or because another experiment has the same replicate with another
        result; `attrs["unfinished"]` has one for each replicate without a finished level.

    Raises:
        UserError: If the store or experiment does not exist, or no level is finished.
    """
    client, experiments = open_store(tracking_uri, experiment)
    names = {entry.experiment_id: entry.name for entry in client.search_experiments()}
    rows, unfinished = [], []
    for run in search_runs(client, experiments, "tags.phase = 'all'"):
        source = f"run {run.info.run_name} of experiment {names.get(run.info.experiment_id)!r}"
        levels = [row | {"mlflow_run": run.info.run_id, "source": source} for row in _levels(client, run)]
        rows += levels
        if not levels:
            failed = "; it failed" if run.info.status == "FAILED" else ""
            unfinished.append(f"{run.info.run_name}: no level is finished{failed}")
    if not rows:
        where = f"experiment {experiment!r}" if experiment else "any experiment"
        raise UserError(f"no level is finished yet in {where} of the MLflow store")
    table = pd.DataFrame(rows)
    typed, problems = _convert(table, COLUMNS)
    left_out = [
        f"{source}, {name_levels(sorted(part.level))}, is left out: {problem}"
        for (source, problem), part in table.assign(problem=problems)[problems != ""].groupby(["source", "problem"])
    ]
    if typed.empty:
        raise UserError(f"the MLflow store has no valid level; {left_out[0]}")
    merged, conflicts = _merge_experiments(typed.join(table[["mlflow_run", "source"]]))
    result = _sorted(merged[list(COLUMNS)])
    result.attrs["left_out"] = left_out + conflicts
    result.attrs["unfinished"] = unfinished
    invalid = table[problems != ""]
    result.attrs["invalid"] = [f"{row.run_id} {row.replicate} {row.level}" for row in invalid.itertuples()]
    return result


def _merge_experiments(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Merges replicates that several experiments have, and leaves out those with another result than the first."""
    kept, conflicts = [], []
    keys = [_normalized(frame)[key] for key in ("run_id", "seed", "identity", "replicate")]
    for (run_id, _, _, replicate), rows in frame.groupby(keys, dropna=False):
        merged, *others = (part for _, part in rows.groupby("mlflow_run", sort=False))
        for part in others:
            pairs = merged.merge(part, on="level", suffixes=("", "_other"))
            different = pairs[pairs.test_accuracy_percent != pairs.test_accuracy_percent_other]
            if different.empty:
                planned = pd.concat([merged, part]).planned_levels.max()
                new = part[~part.level.isin(merged.level)]
                merged = pd.concat([merged, new]).assign(planned_levels=planned)
            else:
                row = different.iloc[0]
                conflicts.append(
                    f"{row.source_other} is left out: replicate {replicate} of run id {run_id} has "
                    f"{row.test_accuracy_percent_other:g} % at level {row.level} there, but "
                    f"{row.test_accuracy_percent:g} % in {row.source}; choose one with --experiment"
                )
        kept.append(merged)
    return pd.concat(kept), conflicts


def open_store(tracking_uri: str, experiment: str | None) -> tuple[MlflowClient, list[str]]:
    """Opens an MLflow store; returns a client and the ids of the experiment, or of all experiments.

    Raises:
        UserError: If the store cannot be read or the experiment does not exist.
    """
    local = next(
        (tracking_uri.removeprefix(kind) for kind in ("sqlite:///", "file://") if tracking_uri.startswith(kind)),
        tracking_uri if "://" not in tracking_uri and tracking_uri not in DATABRICKS else None,
    )
    exists = Path.is_file if tracking_uri.startswith("sqlite:") else Path.is_dir
    if local is not None and not (local and exists(Path(local))):  # MLflow would create it
        raise UserError(f"no MLflow store at {local}; expected sqlite:///<existing file> or http://<server>")
    try:
        check_database(tracking_uri)
        client = MlflowClient(tracking_uri)
        found = {entry.name: entry.experiment_id for entry in client.search_experiments()}
    except (MlflowException, SQLAlchemyError, StoreError, OSError, ValueError) as error:  # an invalid URL: ValueError
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
    tags = {column: run.data.tags.get(column) for column in COLUMNS if column not in ("level", "identity", *names)}
    identity = identities.from_params(run.data.params, run.data.tags.get("ranks"))
    tags["identity"] = json.dumps(identity, sort_keys=True) if identity else None
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
        _reject_delimiter(path, pd.read_csv(path, nrows=0).columns)
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            missing = ["", "nan", "NaN", "NA"]
            frame = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=missing, index_col=False)
    except pd.errors.ParserWarning:
        raise UserError(
            f"{path}: the rows have more fields than the header; expected a comma between fields only"
        ) from None
    except (OSError, EOFError, ValueError) as error:  # pandas raises ValueErrors for malformed text
        raise UserError(
            f"{path} cannot be read: {_reason(error)}; expected a CSV file written by python -m analysis.collect"
        ) from None
    columns = SUMMARY if {"mean", "sd"} <= set(frame.columns) else COLUMNS
    needed = [name for name in columns if name not in OPTIONAL]
    missing = [name for name in needed if name not in frame]
    if missing:
        raise UserError(f"{path}: column {missing[0]} is missing; expected columns {', '.join(needed)}")
    if frame.empty:
        raise UserError(f"{path}: no rows; expected one row per replicate and level")
    typed, problems = _convert(frame.reindex(columns=list(columns)), columns)
    if (problems != "").any():
        row = int((problems != "").idxmax())
        raise UserError(f"{path}: row {row + _FIRST_ROW}: {problems[row]}")
    remarks = _check_fractions(path, typed)
    _reject_duplicates(path, typed)
    _reject_weights(path, typed)
    result = _sorted(typed)
    result.attrs["remarks"] = remarks
    return result


def _reason(error: Exception) -> str:
    if isinstance(error, OSError | EOFError):  # EOFError: of a compressed file that was cut off
        return getattr(error, "strerror", None) or str(error)
    if isinstance(error, UnicodeDecodeError):
        return "not text in UTF-8"
    return "no columns" if isinstance(error, pd.errors.EmptyDataError) else "not a CSV table"


def _reject_delimiter(path: str | Path, columns: Sequence[str]) -> None:
    for delimiter, name in ((";", "semicolons"), ("\t", "tabs")):
        if any(delimiter in column for column in columns):
            raise UserError(
                f"{path}: the columns are separated by {name}; expected commas, and a point before the decimals"
            )


def _check_fractions(path: str | Path, frame: pd.DataFrame) -> list[str]:
    """Rejects fractions of 1 in place of percentages; files of `python -m analysis.collect` have an identity.

    Returns:
        A sentence for each replicate that may have fractions where others have percentages.
    """
    if "identity" in frame and frame.identity.notna().any():
        return []
    dense = frame[frame.level == 0].weights_remaining_percent  # 100 by definition
    column = "mean" if "mean" in frame else "test_accuracy_percent"
    values = frame[column]
    if values.max() <= 1 and (values.between(0, 1, "neither").any() or (dense <= 1).any()):
        raise UserError(
            f"{path}: {column} is at most {values.max():g}, which looks like fractions of 1; expected percent, 0 to 100"
        )
    if len(dense) and (dense <= 1).all():
        raise UserError(
            f"{path}: weights_remaining_percent is {dense.iloc[0]:g} at level 0, which looks like fractions of 1; "
            "expected percent, 100 at level 0"
        )
    if "replicate" not in frame:
        return []
    highest = frame.groupby([*_ORDER, "run_id", "seed", "replicate"], dropna=False, sort=False)[column].max()
    return [
        f"{path}: replicate {replicate} of run id {run_id} ({arm}) has accuracies of at most {value:g} %; they may be "
        "fractions of 1"
        for (*_, arm, _, _, run_id, _, replicate), value in highest[highest < 1].items()
    ]


def _reject_weights(path: str | Path, frame: pd.DataFrame) -> None:
    """Rejects a column of weights remaining that cannot be one, such as that of weights pruned."""
    weights = frame.weights_remaining_percent
    bad = (frame.level == 0) & (weights < 100 * (1 - SAME_WEIGHTS))
    if bad.any():
        row = int(bad.idxmax())
        raise UserError(
            f"{path}: row {row + _FIRST_ROW}: weights_remaining_percent = {weights[row]:g}: must be 100 at level 0"
        )
    ordered = frame.sort_values("level", kind="stable")
    keys = [name for name in (*_ORDER, "run_id", "seed", "replicate", "identity") if name in frame]
    grows = ordered.groupby(keys, dropna=False).weights_remaining_percent.diff() > 0
    if grows.any():
        row = int(grows.idxmax())
        raise UserError(
            f"{path}: row {row + _FIRST_ROW}: weights_remaining_percent = {weights[row]:g} at level "
            f"{frame.level[row]}: must be at most that of the level before"
        )


def published() -> pd.DataFrame:
    """Returns the published curves of the paper, with the columns of `SUMMARY` (analysis/reference/README.md)."""
    return load(_PUBLISHED)


def _convert(frame: pd.DataFrame, columns: dict) -> tuple[pd.DataFrame, pd.Series]:
    """Converts the columns of the valid rows to their types.

    Returns:
        The valid rows, and the problem of every row; empty text if it has none.
    """
    frame = frame.reset_index(drop=True)
    problems = pd.Series("", frame.index)

    def reject(bad: pd.Series, column: str, expected: str) -> None:
        for row in frame.index[bad & (problems == "")]:
            value = frame.loc[row, column]
            shown = "is empty or NaN" if pd.isna(value) else f"= {str(value)!r}"
            problems[row] = f"{column} {shown}: must be {expected}"

    typed = {}
    no_subset = frame.arm.isin(["init", "all"])
    for column, kind in columns.items():
        values = frame[column]
        if column == "identity":
            reject(~values.map(_is_json_object), column, "a JSON object or empty")
            typed[column] = values.astype(object)
            continue
        if kind is str:
            reject(values.isna(), column, "text")
            typed[column] = values.astype(str)
            continue
        numbers = pd.to_numeric(values, errors="coerce").astype(float)
        reject(numbers.abs() >= 1e15, column, "a number below 1e15")
        numbers = numbers.where(numbers.abs() < 1e15)
        if column in ("label_noise", "rewind_steps"):
            numbers = numbers.where(frame.arm != "init", 0.0)  # no pre-training
        empty_allowed = values.isna() & (no_subset if column == "subset_size" else column in OPTIONAL)
        needed = " (only init and all may have none)" if column == "subset_size" else ""
        reject(numbers.isna() & ~empty_allowed, column, f"a number{needed}")
        low, high, expected = _RANGES.get(column, (0, float("inf"), "0 or more"))
        reject((numbers < low) | (numbers > high), column, expected)
        if kind is not float:
            reject((numbers % 1 != 0) & numbers.notna(), column, "a whole number")
        if column == "subset_size":
            numbers = numbers.where(~no_subset)
        typed[column] = numbers
    valid = pd.DataFrame(typed)[problems == ""]
    return valid.astype({name: kind for name, kind in columns.items() if name != "identity"}), problems


def _is_json_object(value: object) -> bool:
    try:
        return pd.isna(value) or isinstance(json.loads(value), dict)
    except (ValueError, RecursionError):
        return False


def _reject_duplicates(path: str | Path, frame: pd.DataFrame) -> None:
    """Rejects a second row of the same replicate and level, also if only one of them has a seed."""
    keys = [name for name in (*_ORDER, "run_id", "seed", "replicate", "level", "identity") if name in frame]
    same_run = _normalized(frame)
    if "seed" in frame:
        groups = same_run.groupby([key for key in keys if key != "seed"], dropna=False)
        mixed = groups.seed.transform("count").between(0, groups.seed.transform("size"), "neither")
        if mixed.any():
            row = frame[mixed].iloc[0]
            raise UserError(
                f"{path}: replicate {row.replicate} of run id {row.run_id} has rows with and without a seed at level "
                f"{row.level}; expected its seed in all of them, and each level once"
            )
    duplicated = same_run.duplicated(keys)
    if duplicated.any():
        row = same_run[duplicated].iloc[0]
        same = frame[(same_run[keys].astype(str) == row[keys].astype(str)).all(axis=1)]
        values = same["mean" if "mean" in frame else "test_accuracy_percent"]
        which = f", replicate {row.replicate} of run id {row.run_id}" if "run_id" in frame else ""
        raise UserError(
            f"{path}: {row.arm}, level {row.level}: two rows for the same replicate and level: rows "
            f"{same.index[0] + _FIRST_ROW} and {same.index[1] + _FIRST_ROW}{which}, with {values.iloc[0]:g} and "
            f"{values.iloc[1]:g} %; expected one"
        )


def _sorted(frame: pd.DataFrame) -> pd.DataFrame:
    keys = [name for name in (*_ORDER, "run_id", "seed", "replicate", "level", "identity") if name in frame]
    return frame.sort_values(keys, ignore_index=True)


def _normalized(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows with equal texts for equal identities; what the identity says too is not compared."""
    if "identity" not in frame:
        return frame
    texts = {
        text: json.dumps(identities.normalize(json.loads(text)), sort_keys=True)
        for text in frame.identity.dropna().unique()
    }
    return frame.assign(identity=frame.identity.map(texts), model=frame.model.where(frame.identity.isna(), ""))


_RANGES: dict[str, tuple[float, float, str]] = {
    "test_accuracy_percent": (0, 100, "0 to 100"),
    "mean": (0, 100, "0 to 100"),
    "weights_remaining_percent": (1e-9, 100, "greater than 0 and at most 100"),
    "label_noise": (0, 1, "0 to 1"),
    "level": (0, MAX_LEVELS, f"0 to {MAX_LEVELS}"),
    "planned_levels": (0, MAX_LEVELS, f"0 to {MAX_LEVELS}"),
    "n": (1, float("inf"), "1 or more"),
}


def results_by_dataset(frame: pd.DataFrame) -> Results:
    """Groups results by data set and arm."""
    return {name: curves_by_arm(rows) for name, rows in frame.groupby(dataset_names(frame))}


def dataset_names(frame: pd.DataFrame) -> pd.Series:
    """Name of the data set of each row; image folders with different images get their fingerprint."""
    if "identity" not in frame or frame.empty:
        return frame.dataset
    marks = {text: _fingerprint(text) for text in frame.identity.unique()}
    fingerprints = frame.identity.map(marks)
    several = fingerprints.groupby(frame.dataset).transform("nunique") > 1
    return frame.dataset.where(~several | (fingerprints == ""), frame.dataset + "-" + fingerprints.str[:8])


def _fingerprint(identity: Any) -> str:
    return "" if pd.isna(identity) else str(json.loads(identity).get("dataset.fingerprint", ""))


def select(frame: pd.DataFrame, dataset: str | None, model: str | None) -> pd.DataFrame:
    """Returns the rows of a data set and a model; None selects all.

    Raises:
        UserError: If the data set or the model is not in the table.
    """
    names = dataset_names(frame)
    if dataset is not None:
        chosen = (frame.dataset == dataset) | (names == dataset)
        _require(chosen, "dataset", dataset, names)
        frame = frame[chosen]
    if model is not None:
        chosen = frame.model == model
        _require(chosen, "model", model, frame.model)
        frame = frame[chosen]
    return frame


def _require(chosen: pd.Series, column: str, wanted: str, available: pd.Series) -> None:
    if not chosen.any():
        expected = ", ".join(sorted(available.unique()))
        raise UserError(f"--{column} = {wanted!r}: not in these results; expected one of {expected}")


def select_one(frame: pd.DataFrame, dataset: str | None, model: str | None) -> pd.DataFrame:
    """Returns the rows of exactly one data set and model.

    Raises:
        UserError: If the selection is not in the table, or still has several data sets or models.
    """
    frame = select(frame, dataset, model)
    for column, names in (("dataset", dataset_names(frame)), ("model", frame.model)):
        available = sorted(names.unique())
        if len(available) > 1:
            raise UserError(f"these results mix {column}s; choose one with --{column} {' | '.join(available)}")
    return frame


def describe_incomplete(frame: pd.DataFrame) -> list[str]:
    """Describes each replicate that lacks planned levels, or levels that others have."""
    sentences = list(frame.attrs.get("unfinished", ()))
    if "replicate" not in frame:
        return sentences
    for dataset, mine in frame.groupby(dataset_names(frame)):
        last_level = mine.groupby("model")["level"].max()
        for arm, (_, rows) in rows_by_arm(mine).items():
            for (model, seed, replicate), levels in rows.groupby(["model", "seed", "replicate"], dropna=False):
                planned = levels.planned_levels.max()
                last = last_level[model] if pd.isna(planned) else int(planned)
                missing = [
                    level
                    for level in sorted(set(range(last + 1)) - set(levels.level))
                    if f"{levels.run_id.iloc[0]} {replicate} {level}" not in frame.attrs.get("invalid", ())
                ]
                if missing:
                    which = f"replicate {replicate}" + f" of seed {seed}" * (rows.seed.nunique() > 1)
                    sentences.append(f"{dataset}, {arm}, {which}: {name_levels(missing)} of {last} not finished")
    return sentences


def format_levels(levels: list[int]) -> str:
    """Formats sorted levels, such as `3 to 12` or `3, 5`."""
    consecutive = levels == list(range(levels[0], levels[-1] + 1))
    return f"{levels[0]} to {levels[-1]}" if consecutive and len(levels) > 2 else ", ".join(map(str, levels))


def name_levels(levels: list[int]) -> str:
    """Names sorted levels, such as `levels 3 to 12` or `level 3`."""
    return f"level{'s' * (len(levels) > 1)} {format_levels(levels)}"


def add_store_arguments(parser: Parser) -> None:
    """Adds the options that choose an MLflow store and an experiment."""
    parser.add_argument("--tracking-uri", default=tracking_uri(), help="MLflow store")
    parser.add_argument("--experiment", help="default: all experiments of the store")


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
    """Prints what was left out, and incomplete replicates, on standard error."""
    for sentence in (*frame.attrs.get("left_out", ()), *frame.attrs.get("remarks", ())):
        print(f"warning: {sentence}", file=sys.stderr)
    for sentence in describe_incomplete(frame):
        print(f"incomplete: {printable(sentence)}", file=sys.stderr)


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
    add_store_arguments(parser)
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
        reason = error.strerror or error
        raise UserError(f"{path} cannot be written: {reason}; expected a path in an existing folder") from None


if __name__ == "__main__":
    run_program(main)
