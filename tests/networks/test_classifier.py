import numpy as np
import pytest
import torch
from composer import Trainer
from composer.models import ComposerClassifier
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.data import DataLoader, TensorDataset

from lth_diet.networks.classifier import StackedClassifier, build_classifier, initialize, stack_classifiers

LAYERS = {
    "Conv1d": lambda: nn.Conv1d(2, 3, 3),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(2, 3, 3),
    "BatchNorm1d": lambda: nn.BatchNorm1d(3),
    "BatchNorm without parameters": lambda: nn.BatchNorm3d(3, affine=False),
    "LayerNorm": lambda: nn.LayerNorm(3),
    "GroupNorm": lambda: nn.GroupNorm(1, 3),
    "Embedding": lambda: nn.Embedding(4, 3),
    "LSTM": lambda: nn.LSTM(3, 2, num_layers=2),
    "Transformer": lambda: nn.Transformer(4, 2, 1, 1, 8),
    "MultiheadAttention": lambda: nn.MultiheadAttention(4, 2, add_bias_kv=True),
    "PReLU": nn.PReLU,
}


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(3))


class SeededScale(Scale):
    def reset_parameters(self):
        nn.init.uniform_(self.scale)


def randomized(make):
    """A network whose parameters, including those that start as constants, depend on PyTorch's generator."""
    network = nn.Sequential(make(), nn.Linear(2, 2))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    return network


@pytest.mark.parametrize("make", [*LAYERS.values(), SeededScale], ids=[*LAYERS, "with reset_parameters"])
def test_all_parameters_depend_on_the_seed_only(make):
    states = []
    for seed, global_seed in ((1, 0), (1, 1), (2, 0)):
        torch.manual_seed(global_seed)
        network = randomized(make)
        before = torch.get_rng_state()
        initialize(network, seed)
        assert torch.equal(before, torch.get_rng_state())
        assert all(bool(parameter.isfinite().all()) for parameter in network.parameters())
        states.append(network.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["1.weight"], states[2]["1.weight"])


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Scale(), r"does not seed 1\.scale of Scale; give Scale a method reset_parameters"),
        (nn.LazyLinear(2), r"1\.weight, which has no shape yet"),
        (nn.Linear(2, 2, device="meta"), r"1\.weight, a torch\.float32 tensor on meta"),
        (nn.utils.weight_norm(nn.Linear(2, 2)), r"1\.weight, which is computed from 1\.weight_g and 1\.weight_v"),
        (nn.utils.spectral_norm(nn.Linear(2, 2)), r"1\.weight, which is computed from 1\.weight_orig"),
        (prune.identity(nn.Linear(2, 2), "weight"), r"1\.weight, which is computed from 1\.weight_orig"),
        (parametrizations.weight_norm(nn.LSTM(2, 2), "weight_hh_l0"), r"1\.weight_hh_l0, which is computed from"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_parameter_that_cannot_be_seeded_is_named_and_the_network_unchanged(layer, message):
    first = nn.BatchNorm1d(2)
    before = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        initialize(nn.Sequential(first, layer), seed=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in first.state_dict().items())


def test_numbers_of_other_generators_are_not_seeded_and_rejected():
    class Drawn(Scale):
        def reset_parameters(self):
            self.scale.data.fill_(np.random.random())

    with pytest.raises(ValueError, match="initialize does not seed the random numbers of Python, NumPy and torch.Gen"):
        initialize(nn.Sequential(nn.Linear(2, 2), Drawn()), seed=1)


def classifiers(count=3):
    return [build_classifier(8, 5, width=4, seed=seed) for seed in range(count)]


def batches(count, size=6):
    """Batches of a stack, and of each of its networks."""
    stacked = [(torch.randn(size, count * 3, 8, 8), torch.randint(5, (size, count))) for _ in range(2)]
    return stacked, [[(x.chunk(count, 1)[r], y[:, r]) for x, y in stacked] for r in range(count)]


def fit(model, batches):
    dataset = TensorDataset(*(torch.cat(tensors) for tensors in zip(*batches, strict=True)))
    loader = DataLoader(dataset, batch_size=len(batches[0][0]))
    trainer = Trainer(
        model=model,
        train_dataloader=loader,
        eval_dataloader=loader,
        max_duration="1ep",
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        progress_bar=False,
        device="cpu",
    )
    trainer.fit()
    return {name: float(metric.compute()) for name, metric in trainer.state.eval_metrics["eval"].items()}


def test_composer_trains_and_evaluates_a_stack_as_its_classifiers():
    separate = classifiers()
    stacked = stack_classifiers(separate, (3, 8, 8))
    assert isinstance(stacked, StackedClassifier) and stacked.get_metrics(is_train=True) == {}
    together, parts = batches(3)
    metrics = fit(stacked, together)
    assert len(metrics) == 6
    for r, (each, part) in enumerate(zip(separate, parts, strict=True)):
        for name, value in fit(each, part).items():
            assert metrics[f"{name}_{r}"] == pytest.approx(value, abs=1e-5)


def test_loss_of_a_stack_is_the_sum_of_the_mean_losses():
    separate = classifiers()
    stacked = stack_classifiers(separate, (3, 8, 8))
    (batch, _), parts = batches(3)
    logits = stacked(batch)
    assert logits.shape == (6, 3, 5) and stacked.losses is None
    loss = stacked.loss(logits, batch)
    expected = torch.stack([each.loss(each(part[0]), part[0]) for each, part in zip(separate, parts, strict=True)])
    assert not stacked.losses.requires_grad
    torch.testing.assert_close(stacked.losses, expected.detach())
    torch.testing.assert_close(loss, expected.sum())
    with torch.autocast("cpu", torch.bfloat16):
        assert (
            stacked.loss(stacked(batch), batch).dtype == separate[0].loss(separate[0](parts[0][0]), parts[0][0]).dtype
        )


def test_a_loss_that_is_nan_reaches_no_other_replicate():
    stacked, (batch, _) = stack_classifiers(classifiers(), (3, 8, 8)), batches(3)[0]
    batch[0][:, 3:6] = torch.nan
    stacked.loss(stacked(batch), batch).backward()
    assert stacked.losses.isfinite().tolist() == [True, False, True]
    for parameter in stacked.parameters():
        assert [bool(part.isfinite().all()) for part in parameter.grad.chunk(3)] == [True, False, True]


def test_one_classifier_is_returned_as_it_is_and_another_loss_is_rejected():
    (only,) = classifiers(1)
    assert stack_classifiers([only], (3, 8, 8)) is only
    other = ComposerClassifier(classifiers(1)[0].module, num_classes=5, loss_fn=nn.functional.multi_margin_loss)
    with pytest.raises(ValueError, match="the loss of classifier 1 is not the mean cross entropy"):
        stack_classifiers([only, other], (3, 8, 8))
    with pytest.raises(ValueError, match="at least one network"):
        stack_classifiers([], (3, 8, 8))
