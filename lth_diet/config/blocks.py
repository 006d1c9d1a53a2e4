"""Blocks: the replicates, or scoring networks, that train together as one stack of networks."""

import collections
from collections.abc import Iterable, Sequence


def blocks(indices: Iterable[int], stack: int) -> tuple[tuple[int, ...], ...]:
    """Group indices into blocks: those with the same index // stack, in increasing order.

    Args:
        indices: Indices of replicates or scoring networks.
        stack: R, the number of networks of a stack.

    Returns:
        The blocks, in the order in which the indices name them. A block may lack some of its indices.
    """
    found: dict[int, list[int]] = collections.defaultdict(list)
    for index in indices:
        found[index // stack].append(index)
    return tuple(tuple(sorted(block)) for block in found.values())


def fills_blocks(replicates: Sequence[int], stack: int) -> bool:
    """Whether no block of some replicates lacks an index."""
    return all(len(block) == stack for block in blocks(replicates, stack))


def largest_stack(replicates: Sequence[Sequence[int]], ranks: int, most: int) -> int:
    """Largest R that replicates can train with.

    Args:
        replicates: Indices of the replicates of each arm of a launch.
        ranks: Number of ranks, each of which needs a block.
        most: Upper limit of R.

    Returns:
        The largest R, up to `most`, whose blocks the replicates fill, with at least one block per rank; else 1.
    """
    return max(
        (
            stack
            for stack in range(1, most + 1)
            if all(fills_blocks(indices, stack) for indices in replicates)
            if sum(map(len, replicates)) // stack >= ranks
        ),
        default=1,
    )


def blocks_problem(replicates: Sequence[int], stack: int, most: int) -> str:
    """Say which replicates would fill their blocks; an empty string if these do.

    Args:
        replicates: Indices of the replicates.
        stack: R, the number of replicates of a block.
        most: Largest number of replicates that a configuration may have.
    """
    if fills_blocks(replicates, stack):
        return ""
    smaller = largest_stack([replicates], 1, stack)
    remedy = f", or use stack = {smaller}" if smaller > 1 else ", or use stack = 1"
    count = len(replicates)
    if sorted(replicates) == list(range(count)):
        below = count // stack * stack
        fitting = [str(number) for number in (below, below + stack) if 0 < number <= most]
        return f"must fill blocks of stack = {stack}, such as replicates = {' or '.join(fitting)}{remedy}"
    block = next(block for block in blocks(replicates, stack) if len(block) < stack)
    first = block[0] // stack * stack
    missing = [str(index) for index in range(first, first + stack) if index not in block]
    return (
        f"must fill blocks of stack = {stack}: the block {first} to {first + stack - 1} lacks {', '.join(missing)}"
        f"{remedy}"
    )
