import hashlib
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from lth_diet import imp
from lth_diet.__main__ import main
from lth_diet.config import loading
from lth_diet.masks.mask import Mask
from lth_diet.networks.resnet import ResNet
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.training.progress import Progress


@pytest.fixture
def replicate(tiny):
    run = RunDirectory(loading.load_config(tiny(), ["prune.levels=1"]))
    run.create()
    imp.IMP(run.config, [run.replicate(0)], Progress([0], 0), lambda: None).run()
    return run.replicate(0)


def test_a_ticket_loads_in_plain_pytorch(replicate, place, capsys):
    assert main(["export", str(replicate.path), "1", "-o", "ticket"]) == 0
    assert "ResNet-8 width 2 on digits, arm random, level 1, 80.0 % of weights" in capsys.readouterr().out
    card = json.loads((place / "ticket/card.json").read_text())
    network = ResNet(8, 10, width=2, channels=1)
    network.load_state_dict(load_file("ticket/rewind_point.safetensors"))
    mask = load_file("ticket/mask.safetensors")
    trained = load_file("ticket/weights.safetensors")
    assert all(torch.equal(trained[name] != 0, remaining & (trained[name] != 0)) for name, remaining in mask.items())
    assert sum(int(remaining.sum()) for remaining in mask.values()) == sum(
        layer["remaining"] for layer in card["layers"]
    )
    assert (card["arm"], card["subset_size"], card["level"], card["replicate"]) == ("random", 128, 1, 0)
    assert card["environment"]["precision"] == "fp32" and card["versions"]["torch"]
    assert card["test_accuracy_percent"] == replicate.level(1).result()["test_accuracy_percent"]
    for name, digest in card["sha256"].items():
        assert hashlib.sha256((place / "ticket" / name).read_bytes()).hexdigest() == digest


def test_show_prints_the_layers_of_a_level(replicate):
    done = subprocess.run(
        [sys.executable, "-m", "lth_diet", "show", str(replicate.path), "1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    mask = Mask.load(replicate.level(1).path / "mask.safetensors")
    assert "fc.weight" in done.stdout and f"{mask.remaining:,} of {mask.total:,} weights remain" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{replicate}", "7"], "level 7 is not finished; finished levels: 0, 1"),
        (["{replicate}/..", "1"], "not a replicate directory"),
        (["nowhere", "1"], "not a replicate directory"),
        (["{replicate}", "1", "-o", "."], "already exists"),
    ],
)
def test_bad_input_is_reported_in_one_sentence(replicate, capsys, arguments, sentence):
    arguments = [argument.format(replicate=replicate.path) for argument in arguments]
    output = [] if "-o" in arguments else ["-o", "ticket"]
    assert main(["export", *arguments, *output]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1
    if sentence.endswith("0, 1"):
        assert main(["show", *arguments]) == 2


def test_a_damaged_file_is_not_exported(replicate, place, capsys):
    (replicate.level(1).path / "weights.safetensors").write_bytes(b"damaged")
    assert main(["export", str(replicate.path), "1", "-o", "ticket"]) == 2
    assert "level_1/weights.safetensors: missing or damaged" in capsys.readouterr().err
    assert not (place / "ticket").exists()
