import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import MEASURED, ROOT, YAMLS

from analysis import arms, collect, identities, paper
from analysis.arms import Arm
from lth_diet.config import loading
from lth_diet.config.run_ids import run_identity, run_name
from lth_diet.errors import UserError
from lth_diet.sweep.grid import Settings, Sweep
from lth_diet.sweep.plan import plan, shared_runs
from recipes import sweep

SWEEPS = ROOT / "yamls/sweeps"
GRID = """
base: base.yaml
arms:
  - {arm: init}
  - {arm: [random, easy, hard], pretrain.steps: [2ba, 4ba]}
prune: {levels: 1}
experiment: "0x1F"
"""


@pytest.fixture
def grid(grid):
    """Write a sweep file of seven runs and return its path."""
    return lambda text=GRID, name="grid.yaml": grid(text, name)


def arms_of(path):
    runs = [run.config for run in Sweep(path).runs.values()]
    return [Arm(c.arm, c.subset_size, c.rewind_step, c.label_noise) for c in runs]


def family_arms(family, sizes):
    names = ("random", "easy") if family.label_noise else ("random", "easy", "hard")
    subsets = {family.arm(name, size=size) for name, size in itertools.product(names, sizes)}
    return {family.arm("init"), family.arm("all"), family.arm("all", family.t_star), *subsets}


SMALL = {"cifar10_small": paper.CIFAR10_SMALL, "cifar10_overnight": paper.CIFAR10_OVERNIGHT}
NOISY = [paper.NOISE_10, paper.NOISE_50]
SHOWN = {f"figure2_{family.dataset}": [(family, [family.size])] for family in paper.CLEAN}
SHOWN |= {f"figure4_{family.dataset}": [(family, family.sizes)] for family in paper.CLEAN}
SHOWN |= {f"figure5_{family.dataset}": [(family, family.sizes)] for family in (paper.CIFAR10, paper.CIFAR100)}
SHOWN |= {"figure3_cifar10": [(family, [family.size]) for family in NOISY]}
SHOWN |= {"figure6_cinic10": [(family, family.sizes) for family in (paper.CINIC10_400, paper.CINIC10)]}
SHOWN |= {"figure7_cifar10": [(family, family.sizes) for family in NOISY]}


@pytest.mark.parametrize("name", SHOWN)
def test_the_sweep_of_a_figure_has_exactly_the_arms_that_the_figure_shows(name):
    there = arms_of(SWEEPS / f"{name}.yaml")
    assert len(there) == len(set(there))
    assert set(there) == set().union(*(family_arms(family, sizes) for family, sizes in SHOWN[name]))


@pytest.mark.parametrize("name", SMALL)
def test_the_sweeps_for_two_cores_have_the_arms_of_their_family_with_and_without_balanced_classes(name):
    runs = [run.config for run in Sweep(SWEEPS / f"{name}.yaml").runs.values()]
    family = SMALL[name]
    clean = {family.arm("init"), family.arm("all", family.t_star), *family_arms(family, [family.size])}
    noisy = family.with_noise(0.5)
    assert set(arms_of(SWEEPS / f"{name}.yaml")) == clean | {noisy.arm("all", 150), noisy.arm("easy")}
    assert not any(family.differing_settings(identities.normalize(run_identity(run))) for run in runs)
    assert len(runs) == 11 and sum(run.arm_description.endswith("balanced") for run in runs) == 3
    assert all(run.stack == 4 and run.replicates == tuple(range(8)) and run.precision == "fp32" for run in runs)


@pytest.mark.parametrize("dataset", paper.NAMES)
def test_the_sweeps_of_a_dataset_have_the_published_arms_and_the_one_published_as_a_copy(dataset):
    published = collect.published()
    there = set().union(*(arms_of(path) for path in SWEEPS.glob(f"*_{dataset}.yaml")))
    copied = {paper.SAME_RUNS} if dataset == "cifar10" else set()
    assert there == set(arms.curves_by_arm(published[published.dataset == dataset])) | copied
    assert len(arms_of(SWEEPS / "figure5_cifar10.yaml")) == 27


def test_every_sweep_file_belongs_to_a_figure_or_a_small_data_set():
    assert {path.stem for path in SWEEPS.iterdir()} == {*SHOWN, "digits", *SMALL}


def test_every_configuration_in_yamls_is_a_run_of_a_sweep():
    swept = set().union(*(Sweep(path).runs for path in SWEEPS.iterdir()))
    alone = {run_name(loading.load_config(path)) for path in YAMLS}
    assert alone <= swept
    assert {name for name in alone if "digits" in name} == Sweep(SWEEPS / "digits.yaml").runs.keys()


def test_the_arguments_of_a_run_reproduce_its_configuration(grid):
    swept = Sweep(grid(), ["seed=3", "retries=0", "runs=else where"])
    assert len(swept.points) == 7 and swept.settings.retries == 0
    for point in swept.points:
        flag, path, *overrides = point.arguments
        config = loading.load_config(path, overrides)
        assert (flag, config) == ("-f", point.run.config)
        assert config.experiment == "0x1F" and config.seed == 3 and config.prune.levels == 1


def test_the_sweep_file_in_the_documentation_is_valid(place):
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/sweeps.md").read_text(), flags=re.S)
    (place / "readme.yaml").write_text(block.replace("..", str(ROOT / "yamls")))
    swept = Sweep(place / "readme.yaml")
    assert len(swept.runs) == 1 + 4 and swept.settings.gpus_per_run == 0.5


def test_a_run_of_two_grids_is_listed_once(grid):
    text = GRID.replace("arms:", "arms:\n  - {arm: [easy, init], pretrain.steps: 2ba}")
    assert len(Sweep(grid(text)).runs) == 7
    assert len(Sweep(grid(text)).work()) == 1 + 7


WARNINGS = {
    "[{arm: [init, all], pretrain.steps: [2, 3]}]": [
        "2 points of entry 1 of arms in grid.yaml are one run, digits_init-"
    ],
    "[{arm: init, seed: [1, 1, 2]}]": ["2 points of entry 1 of arms in grid.yaml are one run, digits_init-"],
    "[{arm: [init, all], scores.steps: 3, pretrain.steps: 3}]": [
        "scores.steps in entry 1 of arms in grid.yaml has no effect on any of its runs"
    ],
    "[{arm: [init, easy], scores.steps: 3}]": [],
    "[{arm: init, train.lr: [0.1, 0.2]}]\ntrain: {lr: 0.3}": [
        "train.lr in grid.yaml has no effect on any run: every arm sets it"
    ],
    "[{arm: init, train.lr: [0.1, 0.2]}, {arm: all}]\ntrain: {lr: 0.3}": [],
    "[{arm: init}]\ngpus_per_run: 0\ncpus_per_run: 1\nthreads: 2": [
        "cpus_per_run = 1 is less than threads = 2: processes share CPUs",
        "threads = 2: 1 CPUs can be used",
    ],
    "[{arm: init, train.steps: [8, 12]}]": [
        "train.milestones = [6, 9] in base.yaml: a level never reaches [9], because train.steps = 8"
    ],
}


@pytest.mark.parametrize("arms", WARNINGS)
def test_a_sweep_warns_of_points_that_are_one_run_and_of_settings_without_effect(grid, capsys, arms):
    grid(f"base: base.yaml\narms: {arms}\n")
    sentences = Sweep(Path("grid.yaml")).warnings(cpus=1)
    for sentence, start in itertools.zip_longest(sentences, WARNINGS[arms]):
        assert sentence.startswith(start)


def test_a_sweep_prints_its_warnings_once(grid, capsys):
    path = grid()
    assert sweep.main(["-f", str(path), "--plan", "intervals.log=50", "pretrain.lr=0.2", "pretrain.lr=0.3"]) == 0
    assert [line[:60] for line in capsys.readouterr().err.splitlines()] == [
        "warning: pretrain.lr is given more than once on the command l"[:60],
        "warning: intervals.log = 50 on the command line: no phase con"[:60],
    ]


@pytest.mark.parametrize("path", sorted(SWEEPS.iterdir()), ids=lambda path: path.stem)
def test_no_sweep_file_has_warnings(path):
    assert Sweep(path).warnings() == []


OUTSIDE = ["experiment: [a, b]", "runs: [a, b]", "dataset.root: [a, b]", "prune.levels: [1, 2]", "replicates: [1, 2]"]


@pytest.mark.parametrize("axis", [*OUTSIDE, "intervals.log: [1, 2]", "pretrain.steps: [1, 2]", "train.lr: [1, 1.0]"])
def test_an_axis_that_distinguishes_no_runs_is_rejected_by_name(grid, axis):
    key, value = axis.partition(":")[0], "x" if "a, b" in axis else 3
    with pytest.raises(UserError, match=rf"^{key} = \[.*\] in entry 1 of arms in .*, so all values would be one run"):
        Sweep(grid(f"base: base.yaml\narms: [{{arm: init, seed: [1, 2], {axis}}}]\n"))
    assert len(Sweep(grid(f"base: base.yaml\narms: [{{arm: init, {axis}}}]\n"), [f"{key}={value}"]).runs) == 1


def test_entries_may_ask_for_different_replicates_of_a_run_but_not_for_different_settings(grid):
    text = "base: base.yaml\narms: [{{arm: init, replicates: 1}}, {{arm: init, replicates: 2, {}}}]\n"
    assert [each.name[-11:] for each in Sweep(grid(text.format("seed: 42"))).work()] == ["replicate_0", "replicate_1"]
    with pytest.raises(UserError, match=r"experiment = 'x' in entry 2 of arms .* has 'tiny' in entry 1 of arms"):
        Sweep(grid(text.format("experiment: x")))


def test_the_arguments_of_a_job_have_every_key_once(grid):
    for each in Sweep(grid(), ["experiment=x", "replicates=2"]).work():
        keys = [text.partition("=")[0] for text in each.arguments]
        assert len(keys) == len(set(keys))


def test_scores_come_first_and_only_easy_and_hard_arms_need_them(grid):
    work = Sweep(grid()).work()
    assert [each.recipe for each in work] == ["score"] + ["imp"] * 7
    needing = {each.config.arm for each in work if each.needs == work[0].name}
    assert needing == {"easy", "hard"}
    assert {each.needs for each in work if each.config.arm not in needing} == {None}


def finish(run, *phases):
    run.create()
    for phase in phases:
        phase.write("curve.jsonl", b"")
        phase.finish({**MEASURED, "steps": 8, "seconds": 0.4})


def test_the_plan_shows_what_is_finished_partial_and_missing_and_changes_nothing(grid, place, capsys):
    path = grid()
    points = {point.run.config.arm_description: point.run for point in Sweep(path).points}
    for words in ("init", "random 128, t_r = 4"):
        replicate = points[words].replicate(0)
        finish(points[words], replicate.pretrain, replicate.level(0))
    finish(points["init"], points["init"].replicate(0).level(1))
    level = points["random 128, t_r = 4"].replicate(0).level(1)
    level.write("curve.jsonl", b"")
    level.checkpoint_path(9).write_text("state")
    level.commit_checkpoint(9)
    before = {p: p.stat().st_mtime_ns for p in place.rglob("*")}
    assert sweep.main(["-f", str(path), "--plan", "gpus=1", "gpus_per_run=0.25"]) == 0
    assert {p: p.stat().st_mtime_ns for p in place.rglob("*")} == before
    header, columns, *rows = capsys.readouterr().out.splitlines()
    assert header.endswith("runs: 7, replicates: 7, sets of scores: 1; in runs")
    place_of = {word: columns.index(word) + len(word) for word in ("finished", "partial", "missing", "steps left")}

    def count(words, column):
        (row,) = (row for row in rows if f" {words}  " in row)
        return row[place_of[column] - 8 : place_of[column]].strip()

    assert [count("init", column) for column in place_of] == ["1", "", "", "0"]
    assert [count("random 128, t_r = 4", column) for column in place_of] == ["", "1", "", "3"]
    assert [count("easy 128, t_r = 2", column) for column in place_of] == ["", "", "1", "22"]
    assert [count("2 networks, for 4 runs", column) for column in place_of] == ["", "", "1", "12"]
    assert rows[-2] == f"left: {2 + 1 + 5 * 3} trainings, {12 + 3 + 3 * 22 + 2 * 20} steps"
    hours = 121 * 0.05 / 3600
    assert rows[-1].startswith(f"time: {hours / 4:,.1f} GPU-hours at 50.0 ms per step (median of ")
    assert rows[-1].endswith("hours with 4 at a time")


def test_the_plan_of_a_stacked_sweep_counts_replicates_and_trains_blocks(grid, capsys):
    path = grid("base: base.yaml\narms: [{arm: init}]\nprune: {levels: 1}\nreplicates: 4\nstack: 2\n")
    (run,) = Sweep(path).runs.values()
    for index in (0, 1, 2):
        finish(run, *(run.replicate(index).level(level) for level in range(2 if index < 1 else 1)))
        finish(run, run.replicate(index).pretrain)
    block, other = Sweep(path).work()
    assert [part.state for part in (*block.parts, *other.parts)] == ["finished", "partial", "partial", "missing"]
    assert (block.steps_left, other.steps_left, block.done) == (12, 12 + 2 * 12, False)
    assert sweep.main(["-f", str(path), "--plan", "cpus=2", "gpus_per_run=0"]) == 0
    header, _, row, *_, left, time, stack = capsys.readouterr().out.splitlines()
    assert header.endswith("runs: 1, replicates: 4, sets of scores: 0; in runs")
    assert row.split()[-5:] == ["1", "2", "1", "4", "48"]
    assert left == "left: 4 trainings, 48 steps"
    assert "process-hours at 50.0 ms per step" in time and time.endswith("hours with 2 at a time")
    assert stack == (
        "stack: 2; recommended for 4 replicates on 2 jobs: 2 on a CPU (the largest whose blocks they fill, "
        "2 or more); another stack is another run id"
    )


def test_the_recommended_stack_counts_the_replicates_of_all_entries_of_a_run(grid, capsys):
    entries = "[{arm: init, replicates: [[0, 1]]}, {arm: init, replicates: [[2, 3, 4, 5, 6, 7]]}]"
    path = grid(f"base: base.yaml\narms: {entries}\nstack: 2\n")
    assert sweep.main(["-f", str(path), "--plan", "cpus=1", "gpus_per_run=0"]) == 0
    assert "stack: 2; recommended for 8 replicates on 1 job: 8 on a CPU" in capsys.readouterr().out


def test_runs_with_finished_pretraining_need_no_scores(grid):
    path = grid()
    for run in Sweep(path).runs.values():
        finish(run, run.replicate(0).pretrain)
    assert {each.recipe for each in Sweep(path).work()} == {"imp"}


def test_the_plan_shows_which_other_sweeps_have_a_run(grid):
    other = "base: base.yaml\narms: [{arm: init}, {arm: hard, pretrain.steps: 4ba}]\n"
    path = grid()
    grid(other, "other.yaml")
    grid("base: nowhere.yaml\narms: [{arm: init}]\n", "broken.yaml")
    swept = Sweep(path, ["seed=3"])
    common = shared_runs(swept, ["seed=3"])
    assert sorted(swept.runs[name].config.arm for name, files in common.items() if files == ["other"]) == [
        "hard",
        "init",
    ]
    assert "shared: 2 of 7 runs, with other sweeps in " in plan(swept, common)


def test_nothing_of_figure_2_is_left_after_figure_4():
    small = ["dataset.name=digits", "prune.levels=0", "replicates=1", "pretrain.subset.size=128"]
    for run in Sweep(SWEEPS / "figure4_cifar10.yaml", small).runs.values():
        finish(run, run.replicate(0).pretrain, run.replicate(0).level(0))
    assert [each for each in Sweep(SWEEPS / "figure2_cifar10.yaml", small).work() if not each.done] == []


def test_several_runs_share_a_gpu_by_fractions():
    settings = Settings(base="x", arms=[{"arm": "init"}])
    assert settings.slots(8, 2, 1, 1) == 2
    assert settings.slots(8, 2, 1, 0.4) == 4, "a run uses one GPU, not parts of two"
    assert settings.slots(8, 2, 3, 0.25) == 2
    assert settings.slots(8, 0, 2, 0) == 4
    assert settings.slots(8, 0, 1, 1) == 0


def test_invalid_input_is_reported_before_ray_or_torch_is_imported(grid):
    script = (
        "import sys; from recipes import sweep; code = sweep.main(sys.argv[1:])\n"
        "assert not {'ray', 'torch', 'composer', 'mlflow'} & set(sys.modules), 'imported'; sys.exit(code)"
    )
    command = [sys.executable, "-c", script, "-f", str(grid()), "train.lr=fast"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr


def test_only_the_scheduler_imports_ray():
    importing = [
        path.name
        for folder in ("lth_diet", "recipes", "analysis")
        for path in (ROOT / folder).rglob("*.py")
        if "import ray" in path.read_text()
    ]
    assert importing == ["scheduler.py"]
