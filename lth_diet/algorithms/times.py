"""Times as arguments of the Algorithms."""

import operator
from collections.abc import Sequence
from typing import Any

from composer import Time, TimeUnit

_NAMES = {TimeUnit.BATCH: "batches", TimeUnit.EPOCH: "epochs", TimeUnit.SAMPLE: "samples"}


def parse_time(name: str, value: Any, units: Sequence[TimeUnit]) -> Time:
    """Return an argument as a Composer Time.

    Args:
        name: Name of the argument, for the message.
        value: An integer (batches), a time string such as ``"400ba"``, or a Time.
        units: Allowed units.

    Raises:
        ValueError: If the value is not a time, is negative or has another unit.
    """
    try:
        time = Time.from_input(value if isinstance(value, str | Time) else operator.index(value), TimeUnit.BATCH)
    except (TypeError, ValueError, OverflowError):
        time = None
    if time is None or time.unit not in units or time.value < 0:
        examples = ", ".join(f"'2{unit.value}' ({_NAMES[unit]})" for unit in units)
        raise ValueError(f"{name}={value!r}; expected a number of batches of at least 0, or a time such as {examples}")
    return time
