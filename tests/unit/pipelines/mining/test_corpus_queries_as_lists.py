"""From passages to lists with fixed vectors: the corpus' own queries go the way of the LLM's.

The steps are the product's own; what would be Ray's actors are objects of this process.
"""

import asyncio
import contextlib
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from actors import index_actor, lexical_index
from actors.encoder_templates import PromptTemplates
from cluster.artifacts import Artifact, Json, write_shards
from cluster.plain_json import dump_json
from cluster.stages import Stage
from cluster.steps import Run, Step, StepContext
from cluster.storage import write_table
from pipelines.corpus.held_out import FILE
from pipelines.datasets.decontamination import REASONS, Decontamination
from pipelines.fret import corpus_queries, fret
from pipelines.ids import passage_id, query_id
from pipelines.mining import candidates
from pipelines.mining.embeddings import vector_column
from pipelines.mixture.fixed_lists import lists_of
from pipelines.recipe.read import load_recipe
from pipelines.records import EMBEDDING, PASSAGE, QUERY
from pipelines.run.console import JsonLines

DOCUMENTS = {
    "bees": [
        "The dance of bees",
        "A bee that found flowers dances for the others.",
        "The angle of her dance tells them the direction.",
    ],
    "bread": [
        "How bread rises",
        "Yeast makes gas that lifts the dough overnight.",
        "A hot oven fixes its shape within minutes.",
    ],
    "glass": [
        "Making window glass",
        "Sand melts when furnaces burn long enough.",
        "Molten tin keeps each pane perfectly flat.",
    ],
    "owls": [
        "Owls at night",
        "Soft feathers let owls fly without any noise.",
        "Their ears hear mice under deep snow.",
    ],
    "tides": [
        "Why tides come twice",
        "The moon pulls the sea towards itself daily.",
        "Water on the far side rises as well.",
    ],
}
PASSAGES = [
    {
        "id": passage_id(title, " ".join(sentences)),
        "title": title,
        "text": " ".join(sentences),
        "source": f"{name}#1",
    }
    for name, (title, *sentences) in DOCUMENTS.items()
]
IDS = {row["source"][:-2]: row["id"] for row in PASSAGES}
RECIPE = [
    "corpus_queries={max_sentences: 20}",
    "gate={}",
    "candidates={num_candidates: 4, max_seed_rank: null, lexical: {weight: 0.25}}",
    "fret={fusion: hybrid, scale: z-scores, negative: all, max_negative_similarity: null}",
    "mixture.fixed_passages={}",
    "training.loss={contrastive_weight: 0, hard_negatives: false, distillation_weight: 1}",
    "student.layers=null",
]


class Letters:
    """An encoder by hand: a text's vector counts its letters."""

    templates = PromptTemplates(query="{text}", passage="{title} {text}")

    def encode(self, texts: list[str]) -> np.ndarray:
        counts = [[text.lower().count(letter) for letter in "abcdefghijkl"] for text in texts]
        vectors = np.array(counts, np.float32) + 0.1
        norms: np.ndarray = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / norms


class Actor:
    """Answers as the handle of a Ray actor would."""

    def __init__(self, held: Any) -> None:
        self._held = held

    def __getattr__(self, name: str) -> Any:
        call = (lambda: True) if name == "__ray_ready__" else getattr(self._held, name)

        async def remote(*arguments: Any) -> Any:
            return call(*arguments)

        return SimpleNamespace(remote=remote)


def start(actor: Any) -> Any:
    """What `ray.remote` would return."""
    remote = SimpleNamespace(remote=lambda *given, **named: Actor(actor(*given, **named)))
    return SimpleNamespace(options=lambda **_: remote)


RAY = SimpleNamespace(
    is_initialized=lambda: False,
    ObjectRef=Actor,
    exceptions=SimpleNamespace(RayError=ZeroDivisionError),
    remote=start,
    get=lambda asked: (
        list(map(asyncio.run, asked)) if isinstance(asked, list) else asyncio.run(asked)
    ),
    kill=lambda actor: None,
)


def run_here(stage: Stage, source: Artifact, context: StepContext) -> dict[str, Json]:
    """Does in this process what `run_stage` does in actors."""
    transform = stage.load()

    async def commit() -> None:
        for shard in source.shards:
            output = await transform(source.shard(shard, list(stage.columns)))
            write_table(context.storage, shard.path, output.rows)

    asyncio.run(commit())
    return {}


def made(name: str, table: pa.Table, inputs: tuple[str, ...] = ()) -> Step:
    def work(context: StepContext) -> dict[str, Json]:
        write_shards(context.storage, table, 2)
        if name == "seeds":
            context.storage.write_bytes(FILE, dump_json(["glass"]).encode())
        return {}

    return Step(name=name, config={}, inputs=inputs, work=work)


def written(document: str, query: str, dropped_by: str | None = None) -> dict[str, Any]:
    seed, task = IDS[document], "question answering"
    row = {"id": query_id(seed), "seed_id": seed, "task": task, "query": query}
    return row | {"dropped_by": dropped_by}


def test_queries_of_the_corpus_become_lists_beside_those_of_the_llm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", RAY)
    for module in (index_actor, lexical_index):
        monkeypatch.setattr(module, "actor_begins", lambda *_: None)
    monkeypatch.setattr(candidates, "run_stage", run_here)
    monkeypatch.setattr(candidates, "report_waiting", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(candidates, "load_encoder", lambda _: Letters())
    monkeypatch.setattr(corpus_queries, "QUERIES_PER_SHARD", 5)
    recipe = load_recipe("laptop", RECIPE)
    queries = [
        written("bees", "a bee that found flowers dances for the OTHERS."),
        written("bread", "what makes dough grow"),
        written("tides", "moon", "query too short"),
    ]
    passages = pa.Table.from_pylist(PASSAGES, schema=PASSAGE)
    vectors = vector_column(Letters().encode([f"{row['title']} {row['text']}" for row in PASSAGES]))
    embedded = pa.table([passages["id"], vectors], schema=EMBEDDING)
    steps = [
        made("passages", passages),
        made("seeds", passages, ("passages",)),
        made("queries", pa.Table.from_pylist(queries, schema=QUERY), ("seeds",)),
        corpus_queries.step(recipe),
        made("embeddings", embedded, ("passages",)),
        candidates.step(recipe),
        fret.step(recipe, Decontamination(["their ears hear mice under deep snow"])),
    ]
    artifacts = Run(str(tmp_path), steps).execute(JsonLines())

    found = artifacts["candidates"]
    sizes = [shard.num_rows for shard in found.shards]
    assert sizes == [2, 1, 5, 5, 2]  # the LLM's first, so that its queries win over their copies
    both = [artifacts[name].read()["id"].to_pylist() for name in ("queries", "corpus_queries")]
    assert found.read()["id"].to_pylist() == both[0] + both[1]

    rows = artifacts["fret"].read().to_pylist()
    assert [len(row["fused"]) for row in rows] == [4, 4, 0, *[4] * 12]
    assert Counter((row["task"], row["dropped_by"]) for row in rows) == {
        ("question answering", None): 2,
        ("question answering", "query too short"): 1,
        ("title", None): 4,
        ("sentence", None): 6,
        ("sentence", "repeats another query"): 1,
        ("sentence", next(iter(REASONS))): 1,
    }
    asked = {row["seed_id"] for row in rows if row["task"] != "question answering"}
    assert asked == set(IDS.values()) - {IDS["glass"]}
    # What is held out may still be found by them: the index holds it too.
    assert any(IDS["glass"] in row["candidate_ids"] for row in rows)

    lists = lists_of(artifacts["fret"].read(), recipe.mixture.fret_only_tasks, Letters.templates)
    assert Counter(lists["task"].to_pylist()) == {
        "question answering": 2,
        "title": 4,
        "sentence": 6,
    }
    assert {len(scores) for scores in lists["teacher_scores"].to_pylist()} == {4}
