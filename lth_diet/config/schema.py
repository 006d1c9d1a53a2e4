"""The schema of a configuration: its sections and keys, with their types, ranges and defaults.

The text below a key is its meaning in `python -m lth_diet keys` and docs/configuration.md. A step is one batch. Steps
may be given in epochs, such as `160ep`: an epoch has training images // train.batch_size batches, also under a subset.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from lth_diet.config.blocks import blocks
from lth_diet.config.fields import (
    MAX_LEVELS,
    Count,
    Index,
    Interval,
    NotNegative,
    PathText,
    Positive,
    Real,
    RunsText,
    Section,
    Steps,
    Text,
    replicate_indices,
    resnet_depth,
)
from lth_diet.data.dataset import NATIVE_SIZES, flips_by_default

Arm = Literal["init", "all", "random", "easy", "hard"]


class Dataset(Section):
    """The dataset to train and test on."""

    name: Literal["cifar10", "cifar100", "cinic10", "image_folder", "digits"]
    """Dataset: cifar10, cifar100, cinic10, digits (8 x 8 pixels, needs no download), or image_folder."""
    root: PathText = "data"
    """Folder of the dataset, where downloads go. The run id depends on the images in an image folder."""
    size: Annotated[Count, Field(ge=4, le=1024)] | None = None
    """Pixels per side: images are scaled, by averaging, and their center is cropped. None keeps them as they are."""
    flip: Annotated[bool, Field(strict=True)] | None = None
    """Whether training images are flipped horizontally at random. None: yes, but not for digits."""

    @model_validator(mode="before")
    @classmethod
    def _drop_defaults(cls, values: Any) -> Any:
        """Values that change nothing count as not given: they must not change the run id."""
        if not isinstance(values, dict) or not isinstance(values.get("name"), str):
            return values
        unchanged = {"size": NATIVE_SIZES.get(values["name"]), "flip": flips_by_default(values["name"])}
        kinds = {"size": int, "flip": bool}
        without = {k: None for k, value in unchanged.items() if type(values.get(k)) is kinds[k] and values[k] == value}
        return {**values, **without}


class Model(Section):
    """The network: a ResNet for small images."""

    depth: Annotated[int, BeforeValidator(resnet_depth)]
    """Number of layers: 6n + 2, from 8 to 1202, such as 20, 32 or 56."""
    width: Annotated[Count, Field(le=1024)] = 16
    """Channels of the first stage; the second and third stages have two and four times as many."""


class Subset(Section):
    """The examples of pre-training, for the arms random, easy and hard."""

    size: Count
    """M, the number of training examples: from train.batch_size to all that remain after the offset."""
    class_balanced: Annotated[bool, Field(strict=True)] = False
    """Whether easy and hard subsets have equally many examples per class; random ones always do (paper, section 3)."""
    offset: Index = 0
    """Number of easiest (arm easy) or hardest (arm hard) examples to skip; a batch must remain."""


class Pretrain(Section):
    """Pre-training of the dense network up to the rewind step; arm init has none."""

    steps: Steps = 0
    """t_r, the rewind step: batches of pre-training, from 1 to train.steps - 1; they count towards train.steps."""
    lr: Positive = 0.4
    """Learning rate of pre-training; constant."""
    subset: Subset | None = None
    """Subset of the training examples; required by the arms random, easy and hard, ignored by the others."""
    label_noise: Annotated[Real, Field(ge=0, le=1)] = 0.0
    """Fraction of the training labels resampled uniformly over all classes for pre-training and scoring."""


class Train(Section):
    """Training of each level with SGD. Batch size, momentum and weight decay also apply to pre-training."""

    steps: Interval
    """T, the last step: each level trains from step t_r to step T."""
    batch_size: Count
    """Images per batch, from 1 to the number of training images; with parallelism: data, a multiple of the ranks."""
    lr: Positive = 0.1
    """Initial learning rate of a level."""
    momentum: Annotated[Real, Field(ge=0, lt=1)] = 0.9
    """Momentum of SGD."""
    weight_decay: NotNegative = 1e-4
    """Weight decay of SGD (L2 penalty on all parameters)."""
    milestones: tuple[Steps, ...] = ()
    """Steps, counted from 0 and increasing, at which the learning rate is multiplied by gamma."""
    gamma: Positive = 0.1
    """Factor of the learning rate at each milestone."""


class Prune(Section):
    """Iterative pruning by global weight magnitude."""

    fraction: Annotated[Real, Field(gt=0, lt=1)] = 0.2
    """Fraction of the remaining weights that each pruning removes."""
    levels: Annotated[Index, Field(le=MAX_LEVELS)] = 20
    """N, the number of prunings; there are N + 1 trainings. Not part of the run id."""


class Scores(Section):
    """EL2N scores, for the arms easy and hard: networks train as in `train`, without pre-training."""

    networks: Count = 10
    """K, the number of networks to average over, each with its own initialization."""
    steps: Interval = 7800
    """t, the number of batches that each network trains before it is evaluated."""
    file: PathText | None = None
    """Path of a scores.safetensors to use instead of computing scores. The run id depends on its content."""


class Intervals(Section):
    """How often to log, save and evaluate. Not part of the run id."""

    log: Interval = 100
    """Batches between rows of the training curve."""
    checkpoint: Interval = 1000
    """Batches between checkpoints, if they take 10 s or longer: a crash repeats at most this many batches and 10 s."""
    evaluate: Steps = 0
    """Batches between evaluations on the test set during a phase; 0 evaluates only at its end."""


class Config(Section):
    """Configuration of one arm of the experiment.

    Defaults are frozen: run ids hash the values that differ from them, so a new default would change existing ids.
    """

    arm: Arm
    """Examples of pre-training: all, or a random, easy or hard subset; init rewinds to initialization instead."""
    dataset: Dataset
    model: Model
    train: Train
    pretrain: Pretrain = Pretrain()
    prune: Prune = Prune()
    scores: Scores = Scores()
    replicates: Annotated[tuple[int, ...], BeforeValidator(replicate_indices)] = (0, 1, 2, 3)
    """Independent repetitions: a count, 1 to 1000, or a list of distinct indices, 0 or more. Not part of the run id."""
    stack: Annotated[Count, Field(le=64)] = 1
    """R, the number of replicates that train as one network; faster for small networks. Part of the run id if not 1."""
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 42
    """Seed from which all random numbers are derived."""
    threads: Annotated[Count, Field(le=1024)] = 1
    """CPU threads per process. Part of the run id, because it changes rounding."""
    parallelism: Literal["replicates", "data"] = "replicates"
    """replicates: each rank trains its own replicates. data: all ranks train each replicate together (DDP)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """fp32 (TF32 on GPUs that have it), bf16 (where the hardware has it), or auto: bf16 on such GPUs, else fp32."""
    deterministic: Annotated[bool, Field(strict=True)] = False
    """Whether to use deterministic kernels on GPU; results on CPU are deterministic in any case."""
    compile: Annotated[bool, Field(strict=True)] = False
    """Whether to use torch.compile, with CUDA graphs on GPU; compiles once per process and arm."""
    variant: Text | None = None
    """Name of a change of the code, if you make one: runs and scores of each variant have their own ids."""
    intervals: Intervals = Intervals()
    runs: RunsText = "runs"
    """Folder of the run directories, or a URL such as s3://bucket/prefix. Not part of the run id."""
    experiment: Text | None = None
    """Name of the MLflow experiment; by default that of the dataset or image folder. Not part of the run id."""

    def __repr__(self) -> str:
        return f"Config({self.dataset.name}, {self.arm_description})"

    @property
    def rewind_step(self) -> int:
        """t_r, the step from which each level trains; 0 for arm init."""
        return 0 if self.arm == "init" else self.pretrain.steps

    @property
    def subset_size(self) -> int | None:
        """Number of examples in the pre-training subset; None without a subset."""
        return self.pretrain.subset.size if self.arm in ("random", "easy", "hard") else None

    @property
    def label_noise(self) -> float:
        """Fraction of the labels resampled during pre-training; 0 for arm init."""
        return 0.0 if self.arm == "init" else self.pretrain.label_noise

    @property
    def experiment_name(self) -> str:
        """Name of the MLflow experiment."""
        folder = Path(self.dataset.root).resolve().name if self.dataset.name == "image_folder" else ""
        return self.experiment or folder or self.dataset.name

    @property
    def arm_description(self) -> str:
        """Description of the arm, such as `easy 2048, t_r = 200, 10 % noise`."""
        about, subset = (self.arm, self.subset_size, self.rewind_step, self.label_noise), self.pretrain.subset
        by_score = (subset.class_balanced, subset.offset) if self.arm in ("easy", "hard") else ()
        return describe_arm(*about, *by_score)

    @property
    def model_name(self) -> str:
        """Name of the network, such as `ResNet-20`; the width is added if it is not 16."""
        return f"ResNet-{self.model.depth}" + (f" width {self.model.width}" if self.model.width != 16 else "")

    @property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """Indices of the replicates of each block, which train together: R with the same index // R."""
        return blocks(self.replicates, self.stack)

    @property
    def scoring_blocks(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of the scoring networks that train together: R by R; the last block has what remains of K."""
        return blocks(range(self.scores.networks), self.stack)

    @property
    def needs_scores(self) -> bool:
        """Whether the arm selects examples by score."""
        return self.arm in ("easy", "hard")


def describe_arm(
    arm: str, size: int | None, rewind_step: int, label_noise: float, class_balanced: bool = False, offset: int = 0
) -> str:
    """Describe an arm, such as `easy 2048, t_r = 200, 10 % noise, balanced, offset = 100`.

    Args:
        arm: Name of the arm.
        size: Subset size; None without a subset.
        rewind_step: Rewind step t_r.
        label_noise: Fraction of resampled labels, 0 to 1.
        class_balanced: Whether an easy or hard subset has equally many examples of each class.
        offset: Number of easiest or hardest examples that the subset skips.
    """
    subset = f" {size}" if size is not None else ""
    steps = f", t_r = {rewind_step}" if arm != "init" else ""
    noise = f", {100 * label_noise:g} % noise" if label_noise else ""
    skipped = f", offset = {offset}" if offset else ""
    return f"{arm}{subset}{steps}{noise}{', balanced' * class_balanced}{skipped}"
