"""Reads YAML files and values; rejects ambiguous ones and those made to exhaust memory."""

import collections
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from lth_diet.errors import UserError

MAX_BYTES = 1 << 16  # of a file
MAX_DEPTH = 20  # of nested sections and lists
MAX_DIGITS = 100  # of an integer, in any notation


def quote(value: Any) -> str:
    """A value as quoted in a message: its repr, shortened to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Loader(yaml.SafeLoader):
    """A SafeLoader that also rejects duplicate keys, aliases, tags, deep nesting and huge integers."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _error_at("aliases are not supported; write out the value", event.start_mark)
        if event.tag is not None:
            raise _error_at(f"tags such as {event.tag} are not supported; write the plain value", event.start_mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _error_at(f"sections or lists are nested more than {MAX_DEPTH} deep", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _error_at(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    keys = (loader.construct_object(key, deep=True) for key, _ in node.value)
    for key, count in collections.Counter(key for key in keys if isinstance(key, Hashable)).items():
        if count > 1:
            raise _error_at(f"the key {quote(key)} is given twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
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
        line = f" in line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: invalid YAML{line}: {reason}") from None


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
            raise ValueError
        text = content.decode()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not a text file of at most {MAX_BYTES:,} bytes"
        raise UserError(f"{path}{role} cannot be read: {reason}") from None
    tree = parse(text, str(path))
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise UserError(f"{path}: not a configuration; expected keys and values, as in yamls/cifar10_all.yaml")
    return tree
