import pytest
import torch
from composer import Time
from composer.optim import MultiStepScheduler
from helpers import Spy
from torch.optim.lr_scheduler import MultiStepLR
from torch.utils.data import DataLoader

from lth_diet.algorithms import ApplyMask, Rewind
from lth_diet.networks.classifier import build_classifier

LR = {"before_forward": lambda state: (int(state.timestamp.batch), state.optimizers[0].param_groups[0]["lr"])}


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.module.state_dict().items()}


def equal(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_parameters_and_batchnorm_statistics_are_saved_at_the_step(trainer):
    spy = Spy(batch_end=lambda state: state_of(state.model))
    rewind = Rewind("3ba")
    trainer([rewind], callbacks=[spy]).fit()
    assert equal(rewind.state, spy.seen["batch_end"][2])
    assert not torch.equal(rewind.state["bn1.running_mean"], torch.zeros(2))


def test_later_run_starts_from_the_saved_state_with_empty_momentum(trainer):
    rewind = Rewind(3)
    trainer([rewind]).fit()
    spy = Spy(before_forward=lambda state: (state_of(state.model), len(state.optimizers[0].state)))
    trainer([rewind], callbacks=[spy]).fit()
    first, momenta = spy.seen["before_forward"][0]
    assert equal(first, rewind.state)
    assert momenta == 0
    assert len(spy.seen["before_forward"]) == 3


def test_rewinding_to_step_0_saves_the_initialization(trainer):
    rewind, model = Rewind(0), build_classifier(8, 10, width=2, seed=1)
    before = state_of(model)
    trainer([rewind], model=model).fit()
    assert equal(rewind.state, before)
    assert not equal(state_of(model), before)


@pytest.mark.parametrize("order", [1, -1])
def test_masked_rewound_run_starts_bit_identically_at_mask_times_state(trainer, half, order):
    rewind = Rewind(3)
    trainer([rewind]).fit()
    spy = Spy(before_forward=lambda state: state_of(state.model))
    trainer([rewind, ApplyMask(half)][::order], callbacks=[spy]).fit()
    expected = {name: tensor * half.get(name, 1) for name, tensor in rewind.state.items()}
    assert equal(spy.seen["before_forward"][0], expected)


def test_timestamp_and_schedule_start_at_the_step_with_absolute_milestones(trainer):
    spies = [Spy(**LR), Spy(**LR)]
    rewind = Rewind(3)
    for spy in spies:
        trainer([rewind], steps=8, callbacks=[spy], scheduler=lambda o: MultiStepLR(o, [2, 5], 0.1)).fit()
    expected = [(step, 0.1 * 0.1 ** ((step >= 2) + (step >= 5))) for step in range(8)]
    assert spies[0].seen["before_forward"] == [(step, pytest.approx(lr)) for step, lr in expected]
    assert spies[1].seen["before_forward"] == [(step, pytest.approx(lr)) for step, lr in expected[3:]]


def test_composer_schedulers_start_at_the_step(trainer):
    spy = Spy(**LR)
    rewind = Rewind(3, state_of(build_classifier(8, 10, width=2, seed=1)))
    trainer([rewind], steps=8, callbacks=[spy], scheduler=lambda _: MultiStepScheduler(["2ba", "5ba"], 0.1)).fit()
    # batch 6 instead of 5: Composer's schedulers lag one batch behind the timestamp
    expected = [(3, 0.01), (4, 0.01), (5, 0.01), (6, 0.001), (7, 0.001)]
    assert spy.seen["before_forward"] == [(step, pytest.approx(lr)) for step, lr in expected]


def test_schedulers_stepped_every_epoch_advance_by_epochs(trainer):
    spy = Spy(**LR)
    rewind = Rewind(8, state_of(build_classifier(8, 10, width=2, seed=1)), step_schedulers_every_batch=False)
    trainer(
        [rewind],
        steps=14,
        callbacks=[spy],
        scheduler=lambda o: MultiStepLR(o, [1, 2]),
        step_schedulers_every_batch=False,
    ).fit()
    assert [lr for _, lr in spy.seen["before_forward"]] == pytest.approx([0.01] * 4 + [0.001] * 2)


def test_timestamp_has_the_epoch_and_sample_of_the_step(trainer):
    spy = Spy(before_dataloader=lambda state: state.timestamp)
    rewind = Rewind("8ba", state_of(build_classifier(8, 10, width=2)))
    trainer([rewind], steps=10, callbacks=[spy]).fit()
    first = spy.seen["before_dataloader"][0]
    assert (first.batch, first.epoch, first.batch_in_epoch) == (Time(8, "ba"), Time(1, "ep"), Time(2, "ba"))
    assert (int(first.sample), int(first.sample_in_epoch)) == (64, 16)


def test_run_resumed_from_a_checkpoint_is_not_rewound(trainer, place):
    state = state_of(build_classifier(8, 10, width=2, seed=5))
    uninterrupted, interrupted, resumed = (build_classifier(8, 10, width=2, seed=1) for _ in range(3))
    trainer([Rewind(2, state)], model=uninterrupted).fit()
    trainer(
        [Rewind(2, state)], model=interrupted, save_folder="saved", save_interval="4ba", save_filename="{batch}.pt"
    ).fit()
    spy = Spy(before_forward=lambda state: int(state.timestamp.batch))
    trainer([Rewind(2, state)], model=resumed, load_path="saved/4.pt", callbacks=[spy]).fit()
    assert spy.seen["before_forward"] == [4, 5]
    assert equal(state_of(resumed), state_of(uninterrupted))


def test_saved_state_is_part_of_a_checkpoint(trainer, place):
    first, second = Rewind(2), Rewind(2)
    trainer([first], save_folder="saved", save_interval="4ba", save_filename="{batch}.pt").fit()
    trainer([second], load_path="saved/4.pt").fit()
    assert equal(first.state, second.state)


@pytest.mark.parametrize("to", ["2ep", -1, "soon"])
def test_time_other_than_a_number_of_batches_raises(to):
    with pytest.raises(ValueError):
        Rewind(to)


def test_rewind_works_with_a_shuffling_dataloader(trainer, examples):
    rewind = Rewind(2)
    for _ in range(2):
        fit = trainer([rewind], loader=DataLoader(examples, batch_size=16, shuffle=True), steps=5)
        fit.fit()
    assert int(fit.state.timestamp.batch) == 5
