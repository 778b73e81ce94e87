"""What a recipe may say about training.

The paper (arXiv 2403.20327) reports neither optimizer, learning rate, temperature, batch size nor
lengths; those defaults are ours, chosen for a three-layer student cut from MiniLM on two cores.
Options beyond the paper name where they come from and are off.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from cluster.config import Config
from pipelines.fingerprints import NotFingerprinted


class LossConfig(Config):
    """Gecko's equation 3, term by term, and what later work added; see `training/loss.py`."""

    contrastive_weight: float = Field(
        default=1,
        ge=0,
        description="of equation 3 (CADET: 0.1 beside lists of scored candidates); 0 leaves it out",
    )
    temperature: float = Field(default=0.05, gt=0, description="GTR used 0.01; the paper is silent")
    in_batch_negatives: bool = Field(
        default=True, description="the batch's other positives are negatives"
    )
    hard_negatives: bool = Field(default=True, description="an example's own are negatives")
    same_tower_negatives: Literal["all", "symmetric", "none"] = Field(
        default="all",
        description="the batch's other queries are negatives: in every batch (equation 3), in those"
        " of symmetric sets, or never (Gemini Embedding)",
    )
    mask_duplicates: bool = Field(
        default=False,
        description="an example with the same query or positive is no negative (Gemini Embedding)",
    )
    mask_margin: float | None = Field(
        default=None,
        ge=0,
        description="an in-batch or same-tower negative more similar than the positive by more than"
        " this is none (Qwen3-Embedding: 0.1)",
    )
    matryoshka_dimensions: tuple[int, ...] = Field(
        default=(),
        description="also train the first so many dimensions; Gecko: 256 beside the full 768",
    )
    matryoshka_weights: tuple[float, ...] = Field(
        default=(), description="of each of them; the full size weighs 1; default: all 1"
    )
    hardness: float = Field(
        default=0,
        ge=0,
        description="weigh an own hard negative by e^(hardness x its similarity)"
        " (EmbeddingGemma: 5)",
    )
    spread_out_weight: float = Field(
        default=0,
        ge=0,
        description="of the mean squared similarity of different queries and of different"
        " positives (EmbeddingGemma)",
    )
    distillation_weight: float = Field(
        default=0,
        ge=0,
        description="of the KL divergence from the fused scores of the positive and the negatives"
        " (KaLM-Embedding-V2); with fret.negative: all, of all scored candidates (CADET)",
    )
    teacher_temperature: float = Field(
        default=0.5,
        gt=0,
        description="divides the fused scores: sums of 1 / rank, above 0 and at most 1 a judge, or"
        " with fret.scale: z-scores some -2 to 2 a judge, for which 1 is usual",
    )
    anchor_weight: float = Field(
        default=20,
        ge=0,
        description="with mixture.fixed_passages, of the mean 1 - cosine between anchored passages"
        " and the vectors that they keep",
    )
    student_temperature: float | None = Field(
        default=None,
        gt=0,
        description="divides the student's similarities in that divergence; default: temperature",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        weights, dimensions = self.matryoshka_weights, self.matryoshka_dimensions
        if weights and len(weights) != len(dimensions):
            raise ValueError(
                f"matryoshka_weights: {len(weights)} given for {len(dimensions)}"
                " matryoshka_dimensions; give one for each"
            )
        if any(weight <= 0 for weight in weights) or any(size < 1 for size in dimensions):
            raise ValueError("matryoshka_dimensions and matryoshka_weights must be above 0")
        contrast = self.contrastive_weight and (self.in_batch_negatives or self.hard_negatives)
        if not (contrast or self.distillation_weight):
            raise ValueError(
                "loss has nothing to learn from: give a distillation_weight, or a"
                " contrastive_weight with in_batch_negatives or hard_negatives"
            )
        return self


class ValidationConfig(Config):
    """How the training is watched, on the mixture's held-out examples and on a test set."""

    every_batches: int = Field(default=100, ge=1, description="and at the end")
    test_set: str | None = Field(
        default=None, description="name of a retrieval set of the recipe's evaluation: nDCG@10"
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="stop after so many looks without a better one, and take the best weights;"
        " judged by the test set if there is one, else by the held-out loss",
    )


class LoraConfig(Config):
    """Low-rank adapters: train few weights beside the model's own; see `training/lora.py`."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32, gt=0, description="an adapter's part weighs alpha / rank")
    dropout: float = Field(
        default=0, ge=0, lt=1, description="of an adapter's input, where training.dropout is on"
    )
    target: Literal["all-linear"] | tuple[str, ...] = Field(
        default="all-linear",
        description="names, or ends of names, of the linear layers that get one",
    )


class TrainerConfig(Config):
    """A training of the student, whatever it learns."""

    epochs: float = Field(default=3, gt=0)
    batch_size: int = Field(default=32, ge=2, description="examples in a batch, over all workers")
    learning_rate: float = Field(default=1e-4, gt=0, description="highest, after the warm-up")
    warmup_ratio: float = Field(
        default=0.1, ge=0, lt=1, description="share of batches with a rising learning rate"
    )
    weight_decay: float = Field(default=0.01, ge=0)
    max_gradient_norm: float = Field(default=1.0, gt=0)
    max_query_tokens: int = Field(default=64, ge=8)
    max_passage_tokens: int = Field(default=256, ge=8)
    dropout: bool = Field(default=True, description="use the model's own dropout")
    precision: Literal["float32", "bfloat16", "auto"] = Field(
        default="float32",
        description="of the matrix products, weights stay float32; auto is bfloat16 where the "
        "hardware multiplies it faster",
    )
    gradient_cache_tokens: Annotated[int | Literal["auto"] | None, NotFingerprinted] = Field(
        default="auto",
        description="keep the activations of only so many tokens at a time, and compute them twice"
        " (GradCache), for batches larger than memory; auto: as many as a trial finds to fit the"
        " GPU, all on a CPU. Halved where memory runs out",
    )
    gradient_checkpointing: Annotated[bool, NotFingerprinted] = Field(
        default=False, description="keep each layer's input alone, and compute the layer twice"
    )
    lora: LoraConfig | None = Field(
        default=None, description="train adapters and, if there is one, the projection alone"
    )
    soup_checkpoints: int = Field(
        default=1, ge=1, description="average the weights of the last so many checkpoints"
    )
    soup_every_batches: int | None = Field(
        default=None, ge=1, description="how far apart those are; default: a tenth of the batches"
    )
    soup_trainings: int = Field(
        default=1,
        ge=1,
        description="divide the batches among so many trainings, each from the start, and average"
        " their last weights (Model Soups)",
    )
    validation: ValidationConfig | None = None
    seed: int = 0
    num_workers: Annotated[int, NotFingerprinted] = Field(
        default=1, ge=1, description="Ray Train workers, one GPU each if any"
    )
    min_workers: Annotated[int | None, NotFingerprinted] = Field(
        default=None, ge=1, description="go on with so few after losing workers; default: wait"
    )
    use_gpu: Annotated[bool, NotFingerprinted] = False
    sharding: Annotated[Literal["none", "fsdp2"], NotFingerprinted] = Field(
        default="none",
        description="fsdp2: each of several workers keeps its share of weights, gradients and"
        " optimizer state alone",
    )
    node_resource: Annotated[str | None, NotFingerprinted] = Field(
        default=None, description="custom resource that steers workers to one node type"
    )
    checkpoint_every_batches: Annotated[int, NotFingerprinted] = Field(
        default=100, ge=1, description="what a crash can cost; changes no number"
    )
    max_failures: Annotated[int, NotFingerprinted] = Field(
        default=2, ge=0, description="restarts from the last checkpoint after a lost worker"
    )
    tracking: Annotated[tuple[Literal["tensorboard", "mlflow", "wandb"], ...], NotFingerprinted] = (
        Field(default=("tensorboard",), description="beside metrics.jsonl")
    )

    @field_validator("gradient_cache_tokens")
    @classmethod
    def _is_enough(cls, tokens: int | str | None) -> int | str | None:
        if isinstance(tokens, int) and tokens < 64:
            raise ValueError("give at least 64, auto or null")
        return tokens

    @model_validator(mode="after")
    def _has_one_soup(self) -> Self:
        if self.soup_trainings > 1 and self.soup_checkpoints > 1:
            raise ValueError("give soup_trainings or soup_checkpoints, not both")
        if self.soup_trainings > 1 and self.validation and self.validation.patience:
            raise ValueError(
                "soup_trainings goes through all batches: leave out validation.patience"
            )
        return self


class TrainingConfig(TrainerConfig):
    """Contrastive training of the student."""

    loss: LossConfig = LossConfig()
