"""Checks of a configuration against the ranks, the data and the machine of a launch, and warnings."""

import contextlib
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path

from lth_diet.config.blocks import blocks, fills_blocks, largest_stack
from lth_diet.config.instability import LoadedInstability
from lth_diet.config.loading import Loaded
from lth_diet.config.run_ids import OUTSIDE_IDENTITY, flatten, run_identity, run_name, scores_identity
from lth_diet.config.schema import Config
from lth_diet.config.yaml_files import quote
from lth_diet.data import catalog
from lth_diet.data.dataset import Dataset
from lth_diet.data.label_noise import noisy_labels
from lth_diet.errors import DeviceError, UserError, print_warnings
from lth_diet.launch.processes import ProcessInfo
from lth_diet.runs import changed_images, environment
from lth_diet.runs.environment import Environment
from lth_diet.runs.instability_directory import InstabilityDirectory
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.run_directory import ReplicateDirectory, RunDirectory
from lth_diet.runs.run_store import open_run_store
from lth_diet.runs.scores_directory import ScoresDirectory, load_arm_scores
from lth_diet.training import devices

_GIB = 1 << 30
WORKING_MEMORY = _GIB
"""Bytes of GPU memory that a process needs beside its images: the CUDA context, a network and its batches."""

_MAX_SIDE_OF_ONE_PIXEL = 4
"""Images of up to this many pixels per side have one pixel in the last layers of a ResNet, after two strides of 2."""


def check_imp(files: Sequence[Loaded], process: ProcessInfo) -> None:
    """Check that every rank has something to train, and that one launch can train all files.

    Raises:
        UserError: If the ranks cannot share the batches or the blocks of replicates, two files are one run, or the
            files differ in a setting of the whole process.
    """
    config = files[0].config
    if len(files) > 1:
        check_together(files)
    if config.parallelism == "data":
        if config.train.batch_size % process.world_size:
            raise UserError(
                f"train.batch_size = {config.train.batch_size}: must be a multiple of the {process.world_size} ranks "
                "with parallelism: data"
            )
        return
    ranks, configs = process.world_size, [loaded.config for loaded in files]
    replicates = sum(len(config.replicates) for config in configs)
    stacks = sorted({config.stack for config in configs})
    remedies = ["more replicates"]
    if stacks != [1]:
        fitting = largest_stack([config.replicates for config in configs], ranks, stacks[-1] - 1)
        remedies += [f"stack={fitting}"] if replicates // fitting >= ranks else []
    elif len(files) == 1 and not isinstance(files[0], LoadedInstability):
        remedies += ["parallelism=data"]
    _check_ranks(ranks, sum(len(config.blocks) for config in configs), f"{replicates} replicates", stacks, remedies)


def _check_ranks(ranks: int, number: int, what: str, stacks: Sequence[int], remedies: Sequence[str]) -> None:
    """Check that each rank has one of a number of blocks."""
    if ranks <= number:
        return
    if stacks != [1]:
        what += f" in {number} block{'s' * (number > 1)} (stack = {' and '.join(map(str, stacks))})"
    *others, last = [f"use composer -n {number} or fewer", *remedies]
    raise UserError(f"command line: {ranks} ranks for {what}; {', '.join(others)}, or {last}")


def check_together(files: Sequence[Loaded]) -> None:
    """Check that one launch can train the runs of several files.

    Raises:
        UserError: If two files are one run, or the files differ in a setting of the whole process.
    """
    first, *others = files
    found: dict[tuple[str, str], Path] = {}
    for loaded in files:
        run = loaded.config.runs, run_name(loaded.config)
        if run in found:
            raise UserError(f"command line: -f {found[run]} and -f {loaded.path} are one run, {run[1]}; give it once")
        found[run] = loaded.path
        if loaded.config.parallelism == "data":
            raise UserError(
                f"parallelism = 'data' {loaded.where['parallelism']}: must be replicates with several files; start one "
                "launch per file"
            )
    for key in ("threads", "deterministic"):
        for other in others:
            theirs, ours = (quote(getattr(each.config, key)) for each in (first, other))
            if ours != theirs:
                raise UserError(
                    f"{key} = {theirs} in {first.path} and {ours} in {other.path}: must be equal in one launch, which "
                    f"sets it once for all files; add {key}=... to the command line, or start one launch per file"
                )


def check_scoring(config: Config, process: ProcessInfo) -> None:
    """Check that there are scores to compute, and networks for every rank.

    Raises:
        UserError: If there are not.
    """
    if config.scores.file is not None:
        raise UserError(f"scores.file = {config.scores.file!r}: must be unset to compute scores")
    ranks, networks = process.world_size, config.scores.networks
    fitting = [
        stack
        for stack in range(1, config.stack)
        if len(blocks(range(networks), stack)) >= ranks and fills_blocks(config.replicates, stack)
    ]
    remedies = ["more scores.networks", *(f"stack={stack}" for stack in fitting[-1:])]
    _check_ranks(ranks, len(config.scoring_blocks), f"{networks} networks", [config.stack], remedies)


def check_environment(files: Sequence[Loaded], process: ProcessInfo) -> None:
    """Check the stores of the runs, the data, the scores and the machine, and choose the device of this process.

    Decodes the data if there is no cache yet.

    Args:
        files: The configurations of the launch.
        process: This rank.

    Raises:
        UserError: If one of them cannot be used with a configuration.
    """
    gpus = 0
    for loaded in files:
        with _naming_file(loaded, files):
            gpus = max(gpus, check_device(loaded.config, process))  # of MIG devices, the first call chooses one
            if loaded.config.compile:
                check_compiler()
            open_run_store(loaded.config.runs).check()
    prepared = set()
    for loaded in files:
        dataset = loaded.config.dataset
        key = (dataset.name, dataset.root, dataset.size)
        with _naming_file(loaded, files):
            warning = None if key in prepared else catalog.prepare(*key[:2], process.launch, dataset.size)
            prepared.add(key)
            if warning and process.local_rank == 0:
                print_warnings([warning])
            check_data(loaded.config, process, gpus)


@contextlib.contextmanager
def _naming_file(loaded: Loaded, files: Sequence[Loaded]) -> Iterator[None]:
    """Adds the path of a configuration to errors, where a launch has several."""
    try:
        yield
    except UserError as error:
        if len(files) == 1:
            raise
        raise UserError(f"{loaded.path}: {error}") from None


def check_data(config: Config, process: ProcessInfo, gpus: int) -> None:
    """Check the images and finished scores of a configuration.

    Args:
        config: The configuration.
        process: This rank.
        gpus: Number of GPUs that the ranks of this machine share.

    Raises:
        UserError: If the images do not fit or are too few, or too small for batches of one, or the scores are not those
            of the images.
    """
    data = catalog.load(config.dataset.name, config.dataset.root, config.dataset.size)
    check_memory(config, data, process, gpus)
    images, side = len(data.test.labels), max(data.train.images.shape[1:3])
    per_rank = config.train.batch_size // (process.world_size if config.parallelism == "data" else 1)
    if per_rank == 1 and side <= _MAX_SIDE_OF_ONE_PIXEL:
        raise UserError(
            f"train.batch_size = {config.train.batch_size}: must be 2 or more per rank with images of {side} x {side} "
            "pixels, of which one pixel remains in the last layers: BatchNorm needs two values"
        )
    if config.parallelism == "data" and images < process.world_size:
        raise UserError(
            f"command line: {process.world_size} ranks for {images} test images; use composer -n {images} or fewer "
            "with parallelism: data"
        )
    if config.needs_scores and (config.scores.file is not None or ScoresDirectory(config).done):
        labels = noisy_labels(data.train.labels, config.pretrain.label_noise, len(data.class_names), config.seed)
        load_arm_scores(config, labels)


def check_device(config: Config, process: ProcessInfo) -> int:
    """Choose the device of this process.

    Returns:
        The number of GPUs that the ranks of this machine share.

    Raises:
        UserError: If a GPU cannot be used, or ranks or precision do not fit the device.
    """
    shared = devices.select(process.local_rank)
    gpus, ranks = devices.count_gpus(), process.local_world_size
    if config.parallelism == "data" and 0 < gpus < ranks:
        raise UserError(
            f"command line: {ranks} ranks for {gpus} GPUs on this machine; use composer -n {gpus} or fewer with "
            "parallelism: data"
        )
    device = devices.describe()
    if config.precision == "bf16" and not device.has_bf16:
        lacks = f"it has neither {' nor '.join(devices.BF16_FEATURES)}"
        if device.is_gpu:
            lacks = f"it has compute capability {device.capability}, and bf16 needs 8.0 or later"
        raise UserError(f"precision = 'bf16': must be auto or fp32 on this device ({device.name}): {lacks}")
    return shared


def check_memory(config: Config, data: Dataset, process: ProcessInfo, gpus: int) -> None:
    """Check that the images fit into the free memory of the GPU, with room for training.

    Args:
        config: The configuration.
        data: Its data set.
        process: This rank.
        gpus: Number of GPUs that the ranks of this machine share.

    Raises:
        UserError: If they do not fit into the whole memory.
        DeviceError: If they do not fit into what is free, as where another process uses the GPU.
    """
    if not devices.is_gpu():
        return
    gpus = max(gpus, 1)
    ranks = len(range(process.local_rank % gpus, process.local_world_size, gpus))
    images = data.train.images.nbytes + data.test.images.nbytes
    (free, total), needed = devices.memory(), ranks * (images + WORKING_MEMORY)
    if needed > free:
        each = f" for each of {ranks} ranks" if ranks > 1 else ""
        raise (DeviceError if needed <= total else UserError)(
            f"dataset.name = {config.dataset.name!r}: the GPU needs about {needed / _GIB:.1f} GiB of memory "
            f"({images / _GIB:.1f} GiB of images and {WORKING_MEMORY / _GIB:g} GiB for training{each}), but "
            f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB are free; use a smaller dataset.size, fewer ranks or runs "
            f"per GPU, or a GPU with more free memory, or set {devices.VISIBLE}= (empty) to train on the CPU"
        )


def environment_warnings(path: Path, phases: Iterable[tuple[str, PhaseDirectory]], now: Environment) -> list[str]:
    """Warn if a run that is to be continued was begun on another device, or with another precision, version or code.

    Args:
        path: Directory of the run or the scores.
        phases: All phases, finished or not, with their names.
        now: What this launch trains with.
    """
    known = []
    for name, phase in phases:
        with contextlib.suppress(UserError):  # damaged: reported when the replicate is locked
            known.append((name, phase.environment()))
    found = environment.differences([*known, ("this launch", now)])
    if not found:
        return []
    return [
        f"{path}: {environment.describe(found)}; results from different environments should not be combined: to start "
        "a separate run, set variant=<name> or runs=<another folder>"
    ]


def run_phases(run: RunDirectory | InstabilityDirectory) -> list[tuple[str, PhaseDirectory]]:
    """Phases of all replicates of a run that exist, with their names."""
    found = [ReplicateDirectory(path) for path in sorted(run.path.glob("replicate_*"))]
    replicates = [run.replicate(replicate.index) for replicate in found]
    return [(f"{replicate.name}/{phase.name}", phase) for replicate in replicates for phase in replicate.phases()]


def check_compiler() -> None:
    """Check for what `torch.compile` builds code with: a C compiler on a GPU, C++ on the CPU, and Python's headers.

    Raises:
        UserError: If a program that includes Python.h cannot be compiled.
    """
    if devices.is_gpu():
        name, variable, language, packages = "C", "CC", "c", "gcc, libc6-dev"
        found = shutil.which("gcc") or shutil.which("clang") or "gcc"
    else:
        name, variable, language, packages, found = "C++", "CXX", "c++", "g++", "g++"
    compiler = os.environ.get(variable, found)
    include = sysconfig.get_path("include", "posix_prefix")
    command = [compiler, "-x", language, "-fsyntax-only", f"-I{include}", "-"]
    try:
        done = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True, errors="replace")
        reason = None if done.returncode == 0 else next(iter(done.stderr.splitlines()), f"status {done.returncode}")
    except OSError as error:
        reason = error.strerror or str(error)
    if reason is not None:
        raise UserError(
            f"compile = true: {compiler!r} ({variable} in the environment, or in the PATH) cannot compile {name} "
            f"with {include}/Python.h ({reason}); install the Debian packages {packages} and python3-dev, or use "
            "compile=false"
        )


def launch_warnings(files: Sequence[Loaded], ranks: int = 1) -> list[str]:
    """List the `warnings` of all files of a launch.

    An override that has an effect on one of the files causes none. With several files, a warning that does not hold for
    all of them names its file.
    """
    used = {key for loaded in files for key in loaded.where.keys() - unused_settings(loaded).keys()}
    found = [warnings(loaded, ranks, used_elsewhere=used) for loaded in files]
    common = set(found[0]).intersection(*found)
    return [
        sentence if sentence in common or str(loaded.path) in sentence else f"{loaded.path}: {sentence}"
        for loaded, sentences in zip(files, found, strict=True)
        for sentence in sentences
    ]


def warnings(loaded: Loaded, ranks: int = 1, scoring: bool = False, used_elsewhere: Collection[str] = ()) -> list[str]:
    """List what is valid but hardly meant, one sentence each: settings without effect, threads, files, changed images.

    Args:
        loaded: The configuration. Settings without effect are listed if its file or the command line has them; those
            of a base file are shared by arms.
        ranks: Ranks of the launch on this machine.
        scoring: Whether only scores are computed. Then only settings of the command line are listed.
        used_elsewhere: Keys with an effect on another file of the launch; on the command line, they are not listed.
    """
    sentences = repeated_warnings(loaded.repeated)
    unused = {
        key: reason
        for key, reason in unused_settings(loaded, scoring).items()
        if not (key in used_elsewhere and loaded.where[key] == "on the command line")
    }
    for reason in dict.fromkeys(unused.values()):
        sentences.append(describe_unused([key for key in unused if unused[key] == reason], *reason))
    threads = thread_warnings(loaded.config.threads, ranks, available_cpus())
    return [*sentences, *schedule_warnings(loaded, scoring), *threads, *data_warnings(loaded.config)]


def data_warnings(config: Config) -> list[str]:
    """Warn of files that are not used, and of images that have changed since an earlier run."""
    return [*catalog.warnings(config.dataset.name, config.dataset.root), *changed_images.warnings(config)]


def repeated_warnings(keys: Iterable[str]) -> list[str]:
    """Warn of keys that are given more than once on the command line."""
    return [f"{key} is given more than once on the command line; the last value counts" for key in keys]


def unused_settings(loaded: Loaded, scoring: bool = False) -> dict[str, tuple[str, str]]:
    """Return the written keys whose values change nothing, each with where it was written and when it has no effect."""
    config, values = loaded.config, flatten(loaded.config.model_dump())
    why = dict.fromkeys(values.keys() - run_identity(config).keys(), f"with arm: {config.arm}")
    if scoring:
        why = dict.fromkeys(values.keys() - scores_identity(config).keys(), "on scores")
    elif config.needs_scores:
        why |= dict.fromkeys(why.keys() & {"scores.networks", "scores.steps"}, "with scores.file")
        why.pop("scores.file", None)
    for key in OUTSIDE_IDENTITY - ({"replicates", "prune.levels"} if scoring else set()):
        why.pop(key, None)
    why.pop("stack", None)
    if not scoring:
        why.pop("parallelism", None)
    if config.dataset.name == "digits":
        why["dataset.root"] = "with dataset.name: digits"
    if not config.train.milestones:
        why["train.gamma"] = "without train.milestones"
    if config.prune.levels == 0:
        why.setdefault("prune.fraction", "with prune.levels: 0")
    return {
        key: (loaded.where[key], why[key])
        for key in values
        if key in loaded.written and key in why and values[key] is not None
        if not scoring or loaded.where[key] == "on the command line"
    }


def describe_unused(keys: Iterable[str], where: str, when: str) -> str:
    """Return the warning of settings without effect, such as `scores.steps in a.yaml has no effect with arm: init`."""
    *others, last = keys
    verb = "have" if others else "has"
    return f"{', '.join(others)}{' and ' if others else ''}{last} {where} {verb} no effect {when}"


def schedule_warnings(loaded: Loaded, scoring: bool = False) -> list[str]:
    """List milestones and intervals that are beyond the end of every phase."""
    config, sentences = loaded.config, []
    train, rewind = config.train, config.rewind_step
    phases = [] if scoring else [(0, rewind), (rewind, train.steps)]
    if scoring or (config.needs_scores and config.scores.file is None):
        phases.append((0, config.scores.steps))
    end = max(last for _, last in phases)
    late = [step for step in train.milestones if step >= (end if scoring else train.steps)]
    if late and not scoring:
        only = f"; of these, scoring reaches {[step for step in late if step < end]}" if late[0] < end else ""
        sentences.append(
            f"train.milestones = {list(train.milestones)} {loaded.where['train.milestones']}: a level never reaches "
            f"{late}, because train.steps = {train.steps}{only}"
        )
    for name, consequence in _INTERVALS.items():
        interval = getattr(config.intervals, name)
        inclusive = name == "log"
        hit = any((last - (not inclusive)) // interval > first // interval for first, last in phases if interval)
        if f"intervals.{name}" in loaded.written and interval and not hit:
            sentences.append(
                f"intervals.{name} = {interval} {loaded.where[f'intervals.{name}']}: no phase contains a multiple of "
                f"it, so {consequence}"
            )
    return sentences


_INTERVALS = {
    "log": "no training loss is logged",
    "checkpoint": "nothing is saved before the end of a phase, and a phase that is stopped starts again",
    "evaluate": "networks are evaluated at the end of each phase only",
}


def thread_warnings(threads: int, ranks: int, cpus: int) -> list[str]:
    """Warn of more threads than CPUs."""
    if threads * ranks <= cpus:
        return []
    each = f" for each of {ranks} ranks" if ranks > 1 else ""
    return [
        f"threads = {threads}{each}: {cpus} CPUs can be used, and more threads than CPUs can make training "
        "many times slower"
    ]


def available_cpus() -> int:
    """Number of CPUs that this process may use, within the limits of `taskset`."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
