import pytest
import torch
from torch import nn
from torch.nn import functional

from lth_diet.masks.mask import Mask, prunable
from lth_diet.networks.classifier import build_classifier, initialize
from lth_diet.networks.resnet import Block, ResNet


@pytest.mark.parametrize(
    ("depth", "classes", "parameters", "weights", "tensors"),
    [(20, 10, 272_474, 270_896, 22), (32, 100, 472_756, 470_192, 34), (56, 10, 855_770, 851_504, 58)],
)
def test_numbers_of_parameters_and_prunable_weights_match_the_paper(depth, classes, parameters, weights, tensors):
    network = build_classifier(depth, classes).module
    assert repr(network) == repr(ResNet(depth, classes))
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert len(prunable(network)) == tensors
    assert Mask.dense(network).total == weights


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (32, 3), (28, 1)])
def test_network_accepts_any_image_size_and_number_of_channels(size, channels):
    network = ResNet(8, classes=7, width=4, channels=channels)
    assert network(torch.zeros(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize("width", [4, 8, 16])
@pytest.mark.parametrize("size", [4, 5, 8, 28, 32, 33, 56, 64, 96, 128, 224])
def test_backward_pass_works_at_any_image_size(size, width):
    network = ResNet(8, classes=2, width=width).to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, size, size).contiguous(memory_format=torch.channels_last)
    network(images).sum().backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in network.parameters())


@pytest.mark.parametrize("size", [4, 5, 9, 32])
def test_shortcut_is_a_strided_convolution(size):
    block = Block(4, 8, stride=2).double().eval()
    images = torch.rand(2, 4, size, size, dtype=torch.float64)
    shortcut = block.shortcut[1](functional.conv2d(images, block.shortcut[0].weight, stride=2))
    main = block.bn2(block.conv2(functional.relu(block.bn1(block.conv1(images)))))
    assert torch.equal(block(images), functional.relu(main + shortcut))


@pytest.mark.parametrize("depth", [2, 9, 21])
def test_depth_that_is_not_6n_plus_2_raises(depth):
    with pytest.raises(ValueError, match="6n \\+ 2"):
        ResNet(depth, 10)


def test_width_scales_the_last_stage():
    assert ResNet(20, 10, width=4).fc.in_features == 16


def test_stages_after_the_first_halve_the_image_once():
    x, sizes = torch.zeros(1, 16, 32, 32), []
    for block in ResNet(20, 10).eval().stages:
        x = block(x)
        sizes.append(tuple(x.shape[1:]))
    assert sizes == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3


def test_block_adds_its_input_before_the_last_relu():
    block, x = ResNet(20, 10).eval().stages[0], torch.randn(2, 16, 8, 8)
    scale = (1 + 1e-5) ** -0.5  # of BatchNorm with its initial statistics
    inner = scale * nn.functional.conv2d(x, block.conv1.weight, padding=1).relu()
    outer = scale * nn.functional.conv2d(inner, block.conv2.weight, padding=1)
    assert torch.allclose(block(x), (outer + x).relu(), atol=1e-5)


def test_initialization_has_the_distributions_of_the_paper():
    network = ResNet(56, 100, width=32)
    initialize(network, seed=1)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10_000:
            fan_in = module.weight[0].numel()
            assert float(module.weight.std()) == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)
    scales = torch.cat([m.weight for m in network.modules() if isinstance(m, nn.BatchNorm2d)])
    assert 0 <= float(scales.min()) < 0.01 and 0.99 < float(scales.max()) <= 1
    assert float(scales.mean()) == pytest.approx(0.5, abs=0.03)
    assert all(bool((m.bias == 0).all()) for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    bound = network.fc.in_features**-0.5
    assert -bound <= float(network.fc.bias.min()) < -0.5 * bound < 0.5 * bound < float(network.fc.bias.max()) <= bound


def test_initialization_depends_on_the_seed_and_not_on_global_state():
    networks = []
    for seed, global_seed in ((1, 0), (1, 1), (2, 0)):
        torch.manual_seed(global_seed)
        networks.append(build_classifier(8, 10, width=4, seed=seed).module.state_dict())
    same = [torch.equal(networks[0][name], networks[1][name]) for name in networks[0]]
    assert all(same)
    assert not torch.equal(networks[0]["conv1.weight"], networks[2]["conv1.weight"])


def test_classifier_has_no_training_metrics_and_is_channels_last():
    model = build_classifier(8, 10, width=4)
    assert model.get_metrics(is_train=True) == {}
    assert model.module.stages[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
