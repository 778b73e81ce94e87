"""Which languages the examples are in: their queries, and the passages that answer them."""

import heapq
from collections import Counter
from typing import Any
from zlib import crc32

from cluster.artifacts import Artifact, Json
from pipelines.fret.languages import language_name, language_of

NUM_SAMPLED = 2000  # examples: a second or two
MIN_SHARE = 0.01  # of an entry of its own; of short queries some are taken for another language's


def collect_languages(fret: Artifact | None) -> dict[str, Json] | None:
    """Counts the languages of a sample of the kept queries and their positives.

    Returns:
        `num_examples` looked at; `rows` with the languages of `query` and `passage` and their
        `count`, the most frequent first; and how many are in `other` languages. None where no query
        is kept.
    """
    columns = ["id", "query", "positive", "dropped_by"]
    kept = (
        row
        for table in (fret.tables(columns) if fret else [])
        for row in table.to_pylist()
        if row["dropped_by"] is None
    )
    sample = heapq.nsmallest(NUM_SAMPLED, kept, key=_draw)
    counts = Counter((language_of(row["query"]), language_of(row["positive"])) for row in sample)
    rows: list[dict[str, Any]] = [
        {"query": language_name(query), "passage": language_name(passage), "count": count}
        for (query, passage), count in counts.most_common()
        if count >= MIN_SHARE * len(sample)
    ]
    other = len(sample) - sum(row["count"] for row in rows)
    return {"num_examples": len(sample), "rows": rows, "other": other} if sample else None


def _draw(row: dict[str, Any]) -> tuple[int, str]:
    return crc32(row["id"].encode()), row["id"]
