"""Types of configuration values.

A ValueError raised here completes the sentence `<key> = <value> in <file>: ...`, as in "must be a number".
"""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo

from lth_diet.errors import expand_path

MAX_REPLICATES = 1000
MAX_LEVELS = 10_000
MAX_NUMBER = 2**31  # exclusive, of steps, images, channels ...
_REAL = re.compile(r"[-+]?((0|[1-9][0-9_]*)(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?")
CONTROL_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def _steps(value: Any, info: ValidationInfo) -> int:
    """A number of batches; epochs are converted by `info.context`, a function that returns the batches per epoch."""
    match = re.fullmatch(r"(0|[1-9][0-9_]{0,19})(ba|ep)?", str(value)) if not isinstance(value, bool) else None
    if match is None:
        raise ValueError("must be a number of batches, such as 400 or 400ba, or of epochs, such as 160ep")
    return int(match[1].replace("_", "")) * (info.context() if match[2] == "ep" else 1)


def _real(value: Any) -> float:
    if type(value) in (int, float):
        return float(value)
    # YAML 1.1 reads 1e-4 as text
    if isinstance(value, str) and _REAL.fullmatch(value):
        return float(value.replace("_", ""))
    raise ValueError("must be a number")


def replicate_indices(value: Any) -> tuple[int, ...]:
    """Indices of replicates: a count n means 0 to n - 1."""
    if type(value) is int and 0 < value <= MAX_REPLICATES:
        return tuple(range(value))
    indices = value if isinstance(value, list | tuple) else []
    in_range = all(type(index) is int and 0 <= index < MAX_NUMBER for index in indices)
    if in_range and 0 < len(indices) == len(set(indices)) <= MAX_REPLICATES:
        return tuple(indices)
    raise ValueError(
        f"must be a count between 1 and {MAX_REPLICATES}, such as 4, or a list of distinct indices, such as [0, 2]"
    )


def _text(value: str) -> str:
    if CONTROL_CHARACTERS.search(value):
        raise ValueError("must be text without control characters")
    return value


def _folder_or_url(text: str) -> str:
    if scheme := re.match(r"(\w+):/(?!/)", text):
        raise ValueError(f"must be a folder, or a URL such as {scheme[1]}://bucket/folder, with two slashes")
    return text


STEPS = BeforeValidator(_steps)
Steps = Annotated[int, STEPS, Field(lt=MAX_NUMBER)]
Interval = Annotated[Steps, Field(gt=0)]
Real = Annotated[float, BeforeValidator(_real), Field(allow_inf_nan=False)]
Positive = Annotated[Real, Field(gt=0)]
NotNegative = Annotated[Real, Field(ge=0)]
Count = Annotated[int, Field(strict=True, gt=0, lt=MAX_NUMBER)]
Index = Annotated[int, Field(strict=True, ge=0, lt=MAX_NUMBER)]
Text = Annotated[str, Field(strict=True, min_length=1), AfterValidator(_text)]
PathText = Annotated[Text, AfterValidator(expand_path)]
RunsText = Annotated[PathText, AfterValidator(_folder_or_url)]


class Section(BaseModel):
    """A section of a configuration: immutable, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def resnet_depth(value: Any) -> int:
    """Layers of a CIFAR-style ResNet: 6n + 2."""
    if type(value) is not int or not 8 <= value <= 1202 or value % 6 != 2:
        raise ValueError("must be 6n + 2, such as 20, 32 or 56, and at most 1202")
    return value
