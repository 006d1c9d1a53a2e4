import pytest
import torch
from composer import Algorithm, Evaluator, Event
from composer.algorithms import EMA, GradientClipping, LabelSmoothing
from helpers import Spy
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


def test_empty_mask_changes_nothing(trainer):
    fit = trainer([ApplyMask({})])
    fit.fit()
    assert not bool((fit.state.model.module.conv1.weight == 0).any())


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
