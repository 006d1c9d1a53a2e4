"""Reads YAML files and values, and rejects what could be read in two ways or exhaust memory."""

import collections
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from lth_diet.errors import UserError

MAX_BYTES = 1 << 16  # of a file
MAX_DEPTH = 20  # sections in sections
MAX_DIGITS = 100  # of a number, in whatever notation


def quote(value: Any) -> str:
    """As it is quoted in a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Loader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, and what lets a short file become a huge tree or number."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _not_here("an alias; write what it stands for", event.start_mark)
        if event.tag is not None:
            raise _not_here(f"a tag, {event.tag}; allowed: values without", event.start_mark)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _not_here(f"more than {MAX_DEPTH} sections or lists in each other", event.start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _not_here(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    keys = (loader.construct_object(key, deep=True) for key, _ in node.value)
    for key, count in collections.Counter(key for key in keys if isinstance(key, Hashable)).items():
        if count > 1:
            raise _not_here(f"the key {quote(key)} stands twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    if len(node.value) <= MAX_DIGITS and abs(number := loader.construct_yaml_int(node)) < 2**63:
        return number
    raise _not_here("a number of more than 64 bits", node.start_mark)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def parse(text: str, where: str) -> Any:
    """Safe YAML.

    Raises:
        UserError: If it is none; `where` is its subject.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, TypeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: not YAML{line}: {reason}") from None


def ends_in_comment(text: str) -> bool:
    value = yaml.compose(text)
    return "#" in (text[value.end_mark.index :] if value else text)


def read_tree(path: Path, named: str = "") -> dict[str, Any]:
    """Keys and values of a YAML file.

    Args:
        path: Of the file.
        named: Where its name stands, for the sentence.

    Raises:
        UserError: If it cannot be read or holds something else.
    """
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError
        text = content.decode()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not text of up to {MAX_BYTES:,} bytes"
        raise UserError(f"{path}{named} cannot be read: {reason}") from None
    tree = parse(text, str(path))
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise UserError(f"{path}: not a configuration; allowed: keys and values, as in yamls/cifar10_all.yaml")
    return tree
