"""From scored candidates to training examples: what is dropped, and that nothing is lost."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.artifacts import Artifact, Json, write_shards
from cluster.steps import Run, Step, StepContext
from pipelines.console import JsonLines
from pipelines.fret.fret import make_fret
from pipelines.fret.fusion import FretConfig
from pipelines.records import PASSAGE, SCORES

IDS = ["a", "b", "c"]


def scored(id_: str, query: str, dropped_by: str | None = None) -> dict[str, Any]:
    asked = dropped_by is None
    return {
        "id": id_,
        "seed_id": "a",
        "task": "question answering",
        "query": query,
        "dropped_by": dropped_by,
        "candidate_ids": IDS if asked else [],
        "similarities": [0.9, 0.8, 0.7] if asked else [],
        "seed_rank": 1 if asked else None,
        "query_likelihoods": [-1.0, -2.0, -3.0] if asked else [],
        "relevances": [-0.1, -0.2, -0.3] if asked else [],
    }


def fret(folder: Path, rows: list[dict[str, Any]], evaluation_queries: list[str]) -> Artifact:
    def writes(table: pa.Table) -> Any:
        def work(context: StepContext) -> dict[str, Json]:
            write_shards(context.storage, table, 2)
            return {}

        return work

    passages = [{"id": i, "title": "", "text": f"text {i}", "source": i} for i in IDS]
    steps = [
        Step(
            name="passages",
            config={},
            inputs=(),
            work=writes(pa.Table.from_pylist(passages, schema=PASSAGE)),
        ),
        Step(
            name="scores",
            config={},
            inputs=("passages",),
            work=writes(pa.Table.from_pylist(rows, schema=SCORES)),
        ),
        Step(
            name="fret",
            config={},
            inputs=("scores", "passages"),
            work=lambda context: make_fret(FretConfig(), evaluation_queries, context),
        ),
    ]
    return Run(str(folder), steps).execute(JsonLines())["fret"]


def test_every_query_keeps_its_row_and_the_first_rule_that_drops_it(tmp_path: Path) -> None:
    rows = [
        scored("q1", "how do bees show each other where the flowers are"),
        scored("q2", "x", dropped_by="query too short"),
        scored("q3", "How do bees show each other where the flowers are"),
        scored("q4", "how do bees show each other where the flowers are today"),
        scored("q5", "why is the sky blue"),
        scored("q6", "tell me why the sky over Rome in the long summer is so blue"),
        scored("q7", "what makes bread rise"),
    ]
    judged = ["Why is the sky BLUE?", "the sky over Rome in the long summer of 1900"]
    artifact = fret(tmp_path, rows, judged)
    dropped = {row["id"]: row["dropped_by"] for row in artifact.read().to_pylist()}
    assert dropped == {
        "q1": None,
        "q2": "query too short",
        "q3": "repeats another query",
        "q4": "nearly repeats another query",
        "q5": "repeats an evaluation query",
        "q6": "repeats an evaluation query",
        "q7": None,
    }
    metrics = artifact.manifest.metrics
    assert metrics["num_kept"] == 2 and metrics["num_contaminated"] == 2
    assert metrics["contaminated"][0] == {
        "query": "why is the sky blue",
        "evaluation_query": "Why is the sky BLUE?",
    }
