import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lth_diet.networks.classifier import initialize

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
