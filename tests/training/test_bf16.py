"""bf16 on a CPU that has it; most tests are skipped elsewhere."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import run
from safetensors.torch import load_file

from lth_diet import scoring
from lth_diet.algorithms import ApplyMask
from lth_diet.networks.classifier import build_classifier
from lth_diet.training import callbacks, devices, trainer
from recipes import imp

needs_bf16 = pytest.mark.skipif(
    not devices.describe().has_bf16, reason=f"this CPU has neither {' nor '.join(devices.BF16_FEATURES)}"
)


class Killed(Exception):
    pass


def kill():
    raise Killed


@pytest.fixture
def network():
    """A small network; its `seen` has the types of the outputs of its first convolution, in training or not."""
    model = build_classifier(8, 10, width=2, channels=1, seed=1)
    model.seen = set()
    model.module.conv1.register_forward_hook(lambda module, _, output: model.seen.add((module.training, output.dtype)))
    return model


@needs_bf16
def test_training_and_evaluation_compute_in_bf16_but_weights_losses_and_metrics_are_fp32(train, network):
    result = train(trainer.Schedule(0, 4, 0.1), model=network, overrides=["precision=bf16"])
    assert network.seen == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert {weight.dtype for weight in network.module.parameters()} == {torch.float32}
    assert result["environment"]["precision"] == "bf16"
    loss = torch.tensor(result["test_loss"])
    assert math.isfinite(loss) and loss.bfloat16() != loss


@needs_bf16
def test_scores_are_measured_in_fp32(train, network):
    train(trainer.Schedule(0, 4, 0.1), model=network, overrides=["precision=bf16"])
    network.seen.clear()
    scoring.probabilities(network.module, [(torch.randn(3, 1, 8, 8), None)])
    assert network.seen == {(False, torch.float32)}


def test_auto_is_fp32(train, network):
    train(trainer.Schedule(0, 4, 0.1), model=network)
    assert {dtype for _, dtype in network.seen} == {torch.float32}


@needs_bf16
def test_a_resumed_training_has_the_bits_of_an_uninterrupted_one_and_pruned_weights_stay_zero(
    train, phase, monkeypatch
):
    def trained(**options):
        model = build_classifier(8, 10, width=2, channels=1, seed=1)
        mask = {"conv1.weight": torch.arange(18).view(2, 1, 3, 3) % 2 == 0}
        result = train(
            trainer.Schedule(0, 8, 0.1, (5,)),
            [ApplyMask(mask)],
            ["precision=bf16", "intervals.checkpoint=3"],
            model,
            **options,
        )
        assert not model.module.conv1.weight[~mask["conv1.weight"]].any()
        return model.module.state_dict(), result["test_loss"], phase.curve()

    expected = trained()
    phase.path.rename("uninterrupted")
    monkeypatch.setattr(callbacks, "SYNC_SECONDS", 0)
    with pytest.raises(Killed):
        trained(sync=kill)
    assert phase.checkpoint()[1] == 3
    weights, loss, curve = trained()
    assert all(torch.equal(weights[name], value) for name, value in expected[0].items()) and loss == expected[1]
    assert [row["step"] for row in curve] == [row["step"] for row in expected[2]]


@needs_bf16
def test_a_run_with_scores_and_a_data_parallel_run_repeat_bit_for_bit(tiny):
    def weights(folder, *overrides, ranks=None):
        status, out, err = run(
            tiny("easy"), "precision=bf16", "prune.levels=1", *overrides, f"runs={folder}", ranks=ranks
        )
        assert status == 0, out + err
        return read(folder)

    def read(folder):
        paths = sorted(Path(folder).glob("*/*/*/weights.safetensors")) + sorted(Path(folder).glob("scores/*/*.safet*"))
        assert len(paths) == 4
        return {path.name + path.parent.name: load_file(path) for path in paths}

    for ranks in (1, 2):
        overrides = ["parallelism=data"] if ranks == 2 else []
        first, second = (weights(f"runs_{ranks}_{n}", *overrides, ranks=ranks) for n in (1, 2))
        assert all(torch.equal(first[file][name], value) for file in first for name, value in second[file].items())
    results = [json.loads(path.read_text()) for path in Path("runs_2_1").glob("*/*/level_1/result.json")]
    assert [result["environment"]["precision"] for result in results] == ["bf16"]


@needs_bf16
def test_the_precision_of_a_launch_is_printed(tiny, capsys):
    assert imp.main(["-f", str(tiny("init")), "precision=bf16", "prune.levels=0"]) == 0
    assert ", bf16, 1 thread\n" in capsys.readouterr().out
