"""The step `fret`: scored candidates become training examples, and queries unfit for it are marked.

Every query keeps its row, with the rule that dropped it if one did: an LLM was paid for it, and
another threshold may want it.
"""

from collections import Counter
from typing import Any

import pyarrow as pa

from cluster.artifacts import Json, write_shards
from cluster.steps import StepContext
from pipelines.corpus.passages import near_duplicates
from pipelines.encoders import PassageTexts
from pipelines.fret.fusion import FretConfig, choose_labels
from pipelines.fret.overlap import OverlapIndex
from pipelines.records import FRET

ROWS_PER_SHARD = 4096
MAX_LISTED = 100


def make_fret(
    config: FretConfig, evaluation_queries: list[str], context: StepContext
) -> dict[str, Json]:
    """Chooses each query's positive and hard negative, and applies the filters."""
    texts = PassageTexts(context.input("passages"))
    judged_by = OverlapIndex(evaluation_queries, config.max_shared_words)
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    overlaps: dict[str, float] = {}
    contaminated: list[dict[str, str]] = []
    for table in context.input("scores").tables():
        for scored in table.to_pylist():
            row = _NO_LABELS | scored
            if row["query_likelihoods"]:
                row |= _labels(scored, config, texts)
                overlap, repeated = judged_by.highest(row["query"])
                if overlap <= config.max_overlap and overlap < 1:
                    repeated = judged_by.shared_run(row["query"]) or ""
                if repeated:
                    row["dropped_by"] = "repeats an evaluation query"
                    contaminated.append({"query": row["query"], "evaluation_query": repeated})
                elif row["query"].casefold() in seen:
                    row["dropped_by"] = "repeats another query"
                else:
                    seen.add(row["query"].casefold())
                    overlaps[row["id"]] = overlap
            rows.append(row)
        context.progress.update(len(rows), context.input("scores").num_rows)
    kept = [row for row in rows if row["dropped_by"] is None]
    for place in near_duplicates([row["query"] for row in kept], config.max_query_similarity):
        kept[place]["dropped_by"] = "nearly repeats another query"
    kept = [row for row in kept if row["dropped_by"] is None]
    table = pa.Table.from_pylist(rows, schema=FRET)
    write_shards(context.storage, table, ROWS_PER_SHARD)
    scored_rows = [row for row in rows if row["query_likelihoods"]]
    return {
        "num_queries": len(rows),
        "num_kept": len(kept),
        "dropped_by": dict(Counter(row["dropped_by"] for row in rows if row["dropped_by"])),
        "num_scored": len(scored_rows),
        "num_positive_is_not_seed": sum(not row["positive_is_seed"] for row in scored_rows),
        "num_kept_positive_is_not_seed": sum(not row["positive_is_seed"] for row in kept),
        "num_without_negative": sum(row["negative_id"] is None for row in kept),
        "num_evaluation_queries": len(judged_by),
        "highest_overlap_kept": round(max((overlaps[row["id"]] for row in kept), default=0.0), 4),
        "num_contaminated": len(contaminated),
        "contaminated": contaminated[:MAX_LISTED],
    }


_NO_LABELS: dict[str, Any] = dict.fromkeys(FRET.names) | {"fused": []}


def _labels(scored: dict[str, Any], config: FretConfig, texts: PassageTexts) -> dict[str, Any]:
    num_scored = len(scored["query_likelihoods"])
    ids = scored["candidate_ids"][:num_scored]
    labels = choose_labels(
        ql=scored["query_likelihoods"],
        rc=scored["relevances"],
        similarities=scored["similarities"][:num_scored],
        seed_place=ids.index(scored["seed_id"]),
        config=config,
        query_id=scored["id"],
    )
    positive_id = ids[labels.positive]
    negative_id = None if labels.negative is None else ids[labels.negative]
    positive = texts[positive_id]
    negative = (None, None) if negative_id is None else texts[negative_id]
    return {
        "positive_id": positive_id,
        "positive_title": positive[0],
        "positive": positive[1],
        "negative_id": negative_id,
        "negative_title": negative[0],
        "negative": negative[1],
        "positive_is_seed": positive_id == scored["seed_id"],
        "fused": labels.fused,
    }
