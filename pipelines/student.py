"""The steps `student` and `export`: the encoder that training starts from, and what it leaves."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from cluster.artifacts import Artifact, Json
from cluster.errors import TokayError, UserError
from cluster.steps import StepContext
from cluster.storage import join
from pipelines.encoders import EncoderConfig, load_encoder

if TYPE_CHECKING:
    from actors.encoder import Encoder
    from cluster.storage import Storage

MODEL = "model"
MIN_PARITY = 0.9999


class StudentConfig(EncoderConfig):
    """The encoder that training starts from."""

    layers: tuple[int, ...] | None = Field(
        default=None, description="keep only these layers of the model, from 0"
    )


def make_student(config: StudentConfig, context: StepContext) -> dict[str, Json]:
    """Saves the starting point, so that `before` and `after` are files of the same kind."""
    from actors.encoder import cut_layers

    encoder = load_encoder(config.model_copy(update={"dtype": "float32"}))  # to be trained
    if config.layers is not None:
        try:
            encoder = cut_layers(encoder, config.layers)
        except ValueError as error:
            raise UserError(f"student.layers: {error}") from error
    card = f"# Student before training\n\nCut from {config.model}, layers {config.layers}.\n"
    _save(encoder, card, context.storage)
    return {
        "num_parameters": encoder.num_parameters,
        "dimensions": encoder.dimensions,
    }


def export_student(
    recipe_name: str, base_model: str, parity_texts: list[str], context: StepContext
) -> dict[str, Json]:
    """Writes the trained student as a sentence-transformers folder and proves its parity.

    Raises:
        TokayError: sentence-transformers embeds the texts differently from Tokay.
    """
    from actors.encoder import Encoder, check_parity

    encoder = Encoder.load(join(context.input("training").uri, "encoder"))
    fret = context.input("fret").manifest.metrics
    mixture = context.input("mixture").manifest
    card = _model_card(recipe_name, base_model, encoder, fret, mixture.metrics)
    with tempfile.TemporaryDirectory() as temporary:
        encoder.save(temporary, model_card=card)
        parity = check_parity(temporary, parity_texts)
        if parity < MIN_PARITY:
            raise TokayError(
                f"the export differs from the trained encoder: sentence-transformers' vectors have"
                f" a cosine of {parity:.5f} with ours, and {MIN_PARITY} is asked for"
            )
        _upload(Path(temporary), context.storage)
    return {"parity_cosine": round(parity, 6), "dimensions": encoder.dimensions}


def model_folder(artifact: Artifact) -> str:
    """Returns the folder or URI of the encoder that a `student` or `export` step wrote."""
    return join(artifact.uri, MODEL)


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
    fret: dict[str, Json],
    mixture: dict[str, Json],
) -> str:
    sets = ", ".join(f"{name} ({rows} examples)" for name, rows in mixture["sets"].items())
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
base_model: {base_model}
tags: [sentence-transformers, feature-extraction, tokay]
---

# A text-embedding model distilled with Tokay

Recipe `{recipe_name}`; {encoder.dimensions} dimensions, at most {encoder.max_tokens} tokens,
{encoder.pooling} pooling, unit vectors. Started from `{base_model}`.

Trained on: {sets}. FRet examples were written and labelled by a large language model
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
