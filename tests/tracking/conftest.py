import pytest
from tracking.runs import create_run


@pytest.fixture
def run(tiny):
    """The directory of a small run without training."""
    return create_run(tiny())
