"""Every case of cases.yaml ends with exit status 2 and one sentence, and changes no file."""

import copy
import re
import shlex
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import yaml
from bad_inputs import steps
from forks.client import Process
from helpers import MEASURED, ROOT, TINY, check_launcher_output

from analysis import claims, collect, dominance, examples, figures, matching, power, report
from lth_diet.__main__ import main
from lth_diet.config import loading
from lth_diet.data import catalog
from lth_diet.masks.mask import Mask
from lth_diet.networks.resnet import ResNet
from lth_diet.runs.run_directory import RunDirectory
from recipes import imp, instability, score, sweep

COMMANDS = {
    "imp": (imp.main, ["recipes/imp.py"]),
    "score": (score.main, ["recipes/score.py"]),
    "instability": (instability.main, ["recipes/instability.py"]),
    "sweep": (sweep.main, ["recipes/sweep.py"]),
    "masks": (main, ["-m", "lth_diet.masks"]),
    "tracking": (main, ["-m", "lth_diet.tracking"]),
    "runs": (main, ["-m", "lth_diet.runs"]),
    "examples": (examples.main, ["-m", "analysis.examples"]),
    "claims": (claims.main, ["-m", "analysis.claims"]),
    "collect": (collect.main, ["-m", "analysis.collect"]),
    "dominance": (dominance.main, ["-m", "analysis.dominance"]),
    "figures": (figures.main, ["-m", "analysis.figures"]),
    "matching": (matching.main, ["-m", "analysis.matching"]),
    "power": (power.main, ["-m", "analysis.power"]),
    "report": (report.main, ["-m", "analysis.report"]),
}
CASES = {
    f"{topic}: {case['case']}": case
    for topic, cases in yaml.safe_load((Path(__file__).parent / "cases.yaml").read_text()).items()
    for case in cases
}
REAL = [name for name, case in CASES.items() if case.get("real")]
COMPOSER = [name for name, case in CASES.items() if case.get("composer")]
BOMBS = [name for name, case in CASES.items() if case.get("bomb")]

IMAGES = """
arm: all
dataset: {name: image_folder}
model: {depth: 8, width: 2}
train: {steps: 12ba, batch_size: 2}
pretrain: {steps: 4ba}
replicates: 1
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Run directory of tiny.yaml with one level, without training."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "tiny.yaml").write_text(TINY.format(arm="random"))
    run = RunDirectory(loading.load_config(folder / "tiny.yaml", [f"runs={folder}/runs", "prune.levels=1"]))
    run.create()
    replicate, mask = run.replicate(0), Mask.dense(ResNet(8, 10, width=2))
    for phase in (replicate.pretrain, replicate.level(0)):
        for name in ("mask.safetensors", "weights.safetensors"):
            phase.write(name, mask.to_bytes())
        phase.finish(MEASURED)
    run.path.rename(folder / "runs/run")
    return folder / "runs"


@pytest.fixture
def prepare(place, monkeypatch, finished):
    """Prepare the working folder of a case and return its command."""

    def make(name):
        case = copy.deepcopy(CASES[name])  # steps modify it
        if case.get("permissions") and not _permissions_matter(place):
            pytest.skip("file permissions do not restrict this user")
        catalog.info.cache_clear()
        (place / "tiny.yaml").write_text(TINY.format(arm="random"))
        (place / "images.yaml").write_text(IMAGES)
        if case.get("run"):
            shutil.copytree(finished, place / "runs")
        for step in case.get("given", []):
            ((what, value),) = step.items()
            getattr(steps, what)(value)
        for key, value in case.get("env", {}).items():
            monkeypatch.setenv(key, value)
        command = case["command"]
        return shlex.split(command) if isinstance(command, str) else command

    return make


def _permissions_matter(place):
    probe = place.parent / "probe"
    probe.touch(mode=0o000)
    try:
        probe.read_bytes()
    except PermissionError:
        return True
    return False


def tree(place):
    """Mode and content of everything below a folder, by path."""

    def content(path):
        if path.is_symlink():
            return path.readlink()
        return path.read_bytes() if path.is_file() and path.stat().st_mode & 0o400 else None

    return {path.relative_to(place): (path.lstat().st_mode, content(path)) for path in place.rglob("*")}


def check(case, err):
    sentence = err.removesuffix("\n")
    assert sentence.startswith("error: ") and sentence.isprintable(), err
    assert re.search(case["sentence"], sentence), err


@pytest.mark.parametrize("name", CASES)
def test_bad_input_exits_with_2_after_one_sentence_and_changes_nothing(prepare, place, capfd, name):
    command, *arguments = prepare(name)
    before = tree(place)
    assert COMMANDS[command][0](arguments) == 2
    out, err = capfd.readouterr()
    check(CASES[name], err)
    assert out == ""
    assert tree(place) == before


@pytest.mark.parametrize("name", REAL)
def test_bad_input_exits_with_2_in_a_process(prepare, place, name):
    command, *arguments = prepare(name)
    before = tree(place)
    script, *rest = COMMANDS[command][1]
    process = Process([script if script == "-m" else ROOT / script, *rest, *arguments])
    out, err = process.communicate()
    assert (process.returncode, out) == (2, "")
    check(CASES[name], err)
    assert tree(place) == before


def test_bad_input_exits_with_2_in_a_new_interpreter(prepare, place):
    command, *arguments = prepare(REAL[0])
    script = ROOT / COMMANDS[command][1][0]
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    check(CASES[REAL[0]], done.stderr)


@pytest.mark.parametrize("name", COMPOSER)
def test_bad_input_is_reported_once_under_the_composer_launcher(prepare, place, name):
    command, *arguments = prepare(name)
    before = tree(place)
    process = Process(["composer", "-n", 2, ROOT / COMMANDS[command][1][0], *arguments])
    out, err = process.communicate()
    assert process.returncode != 0
    check_launcher_output(err + out, CASES[name]["sentence"])
    assert tree(place) == before


@pytest.mark.parametrize("name", BOMBS)
def test_input_made_to_exhaust_memory_or_time_is_rejected_quickly(prepare, name):
    command, *arguments = prepare(name)
    tracemalloc.start()
    begin = time.perf_counter()
    try:
        assert COMMANDS[command][0](arguments) == 2
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - begin < 10


def test_every_step_is_used():
    defined = {name for name, step in vars(steps).items() if getattr(step, "__module__", None) == steps.__name__}
    used = {next(iter(step)) for case in CASES.values() for step in case.get("given", [])}
    assert used == {name for name in defined if not name.startswith("_")}
