"""The step `export`: the trained student as a sentence-transformers folder, its parity proven."""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.artifacts import Artifact, Json
from cluster.errors import TokayError
from cluster.step_task import run_in_task
from cluster.steps import Step, StepContext
from cluster.storage import join
from pipelines.corpus.held_out import HELD_OUT
from pipelines.encoders import MODEL, TRAINED, upload_folder
from pipelines.fret.fusion import asks_llm
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
    more = {
        "embedding_distillation_mixture": recipe.embedding_distillation,
        "prefinetuning_mixture": recipe.prefinetuning,
        "linear_adapter": recipe.linear_adapter,
        "gate": recipe.gate,
    }
    return Step(
        name="export",
        config={"recipe": recipe.name},
        inputs=("training", "mixture", "fret", "passages", *(name for name in more if more[name])),
        work=lambda context: run_in_task(
            partial(_export, recipe.name, recipe.student), context, recipe.resources.encoder
        ),
    )


def _export(recipe_name: str, student: StudentConfig, context: StepContext) -> dict[str, Json]:
    passages = context.input("passages")
    texts = passages.shard(passages.shards[0], ["text"])["text"].to_pylist()
    return export_student(recipe_name, student, texts[:NUM_PARITY_TEXTS], context)


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
    chosen = gate or context.inputs.get("linear_adapter") or context.input("training")
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
    taught = context.inputs.get("embedding_distillation_mixture")
    about = "".join(
        (_taught_by(taught) if taught else "", _trained_on(sets, context.input("fret")))
    )
    adapter = context.inputs.get("linear_adapter")
    if adapter and decided.get("weight") != START:
        num_lists = adapter.manifest.metrics["num_lists"]
        about += f"\nThen a linear layer behind the pooling learned the order of {num_lists} lists."
    card = _model_card(
        recipe_name, student.model, encoder, sizes, list(sets), about, decided.get("decision", "")
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


def _taught_by(mixture: Artifact) -> str:
    """Says whose vectors the student learned first."""
    texts = " and ".join(
        f"{rows} {name}" for name, rows in mixture.manifest.metrics["sets"].items()
    )
    teacher = mixture.manifest.config["teacher"]["model"]
    return f"First it learned the vectors that `{teacher}` gives to {texts}, without labels.\n"


def _trained_on(sets: dict[str, int], fret: Artifact) -> str:
    """Says which sets the student was trained on, and what became of the LLM's queries."""
    if not sets:
        return "Not trained in this run."
    listed = ", ".join(f"{name} ({rows} examples)" for name, rows in sets.items())
    if "fret" not in sets:
        return f"Trained on: {listed}."
    counts = fret.manifest.metrics
    num_queries = counts["num_queries"] - counts["dropped_by"].get(HELD_OUT, 0)
    fusion = fret.manifest.config["fusion"]
    made = "A large language model wrote and labelled FRet's examples (Gecko, arXiv 2403.20327)"
    if not asks_llm(fusion):
        made = (
            "FRet's queries were written by a large language model or taken from the corpus, and"
            f" the order of their candidates is by {fusion}, not by the language model"
        )
    return f"""Trained on: {listed}. {made}: {num_queries} queries, {counts["num_kept"]} kept.
Queries that overlap with the run's {counts["num_evaluation_queries"]} evaluation queries were
taken out; the highest word overlap left is {counts["highest_overlap_kept"]}."""


def _model_card(
    recipe_name: str,
    base_model: str,
    encoder: Encoder,
    sizes: list[int],
    sets: list[str],
    about: str,
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
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
base_model: {json.dumps(base_model)}
datasets: {json.dumps(sets)}
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
