"""A stack: one network that computes R networks of one architecture, for little more time than one of them.

Replicate r has channels r * C to (r + 1) * C - 1 of every tensor of activations (B, R * C, ...), from the images to the
logits, and part r along dimension 0 of every parameter and buffer, whose names are those of one network.
"""

import copy
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from lth_diet.networks.parameters import computed_weights, enumerate_names


class StackedLinear(nn.Linear):
    """R linear layers: inputs (B, R * in), weight (R * out, in), bias (R * out), outputs (B, R * out)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 2:
            raise ValueError(f"a stacked Linear has inputs (B, R * {self.in_features}); got {tuple(x.shape)}")
        inputs = x.reshape(len(x), -1, self.in_features).transpose(0, 1)
        weight = self.weight.view(len(inputs), -1, self.in_features).transpose(1, 2)
        if self.bias is None:
            outputs = torch.bmm(inputs, weight)
        else:
            outputs = torch.baddbmm(self.bias.view(len(inputs), 1, -1), inputs, weight)
        return outputs.transpose(0, 1).flatten(1)


class StackedConv2d(nn.Conv2d):
    """A convolution with R times as many groups, none of which reads another.

    In 16 bits on a CPU, the kernels of oneDNN for channels_last read channels in pairs and multiply the one after an
    odd number of them by zero: NaN in one replicate would reach the next. So groups get an even number there.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        inputs, outputs = weight.shape[1], len(weight) // self.groups
        in_16_bits = x.dtype.itemsize == 2 or torch.is_autocast_enabled("cpu")
        if x.device.type != "cpu" or not in_16_bits or (inputs % 2 == outputs % 2 == 0) or inputs == outputs == 1:
            return super()._conv_forward(x, weight, bias)
        layout = torch.channels_last
        if inputs % 2:
            x = F.pad(x.unflatten(1, (self.groups, inputs)), (0, 0, 0, 0, 0, 1)).flatten(1, 2)
            x = x.contiguous(memory_format=layout)
        weight = F.pad(weight.unflatten(0, (self.groups, outputs)), (0, 0, 0, 0, 0, inputs % 2, 0, outputs % 2))
        weight = weight.flatten(0, 1).contiguous(memory_format=layout)
        if bias is not None:
            bias = F.pad(bias.unflatten(0, (self.groups, outputs)), (0, outputs % 2)).flatten()
        result = super()._conv_forward(x, weight, bias)
        result = result.unflatten(1, (self.groups, -1))[:, :, :outputs].flatten(1, 2)
        return result.contiguous(memory_format=layout)


_RULES: dict[type[nn.Module], tuple[type[nn.Module], tuple[str, ...]]] = {
    nn.Conv2d: (StackedConv2d, ("in_channels", "out_channels", "groups")),
    nn.BatchNorm1d: (nn.BatchNorm1d, ("num_features",)),
    nn.BatchNorm2d: (nn.BatchNorm2d, ("num_features",)),
    nn.GroupNorm: (nn.GroupNorm, ("num_channels", "num_groups")),
    nn.Linear: (StackedLinear, ("out_features",)),
}
"""For each type of layer: the type of R such layers, and the settings that are R times as large."""

_UNCHANGED = (
    *(nn.Identity, nn.Flatten, nn.Sequential, nn.ModuleList, nn.ModuleDict),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.LPPool1d, nn.LPPool2d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    *(nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d, nn.Upsample),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign),
    *(nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink),
    *(nn.Tanhshrink, nn.Threshold),
)
"""Layers of PyTorch without parameters that compute each channel by itself."""


_MODULE_ATTRIBUTES = vars(nn.Module()).keys()
_compared: set[tuple] = set()
"""Architectures, numbers of networks and shapes of images whose stack was compared in this process."""


def stack(networks: Sequence[nn.Module], image_shape: tuple[int, int, int]) -> nn.Module:
    """Stack R networks of one architecture into one, which computes and trains them independently of each other.

    Conv2d, BatchNorm1d, BatchNorm2d, GroupNorm and Linear become layers of R times as many channels; pooling, padding,
    activations, Flatten and modules with a forward of their own stay. Copies with random weights are compared with
    their stack in float64: outputs, gradients and statistics, in training and evaluation mode. This is done once per
    process and architecture, unless modules have settings that are private or no numbers or texts.

    Args:
        networks: Networks from images (B, C, H, W) to logits (B, classes), with the same layers, shapes and settings.
            They are not changed, and the stack shares no tensor with them.
        image_shape: C, H and W.

    Returns:
        A network from images (B, R * C, H, W) to logits (B, R * classes). One network is returned as it is.

    Raises:
        ValueError: If the networks differ, a layer has no stacked form, such as Dropout, or the comparison finds a
            difference, as for a forward that mixes channels.
    """
    if not networks:
        raise ValueError("a stack needs at least one network; got none")
    if len(networks) == 1:
        return networks[0]
    for network in networks:
        _check_layers(network)
    _check_equal_architecture(networks)
    types = tuple(type(module) for module in networks[0].modules())
    case = (types, tuple(_architecture(networks[0]).items()), len(networks), tuple(image_shape))
    if case not in _compared:
        _compare(networks, image_shape)
        if all(map(_is_described, networks[0].modules())):
            _compared.add(case)
    return _build(networks)


def _is_described(module: nn.Module) -> bool:
    """Whether `_architecture` describes all settings of a module; a private attribute or an object may hide some."""
    if type(module) in _RULES or type(module) in _UNCHANGED:
        return True
    own = {name: value for name, value in vars(module).items() if name not in _MODULE_ATTRIBUTES}
    return all(not name.startswith("_") and _is_plain(value) for name, value in own.items())


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def random_states(network: nn.Module) -> tuple:
    """The states of all random number generators that modules may draw from: global ones, and their attributes."""
    attributes = [value for module in network.modules() for value in vars(module).values()]
    own = [value.get_state() for value in attributes if isinstance(value, torch.Generator)]
    states = [state.numpy().tobytes() for state in (torch.get_rng_state(), *own)]
    _, keys, *rest = np.random.get_state()
    return random.getstate(), keys.tolist(), rest, states


def concatenate(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the states (or masks) of R networks to that of their stack.

    Raises:
        ValueError: If names, shapes or types differ, or a scalar, of which a stack has one, such as
            `num_batches_tracked`.
    """
    if not states:
        raise ValueError("a stack needs at least one state; got none")
    for index, state in enumerate(states):
        different = states[0].keys() ^ state.keys()
        if different:
            raise ValueError(
                f"states 0 and {index} cannot be stacked: only one has {enumerate_names(sorted(different))}"
            )
        for name, tensor in state.items():
            _check_equal(f"state {index}", name, _form(states[0][name]), _form(tensor))
    return {name: _concatenate(name, [state[name] for state in states]) for name in states[0]}


def split(state: Mapping[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """Split the state (or masks) of a stack of `count` networks into theirs, which are copies.

    Raises:
        ValueError: If a tensor has no `count` equal parts along dimension 0.
    """
    for name, tensor in state.items():
        if tensor.dim() and len(tensor) % count:
            raise ValueError(f"{name} of shape {tuple(tensor.shape)} is not from a stack of {count} networks")
    parts = {name: tensor.chunk(count) if tensor.dim() else [tensor] * count for name, tensor in state.items()}
    return [{name: parts[name][index].detach().clone() for name in state} for index in range(count)]


def _concatenate(name: str, tensors: Sequence[Tensor]) -> Tensor:
    tensors = [tensor.detach() for tensor in tensors]
    if tensors[0].dim():
        return torch.cat(tensors)  # keeps the memory format
    for index, tensor in enumerate(tensors):
        if not (tensor.is_meta or torch.equal(tensor, tensors[0])):
            raise ValueError(
                f"networks 0 and {index} cannot be stacked: {name} is {tensors[0].item()} and {tensor.item()}, and a "
                "stack has one for all; train them for the same number of steps"
            )
    return tensors[0].clone()


def _build(networks: Sequence[nn.Module]) -> nn.Module:
    stacked = copy.deepcopy(networks[0])
    for module in stacked.modules():
        if type(module) in _RULES:
            stacked_type, settings = _RULES[type(module)]
            for setting in settings:
                setattr(module, setting, len(networks) * getattr(module, setting))
            module.__class__ = stacked_type  # as PyTorch's lazy layers become layers with a shape
    tensors = [dict(_tensors(network)) for network in networks]
    built: dict[int, Tensor] = {}  # layers may share a tensor
    for name, first in tensors[0].items():
        if id(first) not in built:
            tensor = _concatenate(name, [each[name] for each in tensors])
            is_parameter = isinstance(first, nn.Parameter)
            built[id(first)] = nn.Parameter(tensor, first.requires_grad) if is_parameter else tensor
        owner, _, attribute = name.rpartition(".")
        setattr(stacked.get_submodule(owner), attribute, built[id(first)])
    return stacked


def _tensors(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, a shared one under each of its names."""
    yield from network.named_parameters(remove_duplicate=False)
    yield from network.named_buffers(remove_duplicate=False)


def _check_layers(network: nn.Module) -> None:
    remedy = "remove it, or train the networks one by one"
    for name, sources in computed_weights(network).items():
        raise ValueError(
            f"cannot stack {name}, which is computed from {' and '.join(sources)} (weight_norm, spectral_norm, "
            "torch.nn.utils.prune or another parametrization); remove the parametrization, or train the networks one "
            "by one"
        )
    for name, tensor in _tensors(network):
        if is_lazy(tensor):
            raise ValueError(f"cannot stack {name}, which has no shape yet; pass a batch through each network first")
        if _has_hooks(tensor):
            raise ValueError(f"cannot stack {name}, which has hooks; add hooks to the stack instead")
    for name, module in network.named_modules():
        kind = type(module)
        layer = f"{name} ({kind.__name__})" if name else kind.__name__
        if _has_hooks(module):
            raise ValueError(f"cannot stack {layer}, which has hooks; add hooks to the stack instead")
        if kind in _RULES or kind in _UNCHANGED:
            continue
        if kind.__module__.partition(".")[0] == "torch":
            what = "which is random" if "Dropout" in kind.__name__ else "a layer without a stacked form"
            raise ValueError(f"cannot stack {layer}, {what}; {remedy}")
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if own:
            names = enumerate_names(each for each, _ in own)
            raise ValueError(f"cannot stack {layer}, which has tensors ({names}) but no stacked form; {remedy}")


def _has_hooks(owner: nn.Module | Tensor) -> bool:
    """Whether a module or tensor has hooks of any kind."""
    values = [getattr(owner, name) for name in dir(owner) if re.fullmatch(r"_\w*_hooks", name)]
    return any(value for value in values if not callable(value))


def _check_equal_architecture(networks: Sequence[nn.Module]) -> None:
    first = _architecture(networks[0])
    for index, network in enumerate(networks):
        architecture = _architecture(network)
        for name in [*first, *architecture]:
            _check_equal(f"network {index}", name, first.get(name), architecture.get(name))
    owners: dict[int, int] = {}
    for index, network in enumerate(networks):
        for name, tensor in _tensors(network):
            if owners.setdefault(id(tensor), index) != index:
                raise ValueError(f"networks {owners[id(tensor)]} and {index} share {name}; stack separate networks")


def _architecture(network: nn.Module) -> dict[str, str]:
    """Descriptions of all layers, their settings, and the shapes and sharing of tensors, by name."""
    found = {}
    for name, module in network.named_modules(remove_duplicate=False):
        found[name or "the network"] = f"{type(module).__module__}.{type(module).__qualname__}"
        for setting, value in vars(module).items():
            if not setting.startswith("_"):
                found[f"{name}.{setting}".lstrip(".")] = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    names: dict[int, str] = {}
    for name, tensor in _tensors(network):
        shared = names.setdefault(id(tensor), name)
        found[name] = _form(tensor) + ("" if tensor.requires_grad else ", without gradient")
        found[name] += f", shared with {shared}" if shared != name else ""
    return found


def _form(tensor: Tensor) -> str:
    return f"a tensor of shape {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}"


def _check_equal(other: str, name: str, expected: str | None, found: str | None) -> None:
    if found != expected:
        found, expected = found or "missing", expected or "missing"
        which = other.split()[0]
        raise ValueError(
            f"{which} 0 and {other} cannot be stacked: {name} is {expected} in the former and {found} in the latter; "
            f"stack {which}s of one architecture"
        )


def _compare(networks: Sequence[nn.Module], image_shape: tuple[int, int, int]) -> None:
    """Compare a stack of copies with random weights with these copies, in float64 on the CPU."""
    kind = type(networks[0]).__name__
    channels, height, width = image_shape
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        generator = torch.Generator().manual_seed(0)
        copies = [_randomized_copy(network, generator) for network in networks]
        stacked = _build(copies)
        images = torch.randn(4, len(copies) * channels, height, width, dtype=torch.float64, generator=generator)
        parts = images.chunk(len(copies), dim=1)
        for training in (True, False):
            try:
                separate = [_run(each.train(training), part) for each, part in zip(copies, parts, strict=True)]
            except Exception as error:
                raise ValueError(
                    f"cannot stack {kind}: on float64 images of shape {(len(images), *image_shape)}, {_reason(error)}; "
                    "correct the network or the images, or train the networks one by one"
                ) from error
            try:
                together = _run(stacked.train(training), images)
            except Exception as error:
                raise ValueError(
                    f"cannot stack {kind}, whose forward does not compute each channel by itself: on images of "
                    f"{len(copies)} x {channels} channels, {_reason(error)}; change the forward, or train the networks "
                    "one by one"
                ) from error
            place = _first_difference(separate, together)
            if place:
                mode = "training" if training else "evaluation"
                raise ValueError(
                    f"cannot stack {kind}, whose forward does not compute each channel by itself: in {mode} mode, "
                    f"{place} differs between the networks and their stack; change the forward (such as concatenation, "
                    "or a mean over channels), or train the networks one by one"
                )


def _randomized_copy(network: nn.Module, generator: torch.Generator) -> nn.Module:
    duplicate = copy.deepcopy(network).to_empty(device="cpu").double()
    for _, tensor in _tensors(duplicate):
        if tensor.dim() > 1:
            tensor.data.normal_(0, math.sqrt(2 / tensor[0].numel()), generator=generator)
        elif tensor.is_floating_point():
            tensor.data.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.zero_()
    return duplicate


def _run(network: nn.Module, images: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs of the modules by name, last those of the network; and, by name, gradients and buffers after a step."""
    outputs: dict[str, Tensor] = {}

    def record(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() > 1:
            outputs[f"the output of {name}" if name else "the output"] = output.detach().clone()

    hooks = [
        module.register_forward_hook(lambda module, inputs, output, name=name: record(name, output))
        for name, module in network.named_modules()
    ]
    before = random_states(network)
    logits = network(images)
    for hook in hooks:
        hook.remove()
    if random_states(network) != before:
        raise ValueError("its forward draws random numbers, as dropout does")
    if not (isinstance(logits, Tensor) and logits.dim() == 2 and len(logits) == len(images)):
        found = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"its output is {found}; expected logits (B, classes)")
    if network.training and logits.requires_grad:
        logits.square().sum().backward()
    state = {f"the gradient of {name}": each.grad for name, each in _tensors(network) if each.grad is not None}
    return outputs, state | {name: each.clone() for name, each in network.named_buffers()}


def _first_difference(
    separate: Sequence[tuple[dict[str, Tensor], dict[str, Tensor]]],
    together: tuple[dict[str, Tensor], dict[str, Tensor]],
) -> str:
    """Name of the first result of a stack that differs from those of its networks, "" if there is none."""
    differences = []
    for (*parts, whole), dim in zip(zip(*separate, together, strict=True), (1, 0), strict=True):
        # a bias before BatchNorm has a gradient that is zero but for rounding: compare with the largest
        scale = max((_largest(tensor) for tensor in whole.values()), default=0)
        differences += [
            name
            for name, tensor in whole.items()
            if not _is_close([part[name] for part in parts if name in part], tensor, dim, scale)
        ]
    # modules inside may have other dimensions than (B, channels, ...): they only show where a difference comes from
    matters = any(name == "the output" or not name.startswith("the output of ") for name in differences)
    return differences[0] if matters else ""


def _is_close(parts: Sequence[Tensor], whole: Tensor, dim: int, scale: float) -> bool:
    """Whether a result of a stack is, but for rounding, the concatenation of those of its networks."""
    if whole.dim() == 0:
        return all(torch.equal(part, whole) for part in parts)
    expected = torch.cat(list(parts), dim)
    return expected.shape == whole.shape and torch.allclose(whole, expected, 0, 1e-9 * scale, equal_nan=True)


def _largest(tensor: Tensor) -> float:
    """The largest absolute value that is finite, 1 if it is smaller."""
    return max(1.0, float(tensor.abs().nan_to_num(0, 0, 0).max())) if tensor.numel() else 1.0


def _reason(error: Exception) -> str:
    """The first line of an exception's message, without the period."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
