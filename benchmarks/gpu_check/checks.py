"""The checks of gpu_check. Each runs in a process: checks.py NAME FOLDER RESULT GPUS SIZES.

A check is a function of a `Work`. It records what it finds, and fails with a sentence for each expectation that does
not hold. Packages are imported inside the checks: a check that lacks one is skipped.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FAILED, MISSED, PASSED, SKIPPED = "failed", "target missed", "passed", "skipped"
TRAINING = ("torch", "composer", "mlflow", "sklearn")
"""Packages that a run on the digits needs."""

_MIB = 2**20
_KILLED = 256 - signal.SIGKILL  # exit status of Composer's launcher
_SETTINGS = """
arm: all
dataset: {{name: digits, size: {size}}}
model: {{depth: {depth}, width: {width}}}
train: {{steps: {steps}, batch_size: {batch}, milestones: [{half}]}}
pretrain: {{steps: {quarter}, lr: 0.1, subset: {{size: 256}}}}
prune: {{levels: 2}}
scores: {{networks: 2, steps: {half}}}
intervals: {{log: {log}, checkpoint: {log}}}
replicates: 1
experiment: gpu_check
"""
SIZES = {
    "small": {"size": 8, "depth": 8, "width": 2, "steps": 16, "batch": 64},
    "large": {"size": 32, "depth": 20, "width": 16, "steps": 160, "batch": 128},
}
"""Sizes of the networks, images and trainings of the checks, except those that measure speed or memory."""


@dataclasses.dataclass(frozen=True)
class Check:
    """A check.

    Attributes:
        name: Name for --only.
        title: What holds if it passes.
        function: Runs it.
        limit: Seconds after which it is ended.
        alone: Whether no other check may run at the same time, because it measures time or the memory of the device.
        needs_gpus: Number of GPUs without which it is skipped.
        packages: Packages without which it is skipped.
    """

    name: str
    title: str
    function: "Callable[[Work], None]"
    limit: float
    alone: bool
    needs_gpus: int
    packages: Sequence[str]


CHECKS: dict[str, Check] = {}


def check(
    limit: float, alone: bool = False, needs_gpus: int = 0, packages: Sequence[str] = TRAINING
) -> Callable[[Callable[["Work"], None]], Callable[["Work"], None]]:
    """Add a function to the checks, with the first line of its docstring as title."""

    def add(function: Callable[["Work"], None]) -> Callable[["Work"], None]:
        name, title = function.__name__, (function.__doc__ or "").splitlines()[0].rstrip(".")
        CHECKS[name] = Check(name, title, function, limit, alone, needs_gpus, packages)
        return function

    return add


class Skip(Exception):
    """The check cannot run here. The message says why."""


class Work:
    """What a check works with: its folder, the machine, and its result.

    Args:
        folder: An empty folder.
        result: JSON file of the result, written after every finding.
        gpus: Number of GPUs; 0: the check runs on the CPU.
        sizes: Key of `SIZES`.
    """

    def __init__(self, folder: Path, result: Path, gpus: int, sizes: str):
        self.folder, self.gpus = folder, gpus
        self.sizes = SIZES[sizes]
        self._path = result
        self._launches: list[Launch] = []
        self._findings: dict[str, Any] = {}
        self._notes: list[str] = []
        self._failures: list[str] = []
        self._missed: list[str] = []

    def record(self, note: str = "", **findings: Any) -> None:
        """Record numbers for the JSON file and a sentence for the table."""
        self._findings |= findings
        self._notes += [note] if note else []
        self.finish()

    def expect(self, condition: Any, sentence: str) -> bool:
        """Fail with a sentence unless a condition holds, but continue; returns whether it holds."""
        if not condition:
            self._failures.append(sentence)
            self.finish()
        return bool(condition)

    def target(self, value: float, limit: float, what: str) -> None:
        """Compare a measurement with its target, which may be missed without a failure."""
        self.record(f"{what} {value:.3g}, target at most {limit:g}")
        if value > limit:
            self._missed.append(what)

    def finish(self, status: str = "", note: str = "") -> None:
        """Write the result; without status, that of what was recorded so far."""
        reached = FAILED if self._failures else MISSED if self._missed else PASSED
        text = note or "; ".join(self._failures or self._notes)
        content = {"status": status or reached, "note": text, "findings": self._findings}
        write_atomically(self._path, json.dumps(content))

    def launch(
        self,
        name: str,
        *overrides: str,
        ranks: int = 0,
        environment: dict[str, str] | None = None,
        **hooks: Any,
    ) -> "Launch":
        """Start a training on the digits.

        Args:
            name: Name of its folder. Another launch in the same folder resumes it.
            overrides: Settings, as key=value.
            ranks: Ranks of `composer -n`; 0: python alone.
            environment: Changes to the environment variables.
            hooks: HOOKS of probe.py.
        """
        folder = self.folder / name
        if not folder.exists():
            folder.mkdir()
            steps = self.sizes["steps"]
            derived = {"half": steps // 2, "quarter": steps // 4, "log": steps // 8}
            (folder / "check.yaml").write_text(_SETTINGS.format(**self.sizes, **derived))
            with contextlib.suppress(OSError):  # creating a store takes seconds
                shutil.copy(_store(self.folder), folder / "mlflow.db")
        command = [sys.executable]
        if ranks:
            command += ["-m", "composer.cli.launcher", "-n", str(ranks)]
        hooks["record"] = str(folder / "record")
        command += [str(Path(__file__).with_name("probe.py")), json.dumps(hooks), "-f", "check.yaml", *overrides]
        if not self.gpus and self._launches:
            self._launches[-1].process.wait()  # a GPU machine has the cores for several launches at a time
        self._launches.append(Launch(command, folder, os.environ | (environment or {})))
        return self._launches[-1]


class Launch:
    """A training that runs in processes.

    Args:
        command: Its command line.
        folder: Its working folder.
        environment: Its environment variables.
    """

    def __init__(self, command: Sequence[str], folder: Path, environment: dict[str, str]):
        from lth_diet.launch.processes import exit_with_parent

        self.folder = folder
        self._log = folder / "output.txt"
        for path in folder.glob("record_*.json"):
            path.unlink()
        with open(self._log, "wb") as file:
            streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            self.process = subprocess.Popen(
                command, cwd=folder, env=environment, preexec_fn=exit_with_parent, **streams
            )

    @property
    def output(self) -> str:
        """What it printed."""
        return self._log.read_text(errors="replace")

    def wait(self, *statuses: int) -> "Launch":
        """Wait for its end.

        Args:
            statuses: Expected exit statuses, by default 0; negative ones are signals.

        Raises:
            ModuleNotFoundError: If it ended because a package is missing.
            RuntimeError: If it ended with another exit status.
        """
        status = self.process.wait()
        print(f"== {self.folder.name}: exit status {status}\n{self.output}", flush=True)
        if status not in (statuses or (0,)):
            if missing := re.search(r"ModuleNotFoundError: No module named '(\w+)", self.output):
                raise ModuleNotFoundError(name=missing[1])
            raise RuntimeError(f"the training '{self.folder.name}' ended with exit status {status}")
        return self

    def records(self) -> list[dict[str, Any]]:
        """What each rank recorded, by rank."""
        paths = sorted(self.folder.glob("record_*.json"), key=lambda path: int(path.stem.rpartition("_")[2]))
        return [json.loads(path.read_text()) for path in paths]

    def results(self) -> list[dict[str, Any]]:
        """The result.json of all phases."""
        return [json.loads(path.read_text()) for path in sorted(self.folder.glob("runs/**/result.json"))]

    def hashes(self) -> dict[str, str]:
        """SHA-256 of all weights, masks, subsets and scores."""
        files = sorted(self.folder.glob("runs/**/*.safetensors"))
        return {str(path.relative_to(self.folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def failures(self) -> list[Path]:
        """Files that say that an attempt is final."""
        return sorted(self.folder.glob("runs/**/failed.json"))


def write_atomically(path: Path, content: str) -> None:
    """Write a file that is complete at any time."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(content)
    part.replace(path)


def _store(folder: Path) -> Path:
    """The empty MLflow store that all checks copy."""
    return folder.parent / "mlflow.db"


def _error_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


def _same_bits(work: Work, one: Launch, other: Launch, what: str) -> int:
    """Compare all files of two trainings; returns their number."""
    ours, theirs = one.hashes(), other.hashes()
    different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    work.record(**{f"different files, {what}": different})
    work.expect(ours and not different, f"{what}: {len(different)} of {len(ours)} files differ, first {different[:1]}")
    return len(ours)


@check(limit=120, packages=("torch",))
def versions(work: Work) -> None:
    """Versions, GPUs and driver of the machine."""
    from importlib import metadata

    import torch

    from lth_diet.training import devices

    packages = {}
    for name in ("torch", "torchvision", "mosaicml", "mlflow", "triton", "numpy", "ray"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    gpus = devices.count_gpus()
    work.record(
        python=platform.python_version(),
        packages=packages,
        cpu=devices.cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        cuda=torch.version.cuda,
        gpus=gpus,
    )
    cards = []
    for index in range(gpus):
        torch.cuda.set_device(index)
        free, total = torch.cuda.mem_get_info(index)
        device = devices.describe()
        cards.append(vars(device) | {"bf16": device.has_bf16, "free_mib": free // _MIB, "total_mib": total // _MIB})
    work.record(cards=cards)
    if gpus:
        work.record(cudnn=torch.backends.cudnn.version(), architectures=torch.cuda.get_arch_list())
        with contextlib.suppress(AttributeError):
            work.record(nccl=".".join(map(str, torch.cuda.nccl.version())))
    if shutil.which("nvidia-smi"):
        query = "driver_version,name,power.limit,compute_mode,mig.mode.current,persistence_mode"
        smi = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv"], capture_output=True, text=True)
        work.record(nvidia_smi=(smi.stdout or smi.stderr).splitlines())
    names = ", ".join(f"{card['name']} (capability {card['capability']}, {card['total_mib']} MiB)" for card in cards)
    work.record(f"{names or 'no GPU'}; torch {torch.__version__}, Python {platform.python_version()}")
    with contextlib.suppress(ImportError):
        from mlflow import MlflowClient

        MlflowClient(f"sqlite:///{_store(work.folder)}").search_experiments()


@check(limit=150)
def devices(work: Work) -> None:
    """Each rank trains on its own device with every precision, and its results say so."""
    from lth_diet.training.devices import describe
    from lth_diet.training.devices import precision as resolve

    has_bf16 = describe().has_bf16
    common = {"auto": resolve("auto"), "fp32": "fp32"} | ({"bf16": "bf16"} if has_bf16 else {})
    ranks = max(2, work.gpus)
    settings = ("prune.levels=0", f"replicates={ranks}")
    launches = {
        precision: work.launch(precision, f"precision={precision}", *settings, ranks=ranks, report=precision == "auto")
        for precision in common
    }
    if not has_bf16:
        refused = work.launch("bf16", "precision=bf16", *settings, ranks=ranks).wait(2)
        work.expect("precision = 'bf16'" in refused.output, "bf16 is not rejected in a sentence")
    for precision, launch in launches.items():
        launch.wait()
        records = launch.records()
        places = [record["device"] for record in records]
        expected = [rank % work.gpus if work.gpus else "cpu" for rank in range(ranks)]
        work.record(**{f"devices, {precision}": places})
        work.expect(places == expected, f"precision={precision}: ranks train on {places}, not on {expected}")
        for rank, record in enumerate(records):
            for index, gpu in enumerate(record["gpus"]):
                own = index == rank % work.gpus
                work.expect(
                    bool(gpu["allocated"]) == own and gpu["context"] in (own, None),
                    f"precision={precision}: rank {rank} allocated {gpu['allocated']} bytes on GPU {index}",
                )
        trained = [result.get("environment", {}) for result in launch.results() if result["steps"]]
        recorded = {(each.get("device"), each.get("precision")) for each in trained}
        work.record(**{f"recorded, {precision}": sorted(map(str, recorded))})
        right = {(describe().name, common[precision])}
        work.expect(recorded == right, f"precision={precision}: result.json has {recorded}, not {right}")
    work.expect(list(launches["auto"].folder.glob("runs/*.html")), "no report was written")
    work.record(f"{ranks} ranks on {work.gpus or 'no'} GPU{'s' * (work.gpus != 1)}, precision {', '.join(common)}")


@check(limit=90)
def cpu(work: Work) -> None:
    """Without visible GPUs a run trains on the CPU and says so; GPUs that are not there are an error."""
    settings = ("prune.levels=0", "model.depth=8", "model.width=4", "train.steps=20", "train.milestones=[]")
    settings += ("pretrain.steps=5",)
    hidden = work.launch("hidden", *settings, environment={"CUDA_VISIBLE_DEVICES": ""})
    absent = work.launch("absent", environment={"CUDA_VISIBLE_DEVICES": "99"})
    hidden.wait()
    places = [record["device"] for record in hidden.records()]
    name = hidden.records()[0]["description"]["name"]
    recorded = {result.get("environment", {}).get("device") for result in hidden.results() if result["steps"]}
    work.expect(places == ["cpu"], f"CUDA_VISIBLE_DEVICES= trains on {places}")
    work.expect(recorded == {name}, f"CUDA_VISIBLE_DEVICES=: result.json has {recorded}, not {name}")
    line = next((line for line in hidden.output.splitlines() if line.startswith("1 process on CPU")), "")
    work.expect(name in line and "fp32" in line, "a launch on the CPU does not print its device and precision")
    errors = _error_lines(absent.wait(2).output)
    work.record(absent=errors)
    work.expect(len(errors) == 1 and "CUDA_VISIBLE_DEVICES" in errors[0], f"CUDA_VISIBLE_DEVICES=99 gives {errors}")
    if work.gpus:
        work.launch("mixed", *settings).wait()
        again = work.launch("mixed", *settings, "prune.levels=1", environment={"CUDA_VISIBLE_DEVICES": ""}).wait()
        warnings = [line for line in again.output.splitlines() if "warning: " in line and name in line]
        work.record(mixed=warnings)
        work.expect(warnings, "no warning says that the levels of a run were trained on a GPU and on the CPU")
    work.record(f"CUDA_VISIBLE_DEVICES= trains on the {name}; CUDA_VISIBLE_DEVICES=99 is an error")


@check(limit=60, needs_gpus=1)
def rejections(work: Work) -> None:
    """Settings that do not fit the GPUs are rejected in one sentence before training."""
    ranks = work.gpus + 1
    settings = (f"train.batch_size={64 * ranks}", "parallelism=data", "prune.levels=0")
    errors = _error_lines(work.launch("ranks", *settings, ranks=ranks).wait(2).output)
    work.expect(
        len(errors) == 1 and f"{ranks} ranks for {work.gpus} GPU" in errors[0],
        f"parallelism=data with {ranks} ranks on {work.gpus} GPUs gives {errors}",
    )
    work.record(f"parallelism=data with {ranks} ranks on {work.gpus} GPU(s) is rejected", errors=errors)


@check(limit=90)
def steps(work: Work) -> None:
    """No step between two rows of the training curve waits for the device."""
    settings = ("prune.levels=0", "arm=init", "intervals.checkpoint=10000")
    launch = work.launch("steps", *settings, sync="error")
    launch.process.wait()
    if "synchronizing CUDA operation" in launch.output:
        launch = work.launch("places", *settings, sync="warn")
    record = launch.wait().records()[0]
    waits, watched = record["waits"], record["guarded_steps"]
    work.expect(watched >= 0.6 * work.sizes["steps"], f"only {watched} steps were watched")
    how = "CUDA's synchronization debug mode" if work.gpus else "reads of tensors; the GPU sees more"
    work.record(f"{sum(waits.values())} waits in {watched} steps ({how})", waits=waits, watched=watched)
    work.expect(not waits, f"{sum(waits.values())} waits in {watched} steps: {waits}")


@check(limit=120)
def deterministic(work: Work) -> None:
    """Two runs with deterministic=true give the same bits: all weights, masks, subsets and scores."""
    one, other = (work.launch(name, "arm=easy", "deterministic=true") for name in ("one", "other"))
    files = _same_bits(work, one.wait(), other.wait(), "two runs")
    work.record(f"{files} files with equal SHA-256", files=files)


@check(limit=180)
def resume(work: Work) -> None:
    """A run that is killed in a scoring network and in a level, and resumed, gives the same bits."""
    steps = work.sizes["steps"]
    settings = ("arm=easy", "deterministic=true")
    data = (*settings, "parallelism=data", "prune.levels=0")
    in_network, in_level = ["network_1", steps // 4 + 3], ["level_1", steps // 2 + 3]
    whole, whole_data = work.launch("whole", *settings), work.launch("whole, data", *data, ranks=1)

    def wait_for_kill(killed: Launch, phase: str) -> None:
        killed.wait(-signal.SIGKILL, _KILLED)
        checkpoints = list(killed.folder.glob(f"runs/**/{phase}/checkpoint.json"))
        work.expect(checkpoints, f"{killed.folder.name}: there is no checkpoint to resume from in {phase}")

    killed = work.launch("killed", *settings, kill=in_network)
    killed_data = work.launch("killed, data", *data, ranks=1, kill=in_network)
    wait_for_kill(killed, "network_1")
    killed = work.launch("killed", *settings, kill=in_level)
    wait_for_kill(killed_data, "network_1")
    again_data = work.launch("killed, data", *data, ranks=1)
    wait_for_kill(killed, "level_1")
    again = work.launch("killed", *settings).wait()
    files = _same_bits(work, whole.wait(), again, "killed and resumed")
    files += _same_bits(work, whole_data.wait(), again_data.wait(), "killed and resumed, parallelism=data")
    work.record(f"{files} files with equal SHA-256, also with parallelism=data on one rank", files=files)


@check(limit=90, needs_gpus=1)
def gpu_fault(work: Work) -> None:
    """A process whose GPU fails ends, but its failure is not final: a rerun resumes from the checkpoint."""
    settings, step = ("arm=init", "prune.levels=1"), work.sizes["steps"] // 2
    launch = work.launch("run", *settings, fault=["level_1", step])
    status = launch.process.wait()
    print(launch.output, flush=True)
    errors = _error_lines(launch.output)
    work.record(status=status, errors=errors)
    work.expect(status, "a training whose GPU failed ended with status 0")
    work.expect(not launch.failures(), f"{launch.failures()[:1]} says that the failure is final")
    work.expect(len(errors) == 1 and "CUDA" in errors[0], f"a fault of the GPU gives {errors}")
    checkpoints = list(launch.folder.rglob("level_1/checkpoint.json"))
    work.expect(checkpoints, "the level that the fault interrupted has no checkpoint")
    work.launch("run", *settings).wait()
    work.record(f"exit status {status}; a rerun finished")


@check(limit=240)
def distributed(work: Work) -> None:
    """Ranks with parallelism=data have a GPU each; killed and resumed, they give the same bits."""
    if work.gpus == 1:
        raise Skip("needs 2 GPUs, here: 1")
    ranks = min(work.gpus, 8) or 2
    step = work.sizes["steps"]
    settings = (
        "arm=easy",
        "deterministic=true",
        "parallelism=data",
        "prune.levels=1",
        f"train.batch_size={64 * ranks}",
    )
    settings += (f"pretrain.subset.size={64 * ranks}",)
    whole = work.launch("whole", *settings, ranks=ranks)
    for phase, moment in (("network_1", step // 4 + 3), ("level_1", step // 2 + 3)):
        ended = work.launch("killed", *settings, ranks=ranks, kill=[phase, moment])
        ended.wait(_KILLED)
    again = work.launch("killed", *settings, ranks=ranks).wait()
    files = _same_bits(work, whole.wait(), again, "killed")
    places = [record["device"] for record in whole.records()]
    expected = [rank if work.gpus else "cpu" for rank in range(ranks)]
    work.expect(places == expected, f"ranks train on {places}, not on {expected}")
    backend = "NCCL" if work.gpus else "gloo"
    work.record(f"{ranks} ranks over {backend}: {files} files with equal SHA-256", files=files, devices=places)


@check(limit=90)
def memory(work: Work) -> None:
    """A process holds each split's images once on the device, in a launch with scores and several replicates."""
    from lth_diet.data import catalog

    size = 128 if work.gpus else 16
    settings = ("arm=easy", "scores.networks=3", "scores.steps=20", "train.steps=20", "train.milestones=[]")
    settings += ("pretrain.steps=5", "prune.levels=1", "replicates=2", f"dataset.size={size}", "model.depth=8")
    launch = work.launch("memory", *settings, "train.batch_size=64").wait()
    data = catalog.load("digits", "data", size)
    once = data.train.images.nbytes + data.test.images.nbytes
    trainings = launch.records()[0]["trainings"]
    where = "gpu" if work.gpus else "cpu"
    copies = [round(training["before"]["images"].get(where, 0) / once, 2) for training in trainings]
    work.record(image_bytes=once, trainings=trainings, copies=copies)
    work.expect(len(trainings) == 3 + 2 * 3, f"{len(trainings)} trainings instead of 9")
    if work.gpus:
        allocated = [training["before"]["allocated"] for training in trainings]
        limit = once + 96 * _MIB  # cuBLAS keeps 32 MiB per thread on an H100
        work.expect(max(copies) <= 1, f"up to {max(copies)} copies of the images")
        work.expect(max(allocated) <= limit, f"{max(allocated)} bytes before a training; the images have {once}")
    note = "" if work.gpus else "; on the CPU, images are mapped from the cache"
    work.record(f"at most {max(copies)} copies of {once / _MIB:.1f} MiB of images in {len(trainings)} trainings{note}")


@check(limit=240, alone=True)
def compiled(work: Work) -> None:
    """compile=true trains level after level without more memory for each."""
    levels = 20 if work.gpus else 2
    settings = ("arm=init", "compile=true", f"prune.levels={levels}", "train.steps=20", "train.milestones=[]")
    launch = work.launch("compiled", *settings)
    if launch.process.wait() == 2 and any("compile = true" in line for line in _error_lines(launch.output)):
        raise Skip(_error_lines(launch.output)[0].removeprefix("error: "))
    trainings = launch.wait().records()[0]["trainings"]
    seconds = [training["seconds"] for training in trainings]
    key = "free" if work.gpus else "resident"
    series = [training["after"][key] / _MIB for training in trainings]
    work.record(seconds=seconds, **{f"{key}_mib": series})
    work.expect(len(trainings) == levels + 1, f"{len(trainings)} trainings instead of {levels + 1}")
    growth = abs(series[-1] - series[1]) / (len(series) - 2)
    times = f"first training {seconds[0]:.0f} s, last {seconds[-1]:.1f} s"
    work.record(f"{growth:.1f} MiB per level over {levels} levels; {times}", mib_per_level=growth)
    if work.gpus:
        work.expect(growth <= 8, f"{growth:.1f} MiB of the device per level, limit 8; {times}")


@check(limit=200, alone=True, packages=("torch", "composer", "torchvision", "PIL"))
def step_time(work: Work) -> None:
    """Time per step against a bare PyTorch loop and plain Composer."""
    from lth_diet.training.devices import precision as resolve

    options = ("--steps", "150", "--warmup", "30", "--repeats", "2", "--compile")
    small = ("--steps", "2", "--warmup", "1", "--repeats", "1", "--depth", "8", "--batch-size", "8")
    median = _benchmark(work, "step_time", *(options if work.gpus else small))["median"]
    precision = resolve("auto")
    ratio = median[f"ours, {precision}"] / median[f"bare, {precision}"]
    work.record(", ".join(f"{name} {value:.2f}" for name, value in median.items()) + " ms", milliseconds=median)
    if work.gpus:
        work.target(ratio, 1.05, "ours / bare")


@check(limit=120, alone=True, needs_gpus=1)
def out_of_memory(work: Work) -> None:
    """A network or batch that is too large for the GPU is one sentence that says what to change, and exit status 1."""
    settings = ("arm=init", "prune.levels=0", "dataset.size=512", "train.batch_size=1024", "model.depth=56")
    launch = work.launch("large", *settings, environment={"LTH_DIET_CACHE": str(work.folder / "cache")}).wait(1, 2)
    errors = _error_lines(launch.output)
    work.record(errors=errors, failed=[path.read_text() for path in launch.failures()])
    work.expect(len(errors) == 1 and "memory" in errors[0], f"out of memory gives {errors}")
    work.expect("Traceback" not in launch.output, "out of memory gives a traceback")
    if launch.process.returncode == 1:
        work.expect(launch.failures(), "it is not recorded as failed, but another attempt would end in the same way")
    work.record(errors[0].removeprefix("error: ") if errors else "")


@check(limit=120, alone=True, needs_gpus=1)
def neighbor(work: Work) -> None:
    """A run that finds the GPU's memory taken by another process fails, but not for good: a rerun trains it."""
    import torch

    settings = ("arm=init", "prune.levels=0", "dataset.size=128", "train.batch_size=256", "train.steps=10")
    settings += ("train.milestones=[]",)
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(max(0, free - 1536 * _MIB), dtype=torch.uint8, device="cuda")
    launch = work.launch("run", *settings)
    status = launch.process.wait()
    print(launch.output, flush=True)
    work.record(status=status, errors=_error_lines(launch.output))
    work.expect(status, "the run trained although the memory was taken")
    work.expect(not launch.failures(), f"{launch.failures()[:1]} says that the failure is final")
    del taken
    torch.cuda.empty_cache()
    work.launch("run", *settings).wait()
    work.record(f"exit status {status}; rerun once there was memory, it trained")


@check(limit=150, alone=True, packages=("torch", "composer", "psutil"))
def throughput(work: Work) -> None:
    """Steps per second of several replicates on one GPU."""
    _throughput(work)


@check(limit=150, alone=True, needs_gpus=1, packages=("torch", "composer", "psutil"))
def throughput_mps(work: Work) -> None:
    """Steps per second of several replicates on one GPU, with MPS."""
    if not shutil.which("nvidia-cuda-mps-control"):
        raise Skip("nvidia-cuda-mps-control is not installed")
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:  # short: it has sockets
        variables = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        os.environ.update(variables)
        server = subprocess.Popen(["nvidia-cuda-mps-control", "-f"], stdin=subprocess.DEVNULL)
        try:
            time.sleep(2)
            if server.poll() is not None:
                raise Skip(f"nvidia-cuda-mps-control ended with status {server.returncode}")
            _throughput(work)
        finally:
            subprocess.run(["nvidia-cuda-mps-control"], input=b"quit\n", timeout=20)
            server.kill()


def _throughput(work: Work) -> None:
    options = ("--steps", "200", "--warmup", "20", "--most", "8")
    small = ("--steps", "2", "--warmup", "1", "--most", "2", "--depth", "8")
    rows = _benchmark(work, "throughput", *(options if work.gpus else small))["rows"]
    rates = {str(row["replicates"]): row["steps_a_second"] for row in rows}
    work.record("total steps/s: " + ", ".join(f"{k} processes {rate:.0f}" for k, rate in rates.items()), rows=rows)


def _benchmark(work: Work, name: str, *options: str) -> dict[str, Any]:
    path = work.folder / f"{name}.json"
    command = [sys.executable, str(ROOT / f"benchmarks/{name}.py"), *options, "-o", str(path)]
    done = subprocess.run([*command, "--device", "gpu" if work.gpus else "cpu"], cwd=work.folder)
    work.expect(not done.returncode, f"benchmarks/{name}.py ended with exit status {done.returncode}")
    if not path.exists():
        raise RuntimeError(f"benchmarks/{name}.py wrote no results")
    return json.loads(path.read_text())


def main() -> None:
    from lth_diet.launch.processes import exit_with_parent

    name, folder, result, gpus, sizes = sys.argv[1:]
    exit_with_parent()
    work = Work(Path(folder), Path(result), int(gpus), sizes)
    try:
        CHECKS[name].function(work)
        work.finish()
    except Skip as reason:
        work.finish(SKIPPED, str(reason))
    except ModuleNotFoundError as error:
        print(traceback.format_exc(), flush=True)
        work.finish(SKIPPED, f"the package {error.name} is not installed")
    except Exception as error:
        print(traceback.format_exc(), flush=True)
        work.expect(False, (str(error) or type(error).__name__).splitlines()[0])


if __name__ == "__main__":
    main()
