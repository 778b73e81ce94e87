"""What a recipe may say about training.

The paper (arXiv 2403.20327) reports neither optimizer, learning rate, temperature, batch size nor
lengths; those defaults are ours, chosen for a three-layer student cut from MiniLM on two cores.
Options beyond the paper name where they come from and are off.
"""

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field


class TrainingConfig(BaseModel):
    """Contrastive training of the student."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # What changes the speed and not the result.
    UNFINGERPRINTED: ClassVar[tuple[str, ...]] = (
        "num_workers",
        "use_gpu",
        "checkpoint_every_batches",
        "max_failures",
        "node_resource",
    )

    epochs: float = Field(default=3, gt=0)
    batch_size: int = Field(default=32, ge=2, description="examples in a batch, over all workers")
    learning_rate: float = Field(default=1e-4, gt=0, description="highest, after the warm-up")
    warmup_ratio: float = Field(
        default=0.1, ge=0, lt=1, description="share of batches with a rising learning rate"
    )
    weight_decay: float = Field(default=0.01, ge=0)
    max_gradient_norm: float = Field(default=1.0, gt=0)
    temperature: float = Field(default=0.05, gt=0, description="GTR used 0.01; the paper is silent")
    same_tower_negatives: bool = Field(
        default=True, description="the batch's other queries are negatives (Gecko, equation 3)"
    )
    same_tower_margin: float | None = Field(
        default=None,
        ge=0,
        description="leave out same-tower negatives more similar than the positive by more than "
        "this (Qwen3-Embedding: 0.1)",
    )
    mask_duplicates: bool = Field(
        default=False,
        description="an example with the same query or positive is no negative (Gemini Embedding)",
    )
    matryoshka_dimensions: tuple[int, ...] = Field(
        default=(),
        description="also train the first so many dimensions; Gecko: 256 beside the full 768",
    )
    max_query_tokens: int = Field(default=64, ge=8)
    max_passage_tokens: int = Field(default=256, ge=8)
    dropout: bool = Field(default=True, description="use the model's own dropout")
    precision: Literal["float32", "bfloat16", "auto"] = Field(
        default="float32",
        description="of the matrix products, weights stay float32; auto is bfloat16 where the "
        "hardware multiplies it faster",
    )
    seed: int = 0
    num_workers: int = Field(default=1, ge=1, description="Ray Train workers, one GPU each if any")
    use_gpu: bool = False
    node_resource: str | None = Field(
        default=None, description="custom resource that steers workers to one node type"
    )
    checkpoint_every_batches: int = Field(default=100, ge=1)
    max_failures: int = Field(
        default=2, ge=0, description="restarts from the last checkpoint after a lost worker"
    )
