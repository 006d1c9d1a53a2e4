"""Private names of other packages: all of them are listed in CONTRIBUTING.md, and exist in the pinned versions.

Numbers of a single rank that Composer moves to the GPU. The meta device stands for the GPU.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import sys
import types
from importlib.metadata import version

import pytest
import torch
from composer import Trainer
from composer.devices import DeviceGPU
from composer.utils import collect_env
from helpers import ROOT
from torch import distributed

from lth_diet.algorithms import ApplyMask, Rewind
from lth_diet.launch.processes import ProcessInfo
from lth_diet.networks.classifier import build_classifier
from lth_diet.training import composer_internals, devices, trainer
from lth_diet.training.composer_internals import training_device

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
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            yield from (name.value for name in node.args[1:2] if isinstance(name, ast.Constant))
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
    overridden = {name for owner in (Trainer, torch.nn.Conv2d) for name in vars(owner) if is_private(name)} & ours
    listed = {part for name, keyword, *_ in TABLE for part in (*name.split("."), keyword) if is_private(part)}
    assert theirs | overridden == listed


@pytest.mark.parametrize(("name", "keyword", "package", "seen", "file"), TABLE, ids=lambda value: str(value))
def test_a_private_name_exists_in_the_version_where_it_was_seen(name, keyword, package, seen, file):
    assert version(PACKAGES[package]) == seen
    owner, _, last = name.rpartition(".")
    if keyword:
        assert keyword in inspect.getsource(pkgutil.resolve_name(name))
    elif last == "_orig_mod":  # an attribute that __init__ sets
        assert f"self.{last} =" in inspect.getsource(pkgutil.resolve_name(owner))
    else:
        try:
            importlib.import_module(owner)
        except ModuleNotFoundError:
            importlib.import_module(owner.rpartition(".")[0])
        assert hasattr(pkgutil.resolve_name(owner), last)
    assert (keyword or last) in (ROOT / "lth_diet" / file).read_text()


@pytest.mark.parametrize("number", [torch.tensor(3), torch.zeros(1, dtype=torch.uint8)], ids=["scalar", "vector"])
def test_numbers_that_a_scoring_rank_reduces_are_on_the_gpu_because_nccl_reduces_nothing_else(number, monkeypatch):
    def init(self, device_id=None):
        self._device = torch.device("meta")

    def init_process_group(backend, device_id=None, **world):  # like NCCL, without a backend for the CPU
        original("cuda:gloo", **world)

    original = distributed.init_process_group
    monkeypatch.setattr(distributed, "init_process_group", init_process_group)
    monkeypatch.setattr(DeviceGPU, "__init__", init)
    monkeypatch.setattr(devices, "torch_device", lambda: torch.device("meta"))
    with ProcessInfo(0, 2, 0, "127.0.0.1", 1).as_single_process():
        with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
            distributed.all_reduce(number)
        moved = training_device().tensor_to_device(number)  # as Composer does where it resumes from a checkpoint
        assert moved.device.type == "meta"


def test_a_trainer_does_not_measure_the_clock_of_the_cpu(train, monkeypatch):
    monkeypatch.setattr("cpuinfo.get_cpu_info", lambda: pytest.fail("a second before the first step"))
    train(trainer.Schedule(0, 1, 0.1), [])
    assert collect_env.get_composer_env_dict()["cpu_model"] == devices.cpu_name()


def test_without_the_private_names_a_training_ends_with_the_same_bits(train, phase, monkeypatch):
    def trained():
        model = build_classifier(8, 10, width=2, channels=1, seed=1)
        mask = {"conv1.weight": torch.arange(18).view(2, 1, 3, 3) % 2 == 0}
        state = build_classifier(8, 10, width=2, channels=1, seed=2).module.state_dict()
        train(trainer.Schedule(2, 4, 0.1), [Rewind(2, state), ApplyMask(mask)], ["intervals.checkpoint=3"], model)
        return model.state_dict()

    def without(owner, name, default):
        return default if name in {name.rpartition(".")[2] for name, _ in names} else getattr(owner, name, default)

    expected = trained()
    names = [
        (name, file) for name, _, package, _, file in TABLE if package != "Ray" and not file.startswith("networks")
    ]
    assert len(names) > 10
    for name, file in names:
        last, path = name.rpartition(".")[2], ROOT / "lth_diet" / file
        loads = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        assert not [node for node in loads if node.attr == last and isinstance(node.ctx, ast.Load)], "use getattr"
        module = importlib.import_module(f"lth_diet.{file.removesuffix('.py').replace('/', '.')}")
        monkeypatch.setattr(module, "getattr", without, raising=False)
        if last in vars(composer_internals.LeanTrainer):
            monkeypatch.delattr(composer_internals.LeanTrainer, last)
        elif file == "training/trainer.py":
            monkeypatch.setitem(sys.modules, name.rpartition(".")[0], types.ModuleType("without"))
    with trainer._compile_errors(phase):
        found = trained()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
