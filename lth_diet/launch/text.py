"""Readable names and durations."""

import datetime


def humanize(name: str) -> str:
    """Replace underscores with spaces: `level_1` becomes `level 1`."""
    return name.replace("_", " ")


def duration(steps: float, rate: float | None) -> str:
    """Format the time that some steps take, as h:mm:ss; `?` if the rate (steps per second) is unknown or zero."""
    return str(datetime.timedelta(seconds=round(steps / rate))) if rate else "?"
