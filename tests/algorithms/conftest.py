import pytest
import torch
from composer import Trainer
from torch.utils.data import DataLoader, TensorDataset

from lth_diet.masks.mask import prunable
from lth_diet.networks.classifier import build_classifier


@pytest.fixture
def examples():
    """48 examples with labels 0 to 9 in turn."""
    random = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(48, 3, 8, 8, generator=random), torch.arange(48) % 10)


@pytest.fixture
def trainer(examples):
    """Build a Composer Trainer with a PyTorch DataLoader, by default of 6 batches of 8 per epoch."""
    trainers = []

    def build(algorithms, steps=6, model=None, loader=None, callbacks=(), scheduler=None, **options):
        model = model or build_classifier(8, 10, width=2, seed=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
        loader = DataLoader(examples, batch_size=8) if loader is None else loader
        if scheduler:
            options = {"schedulers": scheduler(optimizer), "step_schedulers_every_batch": True} | options
        trainers.append(
            Trainer(
                model=model,
                train_dataloader=loader,
                max_duration=f"{steps}ba",
                optimizers=optimizer,
                algorithms=algorithms,
                callbacks=list(callbacks),
                device="cpu",
                seed=0,
                progress_bar=False,
                **options,
            )
        )
        return trainers[-1]

    yield build
    for built in trainers:
        built.close()


@pytest.fixture
def half():
    """A mask that keeps about half of the weights of `build_classifier(8, 10, width=2)`."""
    random = torch.Generator().manual_seed(2)
    weights = prunable(build_classifier(8, 10, width=2).module)
    return {name: torch.rand(weight.shape, generator=random) < 0.5 for name, weight in weights.items()}
