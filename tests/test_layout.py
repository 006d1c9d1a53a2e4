"""The architecture: packages in layers, imports in one direction, and planning without heavy imports."""

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from helpers import ROOT

import lth_diet
from lth_diet.data import catalog

PACKAGE = ROOT / "lth_diet"
LAYERS = [
    *("program", "errors", "files", "networks", "algorithms", "masks", "data", "scores", "config", "runs", "tracking"),
    *("training", "imp", "scoring", "instability", "launch", "sweep"),
]
"""Lowest first: a module imports from its own layer and from those before it."""
INDEPENDENT = {
    "networks": set(),
    "algorithms": {"networks"},
    "masks": {"errors", "networks"},
    "data": {"errors", "files"},
}
"""Layers that are meant to be used without the rest, and all that they import."""
OLD_SPELLINGS = {"remote.py", "masks/__main__.py", "runs/__main__.py", "tracking/__main__.py"}
HEAVY = ("torch", "composer", "mlflow", "ray", "matplotlib")
LATER = {"mlflow", "sqlalchemy", "alembic", "pandas", "matplotlib", "scipy", "sklearn", "PIL", "requests", "ray"}
"""What a rank needs after its first step, or for some runs only. Composer imports some of these itself."""
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path):
    """Modules of lth_diet that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if is_module(name) else node.module for name in names}
    return {name for name in found if name.partition(".")[0] == "lth_diet"}


def is_module(name):
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(name):
    return name.split(".")[1] if "." in name else ""


def test_the_top_of_the_package_has_at_most_17_names():
    names = {path.name for path in PACKAGE.iterdir() if not path.name.startswith("__")} - OLD_SPELLINGS
    assert {name.removesuffix(".py") for name in names} == set(LAYERS)
    assert len(names) <= 17


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_downwards(path):
    mine = layer(name_of(path))
    if path.name == "__main__.py" or str(path.relative_to(PACKAGE)) in OLD_SPELLINGS or not mine:
        return  # entry points, which nothing imports; asserted below
    for name in imports(path):
        theirs = layer(name)
        assert theirs in ("", *LAYERS[: LAYERS.index(mine) + 1]), f"{name_of(path)} imports {name}"
        assert mine not in INDEPENDENT or theirs in ("", mine, *INDEPENDENT[mine]), f"{name_of(path)} imports {name}"


def test_no_module_imports_an_entry_point():
    entries = {name_of(path) for path in MODULES if path.name == "__main__.py"} | {"lth_diet.remote"}
    for path in MODULES:
        if str(path.relative_to(PACKAGE)) not in OLD_SPELLINGS:
            assert not imports(path) & entries, path


def test_no_modules_import_each_other_in_a_cycle():
    graph = {name_of(path): imports(path) for path in MODULES}
    done = set()

    def visit(name, trail):
        assert name not in trail, " imports ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in graph[name] - {name}:
                visit(other, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_a_package_imports_nothing_by_itself_and_says_what_it_is_for():
    for path in PACKAGE.glob("*/__init__.py"):
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        assert len(docstring.splitlines()) >= 1, path
        if path.parent.name != "algorithms":
            assert not [node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.Expr)], path
            assert "May import" in docstring, path


PLAN = """
import json, sys
from lth_diet.config import loading
from recipes import imp, instability, score, sweep
loading.load_config("tiny.yaml")
assert imp.main(["-f", "tiny.yaml", "--plan"]) == 0
assert score.main(["-f", "tiny.yaml", "--plan"]) == 0
assert instability.main(["-f", "tiny.yaml", "steps=[0,4]", "--plan"]) == 0
assert sweep.main(["-f", "grid.yaml", "--plan"]) == 0
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def test_configuration_and_plans_import_nothing_heavy(tiny, grid):
    tiny("easy")
    grid()
    done = subprocess.run(
        [sys.executable, "-c", PLAN],
        env={"PYTHONPATH": str(ROOT), "HOME": str(Path.cwd())},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert "lth_diet" in loaded and not set(HEAVY) & set(loaded)


def top_imports(path):
    """Modules that a file imports when it is imported, and of lth_diet those that these import."""
    found, todo = set(), [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if is_module(name) else node.module for name in names}
        elif not isinstance(node, ast.FunctionDef) and "TYPE_CHECKING" not in ast.unparse(getattr(node, "test", node)):
            todo += ast.iter_child_nodes(node)
    return found


def test_training_imports_what_is_slow_only_where_it_is_used():
    found, todo = set(), {"lth_diet.launch.command_line", "lth_diet.imp", "lth_diet.scoring", "lth_diet.instability"}
    while todo:
        name = todo.pop()
        found.add(name)
        if is_module(name):
            path = (ROOT / name.replace(".", "/")).with_suffix(".py")
            todo |= top_imports(path if path.exists() else path.with_suffix("") / "__init__.py") - found
    assert "lth_diet.training.trainer" in found and not {name.partition(".")[0] for name in found} & LATER


FIRST_STEP = """
import json, os, sys
commands = []
sys.addaudithook(lambda event, values: commands.append(str(values[1])) if event == "subprocess.Popen" else None)
import composer
before = set(sys.modules)
from lth_diet.training import callbacks

def end(recorder, state, logger):
    print(json.dumps([sorted(set(sys.modules) - before), commands]), flush=True)
    os._exit(0)

callbacks._Recorder.batch_end = end
from recipes import imp
imp.main(["-f", "tiny.yaml"])
"""


@pytest.mark.integration
def test_a_rank_imports_little_beside_composer_and_does_not_measure_the_cpu_before_its_first_step(tiny):
    tiny("all")
    catalog.load("digits", "data")  # decoded by scikit-learn, once
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", FIRST_STEP], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    imported, commands = json.loads(done.stdout.splitlines()[-1])
    assert "lth_diet.imp" in imported and not [name for name in imported if name.startswith("lth_diet.tracking")]
    assert not {name.partition(".")[0] for name in imported} & LATER
    assert not [command for command in commands if "cpuinfo" in command]  # it takes a second


@pytest.mark.integration
def test_a_wheel_has_every_module_and_analysis_below_it(tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    for folder in ("lth_diet", "analysis"):
        shutil.copytree(ROOT / folder, source / folder)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob(f"lth_diet-{lth_diet.__version__}-*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    assert {path.name for path in site.iterdir()} == {"lth_diet", f"lth_diet-{lth_diet.__version__}.dist-info"}
    modules = [name_of(path) for path in MODULES]
    modules += [f"lth_diet.analysis.{path.stem}" for path in (ROOT / "analysis").glob("*.py")]
    code = f"""
import importlib, sys
sys.path.insert(0, {str(site)!r})
for name in {modules}:
    assert importlib.import_module(name).__file__.startswith({str(site)!r}), name
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    published = [sys.executable, "-m", "lth_diet.analysis.claims", "--published"]
    done = subprocess.run(published, cwd=site, capture_output=True, text=True)
    assert done.returncode == 0 and "| CIFAR-10 |" in done.stdout, done.stderr


def test_a_cluster_gets_the_packages_that_are_named_like_local_results():
    for path in (ROOT / "yamls/clusters").glob("*.yaml"):
        excluded = yaml.safe_load(path.read_text())["rsync_exclude"]
        assert {"/runs", "/data", "/shared"} <= set(excluded) and not {"runs", "data"} & set(excluded)
