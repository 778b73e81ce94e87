"""Embedding distillation through real Ray actors and Ray Train."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import BertConfig, BertModel

from actors.encoder import Encoder
from actors.encoder_templates import PromptTemplates
from cluster.artifacts import Artifact, write_shards
from cluster.steps import Run, Step, StepContext
from pipelines.recipe.graph import build_run
from pipelines.recipe.read import load_recipe
from pipelines.records import QUERY

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.usefixtures("ray_session")]

WORDS = ("amber", "basalt", "copper", "diamond", "emerald", "flint", "granite", "hematite")


class Listener:
    def step_found(self, step: Step, artifact: Artifact) -> None: ...

    def step_begins(self, step: Step, resumed: bool) -> "Listener":
        return self

    def step_done(self, step: Step, artifact: Artifact) -> None: ...

    def update(self, done: float, total: float | None = None, note: str = "") -> None: ...


def small_encoder(folder: Path) -> str:
    """Saves a four-layer BERT with random weights and MiniLM's tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.3,  # so that texts differ
    )
    encoder = Encoder(
        BertModel(config),
        Encoder.load("embedded:all-MiniLM-L6-v2", device="cpu").tokenizer,
        pooling="mean",
        max_tokens=64,
        templates=PromptTemplates(passage="{title} {text}"),
    )
    encoder.save(folder, model_card="")
    return str(folder)


def write_queries(context: StepContext) -> dict[str, object]:
    """What the LLM may have written: one query cannot be used."""
    rows = [{"task": "search result", "query": f"which {word} is a metal"} for word in WORDS]
    rows.append({"task": "search result", "query": "", "dropped_by": "empty"})
    rows = [dict.fromkeys(QUERY.names) | {"id": str(n)} | row for n, row in enumerate(rows)]
    write_shards(context.storage, pa.Table.from_pylist(rows, schema=QUERY), 4)
    return {}


def test_student_learns_the_vectors_of_the_retriever_through_workers(tmp_path: Path) -> None:
    documents = [
        {"title": f"About {word}", "text": f"{word} is {n} times a stone or a metal. " * 4}
        for word in WORDS
        for n in range(5)
    ]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)))
    model = small_encoder(tmp_path / "model")
    recipe = load_recipe(
        "laptop",
        [
            f"corpus.path={tmp_path}/corpus.jsonl",
            "corpus.near_duplicate_threshold=null",
            f"retriever={{model: {model}, max_tokens: 64}}",
            f"student={{model: {model}, max_tokens: 64, layers: [0, 3], dtype: float32}}",
            "embedding_distillation.mixture.validation_examples=5",
            "embedding_distillation.training={epochs: 6, batch_size: 8, learning_rate: 5.0e-3,"
            " num_workers: 2, tracking: [], validation: {every_batches: 10}}",
        ],
    )
    names = ("passages", "embeddings", "student")
    names += ("embedding_distillation_mixture", "embedding_distillation")
    steps = [step for step in build_run(recipe, str(tmp_path)).steps if step.name in names]
    queries = Step(name="queries", config={}, inputs=(), work=write_queries)
    made = Run(str(tmp_path / "run"), [queries, *steps]).execute(Listener())

    metrics = made["embedding_distillation_mixture"].manifest.metrics
    assert sum(metrics["sets"].values()) == metrics["num_examples"] == 43
    assert metrics["num_validation_examples"] == 5
    losses = [
        json.loads(line)["validation_loss"]
        for line in (tmp_path / "run/embedding_distillation/metrics.jsonl").read_text().splitlines()
        if "validation_loss" in line
    ]
    assert losses[-1] < losses[0]
    texts = [f"what is {word} made of" for word in WORDS]
    teacher = Encoder.load(model, device="cpu").encode(texts)
    before, after = (
        float(
            (Encoder.load(f"{made[step].uri}/{folder}", device="cpu").encode(texts) * teacher)
            .sum(1)
            .mean()
        )
        for step, folder in (("student", "model"), ("embedding_distillation", "encoder"))
    )
    assert np.isfinite(after)
    assert after > before
