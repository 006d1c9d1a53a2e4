"""Names and durations as a person reads them."""

import datetime


def humanize(name: str) -> str:
    """`level_1` as `level 1`."""
    return name.replace("_", " ")


def duration(steps: float, rate: float | None) -> str:
    """Of some steps at so many a second."""
    return str(datetime.timedelta(seconds=round(steps / rate))) if rate else "?"
