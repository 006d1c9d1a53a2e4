"""The image's commands, run in order in an empty folder: there is no Docker engine where the tests run."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
from helpers import ROOT


def instructions():
    """(name, argument) of each instruction of the Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def ignored(name):
    """Whether .dockerignore keeps a top-level name out of the build."""
    return f"!{name}" not in (ROOT / ".dockerignore").read_text().splitlines()


def build(image, environment):
    """Runs COPY, RUN, ENV and WORKDIR below the folder `image`; returns the working folder and the image's variables."""
    workdir, variables = image, {}
    for name, argument in instructions():
        if name == "WORKDIR":
            workdir = image / argument.lstrip("/")
            workdir.mkdir(parents=True)
        elif name == "ENV":
            variables |= dict(re.findall(r"(\w+)=(\S+)", argument))
        elif name == "COPY":
            *sources, target = argument.split()
            for source in sources:
                assert not ignored(source), f".dockerignore keeps {source} out"
                copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                copy(ROOT / source, workdir / (source if target in (".", "./") else target))
        elif name == "RUN":
            done = subprocess.run(["sh", "-ec", argument], cwd=workdir, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"RUN {argument}\n{done.stdout}{done.stderr}"
    return workdir, variables


@pytest.mark.integration
def test_the_image_builds_in_an_empty_folder_and_runs_the_quickstarts_recipe(place):
    # packages that are installed already count as installed, so that pip compares the pins and downloads nothing
    python = place / "python"
    subprocess.run([sys.executable, "-m", "venv", str(python)], check=True)
    (packages,) = python.glob("lib/python*/site-packages")
    (packages / "tests.pth").write_text(sysconfig.get_path("purelib"))
    environment = {**os.environ, "PATH": f"{python}/bin:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    workdir, variables = build(place / "image", environment)
    assert dict(instructions())["ENTRYPOINT"] == '["composer"]'
    assert dict(instructions())["USER"] != "root"
    launcher = workdir / "launch.py"  # the launcher, with the image's own python
    launcher.write_text("from composer.cli.launcher import main\nmain()\n")
    inside = {key: re.sub("/lth_diet/", f"{workdir}/", value) for key, value in variables.items()}
    inside["LTH_DIET_COMMIT"] = "abc123"
    command = "recipes/imp.py -f yamls/digits_random.yaml train.steps=30 train.milestones=[] prune.levels=1"
    done = subprocess.run(
        ["python", str(launcher), "-n", "2", *command.split()],
        cwd=workdir,
        env=environment | inside,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "weights remaining" in done.stdout
    (result,) = (workdir / "runs").glob("digits_random-*/replicate_0/level_1/result.json")
    assert '"git_commit": "abc123"' in result.read_text()
    assert (workdir / "runs/mlflow.db").exists() and (workdir / "runs/mlartifacts/digits").is_dir()
    assert (workdir / "data/cache/digits/about.json").exists()
