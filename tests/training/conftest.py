import pytest

from lth_diet.config import loading
from lth_diet.data import catalog
from lth_diet.data.loader import EvaluationLoader, Loader
from lth_diet.networks.classifier import build_classifier
from lth_diet.runs.block import BlockPhase
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.training import trainer
from lth_diet.training.progress import Progress


@pytest.fixture
def phase(place):
    return PhaseDirectory(place / "level_0")


@pytest.fixture
def train(phase, tiny):
    """Trains a small classifier through `trainer.train`."""

    def run(schedule, algorithms=(), overrides=(), model=None, sync=lambda: None):
        settings = loading.load_config(tiny(), overrides)
        data = catalog.load("digits", "unused")
        model = model or build_classifier(8, 10, width=2, channels=1, seed=1)
        loader, evaluation = Loader(data, 8, 1, 2), EvaluationLoader(data, data.test)
        block, progress = BlockPhase([phase]), Progress([0], 0)
        return trainer.train(model, loader, evaluation, schedule, algorithms, block, settings, progress, sync)[0]

    return run
