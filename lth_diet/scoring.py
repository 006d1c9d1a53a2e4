"""EL2N scoring: trains K networks and measures the score of every training example (paper, appendix A)."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from safetensors.numpy import save as save_tensors
from torch import nn

from lth_diet.config.run_ids import scores_identity
from lth_diet.config.schema import Config
from lth_diet.data import catalog, seeds
from lth_diet.data.loader import EvaluationLoader
from lth_diet.errors import UserError
from lth_diet.files import LockedError, read_json, remove_partial_files
from lth_diet.runs.block import BlockPhase
from lth_diet.runs.environment import versions
from lth_diet.runs.phase_directory import PhaseDirectory
from lth_diet.runs.scores_directory import ScoresDirectory
from lth_diet.scores import artifact
from lth_diet.scores.artifact import Scores
from lth_diet.scores.el2n import el2n
from lth_diet.scores.summary import ScoredExamples
from lth_diet.training import trainer
from lth_diet.training.builders import Builder
from lth_diet.training.progress import Progress

_LOCK_TIMEOUT = 10.0  # seconds to wait for each network that another process is training


class Scoring:
    """Computes the EL2N scores of a data set.

    Any number of processes may run it at the same time. Each locks the network that it trains. If a process dies,
    another one resumes its network from the last checkpoint.

    Args:
        config: Configuration with the scoring settings.
        progress: Receives progress, results and warnings.
        track: Called after networks and checkpoints to send new results to MLflow.
        order: Numbers of the blocks of networks (`Config.scoring_blocks`) in the order in which to train them: 0 to
            K - 1 with `stack: 1`.
    """

    def __init__(self, config: Config, progress: Progress, track: Callable[[], None], order: Sequence[int]):
        self.config = config
        self.folder = ScoresDirectory(config)
        self.builder = Builder(config, "all")
        self.progress = progress
        self.track = track
        self.order = order

    def run(self) -> None:
        """Train networks until the scores are complete, here or in another process."""
        timeout = 0.0
        while not (self.folder.done or all(network.done for network in self.folder.networks())):
            if any(self.train(number, timeout) for number in self.order):
                timeout = 0.0
            elif not timeout:
                timeout = _LOCK_TIMEOUT
                self.progress.log(f"{self.folder.store}: waiting for networks that other processes are training")
            self.folder.store.refresh_index()
        with self.folder.store.lock(timeout=-1):
            if not self.folder.done:
                remove_partial_files(self.folder.path)
                for number in range(self.config.scores.networks):
                    self.clean_up(number)
                self.combine()
            else:
                self.check_networks()
                if not self.has_pictures:
                    self.save_pictures(self.folder.load(self.labels))
            self.folder.store.upload()
        self.track()  # sends what an earlier launch could not send

    def train(self, number: int, timeout: float = 0.0) -> bool:
        """Train one block of networks and score all training examples with each of them.

        Args:
            number: Number of the block.
            timeout: Seconds to wait for the lock, as for `RunStore.lock`.

        Returns:
            False if its networks are finished already or another process is training them.
        """
        stores = [self.folder.network_store(network) for network in self.config.scoring_blocks[number]]
        phases = [PhaseDirectory(store.path, store.upload) for store in stores]
        if all(phase.done for phase in phases):
            return False
        try:
            with contextlib.ExitStack() as locks:
                for store in stores:
                    locks.enter_context(store.lock(timeout))
                block = BlockPhase(phases)
                if block.done:
                    return False
                for phase in phases:
                    remove_partial_files(phase.path)
                results = self._train(block)
        except LockedError:
            return False
        for k, result in results.items():
            self.progress.report_accuracy(phases[k].name, "scoring", result["test_accuracy_percent"])
            self.progress.set_state(phases[k].name, "done")
        self.track()
        return True

    def _train(self, block: BlockPhase) -> dict[int, dict[str, Any]]:
        builder, settings = Builder(self.config, *(phase.name for phase in block.phases)), self.config.train
        model, data = builder.build_network(), builder.noisy_data
        loader, evaluation_loader = builder.build_loader(data), builder.build_evaluation_loader(data.test)
        schedule = trainer.Schedule(0, self.config.scores.steps, settings.lr, settings.milestones)
        self.progress.start_phase([block.phases[k].name for k in block.training], "scoring")
        results = trainer.train(
            model, loader, evaluation_loader, schedule, [], block, self.config, self.progress, self.track
        )
        outputs = probabilities(model.module, builder.build_evaluation_loader(data.train), len(block))
        for k in sorted(results, reverse=True):  # last the first, which has the checkpoint of all
            phase, scores = block.phases[k], el2n(outputs[:, k], data.train.labels).astype(np.float32)
            phase.write("el2n.safetensors", save_tensors({"el2n": scores}))
            phase.finish({"network": int(phase.name.partition("_")[2]), **results[k]})
        return results

    def clean_up(self, number: int) -> None:
        """Download a finished network and remove what a killed or suspended process left."""
        store = self.folder.network_store(number)
        with store.lock(timeout=-1):
            network = PhaseDirectory(store.path)
            network.remove_stale_checkpoints()
            if network.repair_curve():
                self.progress.log(
                    f"warning: {network.path / 'curve.jsonl'}: removed rows that a suspended process had appended"
                )
            store.upload()

    def check_networks(self) -> None:
        """Repair the curves of finished networks, and warn of damaged files: the finished scores do not need them."""
        for network in [] if self.folder.store.is_remote else self.folder.networks():
            if network.done and network.damaged():
                self.clean_up(int(network.name.partition("_")[2]))
            for path in network.damaged() if network.done else ():
                self.progress.log(f"warning: {path}: missing or damaged; `python -m lth_diet verify` says what to do")

    def combine(self) -> None:
        """Write the scores of all networks as one artifact."""
        networks = self.folder.networks()
        values = np.stack([load_file(network.verified("el2n.safetensors"))["el2n"] for network in networks])
        self.save_pictures(Scores(values, {}))
        artifact.save_scores(
            self.folder.path,
            values,
            self.labels,
            self.config.dataset.name,
            catalog.info(self.config.dataset.name, self.config.dataset.root).fingerprint,
            label_noise=self.config.pretrain.label_noise,
            seed=self.config.seed,
            network_seeds=[seeds.derive_seed(self.config.seed, network.name, "init") for network in networks],
            model=self.config.model_name,
            networks=len(networks),
            steps=self.config.scores.steps,
            test_accuracy_percent=[network.result()["test_accuracy_percent"] for network in networks],
            identity=scores_identity(self.config),
            versions=versions(),
        )

    @property
    def labels(self) -> np.ndarray:
        """Labels of the training examples, with the configured label noise."""
        return self.builder.noisy_data.train.labels

    @property
    def has_pictures(self) -> bool:
        """Whether the pictures and statistics of the scores are complete."""
        try:
            return bool(read_json(self.folder.path / "examples/summary.json"))
        except UserError:
            return False

    def save_pictures(self, scores: Scores) -> None:
        """Write the pictures and statistics of the scores; an error in drawing is only a warning."""
        from lth_diet.scores.pictures import save_scores_pictures  # imports matplotlib, which is slow

        examples = ScoredExamples(self.builder.data, self.labels, scores)
        with self.progress.warn_on_error("cannot draw the pictures of the scores"):
            save_scores_pictures(self.folder.path / "examples", examples)


@torch.no_grad()
def probabilities(network: nn.Module, images: EvaluationLoader, count: int = 1) -> np.ndarray:
    """Softmax outputs in evaluation mode of a stack of `count` networks, float64 of shape (N, count, classes).

    The networks run in single precision, without bf16 or TF32. The softmax is in double precision: in single
    precision, the probabilities of the easiest examples would all round to 1.
    """
    network.eval()
    with without_tf32():
        outputs = [network(batch).unflatten(1, (count, -1)).double().softmax(2).cpu() for batch, _ in images]
    return torch.cat(outputs).numpy()


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Disable TF32, which Composer enables on GPUs."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    previous = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, previous, strict=True):
            backend.allow_tf32 = allowed
