"""The size of a stack that --plan recommends; imports no torch."""

from collections.abc import Sequence
from typing import Literal

from lth_diet.config.blocks import largest_stack
from lth_diet.config.schema import Config
from lth_diet.data.dataset import NATIVE_SIZES
from lth_diet.training import devices

Device = Literal["CPU", "GPU"]
MAX_STACK = 8
"""Largest R that is recommended: the step of a replicate gets hardly faster with more, on a CPU or an H100."""
_CPU_ACTIVATIONS = 1 << 19
"""Outputs of the first layer above which a stack gains nothing on a CPU, as they do not fit into its caches."""
_UNKNOWN_SIZE = 32  # pixels of images whose size is not known before they are decoded


def recommended_stack(
    activations: int, device: Device, ranks: int, replicates: Sequence[Sequence[int]]
) -> tuple[int, str]:
    """Recommend R for a launch.

    A step of a small network consists mostly of overhead, which a stack pays once for R replicates. On a CPU this gains
    until the outputs of a layer exceed the caches. Measured on one thread, the fastest R was 8 for 16 thousand outputs
    per step (digits, width 4), 4 for 131 thousand (16 x 16 pixels, width 8), and none was 10 % faster than R = 1 for
    262 thousand (16 x 16 pixels, width 16). On an H100, with ResNet-20 at 32 x 32 pixels, compiled, a step took 4.3 ms
    per replicate at R = 1, 0.75 ms at 8 and 0.69 ms at 16.

    Args:
        activations: Outputs of the first layer in a step of one replicate, the most of the networks of the launch.
        device: What the ranks train on.
        ranks: Number of ranks, each of which needs a block of R replicates.
        replicates: Indices of the replicates of each arm.

    Returns:
        R, with which the replicates fill their blocks and every rank has one; and the reason for it.
    """
    most, reason = MAX_STACK, "more replicates per step gain little"
    if device == "CPU" and activations * MAX_STACK > _CPU_ACTIVATIONS:
        most, reason = _CPU_ACTIVATIONS // activations, "the layers of larger stacks exceed its caches"
    if most < 3:
        most, reason = 1, "layers of this size gain hardly anything"
    stack = largest_stack(replicates, ranks, most)
    return stack, reason if stack == most else f"the largest whose blocks they fill{f', {ranks} or more' * (ranks > 1)}"


def count_activations(config: Config) -> int:
    """Outputs of the first layer in a training step of one replicate."""
    size = config.dataset.size or NATIVE_SIZES.get(config.dataset.name, _UNKNOWN_SIZE)
    return config.train.batch_size * config.model.width * size**2


def possible_devices() -> list[Device]:
    """What may train, as far as it is known without torch."""
    return {False: ["CPU"], True: ["GPU"], None: ["CPU", "GPU"]}[devices.expects_gpu()]


def recommendation(
    configs: Sequence[Config], ranks: int, known: Sequence[Device] | None = None, name: str = "rank"
) -> str:
    """Describe the R that is recommended for some runs, which train together, and why.

    Args:
        configs: Their configurations.
        ranks: Number of ranks.
        known: What may train; None: see `possible_devices`.
        name: What a rank is called.

    Returns:
        One line; empty if the runs are not stacked, and no larger stack is recommended.
    """
    if any(config.parallelism == "data" for config in configs):
        return ""
    replicates = [config.replicates for config in configs]
    activations = max(map(count_activations, configs))
    found = {
        device: recommended_stack(activations, device, ranks, replicates) for device in known or possible_devices()
    }
    current = sorted({config.stack for config in configs})
    if current == [1] and all(stack == 1 for stack, _ in found.values()):
        return ""
    choices = [
        f"{stack} on a {' or '.join(device for device in found if found[device] == (stack, reason))} ({reason})"
        for stack, reason in dict.fromkeys(found.values())
    ]
    number = sum(map(len, replicates))
    return (
        f"stack: {' and '.join(map(str, current))}; recommended for {_plural(number, 'replicate')} on "
        f"{_plural(ranks, name)}: {', '.join(choices)}; another stack is another run id"
    )


def _plural(number: int, name: str) -> str:
    return f"{number} {name}{'s' * (number != 1)}"
