"""Fuzzing: any configuration is either accepted or rejected with one sentence."""

import shutil
import string

import pytest
from helpers import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from lth_diet.config import loading, run_ids
from lth_diet.errors import UserError
from lth_diet.sweep.grid import Sweep

YAMLS = ROOT / "yamls"
FILES = {str(path.relative_to(YAMLS)): path.read_text() for path in sorted(YAMLS.rglob("*.yaml"))}
SWEEPS = [name for name in FILES if "sweeps/" in name]
ODD = ["\t", "- ", "? ", ": ", "{", "}", "[", "]", "&a ", "*a", "!!int ", "!x ", "<<: ", "|\n", ">", "'", '"', "#", "%"]
ODD += [
    "---\n",
    "...\n",
    "~",
    ".nan",
    "-.inf",
    "1e999",
    "0x" + "f" * 99,
    "1:30",
    "2020-13-45",
    "=",
    "\0",
    "\x1b",
    "\ufeff",
]
ODD += ["\ud800", "\u2028", '"\\0"', '"\\ud800"', "null", "yes", "''", "base: ", "../", "10ba", "- " * 30]

texts = st.sampled_from(ODD) | st.text(max_size=8) | st.sampled_from(sorted(FILES)).map(FILES.get)


@st.composite
def mutated(draw, names):
    """A file of yamls/ after random changes to its lines or characters."""
    text = FILES[draw(st.sampled_from(names))]
    for _ in range(draw(st.integers(1, 5))):
        by_line = draw(st.booleans())
        parts = text.splitlines(keepends=True) if by_line else list(text)
        at = draw(st.integers(0, len(parts)))
        until = draw(st.integers(at, min(len(parts), at + 3)))
        new = draw(st.just([]) | st.just(parts[at:until] * 2) | st.lists(texts, min_size=1, max_size=2))
        text = "".join([*parts[:at], *new, *parts[until:]])
    return text


def check_accepted_or_rejected(path, overrides=(), read=loading.load_config):
    try:
        assert read(path, overrides)
    except UserError as error:
        assert str(error).isprintable()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the base files."""
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(ROOT / "yamls/base", folder / "base")
    return folder


@settings(max_examples=300)
@given(text=mutated(sorted(FILES)))
def test_any_configuration_file(folder, text):
    path = folder / "fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    check_accepted_or_rejected(path)


@settings(max_examples=300)
@given(text=mutated(SWEEPS))
def test_any_sweep_file(folder, text):
    path = folder / "base/fuzz.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    check_accepted_or_rejected(path, read=Sweep)


@settings(max_examples=300)
@given(content=st.binary(max_size=60))
def test_any_bytes(folder, content):
    path = folder / "bytes.yaml"
    path.write_bytes(content)
    check_accepted_or_rejected(path)


KEYS = st.sampled_from(sorted(run_ids.DEFAULTS)) | st.text(string.ascii_lowercase + "._\x1b\n", max_size=12) | st.text()


@settings(max_examples=300)
@given(st.lists(st.tuples(KEYS, st.sampled_from(["=", "", "=="]), texts).map("".join), max_size=4))
def test_any_overrides(overrides):
    check_accepted_or_rejected(ROOT / "yamls/digits_random.yaml", overrides)
