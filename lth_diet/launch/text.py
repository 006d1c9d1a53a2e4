"""Readable names and durations, and tables of progress."""

import datetime
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table


def humanize(name: str) -> str:
    """Replace underscores with spaces: `level_1` becomes `level 1`."""
    return name.replace("_", " ")


def describe_devices(ranks: Sequence[Mapping[str, Any]], threads: int) -> str:
    """Describe the devices of a launch, such as `4 processes on 2 x NVIDIA H100 80GB HBM3, bf16, 1 thread each`.

    Args:
        ranks: `devices.summary` of each rank.
        threads: CPU threads of each process.
    """
    distinct = {(rank["host"], rank["index"]): rank["name"] for rank in ranks}
    names = [f"{number} x {name}" if number > 1 else name for name, number in Counter(distinct.values()).items()]
    precision = " and ".join(dict.fromkeys(rank["precision"] for rank in ranks))
    each = f"{threads} thread{'s' * (threads > 1)}{' each' * (len(ranks) > 1)}"
    return f"{f'{len(ranks)} processes' if len(ranks) > 1 else '1 process'} on {', '.join(names)}, {precision}, {each}"


def duration(steps: float, rate: float | None) -> str:
    """Format the time that some steps take, as h:mm:ss; `?` if the rate (steps per second) is unknown or zero."""
    return str(datetime.timedelta(seconds=round(steps / rate))) if rate else "?"


def progress_table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """Return an empty table: columns with text aligned left, then columns with numbers aligned right."""
    table = Table(title=title, title_justify="left")
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table
