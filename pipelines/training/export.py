"""The step `export`: the trained student as a sentence-transformers folder, its parity proven."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.artifacts import Json
from cluster.errors import TokayError
from cluster.steps import Step, StepContext
from cluster.storage import join
from pipelines.corpus.held_out import HELD_OUT
from pipelines.encoders import MODEL, TRAINED, upload_folder
from pipelines.training.gate import START
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

    more = {"prefinetuning_mixture": recipe.prefinetuning, "gate": recipe.gate}
    return Step(
        name="export",
        config={"recipe": recipe.name},
        inputs=("training", "mixture", "fret", "passages", *(name for name in more if more[name])),
        work=export,
    )


def export_student(
    recipe_name: str, student: StudentConfig, parity_texts: list[str], context: StepContext
) -> dict[str, Json]:
    """Writes the trained student as a sentence-transformers folder and proves its parity.

    Where there is a gate, it is what the gate chose.

    Raises:
        TokayError: Somebody who runs the folder gets other vectors than the trained encoder's.
    """
    from actors.encoder import Encoder
    from actors.parity import DIFFICULT, ParityText, check_parity

    gate = context.inputs.get("gate")
    chosen = gate or context.input("training")
    trust = student.trust_remote_code
    encoder = Encoder.load(join(chosen.uri, TRAINED), device="cpu", trust_remote_code=trust)
    decided = gate.manifest.metrics if gate else {}
    seen: dict[str, Json] = {
        name: context.input(name).manifest.metrics
        for name in ("prefinetuning_mixture", "mixture")
        if name in context.inputs
    }
    sizes = context.input("training").manifest.config["loss"]["matryoshka_dimensions"]
    if decided.get("weight") == START:  # which has not seen the batches of the fine-tuning
        del seen["mixture"]
        sizes = []
    sets = {name: rows for each in seen.values() for name, rows in each["sets"].items()}
    fret = context.input("fret").manifest.metrics if "fret" in sets else None
    card = _model_card(
        recipe_name, student.model, encoder, sizes, sets, fret, decided.get("decision", "")
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
    sets: dict[str, int],
    fret: dict[str, Json] | None,
    decision: str,
) -> str:
    smaller = sorted((size for size in sizes if size < encoder.dimensions), reverse=True)
    cut = ""
    if smaller:
        cut = f"""
The first {" or ".join(map(str, smaller))} dimensions were trained to be used alone (Matryoshka):
cut the vectors and normalise them again, or give `truncate_dim={smaller[0]}`.
"""
    decided = f"{decision}\n\n" if decision else ""
    trained_on = ", ".join(f"{name} ({rows} examples)" for name, rows in sets.items())
    about = f"Trained on: {trained_on}." if sets else "Not trained in this run."
    if fret:
        held_out = fret["dropped_by"].get(HELD_OUT, 0)
        about += f""" FRet examples were written and labelled by a large language model
(Gecko, arXiv 2403.20327): {fret["num_queries"] - held_out} queries, {fret["num_kept"]} kept.
Queries that overlap with the run's {fret["num_evaluation_queries"]} evaluation queries were taken
out; the highest word overlap left is {fret["highest_overlap_kept"]}."""
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
base_model: {json.dumps(base_model)}
datasets: {json.dumps(list(sets))}
tags: [sentence-transformers, feature-extraction, tokay]
---

# A text-embedding model distilled with Tokay

{decided}Recipe `{recipe_name}`; {encoder.dimensions} dimensions, at most {encoder.max_tokens}
tokens, {encoder.pooling} pooling, unit vectors. Started from `{base_model}`.
{cut}
{about}

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("PATH/TO/THIS/FOLDER")
embeddings = model.encode(["a passage", "another"])
```

Query format: `{encoder.templates.query}`; passage format: `{encoder.templates.passage}`.
"""
