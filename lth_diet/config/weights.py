"""Number of weights that each level of a run has, from its configuration alone."""

from lth_diet.config.schema import Config
from lth_diet.data import catalog
from lth_diet.masks.counts import count_remaining
from lth_diet.networks.counts import count_weights


def remaining_weights(config: Config) -> list[int]:
    """Number of remaining weights at levels 0 to `prune.levels`, or to the first level that has none.

    Args:
        config: The configuration.
    """
    data = catalog.info(config.dataset.name, config.dataset.root)
    weights = count_weights(config.model.depth, data.classes, config.model.width, data.channels)
    return count_remaining(weights, config.prune.fraction, config.prune.levels)


def levels_problem(config: Config) -> str:
    """Say what is wrong with `prune.levels` if a level has no weights; else return an empty string."""
    remaining = remaining_weights(config)
    if remaining[-1]:
        return ""
    last = len(remaining) - 2
    return (
        f"must be at most {last} for prune.fraction: {config.prune.fraction}, which leaves {remaining[last]:,} of "
        f"{remaining[0]:,} weights at level {last} and none at the next"
    )
