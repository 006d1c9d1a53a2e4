import re
import warnings

import pytest
import torch
from composer.models import ComposerClassifier
from helpers import ROOT
from torch import nn
from torch.nn.utils import parametrizations, prune

from lth_diet.masks.mask import Mask
from lth_diet.masks.prunable import prunable
from lth_diet.masks.pruning import prune_by_magnitude
from lth_diet.networks.resnet import ResNet


class Positions(nn.Module):
    """A network with an attribute called `module`, and a parameter that belongs to no layer."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(3, 2)
        self.head = nn.Linear(2, 2)
        self.positions = nn.Parameter(torch.randn(1, 4, 3))


def compiled(network):
    return torch.compile(network, backend="eager")


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (nn.Linear(2, 2), ["weight"]),
        (nn.Bilinear(2, 2, 2), ["weight"]),
        (nn.Conv1d(2, 2, 1), ["weight"]),
        (nn.Conv2d(2, 2, 1), ["weight"]),
        (nn.Conv3d(2, 2, 1), ["weight"]),
        (nn.ConvTranspose2d(2, 2, 1), ["weight"]),
        (nn.LSTM(4, 3, proj_size=2), ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]),
        (nn.GRUCell(2, 2), ["weight_ih", "weight_hh"]),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), ["in_proj_weight", "out_proj.weight"]),
        (nn.MultiheadAttention(4, 2, kdim=3), ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_weights_of_layers_that_multiply_their_input_are_prunable(layer, names):
    assert list(prunable(layer)) == names
    network = nn.Sequential(layer, nn.BatchNorm1d(2), nn.LayerNorm((2, 2)), nn.PReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mask = Mask.dense(network)
    assert prune_by_magnitude(network.state_dict(), mask, 0.5).density == pytest.approx(0.5, abs=0.1)


def test_parameters_that_stay_dense_are_named_in_a_warning():
    network = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2), nn.LayerNorm((2, 2)), Positions())
    with pytest.warns(UserWarning, match=r"^not pruned: 0.weight \(Embedding\), 3.positions \(Positions\); name them"):
        assert list(prunable(network)) == ["1.weight", "3.module.weight", "3.head.weight"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(prunable(network, include="0", exclude=["3.pos*", "3.head"])) == [
            "0.weight",
            "1.weight",
            "3.module.weight",
        ]
        assert list(prunable(network, layers=nn.Embedding)) == ["0.weight"]
        assert list(prunable(network, layers=(), include=["3.positions", "1.bias"])) == ["1.bias", "3.positions"]


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (nn.BatchNorm2d(4), {}, r"no prunable weights; choose some .*: weight, bias$"),
        (nn.ReLU(), {}, "no prunable weights.*: it has none"),
        (nn.Linear(2, 2), {"exclude": "weight"}, "no prunable weights"),
        (nn.Linear(2, 2), {"include": ["fc.*"]}, r"no parameter is named 'fc\.\*'; the network has weight, bias"),
        (nn.Linear(2, 2), {"layers": ["weight"]}, "layers has 'weight'; expected types such as torch.nn.Linear"),
        (nn.LazyLinear(2), {}, "weight has no shape yet"),
    ],
)
def test_a_selection_without_weights_is_rejected(network, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        prunable(network, **options)


@pytest.mark.parametrize(
    ("change", "sources"),
    [
        (nn.utils.weight_norm, "0.weight_g and 0.weight_v"),
        (nn.utils.spectral_norm, "0.weight_orig"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "0.weight_orig"),
        (parametrizations.orthogonal, "0.parametrizations.weight.original"),
    ],
)
def test_a_weight_that_is_computed_from_others_is_rejected_or_excluded(change, sources):
    network = nn.Sequential(change(nn.Linear(4, 4)), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=f"^0.weight is computed from {sources} .*weight_norm.*exclude='0.weight'"):
        prunable(network)
    assert list(prunable(network, exclude="0.weight")) == list(prunable(network, exclude="0")) == ["1.weight"]


def test_a_tensor_that_layers_share_counts_once_under_its_first_name():
    network = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    network[2].weight, network[3].weight = network[1].weight, network[0].weight
    assert list(prunable(network)) == ["0.weight", "1.weight"]
    assert list(prunable(network, exclude="3")) == ["1.weight"]
    assert prune_by_magnitude(network.state_dict(), Mask.dense(network), 0.5).remaining == 18


@pytest.mark.parametrize("wrap", [lambda each: each, compiled, nn.DataParallel])
@pytest.mark.parametrize("network", [ResNet(8, 10, width=2), Positions(), nn.Sequential(compiled(nn.Linear(2, 2)))])
@pytest.mark.filterwarnings("ignore")
def test_names_lack_the_prefixes_of_wrappers_and_fit_wrapped_weights(network, wrap):
    mask, wrapped = Mask.dense(network), ComposerClassifier(wrap(network), num_classes=2)
    assert Mask.dense(wrapped) == mask
    mask.validate(wrapped)
    prefixed = Mask({f"module.{name}": tensor for name, tensor in mask.items()})
    prefixed.validate(network)
    pruned = prune_by_magnitude(wrapped.state_dict(), mask, 0.5)
    assert pruned == prune_by_magnitude(network.state_dict(), mask, 0.5)
    again = prune_by_magnitude(network.state_dict(), prefixed, 0.5)
    assert [tensor.tolist() for tensor in again.values()] == [tensor.tolist() for tensor in pruned.values()]
    assert mask.is_zero_outside(wrapped.state_dict()) and not pruned.is_zero_outside(wrapped.state_dict())


def test_the_example_of_the_documentation_runs():
    (block,) = re.findall(r"```python\n(import torch.*?)```", (ROOT / "docs/extending.md").read_text(), flags=re.S)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(block, names := {})
    network = names["network"]
    assert list(Mask.dense(network, exclude=["0", "3"])) == ["1.weight"]
