"""Private names of other packages: all of them are listed in CONTRIBUTING.md, and exist in the pinned versions."""

import ast
import importlib
import inspect
import pkgutil
import re
from importlib.metadata import version

import pytest
from composer import Trainer
from helpers import ROOT

FILES = [path for folder in ("lth_diet", "analysis", "recipes") for path in sorted((ROOT / folder).rglob("*.py"))]
TABLE = re.findall(
    r"^\| `([\w.]+)(?:\((\w+)\))?` \| (\w+) ([\d.]+) \| `(.*?)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M
)
PACKAGES = {"Composer": "mosaicml", "torch": "torch", "Ray": "ray"}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def used(tree):
    """Attributes, keywords and imported names in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg
        elif isinstance(node, ast.Dict):  # of keyword arguments, perhaps
            yield from (key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str))
        elif isinstance(node, ast.ImportFrom) and not node.level and not node.module.startswith("lth_diet"):
            yield from node.module.split(".")
            yield from (alias.name for alias in node.names)


def defined(tree):
    """Names that a module defines: functions, classes, variables, parameters, attributes of self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def test_every_private_name_of_another_package_is_in_the_table():
    trees = [ast.parse(path.read_text()) for path in FILES]
    ours = {name for tree in trees for name in defined(tree)}
    theirs = (
        {name for tree in trees for name in used(tree) if is_private(name)} - ours - {"_exit"}
    )  # os._exit is public
    overridden = {name for name in vars(Trainer) if is_private(name)} & ours
    listed = {part for name, keyword, *_ in TABLE for part in (*name.split("."), keyword) if is_private(part)}
    assert theirs | overridden == listed


@pytest.mark.parametrize(("name", "keyword", "package", "seen", "file"), TABLE, ids=lambda value: str(value))
def test_a_private_name_exists_in_the_version_where_it_was_seen(name, keyword, package, seen, file):
    assert version(PACKAGES[package]) == seen
    owner, _, last = name.rpartition(".")
    if keyword:
        assert keyword in inspect.getsource(pkgutil.resolve_name(name))
    elif last == "_original_model":  # an attribute that Trainer.__init__ sets
        assert f"self.{last} =" in inspect.getsource(pkgutil.resolve_name(owner))
    else:
        try:
            importlib.import_module(owner)
        except ModuleNotFoundError:
            importlib.import_module(owner.rpartition(".")[0])
        assert hasattr(pkgutil.resolve_name(owner), last)
    assert (keyword or last) in (ROOT / "lth_diet" / file).read_text()
