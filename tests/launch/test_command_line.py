import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, write_image_folder
from PIL import Image
from safetensors.numpy import save

from lth_diet.config import loading
from lth_diet.data import catalog
from lth_diet.errors import UserError
from lth_diet.files import read_json, write_json
from lth_diet.launch import checks, plan
from lth_diet.launch.processes import ProcessInfo
from lth_diet.runs import work_left
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.scores import artifact
from recipes import imp, instability, score


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """The launcher's environment variables, unset and restored after each test."""
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(key, raising=False)
    return monkeypatch


def files(place):
    return sorted(path for path in place.rglob("*"))


BAD = {
    "yaml": (["train.lr=["], "train.lr on the command line: invalid YAML"),
    "unknown key": (["train.lrr=1"], "did you mean train.lr?"),
    "type": (["train.lr=fast"], "train.lr = 'fast' on the command line: must be a number"),
    "t_r": (["pretrain.steps=12"], "pretrain.steps = 12 on the command line: must be between 1 and 11"),
    "subset": (
        ["pretrain.subset.size=2000"],
        "pretrain.subset.size = 2000 on the command line: must be between 64 (one batch) and 1442",
    ),
    "small subset": (
        ["pretrain.subset.size=8"],
        "pretrain.subset.size = 8 on the command line: must be between 64 (one batch) and 1442",
    ),
    "offset": (
        ["arm=easy", "pretrain.subset.offset=1400"],
        "pretrain.subset.offset = 1400 on the command line: must be between 0 and 1378, to leave one batch",
    ),
    "fraction": (["prune.fraction=1.5"], "prune.fraction = 1.5 on the command line: must be less than 1"),
    "folder": (
        ["dataset.name=image_folder", "dataset.root=nowhere"],
        "dataset.root = 'nowhere' on the command line: nowhere does not exist; expected a folder with",
    ),
    "depth": (["model.depth=19"], "model.depth = 19 on the command line: must be 6n + 2"),
    "noise": (
        ["pretrain.label_noise=1.5"],
        "pretrain.label_noise = 1.5 on the command line: must be less than or equal to 1",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_invalid_input_exits_with_2_after_one_sentence_and_writes_nothing(tiny, place, capsys, case):
    overrides, sentence = BAD[case]
    path = tiny()
    before = files(place)
    assert imp.main(["-f", str(path), *overrides]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert sentence in err
    assert files(place) == before


@pytest.mark.parametrize("arguments", [[], ["-f"], ["-f", "x.yaml", "--plam"], ["-f", "missing.yaml"]])
def test_an_invalid_command_line_is_reported_in_one_sentence(arguments, capsys):
    assert imp.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


def test_an_image_of_another_size_is_rejected_before_anything_is_written(tiny, place, capsys):
    root = write_image_folder(place / "data", {"train": 40, "test": 2})
    Image.new("RGB", (9, 9)).save(root / "train/ant/0001.png")
    path = tiny("all")
    before = files(place)
    catalog.info.cache_clear()
    assert imp.main(["-f", str(path), "dataset.name=image_folder"]) == 2
    assert "train/ant/0001.png: 9 x 9 pixels, color; expected 8 x 8 pixels, color" in capsys.readouterr().err
    assert files(place) == before


def test_a_run_directory_of_another_configuration_is_rejected(tiny, capsys):
    run = RunDirectory(loading.load_config(tiny()))
    run.create()
    other = RunDirectory(loading.load_config(tiny(), ["seed=1"]))
    run.path.rename(other.path)
    assert imp.main(["-f", "tiny.yaml", "seed=1"]) == 2
    assert "was created with a different configuration: seed is 42 there, 1 here" in capsys.readouterr().err


def test_more_ranks_than_replicates_are_rejected(tiny, environment, capsys):
    environment.setenv("WORLD_SIZE", "3")
    environment.setenv("MASTER_PORT", "1")
    command, sentence = ["-f", str(tiny()), "replicates=2"], "3 ranks for 2 replicates; use composer -n 2 or fewer"
    assert imp.main(command) == 2
    assert f"{sentence}, more replicates, or parallelism=data\n" in capsys.readouterr().err
    assert instability.main([*command, "steps=[0,4]"]) == 2
    assert f"{sentence}, or more replicates\n" in capsys.readouterr().err


def test_a_batch_size_that_ranks_cannot_share_is_rejected(tiny, environment, capsys):
    environment.setenv("WORLD_SIZE", "3")
    environment.setenv("MASTER_PORT", "1")
    assert imp.main(["-f", str(tiny()), "parallelism=data"]) == 2
    assert "train.batch_size = 64: must be a multiple of the 3 ranks with parallelism: data" in (
        capsys.readouterr().err
    )


def test_more_ranks_than_test_images_are_rejected_with_parallelism_data(tiny):
    config = loading.load(tiny(), ["parallelism=data"])
    with pytest.raises(UserError, match="400 ranks for 355 test images; use composer -n 355 or fewer with parallelism"):
        checks.check_environment([config], ProcessInfo(0, 400, 0, "127.0.0.1", 1))


def test_a_data_parallel_run_of_two_ranks_is_not_resumed_by_one(tiny, capsys):
    RunDirectory(loading.load_config(tiny(), ["parallelism=data"]), ranks=2).create()
    assert imp.main(["-f", "tiny.yaml", "parallelism=data"]) == 2
    assert (
        "was created by 2 ranks with parallelism: data, but this launch has 1; use composer -n 2"
        in capsys.readouterr().err
    )


def digits_scores(folder, labels=None, **fingerprint):
    labels = catalog.load("digits", "unused").train.labels if labels is None else labels
    about = {"dataset": "digits", "dataset_fingerprint": "digits"} | fingerprint
    artifact.save_scores(folder, np.full((1, len(labels)), 0.5, np.float32), labels, **about)


def missing(folder):
    pass


def altered(folder):
    digits_scores(folder)
    path = folder / "scores.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def too_short(folder):
    digits_scores(folder)
    content = save({"el2n": np.zeros((1, 1441), np.float32)})
    (folder / "scores.safetensors").write_bytes(content)
    about = read_json(folder / "manifest.json") | {"sha256": hashlib.sha256(content).hexdigest()}
    write_json(folder / "manifest.json", about)


BAD_SCORES = {
    "missing": (missing, "mine/manifest.json cannot be read (No such file or directory)"),
    "altered": (altered, "mine/scores.safetensors: its checksum is not the one in manifest.json"),
    "other data": (
        lambda folder: digits_scores(folder, dataset="cifar10", dataset_fingerprint="cifar10"),
        "mine/scores.safetensors: scores of cifar10 (cifar10); expected scores of digits (digits)",
    ),
    "other labels": (
        lambda folder: digits_scores(folder, np.zeros(1442, int)),
        "scores.file: mine/scores.safetensors: computed with other labels",
    ),
    "wrong length": (
        too_short,
        "scores.file: mine/scores.safetensors: not a scores file (el2n is float32 of shape (1, 1441)",
    ),
    "a folder": (lambda folder: digits_scores(folder / "scores.safetensors"), "mine/scores.safetensors is a folder"),
}


@pytest.mark.parametrize("case", BAD_SCORES)
def test_a_scores_file_that_does_not_match_is_rejected_by_name_before_anything_is_written(tiny, place, capsys, case):
    write, sentence = BAD_SCORES[case]
    write(place / "mine")
    path = tiny("hard")
    before = files(place)
    assert imp.main(["-f", str(path), "scores.file=mine/scores.safetensors"]) == 2
    err = capsys.readouterr().err
    assert sentence in err and "scores.file" in err and err.count("\n") == 1
    assert files(place) == before


def test_a_scores_file_must_match_the_noisy_labels_of_the_arm(tiny, place, capsys):
    digits_scores(place / "mine")
    noisy = ["scores.file=mine/scores.safetensors", "pretrain.label_noise=0.1"]
    assert imp.main(["-f", str(tiny("easy")), *noisy]) == 2
    assert "computed with other labels (label noise unknown" in capsys.readouterr().err


def test_scoring_rejects_a_scores_file_and_more_ranks_than_networks(tiny, place, environment, capsys):
    digits_scores(place / "mine")
    assert score.main(["-f", str(tiny("easy")), "scores.file=mine/scores.safetensors"]) == 2
    assert "scores.file = 'mine/scores.safetensors': must be unset to compute scores" in capsys.readouterr().err
    environment.setenv("WORLD_SIZE", "3")
    environment.setenv("MASTER_PORT", "1")
    assert score.main(["-f", "tiny.yaml"]) == 2
    assert "3 ranks for 2 networks; use composer -n 2 or fewer" in capsys.readouterr().err
    assert not (place / "runs").exists()


def test_the_plan_shows_which_scores_will_be_computed_and_writes_nothing(tiny, place, capsys):
    path = tiny("easy")
    before = files(place)
    assert score.main(["-f", str(path), "--plan"]) == 0
    out = capsys.readouterr().out
    assert "EL2N scores by 2 ResNet-8 width 2, 6 steps (0.27 epochs)\n" in out
    assert "network 1  steps 0 to 6  to do\nscores: 12 steps to train" in out
    assert imp.main(["-f", str(path), "--plan"]) == 0
    assert (
        capsys.readouterr().out
        == f"{out.strip()}\n"
        + plan.plan(RunDirectory(loading.load_config(path))).replace("total: 28", "total: 40")
        + "\n"
    )
    assert files(place) == before


def test_invalid_input_is_reported_before_torch_or_composer_is_imported(tiny):
    script = (
        "import sys; from recipes import imp; code = imp.main(sys.argv[1:])\n"
        "assert not {'torch', 'composer', 'mlflow'} & set(sys.modules), 'imported'; sys.exit(code)"
    )
    command = [sys.executable, "-c", script, "-f", str(tiny()), "train.lr=fast"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_the_plan_shows_phases_steps_and_what_exists_and_writes_nothing(tiny, place, capsys):
    path = tiny()
    before = files(place)
    assert imp.main(["-f", str(path), "replicates=2", "--plan"]) == 0
    out = capsys.readouterr().out
    assert out.count("level 2    64.0 % of weights  steps 4 to 12  to do") == 2
    assert "replicate 1: 28 steps to train" in out and "total: 56 steps to train" in out
    assert files(place) == before


def test_a_result_without_measurements_fails_its_replicate_with_one_sentence(tiny, capsys):
    command = ["-f", str(tiny("init")), "prune.levels=0"]
    assert imp.main(command) == 0
    (path,) = Path("runs").glob("*/replicate_0/level_0/result.json")
    write_json(path, {key: value for key, value in read_json(path).items() if key != "test_accuracy_percent"})
    capsys.readouterr()
    assert imp.main(command) == 1
    out, err = capsys.readouterr()
    assert "no level is finished yet" in out
    reason = f"error: replicate 0: {path}: test_accuracy_percent is missing, expected float | int; delete "
    assert reason in err and "Traceback" not in out + err


def test_the_plan_counts_steps_from_finished_phases_and_checkpoints(tiny):
    run = RunDirectory(loading.load_config(tiny()))
    replicate = run.replicate(0)
    replicate.pretrain.write("curve.jsonl", b"")
    replicate.pretrain.finish({})
    level = replicate.level(0)
    level.write("curve.jsonl", b"")
    level.checkpoint_path(9).write_text("state")
    level.commit_checkpoint(9)
    assert work_left.steps_left(run.phases_of(replicate)) == 3 + 8 + 8
    assert "pretrain  100.0 % of weights  steps 0 to 4  done" in plan.plan(run)
    assert "level 0   100.0 % of weights  steps 4 to 12  resumes at step 9" in plan.plan(run)


@pytest.mark.parametrize("arguments", [["--plan"], []])
def test_what_is_not_used_and_changed_images_are_reported_by_plan_and_launch(tiny, place, capsys, arguments):
    root = write_image_folder(place / "data", {"train": 40, "test": 2})
    (root / "train/0.png").touch()
    settings = ["dataset.name=image_folder", "train.batch_size=16"]
    catalog.info.cache_clear()
    old = RunDirectory(loading.load_config(tiny("all"), settings))
    old.create()
    catalog.load("image_folder", "data")
    Image.new("RGB", (8, 8)).save(root / "train/ant/0001.png")
    catalog.info.cache_clear()
    assert imp.main(["-f", "tiny.yaml", "prune.levels=0", *settings, *arguments]) == 0
    unused, changed = capsys.readouterr().err.splitlines()[-2:]
    assert unused == "warning: data: 1 image directly in train/ is not used (train/0.png); expected train/<class>/"
    assert changed.startswith(f"warning: the images in data are not those of {old.path}: ")
