"""Tables of keys, as `python -m lth_diet keys` prints them and docs/ shows them."""

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from lth_diet.config.fields import MAX_NUMBER, STEPS, Section

_SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
_TYPES = {bool: "true, false", int: "integer", float: "number", str: "text", tuple: "list"}


def table(section: type[Section]) -> str:
    """A Markdown table: one row per key of a section with type, default, range and meaning."""
    rows = [
        (f"`{key}`", _type(field), _default(field), _range(field), " ".join((field.description or "").split()))
        for key, field in _keys(section)
    ]
    lines = [("key", "type", "default", "range", "meaning"), ("---",) * 5, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _keys(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        inner = next((kind for kind in _kinds(field) if isinstance(kind, type) and issubclass(kind, Section)), None)
        if inner is None:
            yield f"{prefix}{name}", field
        else:
            yield from _keys(inner, f"{prefix}{name}.")


def _kinds(field: FieldInfo) -> list[Any]:
    """The types of a field, without None."""
    options = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    return options if type(None) in get_args(field.annotation) else [field.annotation]


def _metadata(field: FieldInfo) -> list[Any]:
    """Validators and limits, those of an optional or listed value too."""
    return [*field.metadata, *(item for kind in _kinds(field) for item in getattr(kind, "__metadata__", ()))]


def _type(field: FieldInfo) -> str:
    (kind,) = _kinds(field)
    if get_origin(kind) is Literal:
        return ", ".join(get_args(kind))
    if STEPS in _metadata(field):
        return "batches"
    kind = getattr(kind, "__origin__", kind)  # of an annotated type
    return _TYPES[get_origin(kind) or kind]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return {None: "none", True: "true", False: "false"}.get(value if isinstance(value, bool | None) else "", f"{value}")


def _range(field: FieldInfo) -> str:
    limits = []
    for item in _metadata(field):
        for part in getattr(item, "metadata", [item]):
            for name, sign in _SIGNS.items():
                limit = getattr(part, name, None) if isinstance(part, annotated_types.BaseMetadata) else None
                if limit is not None and limit != MAX_NUMBER:
                    limits.append(f"{sign} {limit}")
    return ", ".join(dict.fromkeys(limits))
