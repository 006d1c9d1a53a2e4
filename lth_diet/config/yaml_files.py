"""Reads YAML files and values; rejects ambiguous ones and those made to exhaust memory.

Values are read as in YAML 1.1, except that a date is text and that a number is rejected where YAML 1.1 and a reader may
disagree: 010 (octal), 1:30 (base 60), 0o10 (octal in YAML 1.2 only).
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, ClassVar

import yaml

from lth_diet.errors import UserError

MAX_BYTES = 1 << 16  # of a file
MAX_DEPTH = 20  # of nested sections and lists
MAX_DIGITS = 100  # of an integer, in any notation


_LEADING_ZERO = re.compile(r"[-+]?0_*[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9]+)?(ba)?")
_BASE_60 = re.compile(r"[-+]?([1-9][0-9_]*(:[0-5]?[0-9])+|[0-9][0-9_]*(:[0-5]?[0-9])+\.[0-9_]*)")
_OCTAL = re.compile(r"[-+]?0o_*[0-7][0-7_]*")


def quote(value: Any) -> str:
    """A value as quoted in a message: as written in YAML, shortened to 60 characters."""
    text = _as_written(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _as_written(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_as_written(key)}: {_as_written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_as_written, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


def _ambiguity(text: str) -> str:
    """Both readings of an ambiguous number, and how to write each; an empty string for any other text."""
    plain = text.replace("_", "")
    if not (_OCTAL.fullmatch(text) or _BASE_60.fullmatch(text) or _LEADING_ZERO.fullmatch(text)):
        return ""
    if len(text) > MAX_DIGITS:
        return f"{quote(text)} is a number of more than {MAX_DIGITS} digits"
    if "o" in plain:
        value = int(plain, 8)
        return f"{text} is {value} in YAML 1.2 (octal) and text in YAML 1.1; write {value}, or quote it if it is text"
    if ":" in plain:
        value = yaml.safe_load(text)
        return f"{text} is {value} in YAML 1.1 (base 60) and text in YAML 1.2; write {value}, or quote it if it is text"
    sign, digits = re.fullmatch("([-+]?)0*(.*)", plain).groups()
    decimal = sign.replace("+", "") + (digits if digits[:1].isdigit() else f"0{digits}")
    if re.fullmatch("[-+]?[0-7]+", plain) and int(plain, 8) != int(plain):
        octal = int(plain, 8)
        both = f"{text} is {octal} in YAML 1.1 (octal) and {decimal} in YAML 1.2; write {decimal} or {octal}"
        return f"{both}, or quote it if it is text"
    return f"{text} starts with a zero, as octal numbers do in YAML 1.1; write {decimal}, or quote it if it is text"


class _AmbiguousError(yaml.MarkedYAMLError):
    """A number with two readings; its context is its key."""


class _Loader(yaml.SafeLoader):
    """A SafeLoader that also rejects ambiguous numbers, duplicate keys, aliases, tags, deep nesting and huge integers.

    A date is text: a configuration has none, and as text it can be the name of an experiment.
    """

    depth = 0
    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _error_at("aliases are not supported; write out the value", event.start_mark)
        if event.tag is not None:
            raise _error_at(f"tags such as {event.tag} are not supported; write the plain value", event.start_mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _error_at(f"sections or lists are nested more than {MAX_DEPTH} deep", event.start_mark)
        if isinstance(event, yaml.ScalarEvent) and event.style is None and (problem := _ambiguity(event.value)):
            key = index.value if isinstance(index, yaml.ScalarNode) else None
            raise _AmbiguousError(context=key, problem=problem, problem_mark=event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _error_at(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, Hashable):
            if key in seen:
                raise _error_at(f"the key {quote(key)} is given twice", key_node.start_mark)
            seen.add(key)
    return loader.construct_mapping(node, deep=True)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    if not re.search("[0-9a-fA-F]", node.value.removeprefix("0b").removeprefix("0x")):
        raise _error_at(f"{node.value} has no digits", node.start_mark)
    if len(node.value) <= MAX_DIGITS and abs(number := loader.construct_yaml_int(node)) < 2**63:
        return number
    raise _error_at("an integer of more than 64 bits", node.start_mark)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse(text: str, where: str) -> Any:
    """Parse YAML text safely.

    Args:
        text: The text.
        where: Where the text is from; the message starts with it.

    Raises:
        UserError: If the text is not valid YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f"in line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        if isinstance(error, _AmbiguousError):
            at = " ".join(filter(None, [error.context, line if mark.line else ""]))
            raise UserError(f"{where}: {at and f'{at}: '}{reason}") from None
        raise UserError(f"{where}: invalid YAML{line and f' {line}'}: {reason}") from None


def ends_in_comment(text: str) -> bool:
    """Whether YAML takes the end of a text as a comment."""
    value = yaml.compose(text)
    return "#" in (text[value.end_mark.index :] if value else text)


def read_tree(path: Path, role: str = "") -> dict[str, Any]:
    """Read the keys and values of a YAML file.

    Args:
        path: Path of the file.
        role: Follows the path in messages, such as ", the base of a.yaml,".

    Raises:
        UserError: If the file cannot be read or is not a mapping with text keys.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise UserError(f"{path}{role} cannot be read: larger than {MAX_BYTES:,} bytes")
        text = content.decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}{role} cannot be read: not UTF-8 text; save it with this encoding") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else "not the name of a file"
        raise UserError(f"{path}{role} cannot be read: {reason}") from None
    tree = parse(text, str(path))
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise UserError(f"{path}: not a configuration; expected keys and values, as in yamls/cifar10_all.yaml")
    return tree
