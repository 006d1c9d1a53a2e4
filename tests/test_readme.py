"""What README.md and docs/ say is true: every command in them runs here, the long ones with small overrides."""

import glob
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from chromium import PROGRAM, Page
from forks.client import Process
from helpers import MEASURED, ROOT, YAMLS, write_image_folder
from safetensors.numpy import load_file
from tracking.runs import create_run, finish

from lth_diet.config import loading
from lth_diet.config.run_ids import run_name
from lth_diet.runs.scores_directory import ScoresDirectory
from lth_diet.tracking import sync

README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
EXTENDING = PAGES[ROOT / "docs/extending.md"]
PROGRAMS = ("make", "composer", "python", "for", "docker", ".", "git")
COMMANDS = [
    line.strip().partition("     #")[0].strip()
    for page in PAGES.values()
    for line in page.splitlines()
    if line.startswith("    ") and line.split()[0] in PROGRAMS and not line.endswith(":")
]
SMALL = (
    "model.depth=8 model.width=2 train.steps=6 train.milestones=[] train.batch_size=64 prune.levels=1 "
    "intervals.checkpoint=3 stack=1"
)
DIGITS = f"{SMALL} dataset.name=digits experiment=digits"
PRETRAIN = "pretrain.steps=2"
SUBSET = "pretrain.steps=2 pretrain.subset.size=128"
SCORES = "scores.networks=3 scores.steps=5"

# Command to what is added to make it small; None: another test runs it, as named there.
RUNS = {
    ". .venv/bin/activate": None,  # the tests run inside
    "make quickstart": None,  # .ci/run
    "make quickstart-noise": None,
    "make test": None,  # .ci/run
    "make gpu-check": None,  # test_gpu_check.py
    "make faults": None,  # a part of it in make test and make integration
    "composer -n 4 recipes/imp.py -f yamls/cifar100_easy.yaml": f"{DIGITS} {SUBSET} {SCORES}",
    "composer -n 2 recipes/imp.py -f yamls/cifar10_all.yaml replicates=2 prune.levels=3": f"{DIGITS} {PRETRAIN}",
    "python recipes/imp.py -f yamls/cifar10_all.yaml --plan": "",
    "composer -n 2 recipes/imp.py -f yamls/image_folder_all.yaml dataset.root=data/mine replicates=2": f"{SMALL} {PRETRAIN}",
    "composer -n 2 recipes/imp.py -f yamls/digits_init.yaml -f yamls/digits_easy.yaml -f yamls/digits_hard.yaml prune.levels=3": f"{SMALL} {SUBSET} {SCORES} replicates=2",
    "for arm in init all all_half random easy hard; do composer -n 4 recipes/imp.py -f yamls/cifar10_$arm.yaml; done": None,  # below
    "for arm in all all_half random easy; do composer -n 4 recipes/imp.py -f yamls/cifar10_noise10_$arm.yaml; done": None,  # below
    "python recipes/sweep.py -f yamls/sweeps/figure2_cifar10.yaml --plan gpus=4 step_ms=20": "",
    "python recipes/sweep.py -f yamls/sweeps/figure2_cifar10.yaml gpus_per_run=0.5": None,  # test_cluster.py
    "python recipes/sweep.py -f yamls/sweeps/figure2_cifar10.yaml --address auto": None,  # test_cluster.py
    "composer -n 4 recipes/imp.py -f yamls/cifar100_easy.yaml runs=s3://bucket/lottery": None,  # test_s3.py
    "python -m lth_diet pull s3://bucket/lottery runs": None,  # test_s3.py
    "composer -n 2 recipes/instability.py -f yamls/digits_all.yaml -f yamls/digits_random.yaml steps=[0,20,40,80]": f"{SMALL} {SUBSET} steps=[0,2] replicates=2",
    "composer -n 4 recipes/score.py -f yamls/cifar10_noise10_easy.yaml": f"{DIGITS} {SUBSET} scores.networks=4 scores.steps=5",
    "composer -n 2 recipes/score.py -f yamls/cifar10_noise10_easy.yaml dataset.name=image_folder dataset.root=data/mine scores.networks=4 scores.steps=800": f"{SMALL} {SUBSET} {SCORES} scores.networks=2",
    "python -m analysis.examples runs/scores/<id> --root data --arm hard --size 3200 -o examples": None,  # below
    "python -m analysis.examples runs/scores/<id> --root data/mine --arm easy --size 3200 -o examples": None,  # as above
    "composer -n 4 recipes/imp.py -f yamls/cinic10_random.yaml parallelism=data": f"{DIGITS} {SUBSET} replicates=1",
    "python recipes/imp.py -f yamls/digits_all.yaml replicates=16 stack=8 --plan": "",
    "composer -n 2 recipes/imp.py -f yamls/digits_all.yaml replicates=16 stack=8": f"{SMALL} {PRETRAIN} replicates=4 stack=2 runs=stacked",
    "docker build -t lth_diet --build-arg GIT_COMMIT=$(git rev-parse HEAD) .": None,  # test_docker.py
    "docker run --gpus all --shm-size=1g -v $PWD/data:/lth_diet/data -v $PWD/runs:/lth_diet/runs lth_diet -n 4 recipes/imp.py -f yamls/cifar100_all.yaml": None,
    "git clone <this repository> lth_diet": None,
    "docker compose up -d": None,  # test_server.py, natively
    "docker compose run --rm trainer -n 4 recipes/imp.py -f yamls/cifar100_all.yaml": None,
    "composer -n 2 recipes/imp.py -f yamls/digits_easy.yaml scores.file=distance/scores.safetensors": None,  # below
    "python -m lth_diet sync runs": "",
    "python -m lth_diet verify runs": "",
    "python -m analysis.report --experiment digits -o report.html": "--levels 0 1",
    "python -m analysis.collect --experiment digits -o results.csv": "",
    "python -m analysis.dominance results.csv --all-pairs": "--levels 0 1",
    "python -m analysis.dominance --published --dataset cifar10 --challenger easy:size=12800 --reference all:steps=400": "",
    "python -m analysis.matching results.csv --margin 1 -o figures": "--levels 0 1",
    "python -m analysis.figures results.csv --published -o figures": "",
    "python -m analysis.claims --published": "",
    "python -m analysis.claims analysis/results/digits.csv.gz": "",
    "python -m analysis.claims analysis/results/cifar10_small.csv.gz": "",
    "python -m analysis.matching analysis/results/cifar10_small.csv.gz": "",
    "python -m analysis.claims analysis/results/cifar10_overnight.csv.gz": "",
    "python recipes/sweep.py -f yamls/sweeps/cifar10_small.yaml --plan": "",
    "python recipes/sweep.py -f yamls/sweeps/cifar10_small.yaml": None,  # hours
    "python recipes/sweep.py -f yamls/sweeps/cifar10_overnight.yaml replicates=4 --plan": "",
    "python recipes/sweep.py -f yamls/sweeps/cifar10_overnight.yaml replicates=4": None,  # hours
    "python -m analysis.instability --experiment digits -o figures": "",
    "composer -n 2 recipes/instability.py -f yamls/digits_all.yaml -f yamls/digits_random.yaml -f yamls/digits_easy.yaml -f yamls/digits_hard.yaml steps=[0,10,20,40,80]": None,  # as with two files
    "python -m analysis.report --published -o published.html": "",
    "python -m lth_diet show runs/digits_all-5c9a828fce/replicate_0 7": None,  # below
    "python -m lth_diet export runs/digits_all-5c9a828fce/replicate_0 7 -o ticket": None,  # below
    "python benchmarks/scheduling.py": None,  # test_benchmarks.py
    "python benchmarks/stacking.py": None,  # test_benchmarks.py
    "python benchmarks/step_time.py": "--depth 8 --batch-size 8 --warmup 1 --steps 2 --repeats 1",
}


@pytest.fixture
def clone(place, monkeypatch):
    """A folder with what a clone has, and the programs of this environment first on the path."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name in ("recipes", "yamls", "analysis", "lth_diet", "benchmarks"):
        (place / name).symlink_to(ROOT / name)
    return place


def run(command):
    """Output of a command as a shell would run it, without a new interpreter."""
    words = [name for word in shlex.split(command) for name in sorted(glob.glob(word)) or [word]]  # noqa: PTH207
    process = Process(words[words[0] == "python" :])
    out, err = process.communicate()
    assert process.returncode == 0, f"{command}\n{out}{err}"
    return out


def loop(command):
    """The commands of a `for` loop of the shell over arms."""
    arms, body = re.fullmatch(r"for arm in (.*); do (.*); done", command).groups()
    return [body.replace("$arm", arm) for arm in arms.split()]


def test_every_command_is_known_here():
    assert set(COMMANDS) == set(RUNS)


def test_the_page_on_gpus_describes_the_pinned_wheels():
    pins = dict(re.findall(r"^(torch|torchvision)==(\S+)", (ROOT / "requirements.txt").read_text(), flags=re.M))
    page = PAGES[ROOT / "docs/gpus.md"]
    assert f"pins torch {pins['torch']} from PyPI, which contains CUDA {torch.version.cuda};" in page
    assert f"torch=={pins['torch']} torchvision=={pins['torchvision']} --index-url" in page


@pytest.mark.integration
def test_the_commands_run(clone):
    write_image_folder(clone / "data/mine", {"train": 64, "test": 4})
    for command, small in RUNS.items():
        if small is not None:
            run(f"{command} {small}")
    for command in (each for loops in RUNS if loops.startswith("for arm") for each in loop(loops)):
        run(f"{command.replace('composer -n 4', 'python')} --plan")
    for scores in (clone / "runs/scores").iterdir():
        root = "data/mine" if "image_folder" in (scores / "manifest.json").read_text() else "data"
        run(f"python -m analysis.examples {scores} --root {root} --arm hard --size 64 -o examples")
    run("python -m lth_diet show runs/digits_all-*/replicate_0 1")
    run("python -m lth_diet export runs/digits_all-*/replicate_0 1 -o ticket")
    (block,) = re.findall(r"```python\n(import json.*?)```", PAGES[ROOT / "docs/run_directory.md"], flags=re.S)
    Path("ticket.py").write_text(block)
    assert re.search(r"ResNet-8 width 2 on digits: 80\.0 % of weights", run("python ticket.py"))


def test_the_algorithms_run_in_a_trainer_as_the_readme_shows(capsys):
    (block,) = re.findall(r"```python\n(import torch.*?)```", README, flags=re.S)
    names = {}
    exec(block, names)
    assert names["mask"].density == 1212 / 2368
    network = dict(names["network"].named_parameters())
    assert all(bool((network[name][~left] == 0).all()) for name, left in names["mask"].items())
    assert "0.weight" in capsys.readouterr().out


def test_scores_from_a_file_select_the_subset(clone):
    (block,) = re.findall(r"```python\n(from pathlib.*?)```", EXTENDING, flags=re.S)
    names = {}
    exec(block, names)
    (command,) = [command for command in COMMANDS if "scores.file=distance" in command]
    run(
        f"{command.replace('composer -n 2', 'python')} {DIGITS} {SUBSET} replicates=1 pretrain.subset.class_balanced=false"
    )
    (path,) = Path("runs").glob("digits_easy-*/replicate_0/pretrain/subset.safetensors")
    farthest = names["distance"][load_file(path)["indices"]].max()
    assert (names["distance"] <= farthest).sum() == 128 and len(list(Path("runs").rglob("network_*"))) == 0


def test_the_example_algorithm_runs_after_the_readme_example():
    names = {}
    for text, start in ((README, "import torch"), (EXTENDING, "from composer import")):
        (block,) = re.findall(rf"```python\n({start}.*?)```", text, flags=re.S)
        exec(block, names)
    assert max(float(parameter.abs().max()) for parameter in names["network"].parameters()) == pytest.approx(0.1)


@pytest.mark.integration
@pytest.mark.skipif(PROGRAM is None, reason="Chromium is not installed")
def test_the_link_of_make_ui_opens_the_charts_of_the_replicates_only(clone, tiny, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{clone}/mlflow.db")
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, clone)
    replicate = create_run(tiny()).replicate(0)
    for level in (0, 1):
        finish(replicate.level(level), level, level=level)
    sync.sync_replicate(replicate)
    folder = ScoresDirectory(loading.load_config(tiny("easy", "easy.yaml"), []))
    folder.create()
    folder.network(0).path.mkdir(parents=True)
    folder.network(0).finish(MEASURED)
    sync.sync_scores(folder.path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["make", "-C", clone, "-o", ".venv/installed", "ui", f"PORT={port}", f"BIN={Path(sys.executable).parent}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    try:
        link = next(line for line in server.stdout if line.startswith("tiny: ")).split()[1]
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/").read()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.5)
        with Page(clone) as page:
            page.open(link, 1280)
            for _ in range(60):
                text = page.evaluate("document.body.innerText")
                if "replicate_0 (test_accuracy_percent)" in text:
                    break
                time.sleep(0.5)
        assert "replicate_0 (test_accuracy_percent)" in text and "Group by" in text and "1 matching run" in text
        assert "scores/" not in text and "level_0" not in text
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def test_make_ui_sends_to_the_server_where_the_store_is_one(clone, monkeypatch):
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, clone)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    done = subprocess.run(["make", "-o", ".venv/installed", "ui"], capture_output=True, text=True)
    assert done.returncode == 0 and "open MLFLOW_TRACKING_URI in a browser" in done.stdout


def test_the_map_names_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    shims = {"remote.py", "__init__.py"}
    modules = {path.name for path in (ROOT / "lth_diet").rglob("*.py")} - shims
    folders = {path.name for path in (ROOT / "lth_diet").iterdir() if path.is_dir()} - {"__pycache__"}
    assert [name for name in modules if name not in text] == []
    assert [name for name in folders if f"  {name}/" not in text] == []


def test_the_readme_names_every_requirement():
    text = (ROOT / "pyproject.toml").read_text()
    lists = re.findall(r"^(?:dependencies|dev) = \[(.*?)^\]", text, flags=re.M | re.S)
    required = re.findall(r'^    "([A-Za-z0-9-]+)', "".join(lists), flags=re.M)
    assert len(lists) == 2 and len(required) > 20
    assert [name for name in required if name.removesuffix("-bin") not in README] == []


def test_generated_tables_in_the_pages_are_up_to_date(clone):
    for name in ("docs", "analysis", "lth_diet"):
        (clone / name).unlink(missing_ok=True)
        shutil.copytree(ROOT / name, clone / name)
    assert run("python docs/update.py --check") == ""
    page = clone / "docs/configuration.md"
    page.write_text(
        page.read_text().replace("| `train.momentum` | number | 0.9 |", "| `train.momentum` | number | 0.8 |")
    )
    process = Process(["docs/update.py", "--check"])
    assert process.communicate()[0] == f"{page}: out of date; run python docs/update.py\n" and process.returncode == 1
    run("python docs/update.py")
    assert page.read_text() == (ROOT / "docs/configuration.md").read_text()


def test_run_directories_in_the_pages_have_todays_run_ids():
    names = {name for text in PAGES.values() for name in re.findall(r"\b[a-z0-9]+_[a-z]+-[0-9a-f]{10}\b", text)}
    today = {run_name(loading.load_config(path)) for path in YAMLS}
    assert names and names <= today


def test_the_pictures_exist():
    pictures = [
        page.parent / name for page, text in PAGES.items() for name in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    ]
    assert len(pictures) >= 5 and all(picture.exists() for picture in pictures)


def test_links_between_pages_lead_somewhere():
    for page, text in PAGES.items():
        for target in re.findall(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)", text):
            if "://" not in target:
                name, _, anchor = target.partition("#")
                path = (page.parent / name).resolve() if name else page
                assert path.exists(), f"{page.name}: {target}"
                if anchor:
                    headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M)
                    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
                    assert anchor in anchors, f"{page.name}: {target}"
