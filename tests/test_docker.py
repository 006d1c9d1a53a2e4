"""The image's commands, run in order in an empty folder: there is no Docker engine where the tests run."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig

import pytest
from helpers import ROOT
from server import COMPOSE, VARIABLES, interpolated


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
        elif name == "RUN" and not argument.startswith("apt-get"):  # needs root, and changes the machine
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


def test_compose_has_what_the_native_server_of_the_tests_stands_for():
    services = COMPOSE["services"]
    assert set(services) == {"postgres", "mlflow", "trainer"}
    assert "trainer" not in services["mlflow"]["depends_on"] and services["trainer"]["profiles"]
    for service in services.values():
        assert all(services[name]["healthcheck"] for name in service.get("depends_on", {}))
        named = [volume.split(":")[0] for volume in service["volumes"] if volume[0] != "."]
        assert set(named) <= set(COMPOSE["volumes"])
        assert all(config["source"] in COMPOSE["configs"] for config in service.get("configs", []))
    folders = [folder for name, argument in instructions() if name == "RUN" for folder in argument.split()]
    for service in (services["mlflow"], services["trainer"]):
        assert service["build"] == "." and service["image"] == "lth_diet"
        for volume in service["volumes"]:  # Docker gives a new one the mode of the image's folder
            assert volume.split(":")[1].removeprefix("/lth_diet/") in folders
    assert {"--serve-artifacts", "--app-name=basic-auth"} < set(services["mlflow"]["command"])
    (address,) = {interpolated(port, VARIABLES) for port in services["mlflow"]["ports"]}
    assert address == "127.0.0.1:5000:5000"  # this machine only, unless asked for
    assert services["trainer"]["environment"]["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"


def test_the_image_has_a_compiler_and_keeps_compiled_code_on_a_volume():
    (packages,) = [argument for name, argument in instructions() if argument.startswith("apt-get")]
    assert "apt-get install -y --no-install-recommends g++ " in packages
    variables = dict(
        re.findall(r"(\w+)=(\S+)", " ".join(argument for name, argument in instructions() if name == "ENV"))
    )
    (volumes,) = [json.loads(argument) for name, argument in instructions() if name == "VOLUME"]
    for variable in ("LTH_DIET_CACHE", "TORCHINDUCTOR_CACHE_DIR"):
        assert any(variables[variable].startswith(f"{volume}/") for volume in volumes)


def test_containers_that_train_have_shared_memory_and_folders_of_their_user():
    assert COMPOSE["services"]["trainer"]["shm_size"] == "1gb"
    for name in ("Dockerfile", "docs/mlflow.md"):
        text = (ROOT / name).read_text()
        (run,) = re.findall(r"docker run .*", text)
        assert "--gpus all --shm-size=1g " in run
        folders = re.findall(r"-v \$PWD/(\w+):", run)
        assert text.index(f"mkdir -p {' '.join(folders)}") < text.index(run)
    folders = [volume.split(":")[0].removeprefix("./") for volume in COMPOSE["services"]["trainer"]["volumes"]]
    assert f"#   mkdir -p {' '.join(folders)} " in (ROOT / "compose.yaml").read_text()


def test_compose_takes_every_secret_from_the_environment_and_will_not_start_without():
    text = (ROOT / "compose.yaml").read_text()
    asked = set(re.findall(r"\$\{(\w+):\?[^}]+\}", text))
    assert asked == set(VARIABLES)
    secret = re.compile("PASSWORD|USERNAME|SECRET")
    for service in COMPOSE["services"].values():
        values = [value for name, value in service["environment"].items() if secret.search(name)]
        assert values and all(value.startswith("${") for value in values)
    assert not secret.search(re.sub(r"\$\{[^}]*\}", "", str([s.get("command") for s in COMPOSE["services"].values()])))
    assert "/.env" in (ROOT / ".gitignore").read_text().splitlines() and ignored(".env")
    with pytest.raises(AssertionError, match="POSTGRES_PASSWORD"):
        interpolated(COMPOSE["services"]["mlflow"]["environment"]["PGPASSWORD"], {})


def test_compose_reads_its_file():
    if (
        subprocess.run(["docker", "compose", "version"], capture_output=True).returncode
        if shutil.which("docker")
        else 1
    ):
        pytest.skip("there is no docker compose")
    done = subprocess.run(
        ["docker", "compose", "-f", str(ROOT / "compose.yaml"), "config", "--quiet"],
        env=os.environ | VARIABLES,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
