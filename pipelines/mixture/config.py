"""What a recipe may say about the mixture."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from cluster.config import Config
from pipelines.datasets.labelled_sets import LabelledSet
from pipelines.fingerprints import NotFingerprinted


class SetsConfig(Config):
    """Which sets are mixed, and how often each is drawn."""

    labelled: tuple[LabelledSet, ...] = ()
    temperature: float = Field(
        default=1.0,
        gt=0,
        description="a set without a weight of its own has rows^(1/temperature): 1 draws by rows,"
        " more evens the sets out",
    )
    validation_examples: int = Field(
        default=0, ge=0, description="held out of training, from all sets by their weights"
    )
    max_reject_share: Annotated[float, NotFingerprinted] = Field(
        default=0.1, ge=0, le=1, description="of a labelled set's rows that may be unreadable"
    )
    seed: int = 0

    @field_validator("labelled")
    @classmethod
    def _named_apart(cls, sets: tuple[LabelledSet, ...]) -> tuple[LabelledSet, ...]:
        names = [labelled.name for labelled in sets]
        if len(set(names)) < len(names):
            raise ValueError(f"two labelled sets have one name: {names}; give each its own")
        return sets


class FixedPassagesConfig(Config):
    """Training of queries alone, towards passages that keep the retriever's vectors."""

    anchor_share: float = Field(
        default=0.375,
        ge=0,
        description="passages beside each query of a batch that are read in full and held to their"
        " vectors, by training.loss.anchor_weight",
    )
    max_passages: int = Field(
        default=100_000, ge=1, description="to draw those from, by a hash if there are more"
    )


class MixtureConfig(SetsConfig):
    """What the fine-tuning mixes: FRet and labelled sets."""

    fret_weight: float | None = Field(
        default=None, ge=0, description="default: its rows; 0 leaves it out"
    )
    fret_max_rows: int | None = Field(default=None, ge=1, description="drawn, if there are more")
    fret_only_tasks: tuple[str, ...] = Field(
        default=(), description="leave out FRet's examples of other tasks"
    )
    fret_tasks: Literal["rows", "uniform"] = Field(
        default="rows",
        description="uniform: each of FRet's tasks is drawn equally often, which was best in Gecko",
    )
    fixed_passages: FixedPassagesConfig | None = Field(
        default=None,
        description="train queries alone, by lists of the vectors that the retriever's index has;"
        " a list is all candidates. The student must begin in the retriever's space",
    )


class PrefinetuningMixtureConfig(SetsConfig):
    """What the pre-finetuning mixes: labelled sets alone, question-answer and title-body pairs."""

    labelled: tuple[LabelledSet, ...] = Field(min_length=1)


class TextsConfig(Config):
    """Which texts the student learns the teacher's vectors of; no label is read."""

    max_passages: int = Field(
        default=100_000, ge=1, description="of the corpus, drawn by a hash if there are more"
    )
    queries: bool = Field(
        default=True,
        description="the LLM's queries too, also those that FRet drops, but for evaluation queries",
    )
    validation_examples: int = Field(
        default=0, ge=0, description="texts held out of training; from both sets by their rows"
    )
    seed: int = 0
