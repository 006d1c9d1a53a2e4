"""Commands beside the recipes: on runs, and on the configuration.

python -m lth_diet verify runs                                      check every file against its checksum
python -m lth_diet show runs/<run>/replicate_0 8                    weights remaining in each layer at a level
python -m lth_diet export runs/<run>/replicate_0 8 -o ticket        mask and weights as files for plain PyTorch
python -m lth_diet sync runs                                        bring MLflow up to date with the run directories
python -m lth_diet ui                                               MLflow's UI of the local store, with its links
python -m lth_diet pull s3://bucket/prefix runs                     copy runs from an object store
python -m lth_diet keys                                             every key of a configuration and of a sweep file
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from lth_diet.errors import Parser, UserError, print_error
from lth_diet.program import run_program


def main(argv: Sequence[str] | None = None) -> int:
    """Run one of the commands above.

    Returns:
        The exit status: 0; 1 if `verify` found damage or MLflow refused what `sync` sent; 2 if the input is invalid.
    """
    try:
        arguments = _parser().parse_args(argv)
        return arguments.command(arguments)
    except (UserError, OSError) as error:
        return print_error(error)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m lth_diet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="command", required=True)

    command = commands.add_parser("verify", help="check every file against its checksum")
    command.add_argument("runs", type=Path, help="folder of run directories, or one run directory")
    command.set_defaults(command=_verify)

    command = commands.add_parser("sync", help="bring MLflow up to date with the run directories")
    command.add_argument("runs", type=Path, help="folder of run directories, or one run directory")
    command.set_defaults(command=_sync)

    command = commands.add_parser("show", help="weights remaining in each layer at a level")
    command.add_argument("replicate", type=Path, help="runs/<run>/replicate_<r>")
    command.add_argument("level", type=_level)
    command.set_defaults(command=_show)

    command = commands.add_parser("export", help="mask and weights as files for plain PyTorch")
    command.add_argument("replicate", type=Path, help="runs/<run>/replicate_<r>")
    command.add_argument("level", type=_level)
    command.add_argument("-o", "--output", type=Path, required=True, help="new folder")
    command.set_defaults(command=_export)

    command = commands.add_parser("pull", help="copy runs from an object store")
    command.add_argument("url", help="URL of a folder of runs, or of one run directory")
    command.add_argument("folder", type=Path, help="destination, created if it does not exist")
    command.set_defaults(command=_pull)

    command = commands.add_parser("ui", help="MLflow's UI of the local store, with its links")
    command.add_argument("--port", type=int, default=5000, help="default %(default)s")
    command.set_defaults(command=_ui)

    commands.add_parser("keys", help="every key of a configuration and of a sweep file").set_defaults(command=_keys)
    return parser


def _level(text: str) -> int:
    if not re.fullmatch("-?(0|[1-9][0-9]{0,8})", text):
        raise argparse.ArgumentTypeError(f"must be a level, such as 8, after one replicate, not {text!r}")
    return int(text)


# Each command imports only what it needs: MLflow takes seconds.


def _verify(arguments: argparse.Namespace) -> int:
    from lth_diet.runs.find import find_directories
    from lth_diet.runs.verify import verify

    directories, scored = find_directories(arguments.runs)
    damaged = list(verify(arguments.runs))
    for file, sentence in damaged:
        print(f"{file}: {sentence}")
    counts = f"{len(directories)} runs and {len(scored)} sets of scores"
    files = "1 file is" if len(damaged) == 1 else f"{len(damaged)} files are"
    print(f"{counts}: {files} damaged" if damaged else f"{counts}: all finished files are intact")
    return 1 if damaged else 0


def _show(arguments: argparse.Namespace) -> int:
    from lth_diet.masks.mask import Mask
    from lth_diet.runs.export_ticket import find_finished_level

    _, phase = find_finished_level(arguments.replicate, arguments.level)
    mask = Mask.load(phase.verified("mask.safetensors"))
    print(mask.table().to_string(index=False, formatters={"density": "{:.4f}".format}))
    print(f"{mask.remaining:,} of {mask.total:,} weights remain, {100 * mask.density:.2f} %")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from lth_diet.runs.export_ticket import export_ticket

    card = export_ticket(arguments.replicate, arguments.level, arguments.output)
    print(
        f"{arguments.output}: {card['model']} on {card['dataset']}, arm {card['arm']}, level {card['level']}, "
        f"{card['weights_remaining_percent']:.1f} % of weights, {card['test_accuracy_percent']:.2f} %"
    )
    return 0


def _sync(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")  # MLflow reads it when it is imported
    from lth_diet.runs.find import find_directories
    from lth_diet.tracking import mlflow_store, sync

    directories, scored = find_directories(arguments.runs)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # MLflow's default, 7, takes minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    status, reasons = 0, set()
    for folder in [*scored, *directories]:  # an error of one does not stop the others
        try:
            updates = sync.updates(folder, folder in scored)
        except UserError as error:
            status = print_error(error)
            continue
        for path, update in updates:
            try:
                update()
                print(f"{path}: up to date", flush=True)
            except UserError as error:
                status = print_error(error)
            except Exception as error:  # MLflow, SQLAlchemy, requests and the file system each raise their own
                reason = mlflow_store.failure_reason(error)
                shown = "as above" if reason in reasons else reason
                print(f"error: {path}: MLflow is not up to date: {shown}", file=sys.stderr)
                reasons.add(reason)
                status = status or 1
                if not mlflow_store.responds():
                    return status
    return status


def _pull(arguments: argparse.Namespace) -> int:
    from lth_diet.runs.object_store import pull

    print(f"{arguments.folder}: {pull(arguments.url, arguments.folder)} files")
    return 0


def _ui(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")  # MLflow reads it when it is imported
    from lth_diet.tracking import mlflow_store

    uri = mlflow_store.tracking_uri()
    if uri.startswith("http") or uri in mlflow_store.DATABRICKS:
        raise UserError("the MLflow store is a server with its own UI: open MLFLOW_TRACKING_URI in a browser")
    try:
        with mlflow_store.lock_store():
            names = mlflow_store.experiment_names()
    except Exception as error:  # MLflow, SQLAlchemy and the file system each raise their own
        raise UserError(f"the MLflow store cannot be read: {mlflow_store.failure_reason(error)}") from None
    for name in names:
        print(f"{name}: {mlflow_store.comparison_link(name, f'http://127.0.0.1:{arguments.port}')}", flush=True)
    command = ["mlflow", "ui", "--backend-store-uri", uri, "--port", str(arguments.port)]
    os.execv(sys.executable, [sys.executable, "-m", *command])


def _keys(arguments: argparse.Namespace) -> int:
    from lth_diet.config.keys import table
    from lth_diet.config.schema import Config
    from lth_diet.sweep.grid import Settings

    print(f"Keys of a configuration:\n\n{table(Config)}\n\nKeys of a sweep file:\n\n{table(Settings)}")
    return 0


if __name__ == "__main__":
    run_program(main)
