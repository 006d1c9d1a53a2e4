import pytest
import torch
from composer import Algorithm, Callback, Evaluator, Event
from composer.algorithms import EMA, GradientClipping, LabelSmoothing
from composer.models import ComposerClassifier
from helpers import Spy
from torch import nn
from torch.utils.data import DataLoader

from lth_diet.algorithms import ApplyMask
from lth_diet.networks.classifier import build_classifier


def pruned_weights_are_zero(mask, network):
    weights = dict(network.named_parameters())
    return all(bool((weights[name][~remains] == 0).all()) for name, remains in mask.items())


def check_weights(mask):
    return lambda state: pruned_weights_are_zero(mask, state.model.module)


def gradient_norm(state):
    return float(torch.cat([p.grad.flatten() for p in state.model.parameters() if p.grad is not None]).norm())


def test_pruned_weights_are_zero_in_every_forward_pass_and_evaluation_and_others_train(trainer, half, examples):
    look = check_weights(half)
    spy = Spy(before_forward=look, eval_before_forward=look, batch_checkpoint=look)
    evaluator = Evaluator(label="test", dataloader=DataLoader(examples, batch_size=16), eval_interval="2ba")
    fit = trainer([ApplyMask(half)], callbacks=[spy], eval_dataloader=evaluator)
    before = {name: p.detach().clone() for name, p in fit.state.model.module.named_parameters()}
    fit.fit()
    assert spy.seen == {"before_forward": [True] * 6, "eval_before_forward": [True] * 9, "batch_checkpoint": [True] * 6}
    after = dict(fit.state.model.module.named_parameters())
    assert all(bool((after[name][remains] != before[name][remains]).any()) for name, remains in half.items())


def test_momentum_of_pruned_weights_stays_zero(trainer, half):
    fit = trainer([ApplyMask(half)])
    fit.fit()
    names = {parameter: name for name, parameter in fit.state.model.module.named_parameters()}
    for parameter, slot in fit.state.optimizers[0].state.items():
        remains = half.get(names[parameter])
        if remains is not None:
            assert bool((slot["momentum_buffer"][~remains] == 0).all())
            assert bool((slot["momentum_buffer"][remains] != 0).any())


def test_pruned_weights_are_zero_in_checkpoints(trainer, half, place):
    trainer([ApplyMask(half)], save_folder="saved", save_interval="3ba", save_filename="ba{batch}.pt").fit()
    saved = torch.load("saved/ba3.pt", weights_only=False)["state"]["model"]
    for name, remains in half.items():
        assert bool((saved[f"module.{name}"][~remains] == 0).all())


def test_evaluation_without_training_is_masked(trainer, half, examples):
    model = build_classifier(8, 10, width=2, seed=1)
    trainer([ApplyMask(half)], model=model).eval(DataLoader(examples, batch_size=16))
    assert pruned_weights_are_zero(half, model.module)


def test_parameters_without_a_mask_are_not_changed(trainer, half):
    fit = trainer([ApplyMask({"fc.weight": half["fc.weight"]})])
    fit.fit()
    weights = dict(fit.state.model.module.named_parameters())
    assert not bool((weights["conv1.weight"] == 0).any())


@pytest.mark.parametrize("order", [1, -1])
def test_averages_of_pruned_weights_are_zero_with_ema(trainer, half, examples, order):
    spy = Spy(eval_before_forward=check_weights(half))
    evaluator = Evaluator(label="test", dataloader=DataLoader(examples, batch_size=48), eval_interval="1ba")
    algorithms = [ApplyMask(half), EMA(half_life="2ba", update_interval="1ba")][::order]
    fit = trainer(algorithms, callbacks=[spy], eval_dataloader=evaluator)
    fit.fit()
    assert spy.seen["eval_before_forward"] == [True] * 6
    ema = next(algorithm for algorithm in algorithms if isinstance(algorithm, EMA))
    averages = ema.ema_model.named_parameters_dict
    assert all(bool((averages[f"module.{name}"][~remains] == 0).all()) for name, remains in half.items())


@pytest.mark.parametrize("order", [1, -1])
def test_gradient_clipping_sees_masked_gradients(trainer, half, order):
    spy = Spy(after_backward=gradient_norm, batch_end=gradient_norm)
    threshold = 1e-3  # below every norm, so the norm is the threshold unless gradients are masked after clipping
    algorithms = [ApplyMask(half), GradientClipping("norm", threshold)][::order]
    fit = trainer(algorithms, callbacks=[spy])
    fit.fit()
    assert all(norm > threshold for norm in spy.seen["after_backward"])
    assert spy.seen["batch_end"] == pytest.approx([threshold] * 6, rel=1e-2)


def test_label_smoothing_changes_training_and_keeps_pruned_weights_zero(trainer, half):
    models = [build_classifier(8, 10, width=2, seed=1) for _ in range(2)]
    trainer([ApplyMask(half)], model=models[0]).fit()
    trainer([ApplyMask(half), LabelSmoothing(0.1)], model=models[1]).fit()
    assert pruned_weights_are_zero(half, models[1].module)
    assert not torch.equal(models[0].module.fc.weight, models[1].module.fc.weight)


def test_mask_of_another_model_raises_with_the_name_of_the_tensor(trainer, half):
    with pytest.raises(ValueError, match="the mask has fc2.weight, which is not in the model"):
        trainer([ApplyMask({"fc2.weight": torch.ones(2)})]).fit()
    with pytest.raises(ValueError, match=r"the mask of fc.weight has shape \(2,\); expected \(10, 8\)"):
        trainer([ApplyMask({"fc.weight": torch.ones(2)})]).fit()
    with pytest.raises(ValueError, match="several ApplyMask; use one, with the masks of all parameters"):
        trainer([ApplyMask(half), ApplyMask(half)]).fit()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({}, "the mask is empty"),
        ({"a": torch.zeros(2), "b": torch.zeros(0)}, "the mask keeps no weight"),
        ({"a": torch.tensor([0.5, 1])}, "the mask of a has values other than 0 and 1"),
        ({"a": torch.tensor([torch.nan, 1])}, "the mask of a has values other than 0 and 1"),
        ({"a": "11"}, "the mask of a is a str; expected a tensor or array"),
        ([torch.ones(2)], "a mask maps names of parameters to tensors; got a list"),
        ("mask.safetensors", "a mask maps names of parameters to tensors; got a str"),
    ],
)
def test_what_is_no_mask_raises_with_one_sentence(mask, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ApplyMask(mask)
    with pytest.raises((ValueError, TypeError), match=message):
        ApplyMask({"a": torch.ones(2)}).mask = mask


def test_a_layer_without_weights_is_named_in_a_warning(trainer, half):
    with pytest.warns(UserWarning, match=r"^the mask prunes every weight of fc\.weight$"):
        trainer([ApplyMask({**half, "fc.weight": torch.zeros(10, 8)})]).fit()


def test_masks_may_be_arrays_and_are_copied(trainer, half):
    arrays = {name: mask.numpy().astype("uint8") for name, mask in half.items()}
    fit = trainer([ApplyMask(arrays)])
    for array in arrays.values():
        array[:] = 1
    fit.fit()
    assert pruned_weights_are_zero(half, fit.state.model.module)


def test_a_mask_that_is_set_while_training_takes_effect(trainer, half, place):
    other, algorithm = {"fc.weight": ~half["fc.weight"]}, ApplyMask(half)

    class SetMask(Callback):
        def batch_end(self, state, logger):
            if state.timestamp.batch == 3:
                algorithm.mask = other

    looks = [check_weights(half), check_weights(other)]
    spy = Spy(before_forward=lambda state: [look(state) for look in looks])
    fit = trainer([algorithm], callbacks=[SetMask(), spy], save_folder="saved", save_filename="{batch}.pt")
    fit.fit()
    assert spy.seen["before_forward"] == [[True, False]] * 3 + [[True, True]] + [[False, True]] * 2
    resumed = ApplyMask()
    trainer([resumed], steps=7, load_path="saved/6.pt")
    assert resumed.mask.keys() == {"fc.weight"} and torch.equal(resumed.mask["fc.weight"], other["fc.weight"])


def test_a_run_resumed_with_the_mask_of_its_checkpoint_ends_with_the_same_bits(trainer, half, place):
    models = [build_classifier(8, 10, width=2, seed=1) for _ in range(3)]
    trainer(
        [ApplyMask(half)], model=models[0], save_folder="saved", save_interval="3ba", save_filename="{batch}.pt"
    ).fit()
    for model, algorithm in zip(models[1:], (ApplyMask(), ApplyMask(half)), strict=True):
        trainer([algorithm], model=model, load_path="saved/3.pt").fit()
        assert all(algorithm.mask[name].equal(mask) for name, mask in half.items())
        assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), model.parameters(), strict=True))


def test_a_checkpoint_with_another_mask_is_rejected_and_one_without_a_mask_loads(trainer, half, place):
    trainer([ApplyMask(half)], save_folder="saved", save_interval="3ba", save_filename="{batch}.pt").fit()
    other = {**half, "fc.weight": ~half["fc.weight"]}
    fewer = {name: mask for name, mask in half.items() if name != "fc.weight"}
    for mask in (other, fewer):
        with pytest.raises(
            ValueError, match=r"a different mask, in fc\.weight; use ApplyMask\(\) .* load_weights_only"
        ):
            trainer([ApplyMask(mask)], load_path="saved/3.pt")
    trainer([ApplyMask(other)], load_path="saved/3.pt", load_weights_only=True)
    prefixed = ApplyMask({f"module.{name}": mask for name, mask in half.items()})
    trainer([prefixed], load_path="saved/3.pt")

    saved = torch.load("saved/3.pt", weights_only=False)  # as saved before checkpoints had masks
    saved["state"]["algorithms"] = [(name, {"repr": state["repr"]}) for name, state in saved["state"]["algorithms"]]
    torch.save(saved, "old.pt")
    trainer([ApplyMask(other)], load_path="old.pt")
    with pytest.raises(ValueError, match="ApplyMask has no mask, and no checkpoint with a mask was loaded"):
        trainer([ApplyMask()], load_path="old.pt").fit()
    with pytest.raises(ValueError, match="ApplyMask has no mask"):
        trainer([ApplyMask(None)]).fit()


class Wrapping(nn.Module):
    """A network with an attribute called `module`, a compiled part and a shared weight."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(192, 12)
        self.hidden = torch.compile(nn.Linear(12, 12), backend="eager")
        self.again = nn.Linear(12, 12)
        self.again.weight = self.hidden.weight
        self.fc = nn.Linear(12, 10)

    def forward(self, x):
        return self.fc(self.again(self.hidden(self.module(x.flatten(1)).relu()).relu()))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_names_may_have_or_lack_the_prefixes_of_wrappers(trainer, prefix):
    network, random = Wrapping(), torch.Generator().manual_seed(0)
    weights = {
        "module.weight": network.module.weight,
        "again.weight": network.again.weight,
        "fc.weight": network.fc.weight,
    }
    mask = {name: torch.rand(weight.shape, generator=random) < 0.5 for name, weight in weights.items()}
    model = ComposerClassifier(network, num_classes=10)
    trainer([ApplyMask({prefix + name: each for name, each in mask.items()})], model=model).fit()
    assert all(bool((weight[~mask[name]] == 0).all()) for name, weight in weights.items())
    assert not any(bool((weight[mask[name]] == 0).any()) for name, weight in weights.items())


def test_a_weight_that_is_computed_from_others_is_rejected_and_the_others_can_be_masked(trainer, half):
    model = build_classifier(8, 10, width=2, seed=1)
    nn.utils.weight_norm(model.module.fc)
    with pytest.raises(ValueError, match=r"the mask has fc\.weight, which .* computes from module\.fc\.weight_g and"):
        trainer([ApplyMask(half)], model=model).fit()
    trainer([ApplyMask({"fc.weight_v": half["fc.weight"]})], model=model).fit()
    assert bool((model.module.fc.weight[~half["fc.weight"]] == 0).all())


def test_prediction_without_training_is_masked(trainer, half, examples):
    model = build_classifier(8, 10, width=2, seed=1)
    trainer([ApplyMask(half)], model=model).predict(DataLoader(examples, batch_size=16))
    assert pruned_weights_are_zero(half, model.module)


def test_one_instance_masks_the_models_of_several_trainers(trainer, half, examples):
    mask = ApplyMask(half)
    trainer([mask]).fit()
    second = build_classifier(8, 10, width=2, seed=3)
    trainer([mask], model=second).eval(DataLoader(examples, batch_size=16))
    assert pruned_weights_are_zero(half, second.module)


def test_pruned_weights_stay_zero_with_nonzero_initial_momentum(trainer, half):
    look = check_weights(half)
    spy = Spy(before_forward=look, batch_checkpoint=look)
    fit = trainer([ApplyMask(half)], callbacks=[spy])
    for parameter in fit.state.model.parameters():
        fit.state.optimizers[0].state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    fit.fit()
    assert spy.seen == {"before_forward": [True] * 6, "batch_checkpoint": [True] * 6}


class Disturb(Algorithm):
    """Adds 1 to every weight at the start of an epoch, like an algorithm that replaces weights."""

    def match(self, event, state):
        return event == Event.EPOCH_START

    def apply(self, event, state, logger):
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.add_(1)


def test_pruned_weights_stay_zero_with_an_algorithm_that_changes_weights_between_batches(trainer, half):
    spy = Spy(before_forward=check_weights(half))
    trainer([ApplyMask(half), Disturb()], callbacks=[spy]).fit()
    assert spy.seen["before_forward"] == [True] * 6
