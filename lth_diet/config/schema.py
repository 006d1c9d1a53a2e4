"""The schema of a configuration: its sections and keys, with their types, ranges and defaults."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from lth_diet.config.fields import (
    Count,
    Index,
    Interval,
    NotNegative,
    Positive,
    Real,
    Section,
    Steps,
    Text,
    replicate_indices,
    resnet_depth,
)

Arm = Literal["init", "all", "random", "easy", "hard"]


class Dataset(Section):
    name: Literal["cifar10", "cifar100", "cinic10", "image_folder", "digits"]
    root: Text = "data"
    """Folder of the data; downloads go there. Not identity: an image folder enters by its fingerprint."""


class Model(Section):
    depth: Annotated[int, BeforeValidator(resnet_depth)]
    width: Annotated[Count, Field(le=1024)] = 16
    """Channels of the first stage; the next have two and four times as many."""


class Subset(Section):
    size: Count
    class_balanced: Annotated[bool, Field(strict=True)] = False
    """Of easy and hard; a random subset is always balanced (paper, section 3)."""
    offset: Index = 0
    """Skip that many of the easiest or hardest."""


class Pretrain(Section):
    steps: Steps = 0
    """t_r, the rewind step, in batches; it counts towards train.steps."""
    lr: Positive = 0.4
    subset: Subset | None = None
    label_noise: Annotated[Real, Field(ge=0, le=1)] = 0.0
    """Fraction of the training labels drawn anew, during pre-training only."""


class Train(Section):
    steps: Interval
    """T, in batches: a level trains from t_r to T."""
    batch_size: Count
    lr: Positive = 0.1
    momentum: Annotated[Real, Field(ge=0, lt=1)] = 0.9
    weight_decay: NotNegative = 1e-4
    milestones: tuple[Steps, ...] = ()
    """Absolute steps at which the learning rate is multiplied by gamma."""
    gamma: Positive = 0.1


class Prune(Section):
    fraction: Annotated[Real, Field(gt=0, lt=1)] = 0.2
    """Share of the surviving weights that one pruning removes."""
    levels: Index = 20
    """N prunings, N + 1 trainings."""


class Scores(Section):
    """EL2N, of the easy and hard arms; networks train as `train` says, without pre-training."""

    networks: Count = 10
    """K, from different initialisations."""
    steps: Interval = 7800
    """t, after which they are evaluated."""
    file: Text | None = None
    """A scores.safetensors to use instead; it enters the identity by its sha256."""


class Intervals(Section):
    log: Interval = 100
    checkpoint: Interval = 1000
    evaluate: Steps = 0
    """Batches between evaluations inside a phase; 0: only at its end."""


class Config(Section):
    """One arm. The defaults are frozen: a run id hashes what differs from them, so changing one changes old ids."""

    arm: Arm
    dataset: Dataset
    model: Model
    train: Train
    pretrain: Pretrain = Pretrain()
    prune: Prune = Prune()
    scores: Scores = Scores()
    replicates: Annotated[tuple[int, ...], BeforeValidator(replicate_indices)] = (0, 1, 2, 3)
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 42
    threads: Annotated[Count, Field(le=1024)] = 1
    """CPU threads a process. Identity: sums depend on how they are split."""
    parallelism: Literal["replicates", "data"] = "replicates"
    """replicates: a rank trains replicates of its own. data: all ranks train each replicate together (DDP)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: fp32 on CPU, bf16 on GPU."""
    deterministic: Annotated[bool, Field(strict=True)] = False
    """Deterministic kernels on GPU; on CPU the same bits are promised without."""
    compile: Annotated[bool, Field(strict=True)] = False
    """Train a network that torch.compile has translated, on GPU with CUDA graphs; once a process, not once a level."""
    intervals: Intervals = Intervals()
    runs: Text = "runs"
    experiment: Text | None = None
    """MLflow experiment; the name of the dataset if none is given."""

    @property
    def rewind_step(self) -> int:
        """t_r: the step that a level starts from."""
        return 0 if self.arm == "init" else self.pretrain.steps

    @property
    def subset_size(self) -> int | None:
        """Examples seen in pre-training; None: all of them, or no pre-training."""
        return self.pretrain.subset.size if self.arm in ("random", "easy", "hard") else None

    @property
    def label_noise(self) -> float:
        """Fraction of labels drawn anew in pre-training."""
        return 0.0 if self.arm == "init" else self.pretrain.label_noise

    @property
    def experiment_name(self) -> str:
        """The MLflow experiment."""
        return self.experiment or self.dataset.name

    @property
    def arm_description(self) -> str:
        """Such as `random 2048, t_r = 200, 10 % noise`."""
        size = f" {self.subset_size}" if self.subset_size is not None else ""
        steps = f", t_r = {self.rewind_step}" if self.arm != "init" else ""
        noise = f", {100 * self.label_noise:g} % noise" if self.label_noise else ""
        return f"{self.arm}{size}{steps}{noise}"

    @property
    def model_name(self) -> str:
        return f"ResNet-{self.model.depth}" + (f" width {self.model.width}" if self.model.width != 16 else "")

    @property
    def needs_scores(self) -> bool:
        """Whether the arm chooses examples by score."""
        return self.arm in ("easy", "hard")
