"""Seeds and labels by Ray tasks: the same as one process draws and chooses."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.artifacts import Artifact, Json, write_shards
from cluster.steps import Run, Step, StepContext
from pipelines.corpus.seeds import HoldOut, SeedsConfig, choose_seeds
from pipelines.datasets.decontamination import Decontamination
from pipelines.fret import fret as fret_step
from pipelines.fret.corpus_queries import CorpusQueriesConfig, take_queries
from pipelines.fret.fret import FretConfig, make_fret
from pipelines.ids import passage_id
from pipelines.records import CANDIDATES, PASSAGE, SCORES
from pipelines.run.console import JsonLines

pytestmark = pytest.mark.slow
TEXTS = [
    f"Bees of meadow {n} fly far. They dance on the comb of their hive, and the others follow."
    for n in range(60)
]
IDS = [passage_id("", text) for text in TEXTS]


def writes(rows: list[dict[str, Any]], schema: pa.Schema, rows_per_shard: int) -> Any:
    def work(context: StepContext) -> dict[str, Json]:
        write_shards(context.storage, pa.Table.from_pylist(rows, schema=schema), rows_per_shard)
        return {}

    return work


def steps() -> list[Step]:
    passages = [
        {"id": id_, "title": "", "text": text, "source": f"d{n // 2}#{n % 2 + 1}"}
        for n, (id_, text) in enumerate(zip(IDS, TEXTS, strict=True))
    ]
    queries = [
        {
            "id": f"{n:016x}",
            "seed_id": IDS[n],
            "task": "search",
            "query": f"how do the bees of meadow {n // 2} find it",
            "candidate_ids": [IDS[(n + k) % 60] for k in range(4)],
            "similarities": [0.9, 0.8, 0.7, 0.6],
            "seed_rank": 1,
        }
        for n in range(40)
    ]
    scores = [
        {
            "passage_id": IDS[n],
            "query_ids": [f"{(n - k) % 60:016x}" for k in range(3) if (n - k) % 60 < 40],
            "query_likelihoods": [-float(k) for k in range(3) if (n - k) % 60 < 40],
            "relevances": [-float(n % 5) for k in range(3) if (n - k) % 60 < 40],
            "errors": [None for k in range(3) if (n - k) % 60 < 40],
        }
        for n in range(60)
    ]
    label = FretConfig(max_query_similarity=0.7)
    known = Decontamination(["how do the bees of meadow 3 find it?"])
    return [
        Step(name="passages", config={}, inputs=(), work=writes(passages, PASSAGE, 7)),
        Step(
            name="seeds",
            config={},
            inputs=("passages",),
            work=lambda context: choose_seeds(
                SeedsConfig(num_seeds=20, rows_per_shard=4),
                HoldOut(num_queries=4, num_seeds=3),
                context,
            ),
        ),
        Step(
            name="corpus_queries",
            config={},
            inputs=("passages", "seeds"),
            work=lambda context: take_queries(CorpusQueriesConfig(max_sentences=30), context),
        ),
        Step(name="candidates", config={}, inputs=(), work=writes(queries, CANDIDATES, 6)),
        Step(name="scores", config={}, inputs=(), work=writes(scores, SCORES, 9)),
        Step(
            name="fret",
            config={},
            inputs=("candidates", "scores", "passages"),
            work=lambda context: make_fret(label, known, context),
        ),
    ]


def test_tasks_give_what_one_process_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setattr(fret_step, "QUERIES_PER_SHARD", 8)
    monkeypatch.setattr(fret_step, "TEXTS_PER_SHARD", 16)

    def made(name: str) -> dict[str, Artifact]:
        return Run(str(tmp_path / name), steps()).execute(JsonLines())

    expected = made("alone")
    request.getfixturevalue("ray_session")
    found = made("tasks")
    for name, artifact in expected.items():
        assert found[name].manifest.files == artifact.manifest.files, name
        assert found[name].manifest.metrics == artifact.manifest.metrics, name
    metrics = found["fret"].manifest.metrics
    assert metrics["num_contaminated"] == 2 and metrics["num_judged"] == 40
    assert metrics["dropped_by"]["repeats another query"] == 19
    assert found["fret"].num_shards == 5
    assert found["seeds"].num_rows == 23
