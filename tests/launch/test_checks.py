import os
import re
import shutil
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import write_image_folder
from PIL import Image

from lth_diet.config import loading
from lth_diet.data.dataset import Dataset, Split
from lth_diet.errors import DeviceError, UserError
from lth_diet.launch import checks
from lth_diet.launch.processes import ProcessInfo
from lth_diet.training import devices
from recipes import imp, score

BASE = """
dataset: {name: digits}
model: {depth: 8, width: 2}
train: {steps: 12, batch_size: 64, milestones: [6, 9], gamma: 0.3}
pretrain: {steps: 4, lr: 0.1}
scores: {networks: 2, steps: 6}
intervals: {log: 50, checkpoint: 50, evaluate: 50}
replicates: 1
"""
SUBSET = "arm=random pretrain.subset.size=64 "

WARNINGS = {
    "": [],
    "arm=init": ["pretrain.label_noise in a.yaml has no effect with arm: init"],
    "arm=init pretrain.steps=5 pretrain.lr=1": [
        "pretrain.steps and pretrain.lr on the command line have no effect with arm: init",
        "pretrain.label_noise in a.yaml has no effect with arm: init",
    ],
    "pretrain.subset.size=64": ["pretrain.subset.size on the command line has no effect with arm: all"],
    "pretrain.subset=": [],
    "scores.steps=5": ["scores.steps on the command line has no effect with arm: all"],
    f"{SUBSET}pretrain.subset.offset=3 pretrain.subset.class_balanced=true scores.networks=3": [
        "pretrain.subset.class_balanced, pretrain.subset.offset and scores.networks on the command line have no effect "
        "with arm: random"
    ],
    "dataset.root=x": ["dataset.root on the command line has no effect with dataset.name: digits"],
    "train.gamma=0.5": [],
    "train.gamma=0.5 train.milestones=[]": ["train.gamma on the command line has no effect without train.milestones"],
    "prune.levels=0": [],
    "prune.levels=0 prune.fraction=0.1": ["prune.fraction on the command line has no effect with prune.levels: 0"],
    "train.steps=9": [
        "train.milestones = [6, 9] in base.yaml: a level never reaches [9], because train.steps = 9",
    ],
    "train.steps=10": [],
    "train.milestones=[6,20]": [
        "train.milestones = [6, 20] on the command line: a level never reaches [20], because train.steps = 12"
    ],
    "arm=easy pretrain.subset.size=64 scores.steps=30 train.milestones=[6,20,40]": [
        "train.milestones = [6, 20, 40] on the command line: a level never reaches [20, 40], because train.steps = 12; of "
        "these, scoring reaches [20]"
    ],
    "intervals.log=13": [
        "intervals.log = 13 on the command line: no phase contains a multiple of it, so no training loss is logged"
    ],
    "intervals.log=12 intervals.checkpoint=11 intervals.evaluate=11": [],
    "intervals.checkpoint=12": [
        "intervals.checkpoint = 12 on the command line: no phase contains a multiple of it, so nothing is saved before "
        "the end of a phase, and a phase that is stopped starts again"
    ],
    "intervals.evaluate=12": [
        "intervals.evaluate = 12 on the command line: no phase contains a multiple of it, so networks are evaluated at "
        "the end of each phase only"
    ],
    "intervals.evaluate=0": [],
    "train.lr=0.1 train.lr=0.2": ["train.lr is given more than once on the command line; the last value counts"],
}


@pytest.fixture
def config(place):
    (place / "base.yaml").write_text(BASE)
    (place / "a.yaml").write_text("base: base.yaml\narm: all\npretrain: {label_noise: 0.1}\n")
    return "a.yaml"


@pytest.mark.parametrize("overrides", WARNINGS)
def test_a_setting_without_effect_is_a_warning_unless_it_is_a_default_or_of_a_base_file(config, overrides):
    assert checks.warnings(loading.load(config, overrides.split())) == WARNINGS[overrides]


def test_scoring_warns_of_settings_of_the_command_line_that_change_no_scores(config):
    overrides = ["prune.levels=3", "pretrain.steps=5", "scores.steps=7", "intervals.log=9", "runs=x"]
    assert checks.warnings(loading.load(config, overrides), scoring=True) == [
        "pretrain.steps and prune.levels on the command line have no effect on scores",
        "intervals.log = 9 on the command line: no phase contains a multiple of it, so no training loss is logged",
    ]


def test_more_threads_than_cpus_of_this_machine_are_a_warning(config):
    cpus = len(os.sched_getaffinity(0))
    for threads, ranks in ((cpus, 1), (1, cpus)):
        assert not checks.warnings(loading.load(config, [f"threads={threads}"]), ranks)
    (sentence,) = checks.warnings(loading.load(config, [f"threads={cpus}"]), 2)
    assert sentence.startswith(f"threads = {cpus} for each of 2 ranks: {cpus} CPUs can be used, and more threads than")


@pytest.mark.parametrize("recipe", [imp, score])
def test_a_plan_prints_each_warning_once_on_stderr(config, capsys, recipe):
    assert recipe.main(["-f", config, "intervals.log=13", "pretrain.steps=5", "pretrain.steps=6", "--plan"]) == 0
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert "steps to train" in out and len(lines) == len(set(lines)) >= 2
    assert all(line.startswith("warning: ") for line in lines)
    assert "warning: pretrain.steps is given more than once on the command line; the last value counts" in lines


def test_a_launch_prints_its_warnings(config, capsys):
    overrides = ["prune.levels=0", "train.milestones=[6,20]", "train.steps=8", "runs=runs"]
    assert imp.main(["-f", config, *overrides]) == 0
    err = capsys.readouterr().err
    assert err.count("warning: train.milestones = [6, 20] on the command line: a level never reaches [20]") == 1


def test_one_rank_with_data_parallelism_is_a_warning(config, capsys):
    assert imp.main(["-f", config, "parallelism=data", "--plan"]) == 0
    assert (
        "warning: parallelism = data: has no effect with one rank; use composer -n <ranks>" in capsys.readouterr().err
    )


@pytest.mark.parametrize(("mode", "levels"), [("L", 12), ("RGB", 13)])
def test_the_channels_of_the_images_decide_how_many_levels_have_weights(config, place, mode, levels):
    for path in write_image_folder(place / mode).rglob("*.png"):
        Image.open(path).convert(mode).save(path)
    folder = ["dataset.name=image_folder", f"dataset.root={mode}", "train.batch_size=2", "prune.fraction=0.4"]
    with pytest.raises(UserError, match=f"prune.levels = 99 .*: must be at most {levels} for prune.fraction: 0.4"):
        loading.load_config(config, [*folder, "prune.levels=99"])


def test_continuing_a_run_with_other_code_is_a_warning_and_a_variant_is_a_run_of_its_own(config, capsys, monkeypatch):
    settings = ["-f", config, "train.steps=8", "train.milestones=[]", "runs=runs", "prune.levels=0"]
    more = [*settings[:-1], "prune.levels=1"]
    assert imp.main(settings) == 0
    capsys.readouterr()
    monkeypatch.setattr(devices, "code_hash", lambda: "another")
    assert imp.main(settings) == 0
    assert "warning" not in capsys.readouterr().err  # nothing is left to train
    assert imp.main([*more, "variant=tanh"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert imp.main(more) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(
        r"warning: runs/digits_all-\w+: code = \w{12} \(replicate_0/pretrain to replicate_0/level_0, 2 trainings\) and "
        r"another \(this launch\); results from different environments should not be combined: to start a separate run, "
        r"set variant=<name> or runs=<another folder>\n",
        err,
    )
    assert re.match(r"1 process on CPU \(.+\), fp32, 1 thread\n", out)
    assert re.search(
        r"note: digits_all-\w+: its trainings were run in different environments: code = \w{12} \(repl", out
    )
    runs = sorted(path.name for path in Path("runs").glob("digits_all-*"))
    assert len(runs) == 2


def test_continuing_scores_with_another_version_is_a_warning(config, capsys, monkeypatch):
    settings = ["-f", config, "runs=runs", "scores.networks=2", "train.milestones=[]"]
    assert score.main(settings) == 0
    for path in ("manifest.json", "network_1/result.json"):
        next(Path("runs/scores").glob(f"*/{path}")).unlink()
    capsys.readouterr()
    monkeypatch.setattr(devices, "versions", lambda: {"torch": "9.9", "composer": "0.32.1"})
    assert score.main(settings) == 0
    assert re.search(r"runs/scores/\w+: torch = \S+ \(network_0\) and 9.9 \(this launch\);", capsys.readouterr().err)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with some free memory, for a launch on a machine with some GPUs."""

    def make(free, gpus=1):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        monkeypatch.setattr(devices, "torch_device", lambda: torch.device("meta"))
        monkeypatch.setattr(devices, "describe", lambda: devices.Device("Tesla T4", "7.5", True, False))
        monkeypatch.setattr(devices, "count_gpus", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free * 2**30), 15 * 2**30))

    return make


@pytest.mark.parametrize(
    ("ranks", "rank", "gpus", "free", "fits"),
    [
        *((1, 0, 1, 1.1, True), (1, 0, 1, 0.9, False), (2, 1, 1, 1.9, False), (2, 1, 1, 2.1, True)),
        *((2, 1, 2, 1.1, True), (3, 0, 2, 1.9, False), (3, 1, 2, 1.1, True)),
    ],
)
def test_training_needs_free_memory_for_all_ranks_of_a_gpu(config, gpu, ranks, rank, gpus, free, fits):
    gpu(free, gpus)
    process = ProcessInfo(rank, ranks, rank, "127.0.0.1", 1)
    if fits:
        checks.check_environment([loading.load(config)], process)
    else:
        with pytest.raises(DeviceError, match="dataset.name = 'digits': the GPU needs about"):
            checks.check_environment([loading.load(config)], process)


def test_images_that_do_not_fit_into_the_gpu_are_rejected_with_sizes_and_remedies(config, gpu):
    gpu(14.6)
    images = np.broadcast_to(np.uint8(0), (50_000, 224, 224, 3))
    data = Dataset("digits", Split(images, None), Split(images[:5000], None), (0.5,), (0.5,), ("a", "b"))
    arguments = loading.load_config(config), data
    checks.check_memory(*arguments, ProcessInfo(0, 1, 0, "127.0.0.1", 1), 1)
    with pytest.raises(UserError) as caught:
        checks.check_memory(*arguments, ProcessInfo(0, 2, 0, "127.0.0.1", 1), 1)
    assert str(caught.value) == (
        "dataset.name = 'digits': the GPU needs about 17.4 GiB of memory (7.7 GiB of images and 1 GiB for training for "
        "each of 2 ranks), but 14.6 of 15.0 GiB are free; use a smaller dataset.size, fewer ranks or runs per GPU, or a "
        "GPU with more free memory, or set CUDA_VISIBLE_DEVICES= (empty) to train on the CPU"
    )


def test_ranks_on_separate_mig_devices_do_not_share_memory(config, gpu, monkeypatch):
    gpu(1.1)
    monkeypatch.setenv(devices.VISIBLE, "MIG-a,MIG-b")
    checks.check_environment([loading.load(config)] * 2, ProcessInfo(1, 2, 1, "127.0.0.1", 1))
    assert os.environ[devices.VISIBLE] == "MIG-b"


@pytest.mark.parametrize(
    ("device", "variable", "name", "packages"),
    [("cpu", "CXX", "C\\+\\+", "g\\+\\+"), ("meta", "CC", "C", "gcc, libc6-dev")],
)
class TestCompiler:
    """The compiler is the one that `torch.compile` uses on the device: inductor's on the CPU, Triton's on a GPU."""

    @pytest.fixture(autouse=True)
    def choose(self, device, variable, monkeypatch):
        monkeypatch.setattr(devices, "torch_device", lambda: torch.device(device))
        for other in ("CC", "CXX"):
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv("CXX" if variable == "CC" else "CC", "/nowhere/of-the-other-device")

    def rejected(self, compiler, name, packages, reason):
        packages = f"install the Debian packages {packages} and python3-dev, or use compile=false"
        with pytest.raises(
            UserError, match=f"^compile = true: '{compiler}' .*cannot compile {name} with .*{reason}.*{packages}$"
        ):
            checks.check_compiler()

    @pytest.mark.skipif(
        not (shutil.which("g++") and Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists()),
        reason="this machine has no compiler or no headers of Python",
    )
    def test_a_compiler_with_the_headers_of_python_is_accepted(self, device, variable, name, packages):
        checks.check_compiler()

    def test_no_compiler_is_rejected(self, device, variable, name, packages, place, monkeypatch):
        monkeypatch.setenv("PATH", str(place))
        self.rejected("gcc" if variable == "CC" else "g\\+\\+", name, packages, "No such file or directory")
        monkeypatch.setenv(variable, "/nowhere/cc")
        self.rejected("/nowhere/cc", name, packages, "No such file or directory")
        monkeypatch.setenv(variable, "/bin/false")
        self.rejected("/bin/false", name, packages, "status 1")

    def test_no_headers_of_python_are_rejected(self, device, variable, name, packages, place, monkeypatch):
        monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(place))
        self.rejected(".*", name, packages, f"{place}/Python.h")


def test_compile_is_checked_before_the_data_is_decoded(config, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nowhere/cc")
    monkeypatch.setattr(checks.catalog, "prepare", lambda *_: pytest.fail("the data was decoded"))
    assert imp.main(["-f", config, "compile=true"]) == 2
    assert capsys.readouterr().err.count("error: compile = true: '/nowhere/cc' (CXX ") == 1
