import shutil
import subprocess

import pytest
from helpers import ROOT

from lth_diet.runs import environment

SOURCE = '''"""Doc of the module."""

import torch


def scale(x):
    """Doc of a function
    in two lines."""
    y = "# not a comment"
    return x * 2, y
'''
SAME = [
    SOURCE.replace("import torch\n", "import torch  # why\n"),
    SOURCE.replace("in two lines.", "in two other lines.\n\n    Args:\n        x: A number."),
    SOURCE.replace('"""Doc of the module."""\n\n', "\n# A comment.\n"),
    SOURCE.replace("    y =", "\n    y ="),
]
OTHER = [
    SOURCE.replace("x * 2", "x * 3"),
    SOURCE.replace("# not a comment", "# a comment"),
    SOURCE.replace("def scale(x):", "def scale(x): 'doc'\ndef other(x):"),
]


@pytest.fixture
def package(tmp_path):
    """A copy of the package, with one more module that computes."""
    copy = tmp_path / "lth_diet"
    shutil.copytree(ROOT / "lth_diet", copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def hash_with(package, name, source):
    (package / name).write_text(source)
    environment.code_hash.cache_clear()
    return environment.code_hash(package)


@pytest.mark.parametrize("source", SAME)
def test_comments_and_docstrings_do_not_change_the_hash_of_the_code(package, source):
    assert hash_with(package, "masks/new.py", source) == hash_with(package, "masks/new.py", SOURCE)


@pytest.mark.parametrize("source", OTHER)
def test_code_changes_the_hash_of_the_code(package, source):
    assert hash_with(package, "masks/new.py", source) != hash_with(package, "masks/new.py", SOURCE)


def test_the_hash_is_of_what_computes_results(package):
    def after(name, old, new):
        text = (package / name).read_text()
        assert old in text
        changed = hash_with(package, name, text.replace(old, new))
        hash_with(package, name, text)
        return changed

    before = environment.code_hash(package)
    assert after("networks/resnet.py", "F.relu", "F.tanh") != before
    assert after("imp.py", "range(levels)", "range(levels + 1)") != before
    assert after("instability.py", "POINTS = 11", "POINTS = 12") != before
    assert after("launch/screen.py", "import", "import os\nimport") == before


def test_the_commit_is_that_of_the_repository_that_tracks_the_package(package, tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, *arguments], check=True, capture_output=True)

    monkeypatch.delenv("LTH_DIET_COMMIT", raising=False)
    monkeypatch.setattr(environment, "PACKAGE", package)
    assert environment._git_commit() == ""
    git("init", "-q")
    (tmp_path / "other").touch()
    git("add", "other")
    git("-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "first")
    assert environment._git_commit() == ""  # as in a virtual environment inside another repository
    git("add", "lth_diet")
    git("-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-qm", "second")
    assert len(environment._git_commit()) == 40


def test_a_phase_resumed_elsewhere_has_both_values():
    first, second = {"device": "A", "torch": "2"}, {"device": "B", "torch": "2", "code": "c"}
    both = environment.merge(first, second)
    assert both == {"device": "A, then B", "torch": "2", "code": "c"}
    assert environment.merge(both, second) == both
    assert environment.merge(both, first)["device"] == "A, then B, then A"


def test_differences_name_the_phases_of_each_value():
    old, new = {"device": "A", "torch": "2.6"}, {"device": "A", "torch": "2.7", "code": "c"}
    found = environment.differences([("pretrain", old), ("level_0", old), ("level_1", {}), ("level_2", new)])
    assert found == {"torch": {"2.6": ["pretrain", "level_0"], "2.7": ["level_2"]}}
    assert environment.describe(found) == "torch = 2.6 (pretrain to level_0, 2 trainings) and 2.7 (level_2)"
