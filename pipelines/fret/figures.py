"""What the manifest of the step `fret` says, counted shard by shard."""

from __future__ import annotations

from collections import Counter
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from cluster.exchange import Shared
from cluster.storage import Storage, read_table
from pipelines.datasets.decontamination import REASONS
from pipelines.fret.corpus_queries import TASKS
from pipelines.fret.judging import Judging
from pipelines.records import CANDIDATES, FRET

MAX_LISTED = 100
_COLUMNS = [
    *(name for name in FRET.names if name in CANDIDATES.names),
    *("query_likelihoods", "relevances", "cross_scores", "fused"),
    *("positive_is_seed", "negative_ids"),
]


@dataclass(kw_only=True)
class ShardFigures:
    """Figures of a shard, or of the first few.

    Attributes:
        counts: Queries, and what became of them.
        dropped_by: How many queries each reason has dropped.
        contaminated: The first queries that repeat an evaluation query, each with that.
        highest_overlap: Of a query that is kept with an evaluation query.
        judging: Who ranks the seed first; None: it is not judged.
    """

    counts: Counter[str] = field(default_factory=lambda: Counter(_count([])))
    dropped_by: Counter[str] = field(default_factory=Counter)
    contaminated: list[dict[str, str]] = field(default_factory=list)
    highest_overlap: float = 0.0
    judging: Judging | None = None

    def add(self, other: ShardFigures) -> None:
        """Adds those of the next shard."""
        self.counts.update(other.counts)
        self.dropped_by.update(other.dropped_by)
        self.contaminated = (self.contaminated + other.contaminated)[:MAX_LISTED]
        self.highest_overlap = max(self.highest_overlap, other.highest_overlap)
        if self.judging and other.judging:
            self.judging.add_all(other.judging)


def figures_of(
    number: int, storage: Storage, path: str, decontamination: Shared, judging: Judging | None
) -> tuple[int, ShardFigures]:
    """Returns the figures of a shard of `FRET`, and its number; `judging` has no query yet."""
    known, rows = decontamination.get(), read_table(storage, path, _COLUMNS).to_pylist()
    found = ShardFigures(judging=deepcopy(judging), counts=Counter(_count(rows)))
    for row in rows:
        if row["dropped_by"] is not None:
            found.dropped_by[row["dropped_by"]] += 1
        if row["dropped_by"] in REASONS and len(found.contaminated) < MAX_LISTED:
            _, repeated = known.repeated(row["query"])
            found.contaminated.append({"query": row["query"], "evaluation_query": repeated})
        if found.judging and row["task"] not in TASKS:
            found.judging.add_row(row)
    kept = (row["query"] for row in rows if row["dropped_by"] is None)
    found.highest_overlap = known.highest_overlap(kept)
    return number, found


def _count(rows: list[dict[str, Any]]) -> dict[str, int]:
    scored = [row for row in rows if row["fused"]]
    kept = [row for row in scored if row["dropped_by"] is None]
    return {
        "num_queries": len(rows),
        "num_kept": len(kept),
        "num_scored": len(scored),
        "num_positive_is_not_seed": sum(not row["positive_is_seed"] for row in scored),
        "num_kept_positive_is_not_seed": sum(not row["positive_is_seed"] for row in kept),
        "num_without_negative": sum(not row["negative_ids"] for row in kept),
    }
