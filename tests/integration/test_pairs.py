"""Pairs grouped by passage over the whole run, by real Ray Data."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.artifacts import Artifact, Json, write_shards
from cluster.steps import Run, Step, StepContext
from pipelines.fret.pairs import Queries, group_pairs, pairs_to_score
from pipelines.ids import passage_id
from pipelines.records import CANDIDATES, PASSAGE
from pipelines.run.console import JsonLines

pytestmark = pytest.mark.slow
TEXTS = [f"text {number}" for number in range(40)]
IDS = [passage_id("", text) for text in TEXTS]
NUM_SCORED = 3


def writes(rows: list[dict[str, Any]], schema: pa.Schema, rows_per_shard: int) -> Any:
    def work(context: StepContext) -> dict[str, Json]:
        write_shards(context.storage, pa.Table.from_pylist(rows, schema=schema), rows_per_shard)
        return {}

    return work


def query(number: int, candidates: list[int], seed: int, dropped_by: str | None = None) -> Any:
    return {
        "id": f"q{number}",
        "seed_id": IDS[seed],
        "task": f"task {number % 2}",
        "query": f"query {number}",
        "dropped_by": dropped_by,
        "candidate_ids": [IDS[place] for place in candidates],
        "similarities": [0.5] * len(candidates),
        "seed_rank": None,
    }


def grouped(folder: Path, queries: list[Any]) -> Artifact:
    passages = [
        {"id": id_, "title": "", "text": text, "source": "a#1"}
        for id_, text in zip(IDS, TEXTS, strict=True)
    ]
    inputs = ("candidates", "passages")
    steps = [
        Step(name="passages", config={}, inputs=(), work=writes(passages, PASSAGE, 7)),
        Step(name="candidates", config={}, inputs=(), work=writes(queries, CANDIDATES, 2)),
        Step(name="pairs", config={}, inputs=inputs, work=lambda c: group_pairs(NUM_SCORED, c)),
    ]
    return Run(str(folder), steps).execute(JsonLines())["pairs"]


def test_each_passage_comes_once_with_the_queries_of_all_shards(
    ray_session: None, tmp_path: Path
) -> None:
    queries = [query(n, [0, 1 + n, 2 + n, 3 + n], seed=0) for n in range(9)]
    queries.append(query(9, [20, 21, 22, 23], seed=23))  # the seed beyond those that are scored
    queries.append(query(10, [], seed=0, dropped_by="query too short"))
    queries.append(query(11, [30, 31], seed=30, dropped_by="round trip failed"))
    pairs = grouped(tmp_path / "a", queries)
    rows = pairs.read().to_pylist()
    expected: dict[str, set[str]] = {}
    for number in range(9):
        for place in (0, 1 + number, 2 + number):
            expected.setdefault(IDS[place], set()).add(f"q{number}")
    for place in (20, 21, 23):
        expected[IDS[place]] = {"q9"}
    assert {row["passage_id"]: set(row["query_ids"]) for row in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        assert row["text"] == TEXTS[IDS.index(row["passage_id"])]
        assert row["queries"] == [f"query {id_[1:]}" for id_ in row["query_ids"]]
        assert row["tasks"] == [f"task {int(id_[1:]) % 2}" for id_ in row["query_ids"]]
    for shard in pairs.shards:
        ids = pairs.shard(shard)["passage_id"].to_pylist()
        assert ids == sorted(ids)
    assert 1 < len(pairs.shards) <= 6
    assert pairs.manifest.metrics == {"num_passages": len(rows), "num_pairs": 30}
    again = grouped(tmp_path / "b", queries)
    assert [f.sha256 for f in again.shards] == [f.sha256 for f in pairs.shards]


def test_run_whose_queries_were_all_dropped_has_no_pairs(ray_session: None, tmp_path: Path) -> None:
    pairs = grouped(tmp_path, [query(0, [], seed=0, dropped_by="query too short")])
    assert pairs.num_rows == 0
    assert pairs.manifest.metrics == {"num_passages": 0, "num_pairs": 0}


def test_queries_of_a_probe_are_left_out_and_those_alone_are_grouped_for_it(
    ray_session: None, tmp_path: Path
) -> None:
    queries = [query(n, [0, 1 + n, 2 + n], seed=0) for n in range(9)]
    probed = Queries(ids=frozenset({"q2", "q5"}), only=True)

    def probe(context: StepContext) -> dict[str, Json]:
        return {"fusion": "ql"} | group_pairs(NUM_SCORED, context, probed, num_shards=2)

    inputs = ("candidates", "passages")
    passages = [
        {"id": id_, "title": "", "text": text, "source": "a#1"}
        for id_, text in zip(IDS, TEXTS, strict=True)
    ]
    steps = [
        Step(name="passages", config={}, inputs=(), work=writes(passages, PASSAGE, 7)),
        Step(name="candidates", config={}, inputs=(), work=writes(queries, CANDIDATES, 2)),
        Step(name="probe", config={}, inputs=inputs, work=probe),
        Step(
            name="pairs",
            config={},
            inputs=(*inputs, "probe"),
            work=lambda context: pairs_to_score(NUM_SCORED, context),
        ),
    ]
    made = Run(str(tmp_path), steps).execute(JsonLines())
    asked = {
        name: {id_ for row in made[name].read().to_pylist() for id_ in row["query_ids"]}
        for name in ("probe", "pairs")
    }
    assert asked == {"probe": {"q2", "q5"}, "pairs": {f"q{n}" for n in (0, 1, 3, 4, 6, 7, 8)}}
    assert len(made["probe"].shards) <= 2
    assert made["pairs"].manifest.metrics["num_pairs"] == 21
