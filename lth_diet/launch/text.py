"""Readable names and durations, and tables of progress."""

import datetime
from collections.abc import Sequence

from rich.table import Table


def humanize(name: str) -> str:
    """Replace underscores with spaces: `level_1` becomes `level 1`."""
    return name.replace("_", " ")


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
