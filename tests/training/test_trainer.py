import time

import pytest
import torch
from composer import Algorithm, Event, Trainer
from torch._dynamo.exc import TorchDynamoException

from lth_diet import errors
from lth_diet.algorithms import ApplyMask, Rewind
from lth_diet.data import catalog, loader
from lth_diet.data.loader import EvaluationLoader
from lth_diet.networks.classifier import build_classifier
from lth_diet.training import callbacks, composer_internals, devices, trainer


class Look(Algorithm):
    """Notes step and learning rate in every forward."""

    def __init__(self):
        self.seen = []

    def match(self, event, state):
        return event == Event.BEFORE_FORWARD

    def apply(self, event, state, logger):
        self.seen.append((int(state.timestamp.batch), state.optimizers[0].param_groups[0]["lr"]))


def weights_of_table_1(step):
    """Table 1, CIFAR-10 and CIFAR-100: 0.1, divided by ten at 31,200 and at 46,800 steps."""
    return 0.1 if step < 31_200 else 0.01 if step < 46_800 else 0.001


@pytest.mark.parametrize("first", [0, 400, 31_195, 31_200, 46_795, 62_390])
def test_the_learning_rate_of_a_rewound_level_is_that_of_table_1_at_every_step(train, first):
    look = Look()
    state = build_classifier(8, 10, width=2, channels=1, seed=1).module.state_dict()
    train(trainer.Schedule(first, first + 10, 0.1, (31_200, 46_800)), [Rewind(first, state), look])
    expected = [(step, pytest.approx(weights_of_table_1(step))) for step in range(first, first + 10)]
    assert look.seen == expected


def test_a_resumed_training_ends_with_the_same_bits_curve_and_learning_rates(train, phase, monkeypatch):
    monkeypatch.setattr(callbacks, "SYNC_SECONDS", 0)
    whole, first, second = (build_classifier(8, 10, width=2, channels=1, seed=1) for _ in range(3))
    schedule = trainer.Schedule(0, 8, 0.1, (5,))
    overrides = ["intervals.evaluate=4", "intervals.log=4"]
    train(schedule, overrides=overrides, model=whole)
    curve = [{**row, "timestamp": 0} for row in phase.curve()]
    (phase.path / "curve.jsonl").unlink()
    phase._keep_only_checkpoint(None)

    class Killed(Exception):
        pass

    def die_after_the_second():
        if phase.checkpoint()[1] == 6:
            with open(phase.path / "curve.jsonl", "a") as file:
                file.write('{"step": 7, "timestamp": 1, "train_loss": 0}\n{"step": 8, "ti')
            raise Killed

    with pytest.raises(Killed):
        train(schedule, overrides=overrides, model=first, sync=die_after_the_second)
    look = Look()
    train(schedule, [look], overrides, model=second)
    assert [step for step, _ in look.seen] == [6, 7]
    assert [{**row, "timestamp": 0} for row in phase.curve()] == curve
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


@pytest.mark.parametrize(("seconds", "syncs"), [(0, 5), (60, 0)])
def test_mlflow_is_updated_at_checkpoints_and_at_most_once_per_interval(train, monkeypatch, seconds, syncs):
    monkeypatch.setattr(callbacks, "SYNC_SECONDS", seconds)
    calls = []
    train(trainer.Schedule(0, 6, 0.1), overrides=["intervals.checkpoint=1"], sync=lambda: calls.append(1))
    assert len(calls) == syncs


@pytest.mark.parametrize(
    ("section", "name"),
    [("callbacks", "_Recorder"), ("optimizers", "SGD"), ("schedulers", "MultiStepLR"), ("algorithms", "Rewind")],
)
def test_a_checkpoint_that_lacks_a_state_is_an_error(train, phase, monkeypatch, section, name):
    class Killed(Exception):
        pass

    def kill():
        raise Killed

    monkeypatch.setattr(callbacks, "SYNC_SECONDS", 0)
    arguments = trainer.Schedule(0, 8, 0.1, (5,)), [Rewind(2)], ["intervals.checkpoint=3"]
    with pytest.raises(Killed):
        train(*arguments, sync=kill)
    path, step = phase.checkpoint()
    content = torch.load(path, weights_only=False)
    states = dict(content["state"][section])
    states["Renamed"] = states.pop(name)
    content["state"][section] = list(states.items()) if section == "algorithms" else states
    torch.save(content, path)
    phase.commit_checkpoint(step)
    with pytest.raises(errors.TrainingError, match=f"does not restore the training .{name} is not in the state_dict"):
        train(*arguments)


def test_a_phase_resumed_on_another_device_records_both(train, phase, monkeypatch):
    class Killed(Exception):
        pass

    def kill():
        raise Killed

    monkeypatch.setattr(callbacks, "SYNC_SECONDS", 0)
    arguments = trainer.Schedule(0, 8, 0.1, (5,)), [], ["intervals.checkpoint=3"]
    with pytest.raises(Killed):
        train(*arguments, sync=kill)
    first = phase.environment()
    monkeypatch.setattr(devices, "describe", lambda: devices.Device("another CPU", first["capability"], False, False))
    found = train(*arguments)["environment"]
    assert found == {**first, "device": f"{first['device']}, then another CPU"}


def test_a_checkpoint_with_another_mask_is_an_error(train, monkeypatch):
    class Killed(Exception):
        pass

    def kill():
        raise Killed

    monkeypatch.setattr(callbacks, "SYNC_SECONDS", 0)
    mask = torch.arange(18).view(2, 1, 3, 3) % 2 == 0
    arguments = trainer.Schedule(0, 8, 0.1, (5,)), [ApplyMask({"conv1.weight": mask})], ["intervals.checkpoint=3"]
    with pytest.raises(Killed):
        train(*arguments, sync=kill)
    arguments[1][0].mask = {"conv1.weight": ~mask}
    with pytest.raises(
        errors.TrainingError, match=r"level_0: .* a different mask, in conv1\.weight; .*delete .*level_0"
    ):
        train(*arguments)


def test_the_curve_has_mean_loss_learning_rate_and_evaluations_at_their_intervals(train, phase):
    result = train(trainer.Schedule(0, 8, 0.1, (5,)), overrides=["intervals.log=3", "intervals.evaluate=4"])
    rows = phase.curve()
    assert [(row["step"], sorted(set(row) - {"step", "timestamp"})) for row in rows] == [
        (3, ["learning_rate", "train_loss"]),
        (4, ["test_accuracy_percent", "test_loss"]),
        (6, ["learning_rate", "train_loss"]),
        (8, ["test_accuracy_percent", "test_loss"]),
    ]
    assert [row["learning_rate"] for row in rows if "learning_rate" in row] == pytest.approx([0.1, 0.01])
    assert result["test_accuracy_percent"] == rows[-1]["test_accuracy_percent"]


def test_accuracy_is_measured_after_the_last_step_on_the_test_images(train):
    model = build_classifier(8, 10, width=2, channels=1, seed=1)
    result = train(trainer.Schedule(0, 20, 0.1), model=model)
    data = catalog.load("digits", "unused")
    model.eval()
    hits = 0
    with torch.no_grad():
        for batch in EvaluationLoader(data, data.test, batch_size=50):
            hits += int((model(batch).argmax(1) == batch[1]).sum())
    assert result["test_accuracy_percent"] == pytest.approx(100 * hits / 355, abs=1e-4)


def test_a_loss_that_is_not_finite_stops_with_step_and_learning_rate(train, phase):
    with pytest.raises(errors.TrainingError, match=r"level_0: the loss is (nan|inf) at step \d+ with learning rate"):
        train(trainer.Schedule(0, 8, 1e30))


def test_a_closed_trainer_is_not_kept_alive(train):
    import gc
    import weakref

    model = build_classifier(8, 10, width=2, channels=1, seed=1)
    train(trainer.Schedule(0, 2, 0.1), model=model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_steps_are_those_of_composers_own_trainer_bit_for_bit(train, phase, monkeypatch):
    ours, plain = (build_classifier(8, 10, width=2, channels=1, seed=1) for _ in range(2))
    curves = []
    for model, kind in ((ours, composer_internals.LeanTrainer), (plain, Trainer)):
        monkeypatch.setattr(composer_internals, "LeanTrainer", kind)
        mask = {"conv1.weight": torch.arange(18).view(2, 1, 3, 3) % 2 == 0}
        train(trainer.Schedule(0, 8, 0.1, (5,)), [ApplyMask(mask)], ["intervals.log=1"], model)
        curves.append([{**row, "timestamp": 0} for row in phase.curve()])
        phase._keep_only_checkpoint(None)
    assert curves[0] == curves[1] and len(curves[0]) == 9
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name]), name


def test_losses_are_read_from_the_device_at_an_interval_and_not_at_every_step(train, monkeypatch):
    reads = []
    for name in ("cpu", "tolist"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor,
            name,
            lambda tensor, original=original: (reads.append(tuple(tensor.shape)), original(tensor))[1],
        )
    look = Look()
    train(trainer.Schedule(0, 8, 0.1), [look], ["intervals.log=4", "intervals.checkpoint=100"])
    assert len(look.seen) == 8
    assert reads[:2] == [(4, 1), (4, 1)], "the losses of four steps at a time"
    assert len(reads) < 8


def test_a_loss_that_is_not_finite_is_named_by_its_step_and_never_saved(train, phase):
    with pytest.raises(errors.TrainingError) as stopped:
        train(trainer.Schedule(0, 8, 1e30), overrides=["intervals.log=1", "intervals.checkpoint=100"])
    (phase.path / "curve.jsonl").unlink()
    with pytest.raises(errors.TrainingError) as later:
        train(trainer.Schedule(0, 8, 1e30), overrides=["intervals.log=8", "intervals.checkpoint=6"])
    assert str(later.value) == str(stopped.value)
    assert phase.checkpoint() is None


@pytest.mark.parametrize(
    ("device", "remedy"),
    [("cpu", "; try another number of threads or compile=false"), ("meta", r"\); use compile=false")],
)
def test_another_number_of_threads_is_a_remedy_on_the_cpu_only(phase, monkeypatch, device, remedy):
    monkeypatch.setattr(devices, "torch_device", lambda: torch.device(device))
    message = f"cannot compile this network on this machine .*{remedy}$"
    with pytest.raises(errors.TrainingError, match=message), trainer._compile_errors(phase):
        raise TorchDynamoException("a reason\nand a traceback")


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (loader.Loader, "batch"),
        (callbacks.dist, "all_reduce"),  # where losses are read
        (callbacks.checkpoint, "save_checkpoint"),
        (loader.EvaluationLoader, "__iter__"),
    ],
)
def test_a_fault_of_the_gpu_keeps_its_reason_wherever_cuda_reports_it(train, phase, monkeypatch, owner, name):
    def fail(*arguments, **options):
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(RuntimeError, match="^CUDA error: unspecified launch failure$"):
        train(trainer.Schedule(0, 8, 0.1), overrides=["intervals.checkpoint=3"])
    assert phase.checkpoint() is None or name == "__iter__"


@pytest.mark.parametrize(
    ("reason", "expected"), [("CUDA error: out of memory", RuntimeError), ("no compiler", errors.TrainingError)]
)
def test_a_fault_of_the_gpu_during_compilation_is_no_failed_compilation(phase, reason, expected):
    with pytest.raises(expected, match=reason), trainer._compile_errors(phase):
        raise TorchDynamoException(reason)


@pytest.mark.integration
def test_a_compiled_network_trains_to_the_same_losses_and_is_compiled_once_a_process(train, phase):
    def losses(*overrides):
        (phase.path / "curve.jsonl").unlink(missing_ok=True)
        model = build_classifier(8, 10, width=2, channels=1, seed=1)
        began = time.monotonic()
        result = train(trainer.Schedule(0, 8, 0.1), overrides=["intervals.log=1", *overrides], model=model)
        rows = [row["train_loss"] for row in phase.curve() if "train_loss" in row]
        return rows, result["test_accuracy_percent"], time.monotonic() - began

    plain, accuracy, _ = losses()
    compiled, compiled_accuracy, first = losses("compile=true")
    again, again_accuracy, second = losses("compile=true")
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert compiled_accuracy == pytest.approx(accuracy, abs=1)
    assert (again, again_accuracy) == (compiled, compiled_accuracy)
    assert second < first / 2


@pytest.mark.parametrize(("seconds", "steps"), [(0, [2, 4, 6]), (10, [4])])
def test_a_checkpoint_is_due_at_multiples_and_not_sooner_than_ten_seconds_after_the_last(
    train, phase, monkeypatch, seconds, steps
):
    clock, saved = [0.0], []

    class Late(Algorithm):
        """Six seconds pass in every second batch."""

        def match(self, event, state):
            return event == Event.BEFORE_FORWARD and int(state.timestamp.batch) % 2 == 0

        def apply(self, event, state, logger):
            clock[0] += 6

    monkeypatch.setattr(callbacks, "CHECKPOINT_SECONDS", seconds)
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(type(phase), "commit_checkpoint", lambda phase, step, *rest: saved.append(step))
    result = train(trainer.Schedule(0, 8, 0.1), [Late()], ["intervals.checkpoint=2"])
    assert saved == steps
    assert result["seconds"] == 24


def test_the_time_of_a_resumed_training_is_that_of_all_attempts(train, phase, monkeypatch):
    clock = [0.0]

    class Slow(Algorithm):
        """One second passes in every batch."""

        def match(self, event, state):
            return event == Event.BEFORE_FORWARD

        def apply(self, event, state, logger):
            clock[0] += 1

    class Killed(Exception):
        pass

    def die():
        raise Killed

    monkeypatch.setattr(callbacks, "SYNC_SECONDS", 0)
    monkeypatch.setattr(callbacks, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: clock[0])
    with pytest.raises(Killed):
        train(trainer.Schedule(0, 8, 0.1), [Slow()], ["intervals.checkpoint=5"], sync=die)
    clock[0] += 3600
    assert train(trainer.Schedule(0, 8, 0.1), [Slow()], ["intervals.checkpoint=5"])["seconds"] == 8


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_a_checkpoint_of_an_earlier_commit_resumes_with_its_momentum_and_the_kernel_of_this_device(
    train, phase, monkeypatch, device
):
    class Killed(Exception):
        pass

    def kill():
        raise Killed

    monkeypatch.setattr(callbacks, "SYNC_SECONDS", 0)
    arguments = trainer.Schedule(0, 8, 0.1), [], ["intervals.checkpoint=3"]
    with pytest.raises(Killed):
        train(*arguments, sync=kill)
    path, step = phase.checkpoint()
    content = torch.load(path, weights_only=False)
    optimizer = content["state"]["optimizers"]["SGD"]
    for group in optimizer["param_groups"]:
        group.update({"cpu": {"fused": True, "foreach": False}, "gpu": {"fused": None, "foreach": None}}[device])
    expected = {name: state["momentum_buffer"] for name, state in optimizer["state"].items()}
    torch.save(content, path)
    phase.commit_checkpoint(step)
    described = devices.describe()
    monkeypatch.setattr(devices, "describe", lambda: described)
    monkeypatch.setattr(devices, "is_gpu", lambda: device == "gpu")  # PyTorch's fused kernel is for CPUs, too
    momentum = []

    class First(Look):
        def apply(self, event, state, logger):
            (optimizer,) = state.optimizers
            momentum.append({id(weight): value["momentum_buffer"].clone() for weight, value in optimizer.state.items()})
            assert all(group["fused"] == (device == "gpu") for group in optimizer.param_groups)
            self.names = {name: id(weight) for name, weight in state.model.named_parameters()}

    first = First()
    train(arguments[0], [first], ["precision=fp32"])
    assert len(momentum) == 5
    assert all(torch.equal(momentum[0][first.names[name]], value) for name, value in expected.items())
    assert any(bool(value.any()) for value in expected.values())


@pytest.mark.integration
def test_evaluation_is_not_compiled(train, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(trainer, "_compile_config", lambda: {"backend": backend})
    train(trainer.Schedule(0, 4, 0.1), overrides=["compile=true", "intervals.evaluate=2"])
    assert len(graphs) == 1, "of the training batches"
