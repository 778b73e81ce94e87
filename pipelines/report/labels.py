"""The labels in figures: tasks, queries, how far QL and RC agree, and what they changed."""

import math
from collections import Counter, defaultdict

import numpy as np

from actors.words import compared_words
from cluster.artifacts import Artifact, Json
from pipelines.corpus.held_out import HELD_OUT
from pipelines.fret.fusion import ranks

_COLUMNS = [
    "task",
    "query",
    "dropped_by",
    "positive_is_seed",
    "query_likelihoods",
    "relevances",
    "fused",
    "candidate_ids",
    "positive_id",
]
MAX_TASKS = 20
REPEATS = ("repeats another query", "nearly repeats another query")


def collect_labels(fret: Artifact | None) -> dict[str, Json] | None:
    """Streams the step's shards and returns its figures; None where there is no labelled query.

    `ql_rc_correlation` is Spearman's, averaged over the queries that the LLM scored. `rank_shifts`
    counts labelled queries by the retriever's rank (from 1) of the passage that became the
    positive. `task_entropy_bits` is that of the kept queries' tasks. `near_duplicate_share` is the
    repeated share of the queries that passed all other filters.
    """
    tasks: dict[str, Counter[str]] = defaultdict(Counter)
    correlations: list[float] = []
    shifts: Counter[int] = Counter()
    words: Counter[str] = Counter()
    lengths: list[int] = []
    repeats = 0
    for table in fret.tables(_COLUMNS) if fret else []:
        for row in table.to_pylist():
            if row["dropped_by"] == HELD_OUT:  # it was never meant to be labelled
                continue
            counts = tasks[row["task"]]
            counts["num_queries"] += 1
            if row["fused"]:
                counts["num_scored"] += 1
                counts["num_positive_is_not_seed"] += not row["positive_is_seed"]
                shifts[row["candidate_ids"].index(row["positive_id"]) + 1] += 1
            if row["query_likelihoods"] and row["relevances"]:
                correlations.append(rank_correlation(row["query_likelihoods"], row["relevances"]))
            repeats += row["dropped_by"] in REPEATS
            if row["dropped_by"] is None:
                counts["num_kept"] += 1
                query_words = compared_words(row["query"])
                lengths.append(len(query_words))
                words.update(query_words)
    if not shifts:
        return None
    kept = [counts["num_kept"] for counts in tasks.values() if counts["num_kept"]]
    common = sorted(tasks.items(), key=lambda entry: -entry[1]["num_queries"])
    return {
        "tasks": [_task_row(task, counts) for task, counts in common[:MAX_TASKS]],
        "num_tasks": len(tasks),
        "task_entropy_bits": -sum(n / sum(kept) * math.log2(n / sum(kept)) for n in kept),
        "ql_rc_correlation": float(np.mean(correlations)) if correlations else None,
        "rank_shifts": [{"rank": rank, "count": shifts[rank]} for rank in sorted(shifts)],
        "near_duplicate_share": repeats / (repeats + len(lengths)) if lengths else None,
        "mean_query_words": float(np.mean(lengths)) if lengths else None,
        "type_token_ratio": len(words) / sum(lengths) if lengths else None,
    }


def rank_correlation(left: list[float], right: list[float]) -> float:
    """Returns Spearman's rank correlation of two lists; 1 where one has fewer than two."""
    n = min(len(left), len(right))
    if n < 2:
        return 1.0
    differences = ranks(left) - ranks(right)
    return float(1 - 6 * np.square(differences).sum() / (n * (n * n - 1)))


def share(part: int | None, whole: int | None) -> float | None:
    """Returns part / whole; None where one is unknown or the whole is 0."""
    return part / whole if part is not None and whole else None


def _task_row(task: str, counts: Counter[str]) -> dict[str, Json]:
    return {
        "task": task,
        **{key: counts[key] for key in ("num_queries", "num_scored", "num_kept")},
        "positive_is_not_seed_share": share(
            counts["num_positive_is_not_seed"], counts["num_scored"]
        ),
    }
