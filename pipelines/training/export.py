"""The step `export`: the trained student as a sentence-transformers folder, its parity proven."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.artifacts import Json, Manifest
from cluster.errors import TokayError
from cluster.steps import Step, StepContext
from cluster.storage import join
from pipelines.encoders import MODEL, TRAINED, upload_folder
from pipelines.training.student import StudentConfig

if TYPE_CHECKING:
    from actors.encoder import Encoder
    from pipelines.recipe.recipe import Recipe

TITLE = "export and check parity"
MIN_PARITY = 0.9999
NUM_PARITY_TEXTS = 32


def step(recipe: Recipe) -> Step:
    """Returns the step."""

    def export(context: StepContext) -> dict[str, Json]:
        passages = context.input("passages")
        texts = passages.shard(passages.shards[0], ["text"])["text"].to_pylist()
        return export_student(recipe.name, recipe.student, texts[:NUM_PARITY_TEXTS], context)

    between = ("embedding_distillation", "prefinetuning")
    first = tuple(f"{stage}_mixture" for stage in between if getattr(recipe, stage))
    return Step(
        name="export",
        config={"recipe": recipe.name},
        inputs=("training", "mixture", "fret", "passages", *first),
        work=export,
    )


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
    taught = context.inputs.get("embedding_distillation_mixture")
    card = _model_card(
        recipe_name, student.model, encoder, sizes, fret, sets, taught.manifest if taught else None
    )
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
        upload_folder(Path(temporary), context.storage, MODEL)
    return {"parity_cosine": round(worst.cosine, 6), "dimensions": encoder.dimensions}


def _model_card(
    recipe_name: str,
    base_model: str,
    encoder: Encoder,
    sizes: list[int],
    fret: dict[str, Json],
    sets: dict[str, int],
    taught: Manifest | None,
) -> str:
    smaller = sorted((size for size in sizes if size < encoder.dimensions), reverse=True)
    cut = ""
    if smaller:
        cut = f"""
The first {" or ".join(map(str, smaller))} dimensions were trained to be used alone (Matryoshka):
cut the vectors and normalise them again, or give `truncate_dim={smaller[0]}`.
"""
    vectors = ""
    if taught:
        texts = " and ".join(f"{rows} {name}" for name, rows in taught.metrics["sets"].items())
        teacher = taught.config["teacher"]["model"]
        vectors = (
            f"First it learned the vectors that `{teacher}` gives to {texts}, without labels.\n"
        )
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
{vectors}Trained on: {trained_on}. FRet examples were written and labelled by a large language model
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
