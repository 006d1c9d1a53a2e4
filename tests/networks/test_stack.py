import copy
import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

from lth_diet.networks import stack as module
from lth_diet.networks.classifier import build_classifier
from lth_diet.networks.stack import concatenate, split, stack

IMAGE = (3, 6, 6)


class Branches(nn.Module):
    """A container whose custom forward may mix channels, depend on the training mode, or draw random numbers."""

    def __init__(self, forward, channels=3):
        super().__init__()
        self.a = nn.Conv2d(channels, channels, 3, padding=1)
        self.b = nn.Conv2d(channels, channels, 1, groups=channels)
        self.combine = forward
        self.draws = torch.Generator()

    def forward(self, x):
        return self.combine(self, self.a(x), self.b(x))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


def head(*layers, features=3 * 36):
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 5))


def build(seed, widths=(4, 5), norm="batch", bias=True, groups=1, pool=False, deep_head=False):
    """A network with the layers that have a stacked form, with random values in all parameters."""
    layers, channels = [], IMAGE[0]
    for width in widths:
        width = groups * width
        inner = [nn.Conv2d(channels, width, 3, 2 if pool else 1, 1, groups=groups if layers else 1, bias=bias)]
        if norm == "group":
            inner.append(nn.GroupNorm(groups, width))
        elif norm != "none":
            inner.append(nn.BatchNorm2d(width, affine=bias, track_running_stats=norm == "batch", momentum=0.3))
        layers += [nn.Sequential(*inner, nn.ReLU()), Branches(lambda self, a, b: a.tanh() + b, width), nn.Identity()]
        channels = width
    layers += [
        nn.AvgPool2d(2, ceil_mode=True) if pool else nn.MaxPool2d(3, 2, 1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
    ]
    features = channels * 4
    if deep_head:
        layers += [nn.Linear(features, 7, bias=bias), nn.BatchNorm1d(7), nn.GELU()]
        features = 7
    built = nn.Sequential(*layers, nn.Linear(features, 5, bias=bias))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.normal_(0, 0.5, generator=random)
    return built


ARCHITECTURES = {
    "widths": st.lists(st.integers(1, 6), min_size=1, max_size=2),
    "norm": st.sampled_from(["batch", "batch without statistics", "group", "none"]),
    "bias": st.booleans(),
    "groups": st.integers(1, 2),
    "pool": st.booleans(),
    "deep_head": st.booleans(),
}


def train(model, batches, steps=20):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)
    for images, labels in itertools.islice(itertools.cycle(batches), steps):
        logits = model(images).view(len(images), -1, 5)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(
            0
        ).sum().backward()
        optimizer.step()
    return logits.detach(), [parameter.grad for parameter in model.parameters()]


@settings(max_examples=20, deadline=None)
@given(count=st.integers(2, 4), architecture=st.fixed_dictionaries(ARCHITECTURES))
def test_a_stack_trains_as_its_networks_do(count, architecture):
    networks = [build(seed, **architecture).double() for seed in range(count)]
    stacked = stack(networks, IMAGE)
    images, labels = torch.randn(2, 4, count * 3, *IMAGE[1:], dtype=torch.float64), torch.randint(5, (2, 4, count))
    logits, gradients = train(stacked, list(zip(images, labels, strict=True)))
    states = split(stacked.state_dict(), count)
    for r, each in enumerate(networks):
        parts = [(x[:, 3 * r : 3 * r + 3], y[:, r : r + 1]) for x, y in zip(images, labels, strict=True)]
        expected, expected_gradients = train(each, parts)
        torch.testing.assert_close(logits[:, r], expected[:, 0], rtol=1e-9, atol=1e-9)
        for found, gradient in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(found.chunk(count)[r], gradient, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(states[r], dict(each.state_dict()), rtol=1e-9, atol=1e-9)
        evaluated = stacked.eval()(images[0]).view(4, count, 5)[:, r]
        torch.testing.assert_close(evaluated, each.eval()(parts[0][0]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_a_replicate_does_not_change_a_bit_of_the_others(precision, layout, threads):
    torch.set_num_threads(threads)
    dtype = torch.float64 if precision == "fp64" else torch.float32

    @settings(max_examples=15 if threads == 1 else 2, deadline=None)
    @given(
        count=st.integers(2, 4),
        replicate=st.integers(0, 3),
        noise=st.booleans(),
        architecture=st.fixed_dictionaries(ARCHITECTURES),
    )
    def check(count, replicate, noise, architecture):
        stacked = stack([build(seed, **architecture) for seed in range(count)], IMAGE)
        stacked.to(dtype=dtype, memory_format=layout)
        images, labels = torch.randn(5, count * 3, *IMAGE[1:], dtype=dtype), torch.randint(5, (5, count))
        results = []
        for changed in (False, True):
            model, x = copy.deepcopy(stacked), images.clone()
            if changed:
                x.chunk(count, 1)[replicate % count].copy_(torch.randn(5, *IMAGE) if noise else torch.tensor(torch.nan))
            x = x.to(memory_format=layout).requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                logits, gradients = train(model, [(x, labels)], steps=2)
            state = {"x": x.grad.movedim(1, 0), "logits": logits.movedim(1, 0), **model.state_dict()}
            state |= {f"gradient {index}": gradient for index, gradient in enumerate(gradients)}
            results.append(split(state, count))
        for r, (before, after) in enumerate(zip(*results, strict=True)):
            same = all(torch.equal(before[name], after[name]) for name in before)
            assert same or r == replicate % count
            assert noise or same == (r != replicate % count)

    check()


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
def test_no_width_of_a_bf16_convolution_reads_the_next_replicate(kernel, stride):
    for inputs, outputs in itertools.product((1, 2, 3, 17), (1, 3, 8, 33)):
        convolutions = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2) for _ in range(2)]
        stacked = stack(
            [nn.Sequential(each, nn.AdaptiveAvgPool2d(1), nn.Flatten()) for each in convolutions], (inputs, 5, 5)
        )
        results = []
        for value in (0.0, torch.nan):
            model = copy.deepcopy(stacked).to(memory_format=torch.channels_last)
            images = torch.ones(3, 2 * inputs, 5, 5).to(memory_format=torch.channels_last)
            images[:, inputs:] = value
            images.requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(images)
            (logits * torch.tensor([1.0] * outputs + [value] * outputs)).sum().backward()
            results.append(
                [logits[:, :outputs], images.grad[:, :inputs], *(p.grad[:outputs] for p in model.parameters())]
            )
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True)), (inputs, outputs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: head(nn.Dropout(0.1)), r"cannot stack 0 \(Dropout\), which is random; remove it"),
        (lambda: head(nn.Sequential(nn.Dropout2d())), r"cannot stack 0\.0 \(Dropout2d\), which is random"),
        (lambda: head(nn.LayerNorm(6)), r"0 \(LayerNorm\), a layer without a stacked form; remove it"),
        (lambda: head(nn.Softmax(1)), r"0 \(Softmax\), a layer without a stacked form"),
        (lambda: head(Scale()), r"0 \(Scale\), which has tensors \(scale\) but no stacked form"),
        (lambda: head(type("MyConv", (nn.Conv2d,), {})(3, 3, 1)), r"0 \(MyConv\), which has tensors \(weight, bias\)"),
        (lambda: head(nn.LazyConv2d(3, 1)), r"0\.weight, which has no shape yet; pass a batch"),
        (lambda: head(nn.utils.weight_norm(nn.Conv2d(3, 3, 1))), r"0\.weight, which is computed from 0\.weight_g"),
        (lambda: head(parametrizations.weight_norm(nn.Conv2d(3, 3, 1))), r"0\.weight, which is computed from"),
        (lambda: head(prune.identity(nn.Conv2d(3, 3, 1), "weight")), r"0\.weight, which is computed from"),
        (lambda: hooked(nn.Module.register_forward_hook), r"0 \(Conv2d\), which has hooks; add hooks to the stack"),
        (lambda: hooked(nn.Module.register_full_backward_pre_hook), r"0 \(Conv2d\), which has hooks"),
        (lambda: hooked(lambda layer, hook: layer.weight.register_hook(hook)), r"0\.weight, which has hooks"),
        (lambda: nn.DataParallel(head()), r"stack DataParallel, a layer without a stacked form"),
        (lambda: nn.Sequential(nn.Linear(6, 5)), r"Sequential: on float64 images .*its output is a tensor of shape"),
        (lambda: head(features=7), r"Sequential: on float64 images of shape \(4, 3, 6, 6\), mat1 and mat2"),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 6), nn.Flatten(0)), "its output is a tensor of shape"),
        *(
            (lambda forward=forward, channels=channels: head(Branches(forward), nn.Conv2d(channels, 3, 1)), message)
            for forward, channels, message in [
                (
                    lambda self, a, b: torch.cat([a, b], 1),
                    6,
                    "in training mode, the output of 0 differs",
                ),
                (lambda self, a, b: a - b.mean(1, keepdim=True), 3, "in training mode, the output of 0 differs"),
                (lambda self, a, b: a + (b if self.training else b.flip(1)), 3, "in evaluation mode, the output of 0"),
                (lambda self, a, b: a + nn.functional.dropout(b, 1e-3), 3, "its forward draws random numbers"),
                (lambda self, a, b: a + random.random() * b, 3, "its forward draws random numbers"),
                (lambda self, a, b: a + np.random.random() * b, 3, "its forward draws random numbers"),
                (
                    lambda self, a, b: a + torch.rand((), generator=self.draws) * b,
                    3,
                    "its forward draws random numbers",
                ),
                (lambda self, a, b: a.view(-1, 3, 6, 6) + b, 3, "does not compute each channel by itself: on images"),
                (lambda self, a, b: nn.functional.layer_norm(a, a.shape[1:]), 3, "the output of 0 differs"),
                (lambda self, a, b: a + (b.mean(1, True) - b.mean(1, True).detach()), 3, "the gradient of 0.b"),
            ]
        ),
    ],
)
def test_a_network_that_cannot_be_stacked_is_rejected_by_name(make, message):
    with pytest.raises(ValueError, match=message) as error:
        stack([make(), make()], IMAGE)
    assert "\n" not in str(error.value)


def test_networks_whose_hidden_settings_differ_are_rejected_also_after_others_that_have_the_same():
    def make(slope):
        network = head(Branches(lambda self, a, b: nn.functional.leaky_relu(a, self._slope) + b), nn.ReLU())
        network[0]._slope = slope
        return network

    stack([make(0.1), make(0.1)], IMAGE)
    with pytest.raises(ValueError, match="the output of 0 differs"):
        stack([make(0.1), make(0.9)], IMAGE)


def hooked(register):
    built = head(nn.Conv2d(3, 3, 1))
    register(built[0], lambda *arguments: None)
    return built


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: head(nn.Conv2d(3, 3, 1)),
            r"networks? 0 and network 1 cannot be stacked: 0\.bias is missing in the former",
        ),
        (lambda: head(nn.Conv2d(3, 3, 1, stride=2, bias=False)), r"0\.stride is \(1, 1\) in the former and \(2, 2\)"),
        (lambda: head(nn.Conv2d(3, 4, 1, bias=False)), r"0\.out_channels is 3 in the former and 4 in the latter"),
        (lambda: head(nn.Identity()), r"0 is torch\.nn\.modules\.conv\.Conv2d in the former"),
        (lambda: head(nn.Conv2d(3, 3, 1, bias=False)).double(), r"0\.weight is a tensor .*float32 .*float64"),
        (
            lambda: head(nn.Conv2d(3, 3, 1, bias=False)).eval(),
            r"training is True in the former and False in the latter",
        ),
        (lambda: head(nn.Conv2d(3, 3, 1, bias=False).requires_grad_(False)), r"0\.weight is .*without gradient"),
    ],
)
def test_networks_of_other_architectures_are_rejected(other, message):
    with pytest.raises(ValueError, match=message):
        stack([head(nn.Conv2d(3, 3, 1, bias=False)), other()], IMAGE)


def test_networks_that_share_tensors_are_rejected_and_layers_that_do_stay_tied():
    first, second = head(nn.Conv2d(3, 3, 1)), head(nn.Conv2d(3, 3, 1))
    second[0].weight = first[0].weight
    with pytest.raises(ValueError, match=r"networks 0 and 1 share 0\.weight"):
        stack([first, second], IMAGE)
    with pytest.raises(ValueError, match="networks 0 and 1 share 0"):
        stack([first, first], IMAGE)
    networks = [head(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)) for _ in range(2)]
    for each in networks:
        each[2].weight = each[0].weight
    stacked = stack(networks, IMAGE)
    assert stacked[0].weight is stacked[2].weight
    assert len(list(stacked.parameters())) == len(list(networks[0].parameters()))
    with pytest.raises(ValueError, match=r"2\.weight is .* in the former and .*shared with 0\.weight"):
        stack([head(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)), networks[1]], IMAGE)


def test_stacking_changes_neither_networks_nor_random_state_and_shares_nothing():
    networks = [build(seed).to(memory_format=torch.channels_last) for seed in range(3)]
    for each in networks:
        each(torch.randn(2, *IMAGE)).sum().backward()
    before = copy.deepcopy(networks)
    gradients = [[parameter.grad.clone() for parameter in each.parameters()] for each in networks]
    module._compared.clear()
    state = torch.get_rng_state()
    stacked = stack(networks, IMAGE)
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        for tensor in [*stacked.parameters(), *stacked.buffers()]:
            tensor.zero_()
    for each, old, expected in zip(networks, before, gradients, strict=True):
        assert each.training
        torch.testing.assert_close(each.state_dict(), old.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close([parameter.grad for parameter in each.parameters()], expected, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in stacked.parameters())


def test_a_stack_has_the_states_of_its_networks_and_their_memory_format():
    networks = [build_classifier(8, 5, 4, seed=seed).module for seed in range(3)]
    stacked = stack(networks, (3, 8, 8))
    states = [each.state_dict() for each in networks]
    torch.testing.assert_close(dict(stacked.state_dict()), concatenate(states), rtol=0, atol=0)
    for found, state in zip(split(stacked.state_dict(), 3), states, strict=True):
        torch.testing.assert_close(found, dict(state), rtol=0, atol=0)
        assert all(found[name].stride() == state[name].stride() for name in found)
    assert stacked.stages[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert [name for name, _ in stacked.named_parameters()] == [name for name, _ in networks[0].named_parameters()]


def test_one_network_is_returned_as_it_is():
    only = head(nn.Dropout())
    assert stack([only], IMAGE) is only
    with pytest.raises(ValueError, match="at least one network"):
        stack([], IMAGE)


def test_a_stack_of_the_meta_device():
    networks = [build_classifier(8, 5, 4).module.to("meta") for _ in range(2)]
    stacked = stack(networks, (3, 8, 8))
    assert stacked(torch.empty(4, 6, 8, 8, device="meta")).shape == (4, 10)


@given(
    count=st.integers(1, 4),
    shapes=st.lists(st.lists(st.integers(1, 3), max_size=3), max_size=4),
    dtype=st.sampled_from([torch.bool, torch.int64, torch.float32]),
)
def test_split_reverses_concatenate(count, shapes, dtype):
    states = [{str(i): torch.randint(2, shape).to(dtype) for i, shape in enumerate(shapes)} for _ in range(count)]
    for state in states:
        state.update({name: tensor for name, tensor in states[0].items() if not tensor.dim()})
    together = concatenate(states)
    torch.testing.assert_close(split(together, count), states, rtol=0, atol=0)
    for tensor in together.values():
        tensor.zero_()


def test_states_that_do_not_fit_are_rejected_by_name():
    first = {"a": torch.zeros(2), "steps": torch.tensor(1)}
    for second, message in [
        ({"a": torch.zeros(2)}, "only one has steps"),
        ({"a": torch.zeros(3), "steps": torch.tensor(1)}, r"a is a tensor of shape \(2,\)"),
        ({"a": torch.zeros(2).bool(), "steps": torch.tensor(1)}, r"a is .* torch.bool"),
        ({"a": torch.zeros(2), "steps": torch.tensor(2)}, "steps is 1 and 2, and a stack has one for all"),
    ]:
        with pytest.raises(ValueError, match=message):
            concatenate([first, second])
    with pytest.raises(ValueError, match="at least one state"):
        concatenate([])
    with pytest.raises(ValueError, match=r"a of shape \(2,\) is not from a stack of 3 networks"):
        split(first, 3)
