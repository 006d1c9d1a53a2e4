import copy

import pytest
import torch
from composer import Time
from composer.models import ComposerClassifier
from composer.optim import MultiStepScheduler
from helpers import Spy, warnings_of
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, MultiStepLR
from torch.utils.data import DataLoader, IterableDataset

from lth_diet.algorithms import ApplyMask, Rewind, SubsetSampling
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


@pytest.mark.parametrize("to", [-1, "-1ep", "soon", "400", "8sp", "0.5dur", 2.5, None])
def test_time_other_than_a_number_of_batches_or_epochs_raises(to):
    with pytest.raises(ValueError, match=f"to={to!r}; expected a number of batches"):
        Rewind(to)


class Backbone(nn.Module):
    """A network whose attribute `module` is one of its parts."""

    def __init__(self):
        super().__init__()
        self.module, self.head = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), nn.Linear(4, 10)

    def forward(self, images):
        return self.head(self.module(images))


class TwoParts(ComposerClassifier):
    """A ComposerModel with parameters outside its attribute `module`."""

    def __init__(self):
        super().__init__(Backbone().module, num_classes=10)
        self.head = nn.Linear(4, 10)

    def forward(self, batch):
        return self.head(super().forward(batch))


def weighted_classifier():
    return ComposerClassifier(Backbone(), num_classes=10, loss_fn=nn.CrossEntropyLoss(torch.ones(10)))


MODELS = {
    "a network with an attribute module": lambda: ComposerClassifier(Backbone(), num_classes=10),
    "a ComposerModel with two parts": TwoParts,
    "torch.compile": lambda: ComposerClassifier(torch.compile(Backbone(), backend="eager"), num_classes=10),
    "DataParallel": lambda: ComposerClassifier(nn.DataParallel(Backbone()), num_classes=10),
    "a loss with a buffer": weighted_classifier,
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_of_any_model_is_rewound_by_its_name_in_the_network(trainer, kind):
    model = MODELS[kind]()
    initial = copy.deepcopy(model.state_dict())
    rewind = Rewind(0, state_of_network(model))
    assert sorted(rewind.state) == ["head.bias", "head.weight", "module.1.bias", "module.1.weight"]
    trainer([rewind], model=model).fit()
    assert not any(torch.equal(initial[name], p) for name, p in model.named_parameters())
    spy = Spy(before_forward=lambda state: copy.deepcopy(state.model.state_dict()))
    trainer([rewind], model=model, steps=1, callbacks=[spy]).fit()
    assert equal(spy.seen["before_forward"][0], initial)


def state_of_network(model):
    """State of the Backbone in a model, with its own names."""
    names = {".".join(name.split(".")[-2 if "head" in name else -3 :]): name for name in dict(model.named_parameters())}
    return {bare: model.state_dict()[name] for bare, name in names.items()}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_names_of_a_given_state_may_have_prefixes_of_wrappers(trainer, prefix):
    state, spy = state_of(build_classifier(8, 10, width=2, seed=2)), Spy(before_forward=lambda s: state_of(s.model))
    rewind = Rewind(0, {f"{prefix}{name}": tensor for name, tensor in state.items()})
    trainer([rewind], steps=1, callbacks=[spy]).fit()
    assert equal(spy.seen["before_forward"][0], state)


def test_given_state_is_copied(trainer):
    model = build_classifier(8, 10, width=2, seed=1)
    before, rewind = state_of(model), Rewind(2, model.module.state_dict())
    trainer([rewind], model=model).fit()
    assert not equal(state_of(model), before)
    assert equal(rewind.state, before)


@pytest.mark.parametrize(
    ("to", "duration", "sentence"),
    [
        ("7ba", "6ba", "Rewind saves no state: training ends at 6ba, before to=7ba"),
        ("7ba", "1ep", "Rewind saves no state: training ended at batch 6, before to=7ba"),
        ("2ep", "8ba", "Rewind saves no state: training ended at batch 8, before to=2ep"),
        ("2ep", "1ep", "Rewind saves no state: training ends at 1ep, before to=2ep"),
        ("6ba", "6ba", None),
        ("1ep", "6ba", None),
    ],
)
def test_first_run_that_ends_before_the_step_warns_and_later_runs_do_not_start(trainer, to, duration, sentence):
    rewind = Rewind(to)
    assert warnings_of(trainer([rewind]), "Rewind", duration=duration) == [sentence] * (sentence is not None)
    if sentence is not None:
        with pytest.raises(ValueError, match="nothing to rewind to: the first training ended at batch"):
            trainer([rewind]).fit()


def test_first_run_may_reach_the_step_in_several_fits(trainer):
    rewind, spy = Rewind(5), Spy(batch_end=lambda state: state_of(state.model))
    fit = trainer([rewind], callbacks=[spy])
    for _ in range(3):
        fit.fit(duration="2ba")
    assert equal(rewind.state, spy.seen["batch_end"][4])
    trainer([rewind]).fit()


@pytest.mark.parametrize(("to", "steps"), [(15, 10), (10, 10), ("2ep", 12)])
def test_step_that_leaves_nothing_to_train_raises_and_changes_nothing(trainer, to, steps):
    model = build_classifier(8, 10, width=2, seed=1)
    before = state_of(model)
    with pytest.raises(ValueError, match="nothing is left to train: Rewind starts at to="):
        trainer([Rewind(to, state_of(build_classifier(8, 10, width=2, seed=2)))], model=model, steps=steps).fit()
    assert equal(state_of(model), before)


class Stream(IterableDataset):
    """A data set whose loader has no length."""

    def __init__(self, examples):
        self.examples = examples

    def __iter__(self):
        return iter(self.examples)


CLOCK = ("batch", "epoch", "epoch_in_iteration", "batch_in_epoch", "sample", "sample_in_epoch")


def clock_of(state):
    return [int(getattr(state.timestamp, name)) for name in CLOCK]


@pytest.mark.parametrize("to", [2, "1ep"])
@pytest.mark.parametrize("sized", [True, False])
def test_later_run_continues_at_the_clock_of_the_first(trainer, examples, to, sized):
    def loader():  # 48 examples in batches of 32 and 16
        return DataLoader(examples if sized else Stream(examples), batch_size=32)

    rewind, state = (
        Rewind(to),
        {"fit_start": clock_of, "batch_start": lambda state: (clock_of(state), state.batch[1].tolist())},
    )
    first, second = Spy(**state), Spy(**state)
    for spy in (first, second):
        trainer([rewind], loader=loader(), steps=5, callbacks=[spy]).fit()
    assert second.seen["batch_start"][0][1] == first.seen["batch_start"][2][1]
    if to == 2 and not sized:  # the epoch is not known until the loader ends
        assert second.seen["fit_start"] == [[2, 0, 0, 2, 48, 64]]
    else:
        assert second.seen["fit_start"] == [[2, 1, 1, 0, 48, 0]]
        assert second.seen["batch_start"] == first.seen["batch_start"][2:]


def test_given_state_at_an_epoch_needs_a_loader_with_a_length(trainer, examples):
    state = state_of(build_classifier(8, 10, width=2, seed=1))
    spy = Spy(before_forward=clock_of)
    trainer([Rewind("1ep", state)], steps=8, callbacks=[spy]).fit()
    assert spy.seen["before_forward"][0] == [6, 1, 1, 0, 48, 0]
    with pytest.raises(ValueError, match="the loader has no length, so Rewind needs batches; got to=1ep"):
        trainer([Rewind("1ep", state)], loader=DataLoader(Stream(examples), batch_size=8), steps=8).fit()


@pytest.mark.parametrize("duration", ["1000tok", "100sp"])
def test_duration_in_a_unit_that_cannot_be_rewound_raises(trainer, examples, duration):
    batches = list(DataLoader(examples, batch_size=8))
    fit = trainer(
        [Rewind(2, state_of(build_classifier(8, 10, width=2)))], loader=batches, device_train_microbatch_size=8
    )
    with pytest.raises(ValueError, match=f"cannot set the clock to to=2ba in the unit of {duration}"):
        fit.fit(duration=duration)


@pytest.mark.parametrize(("rewound", "trained"), [(True, False), (False, True)])
def test_schedulers_stepped_at_other_times_by_the_trainer_raise_after_a_batch(trainer, rewound, trained):
    state = state_of(build_classifier(8, 10, width=2))
    for given in (None, state):
        spy = Spy(batch_start=lambda state: None)
        fit = trainer(
            [Rewind(2, given, step_schedulers_every_batch=rewound)],
            callbacks=[spy],
            scheduler=lambda o: MultiStepLR(o, [3]),
            step_schedulers_every_batch=trained,
        )
        times = {True: "every batch", False: "every epoch"}
        expected = f"expects schedulers that step {times[rewound]}, but the Trainer steps them {times[trained]}"
        with pytest.raises(ValueError, match=expected):
            fit.fit()
        assert len(spy.seen["batch_start"]) == 1


def test_used_optimizer_or_scheduler_warns(trainer):
    state = state_of(build_classifier(8, 10, width=2))

    def fit(use):
        built = trainer([Rewind(2, state)], scheduler=lambda o: ConstantLR(o))
        use(built.state)
        return warnings_of(built, "Rewind")

    assert fit(lambda state: None) == []
    parameter = "momentum_buffer"
    for use in (
        lambda state: (
            state.optimizers[0].state[state.optimizers[0].param_groups[0]["params"][0]].update({parameter: None})
        ),
        lambda state: state.schedulers[0].step(),
    ):
        (warning,) = fit(use)
        assert "give each Trainer a new optimizer and scheduler" in warning


def test_run_that_resumes_after_the_step_without_a_state_raises(trainer, place):
    trainer([], save_folder="saved", save_interval="1ba", save_filename="{batch}.pt").fit()
    rewind = Rewind(3)
    fit = trainer([rewind], load_path="saved/3.pt")
    at_step = state_of(fit.state.model)
    fit.fit()
    assert equal(rewind.state, at_step)
    with pytest.raises(ValueError, match="training resumes at batch 4, after to=3ba, but the checkpoint has no state"):
        trainer([Rewind(3)], load_path="saved/4.pt").fit()


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (lambda state: Rewind(3, state), "Rewind has to=3ba; the checkpoint was saved with 2ba"),
        (lambda state: Rewind(2, {**state, "fc.bias": state["fc.bias"] + 1}), "another state than the training"),
        (lambda state: Rewind(2, {"fc.bias": state["fc.bias"]}), "another state than the training"),
        (lambda state: Rewind(2, state), None),
    ],
)
def test_resuming_with_another_step_or_state_raises(trainer, place, other, sentence):
    first = Rewind(2)
    trainer([first], steps=3, save_folder="saved", save_filename="{batch}.pt").fit()
    if sentence is None:
        trainer([other(first.state)], load_path="saved/3.pt").fit()
    else:
        with pytest.raises(ValueError, match=sentence):
            trainer([other(first.state)], load_path="saved/3.pt")


def test_epoch_of_a_resumed_first_run_keeps_its_batch(trainer, examples, place):
    loader = DataLoader(Stream(examples), batch_size=16)
    trainer([Rewind("1ep")], loader=loader, steps=5, save_folder="saved", save_filename="{batch}.pt").fit()
    resumed, spy = Rewind("1ep"), Spy(before_forward=clock_of)
    trainer([resumed], loader=loader, steps=6, load_path="saved/5.pt").fit()
    trainer([resumed], loader=loader, steps=6, callbacks=[spy]).fit()
    assert spy.seen["before_forward"][0][:2] == [3, 1]


def test_state_of_an_older_checkpoint_loads():
    rewind, state = Rewind(3), {"weight": torch.ones(2)}
    rewind.load_state_dict({"state": state})
    assert equal(rewind.state, state)


def test_subset_sampling_before_rewind_raises_unless_it_has_ended(trainer):
    rewind = Rewind(2, state_of(build_classifier(8, 10, width=2, seed=1)))
    with pytest.raises(ValueError, match="SubsetSampling starts before Rewind has set the clock; list Rewind first"):
        trainer([SubsetSampling(range(16), 2), rewind]).fit()
    spy = Spy(batch_start=lambda state: (clock_of(state)[0], int(state.dataloader_len)))
    trainer([rewind, SubsetSampling(range(16), 4)], callbacks=[spy]).fit()
    assert spy.seen["batch_start"] == [(2, 2), (3, 2), (4, 6), (5, 6)]


def test_rewinding_into_an_epoch_of_all_examples_ends_the_subset(trainer):
    spy = Spy(batch_start=lambda state: (clock_of(state)[:2], int(state.dataloader_len)))
    rewind = Rewind(5, state_of(build_classifier(8, 10, width=2, seed=1)))
    trainer([rewind, SubsetSampling(range(16), 5)], steps=7, callbacks=[spy]).fit()
    assert spy.seen["batch_start"] == [([5, 0], 6), ([6, 1], 6)]


def test_rewind_works_with_a_shuffling_dataloader(trainer, examples):
    rewind = Rewind(2)
    for _ in range(2):
        fit = trainer([rewind], loader=DataLoader(examples, batch_size=16, shuffle=True), steps=5)
        fit.fit()
    assert int(fit.state.timestamp.batch) == 5
