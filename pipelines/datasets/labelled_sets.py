"""What a recipe may say about a data set that people labelled."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from cluster.config import Config
from pipelines.fingerprints import NotFingerprinted
from pipelines.names import SetName

RUN_PASSAGES = "run:passages"
HUB = "hub:"

Kind = Literal[
    "pairs",
    "title-body",
    "nli",
    "classification",
    "clustering",
    "sts",
    "retrieval",
    "rerank",
    "multiple-choice",
    "bitext",
]

# The fields of a row of each kind: of a JSON line, a TSV's or a Parquet file's columns; of bitext,
# the names of its text files.
FIELDS: dict[str, tuple[str, ...]] = {
    "pairs": ("query", "positive", "negative", "negatives"),
    "title-body": ("title", "text"),
    "nli": ("premise", "hypothesis", "label"),
    "classification": ("text", "label"),
    "clustering": ("text", "label"),
    "sts": ("score", "sentence1", "sentence2"),
    "retrieval": (),
    "rerank": ("query", "positive", "negative"),
    "multiple-choice": ("query", "label", "a", "b", "c", "d"),
    "bitext": ("sentence1", "sentence2"),
}

# Gecko's task and symmetry of each kind, where the recipe names none.
_TASKS = {
    "nli": "semantic similarity",
    "sts": "semantic similarity",
    "bitext": "semantic similarity",
    "classification": "classification",
    "rerank": "question answering",
    "retrieval": "question answering",
    "multiple-choice": "question answering",
}
_SYMMETRIC = ("nli", "sts", "bitext", "classification", "clustering")


class LabelledSet(Config):
    """A data set that people labelled, or that labels itself (titles of texts)."""

    name: SetName
    kind: Kind = "pairs"
    path: Annotated[str, NotFingerprinted] = Field(
        description=f"a .jsonl, .tsv or .parquet file, path or s3:// URI; for retrieval a BEIR"
        f" folder; for bitext a folder with en.txt and de.txt, whose lines are translations, and"
        f" fields {{sentence1: en, sentence2: de}}; '{HUB}NAME[:CONFIG[:SPLIT]]', of the hub or a"
        f" folder, through `datasets`, where SPLIT may be as 'train[:1000]' and a retrieval set is"
        f" laid out as mteb's are; for title-body also '{RUN_PASSAGES}'"
    )
    revision: str | None = Field(default=None, description="of a hub data set: a commit or tag")
    fields: dict[str, str] = Field(
        default={}, description="its names of a row's fields, where they are others"
    )
    split: str = Field(default="train", description="of a retrieval set: which qrels")
    task: str = Field(default="", description="default: Gecko's for this kind, or 'search result'")
    symmetric: bool | None = Field(
        default=None,
        description="targets are formatted like queries; default: for nli, sts, bitext,"
        " classification and clustering",
    )
    min_score: float = Field(default=4.0, description="of an sts pair that is a positive one")
    max_negatives: int = Field(
        default=1, ge=0, description="hard negatives an example; Gecko has one"
    )
    max_rows: int | None = Field(default=None, ge=1, description="drawn, if there are more")
    weight: float | None = Field(
        default=None, gt=0, description="share of batches against the other sets; default: rows"
    )

    @field_validator("name")
    @classmethod
    def _is_not_fret(cls, name: str) -> str:
        if name == "fret":
            raise ValueError("fret is the name of the generated set; give another")
        return name

    @model_validator(mode="after")
    def _fits_the_kind(self) -> Self:
        unknown = sorted(self.fields.keys() - set(FIELDS[self.kind]))
        if unknown:
            raise ValueError(
                f"labelled set {self.name!r}: fields {unknown} given; a set of kind {self.kind} has"
                f" {', '.join(FIELDS[self.kind]) or 'none'}"
            )
        if self.path == RUN_PASSAGES and self.kind != "title-body":
            raise ValueError(
                f"labelled set {self.name!r}: {RUN_PASSAGES} is for the kind title-body, not"
                f" {self.kind}"
            )
        if self.path.startswith(HUB) and self.kind == "bitext":
            raise ValueError(
                f"labelled set {self.name!r}: a {self.kind} set is a folder; download {self.path}"
                " first, or read it as pairs"
            )
        if self.kind == "retrieval" and self.hub_name[2]:
            raise ValueError(
                f"labelled set {self.name!r}: of a retrieval set, name the split in `split`, not in"
                f" {self.path}"
            )
        return self

    @property
    def hub_name(self) -> tuple[str, str, str]:
        """The name, configuration and split of a set of the hub; the latter two may be empty."""
        name, config, split = [*self.path.removeprefix(HUB).split(":", 2), "", ""][:3]
        return (name, config, split) if self.path.startswith(HUB) else ("", "", "")

    @property
    def query_task(self) -> str:
        """The task in front of its queries."""
        return self.task or _TASKS.get(self.kind, "search result")

    @property
    def is_symmetric(self) -> bool:
        """Whether its targets are formatted like queries."""
        return self.kind in _SYMMETRIC if self.symmetric is None else self.symmetric
