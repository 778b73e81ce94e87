"""What a recipe may say about the mixture."""

from pydantic import BaseModel, ConfigDict, Field


class LabelledSet(BaseModel):
    """Human-labelled pairs or triples: JSONL rows of `query`, `positive` and maybe `negative`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    path: str
    task: str = "search result"
    symmetric: bool = Field(
        default=False, description="targets are formatted like queries (STS, NLI, classification)"
    )
    weight: float | None = Field(
        default=None, gt=0, description="share of batches against the other sets; default: rows"
    )


class MixtureConfig(BaseModel):
    """What is mixed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fret_weight: float | None = Field(default=None, gt=0, description="default: its rows")
    labelled: tuple[LabelledSet, ...] = ()
    seed: int = 0
