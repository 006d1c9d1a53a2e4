import pytest
import torch
from composer import Algorithm, Evaluator, Event
from composer.algorithms import EMA, GradientClipping, LabelSmoothing
from helpers import Spy
from torch.utils.data import DataLoader

from lth_diet.algorithms import ApplyMask
from lth_diet.networks.classifier import build_classifier


def pruned_are_zero(mask, network):
    weights = dict(network.named_parameters())
    return all(bool((weights[name][~left] == 0).all()) for name, left in mask.items())


def looks_at_weights(mask):
    return lambda state: pruned_are_zero(mask, state.model.module)


def gradient_norm(state):
    return float(torch.cat([p.grad.flatten() for p in state.model.parameters() if p.grad is not None]).norm())


def test_masked_weights_are_zero_in_every_forward_and_evaluation_and_others_train(trainer, half, examples):
    look = looks_at_weights(half)
    spy = Spy(before_forward=look, eval_before_forward=look, batch_checkpoint=look)
    evaluator = Evaluator(label="test", dataloader=DataLoader(examples, batch_size=16), eval_interval="2ba")
    fit = trainer([ApplyMask(half)], callbacks=[spy], eval_dataloader=evaluator)
    before = {name: p.detach().clone() for name, p in fit.state.model.module.named_parameters()}
    fit.fit()
    assert spy.seen == {"before_forward": [True] * 6, "eval_before_forward": [True] * 9, "batch_checkpoint": [True] * 6}
    after = dict(fit.state.model.module.named_parameters())
    assert all(bool((after[name][left] != before[name][left]).any()) for name, left in half.items())


def test_momentum_of_masked_weights_stays_zero(trainer, half):
    fit = trainer([ApplyMask(half)])
    fit.fit()
    names = {parameter: name for name, parameter in fit.state.model.module.named_parameters()}
    for parameter, slot in fit.state.optimizers[0].state.items():
        left = half.get(names[parameter])
        if left is not None:
            assert bool((slot["momentum_buffer"][~left] == 0).all())
            assert bool((slot["momentum_buffer"][left] != 0).any())


def test_a_checkpoint_holds_zeros(trainer, half, place):
    trainer([ApplyMask(half)], save_folder="saved", save_interval="3ba", save_filename="ba{batch}.pt").fit()
    saved = torch.load("saved/ba3.pt", weights_only=False)["state"]["model"]
    for name, left in half.items():
        assert bool((saved[f"module.{name}"][~left] == 0).all())


def test_evaluation_without_training_is_masked_too(trainer, half, examples):
    model = build_classifier(8, 10, width=2, seed=1)
    trainer([ApplyMask(half)], model=model).eval(DataLoader(examples, batch_size=16))
    assert pruned_are_zero(half, model.module)


def test_weights_that_the_mask_does_not_name_are_left_alone(trainer, half):
    fit = trainer([ApplyMask({"fc.weight": half["fc.weight"]})])
    fit.fit()
    weights = dict(fit.state.model.module.named_parameters())
    assert not bool((weights["conv1.weight"] == 0).any())


@pytest.mark.parametrize("order", [1, -1])
def test_zeros_under_the_weights_of_ema(trainer, half, examples, order):
    spy = Spy(eval_before_forward=looks_at_weights(half))
    evaluator = Evaluator(label="test", dataloader=DataLoader(examples, batch_size=48), eval_interval="1ba")
    algorithms = [ApplyMask(half), EMA(half_life="2ba", update_interval="1ba")][::order]
    fit = trainer(algorithms, callbacks=[spy], eval_dataloader=evaluator)
    fit.fit()
    assert spy.seen["eval_before_forward"] == [True] * 6
    ema = next(algorithm for algorithm in algorithms if isinstance(algorithm, EMA))
    averages = ema.ema_model.named_parameters_dict
    assert all(bool((averages[f"module.{name}"][~left] == 0).all()) for name, left in half.items())


@pytest.mark.parametrize("order", [1, -1])
def test_clipping_sees_masked_gradients(trainer, half, order):
    spy = Spy(after_backward=gradient_norm, batch_end=gradient_norm)
    threshold = 1e-3  # below every norm: clipped gradients have exactly this norm, if nothing was masked after
    algorithms = [ApplyMask(half), GradientClipping("norm", threshold)][::order]
    fit = trainer(algorithms, callbacks=[spy])
    fit.fit()
    assert all(norm > threshold for norm in spy.seen["after_backward"])
    assert spy.seen["batch_end"] == pytest.approx([threshold] * 6, rel=1e-2)


def test_label_smoothing_changes_the_training_and_not_the_zeros(trainer, half):
    models = [build_classifier(8, 10, width=2, seed=1) for _ in range(2)]
    trainer([ApplyMask(half)], model=models[0]).fit()
    trainer([ApplyMask(half), LabelSmoothing(0.1)], model=models[1]).fit()
    assert pruned_are_zero(half, models[1].module)
    assert not torch.equal(models[0].module.fc.weight, models[1].module.fc.weight)


def test_a_mask_of_another_model_is_refused_with_the_tensor_named(trainer, half):
    with pytest.raises(ValueError, match="the mask has fc2.weight, which the model lacks"):
        trainer([ApplyMask({"fc2.weight": torch.ones(2)})]).fit()
    with pytest.raises(ValueError, match=r"the mask of fc.weight has the shape \(2,\), the parameter \(10, 8\)"):
        trainer([ApplyMask({"fc.weight": torch.ones(2)})]).fit()


def test_predictions_without_training_are_masked_too(trainer, half, examples):
    model = build_classifier(8, 10, width=2, seed=1)
    trainer([ApplyMask(half)], model=model).predict(DataLoader(examples, batch_size=16))
    assert pruned_are_zero(half, model.module)


def test_one_instance_masks_the_model_of_each_trainer(trainer, half, examples):
    mask = ApplyMask(half)
    trainer([mask]).fit()
    second = build_classifier(8, 10, width=2, seed=3)
    trainer([mask], model=second).eval(DataLoader(examples, batch_size=16))
    assert pruned_are_zero(half, second.module)


def test_an_empty_mask_masks_nothing(trainer):
    fit = trainer([ApplyMask({})])
    fit.fit()
    assert not bool((fit.state.model.module.conv1.weight == 0).any())


def test_zeros_hold_against_an_optimizer_with_momentum_from_elsewhere(trainer, half):
    look = looks_at_weights(half)
    spy = Spy(before_forward=look, batch_checkpoint=look)
    fit = trainer([ApplyMask(half)], callbacks=[spy])
    for parameter in fit.state.model.parameters():
        fit.state.optimizers[0].state[parameter]["momentum_buffer"] = torch.ones_like(parameter)
    fit.fit()
    assert spy.seen == {"before_forward": [True] * 6, "batch_checkpoint": [True] * 6}


class Disturb(Algorithm):
    """Adds to every weight when an epoch starts, as an algorithm that swaps weights might."""

    def match(self, event, state):
        return event == Event.EPOCH_START

    def apply(self, event, state, logger):
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.add_(1)


def test_zeros_hold_against_an_algorithm_that_changes_weights_between_batches(trainer, half):
    spy = Spy(before_forward=looks_at_weights(half))
    trainer([ApplyMask(half), Disturb()], callbacks=[spy]).fit()
    assert spy.seen["before_forward"] == [True] * 6
