"""The steps `student` and `export`: the encoder that training starts from, and what it leaves."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, field_validator

from cluster.artifacts import Json
from cluster.errors import TokayError, UserError
from cluster.steps import Step, StepContext
from cluster.storage import join
from pipelines.encoders import MODEL, TRAINED, EncoderConfig, load_encoder
from pipelines.fingerprints import NotFingerprinted, fingerprinted

if TYPE_CHECKING:
    from actors.encoder import Encoder
    from cluster.storage import Storage
    from pipelines.recipe.recipe import Recipe

TITLE = "make the student"
MIN_PARITY = 0.9999


class StudentConfig(EncoderConfig):
    """The encoder that training starts from."""

    dtype: Annotated[Literal["float32", "bfloat16", "float16", "auto"], NotFingerprinted] = Field(
        default="auto", description="in evaluation and index; training keeps float32 weights"
    )
    layers: tuple[int, ...] | None = Field(
        default=None, description="keep only these layers of the model, from 0"
    )
    pooling: Literal["mean", "cls", "lasttoken"] | None = Field(
        default=None, description="the model's own if null; mean for a bidirectional decoder"
    )
    bidirectional: bool = Field(
        default=False, description="let every token of a decoder see those behind it too"
    )
    projection: int | None = Field(
        default=None, ge=1, description="dimensions of a linear layer behind the pooling"
    )

    @field_validator("layers")
    @classmethod
    def _rise(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers is not None and (
            not layers or list(layers) != sorted({*layers}) or layers[0] < 0
        ):
            raise ValueError("give rising indices from 0, such as [0, 2, 5]")
        return layers


def step(recipe: Recipe) -> Step:
    """Returns the step."""
    return Step(
        name="student",
        title=TITLE,
        config=fingerprinted(recipe.student),
        inputs=(),
        work=lambda context: make_student(recipe.student, context),
    )


def make_student(config: StudentConfig, context: StepContext) -> dict[str, Json]:
    """Saves the starting point, so that `before` and `after` are files of the same kind.

    Raises:
        UserError: The model cannot be cut, seen through or pooled so.
    """
    encoder = load_student(config)
    parts = [f"`{config.model}`"]
    parts += [f"layers {list(config.layers)}"] if config.layers is not None else []
    parts += [f"a projection to {config.projection} dimensions"] if config.projection else []
    parts += ["bidirectional attention"] if config.bidirectional else []
    parts.append(f"{encoder.pooling} pooling")
    _save(encoder, f"# Student before training\n\nMade of {', '.join(parts)}.\n", context.storage)
    return {
        "num_parameters": encoder.num_parameters,
        "dimensions": encoder.dimensions,
    }


def load_student(config: StudentConfig) -> Encoder:
    """Loads the model and makes the student of it.

    Raises:
        UserError: The model cannot be cut, seen through or pooled so.
    """
    from actors.encoder import add_projection, cut_layers, see_both_ways

    weights = config.model_copy(update={"dtype": "float32"})  # to be trained
    encoder = load_encoder(weights, device="cpu")  # by workers; here is the driver
    try:
        if config.layers is not None:
            encoder = cut_layers(encoder, config.layers)
    except ValueError as error:
        raise UserError(f"student.layers: {error}") from error
    try:
        if config.bidirectional:
            see_both_ways(encoder)
    except ValueError as error:
        raise UserError(f"student.bidirectional: {error}") from error
    encoder.pooling = config.pooling or ("mean" if config.bidirectional else encoder.pooling)
    if config.projection is not None:
        add_projection(encoder, config.projection)
    return encoder


def export_student(
    recipe_name: str, student: StudentConfig, parity_texts: list[str], context: StepContext
) -> dict[str, Json]:
    """Writes the trained student as a sentence-transformers folder and proves its parity.

    Raises:
        TokayError: Somebody who runs the folder gets other vectors than the trained encoder's.
    """
    from actors.encoder import Encoder
    from actors.parity import DIFFICULT, ParityText, check_parity

    training = context.input("training")
    trust = student.trust_remote_code
    encoder = Encoder.load(join(training.uri, TRAINED), device="cpu", trust_remote_code=trust)
    sizes = training.manifest.config["loss"]["matryoshka_dimensions"]
    fret = context.input("fret").manifest.metrics
    sets: dict[str, int] = {}
    for name in ("prefinetuning_mixture", "mixture"):
        if name in context.inputs:
            sets |= context.inputs[name].manifest.metrics["sets"]
    card = _model_card(recipe_name, student.model, encoder, sizes, fret, sets)
    texts = [*DIFFICULT, *(ParityText(kind="passage", text=text) for text in parity_texts)]
    with tempfile.TemporaryDirectory() as temporary:
        encoder.save(temporary, model_card=card)
        agreements = check_parity(
            temporary, texts, dimensions=sizes, trained=encoder, trust_remote_code=trust
        )
        worst = min(agreements, key=lambda each: each.cosine)
        if not worst.cosine >= MIN_PARITY:
            raise TokayError(
                f"the export differs from the trained encoder: {worst.way} gives a {worst.kind}"
                f" text's vector, at {worst.dimensions} dimensions, a cosine of"
                f" {worst.cosine:.5f} with ours, and {MIN_PARITY} is asked for"
            )
        _upload(Path(temporary), context.storage)
    return {"parity_cosine": round(worst.cosine, 6), "dimensions": encoder.dimensions}


def _save(encoder: Encoder, card: str, storage: Storage) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        encoder.save(temporary, model_card=card)
        _upload(Path(temporary), storage)


def _upload(folder: Path, storage: Storage) -> None:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            storage.upload(file, f"{MODEL}/{file.relative_to(folder).as_posix()}")


def _model_card(
    recipe_name: str,
    base_model: str,
    encoder: Encoder,
    sizes: list[int],
    fret: dict[str, Json],
    sets: dict[str, int],
) -> str:
    smaller = sorted((size for size in sizes if size < encoder.dimensions), reverse=True)
    cut = ""
    if smaller:
        cut = f"""
The first {" or ".join(map(str, smaller))} dimensions were trained to be used alone (Matryoshka):
cut the vectors and normalise them again, or give `truncate_dim={smaller[0]}`.
"""
    trained_on = ", ".join(f"{name} ({rows} examples)" for name, rows in sets.items())
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
base_model: {json.dumps(base_model)}
datasets: {json.dumps(list(sets))}
tags: [sentence-transformers, feature-extraction, tokay]
---

# A text-embedding model distilled with Tokay

Recipe `{recipe_name}`; {encoder.dimensions} dimensions, at most {encoder.max_tokens} tokens,
{encoder.pooling} pooling, unit vectors. Started from `{base_model}`.
{cut}
Trained on: {trained_on}. FRet examples were written and labelled by a large language model
(Gecko, arXiv 2403.20327): {fret["num_queries"]} queries, {fret["num_kept"]} kept. Queries that
overlap with the run's {fret["num_evaluation_queries"]} evaluation queries were taken out; the
highest word overlap left is {fret["highest_overlap_kept"]}.

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH/TO/THIS/FOLDER")
embeddings = model.encode(["a passage", "another"])
```

Query format: `{encoder.templates.query}`; passage format: `{encoder.templates.passage}`.
"""
