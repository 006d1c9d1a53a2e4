"""Claims of SECURITY.md: no module unpickles, and its advisories match the pinned versions."""

import ast
import re

import pytest
from helpers import ROOT

MODULES = [path for folder in ("lth_diet", "recipes", "analysis") for path in (ROOT / folder).rglob("*.py")]
UNPICKLES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_unpickles_or_executes_its_input(path):
    tree = ast.parse(path.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    assert not {name.partition(".")[0] for name in imported} & UNPICKLES
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {
        "torch.load",
        "eval",
        "exec",
        "yaml.unsafe_load",
        "yaml.full_load",
        "os.system",
        "tar.extractall",
    }
    keywords = {
        word.arg: ast.unparse(word.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for word in node.keywords
    }
    assert keywords.get("allow_pickle", "False") == "False" and keywords.get("shell", "False") == "False"
    if "yaml.load" in calls:
        assert keywords["Loader"] == "_Loader"


def test_every_advisory_names_a_pinned_version():
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    text = (ROOT / "SECURITY.md").read_text().lower()
    named = re.findall(
        r"(mosaicml|torch|pillow|mlflow|flask|starlette|gitpython|requests|protobuf|python-dotenv|cryptography) (\d[\w.]*\d)",
        text,
    )
    assert len(named) >= 11
    assert {name: version for name, version in named if version != pins[name]} == {}
