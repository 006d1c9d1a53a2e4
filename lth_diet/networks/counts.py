"""Sizes of the networks, from their settings alone; imports no torch."""


def count_weights(depth: int, classes: int, width: int, channels: int) -> int:
    """Number of prunable weights (of convolutions and the linear layer) of a `ResNet` with these arguments."""
    weights = 9 * channels * width
    inputs = width
    for stage in range(3):
        outputs = width * 2**stage
        weights += 9 * inputs * outputs + (inputs * outputs if inputs != outputs else 0)
        weights += 9 * outputs * outputs * ((depth - 2) // 3 - 1)
        inputs = outputs
    return weights + inputs * classes
