"""Some FRet examples with everything the choice of their labels was made from."""

from typing import Any

from cluster.artifacts import Artifact, Json
from pipelines.fret.fusion import ranks
from pipelines.report.run_folder import excerpt, find_passages

NUM_OF_EACH_KIND = 3
CANDIDATE_CHARACTERS = 140


def choose_examples(fret: Artifact | None, passages: Artifact | None) -> list[dict[str, Json]]:
    """Returns kept queries whose positive is and is not the seed, and one of each dropped kind.

    They are spread evenly over the first shard, not picked by quality.
    """
    if fret is None or not fret.num_rows:
        return []
    rows = [row for row in fret.shard(fret.shards[0]).to_pylist() if row["query_likelihoods"]]
    kept = [row for row in rows if row["dropped_by"] is None]
    chosen = _spread([row for row in kept if not row["positive_is_seed"]])
    chosen += _spread([row for row in kept if row["positive_is_seed"]])
    dropped = {row["dropped_by"]: row for row in reversed(rows) if row["dropped_by"]}
    chosen += [dropped[reason] for reason in sorted(dropped)]
    return describe_examples(chosen, passages)


def describe_examples(
    rows: list[dict[str, Any]], passages: Artifact | None
) -> list[dict[str, Json]]:
    """Returns rows of the FRet artifact with their passages' texts and each candidate's ranks."""
    ids = {id_ for row in rows for id_ in (row["seed_id"], *row["candidate_ids"])}
    texts = find_passages(passages, ids)
    return [_example(row, texts) for row in rows]


def _spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    number = min(NUM_OF_EACH_KIND, len(rows))
    return [rows[place * len(rows) // number] for place in range(number)]


def _example(row: dict[str, Any], texts: dict[str, dict[str, str]]) -> dict[str, Json]:
    def passage(id_: str) -> dict[str, str]:
        return texts.get(id_, {"id": id_, "title": "", "text": ""})

    roles = {
        "seed": row["seed_id"],
        "positive": row["positive_id"],
        "hard negative": row["negative_id"],
    }
    num_scored = len(row["query_likelihoods"])
    ids = row["candidate_ids"][:num_scored]
    ql_ranks, rc_ranks = ranks(row["query_likelihoods"]), ranks(row["relevances"])
    candidates = []
    for place, id_ in enumerate(ids):
        found = passage(id_)
        candidates.append(
            {
                "id": id_,
                "title": found["title"],
                "text": excerpt(found["text"], CANDIDATE_CHARACTERS),
                "roles": [role for role, holder in roles.items() if holder == id_],
                "similarity": row["similarities"][place],
                "ql": row["query_likelihoods"][place],
                "ql_rank": int(ql_ranks[place]),
                "rc": row["relevances"][place],
                "rc_rank": int(rc_ranks[place]),
                "fused": row["fused"][place],
            }
        )
    return {
        "id": row["id"],
        "task": row["task"],
        "query": row["query"],
        "dropped_by": row["dropped_by"],
        "positive_is_seed": row["positive_is_seed"],
        "seed_rank": row["seed_rank"],
        "seed": passage(row["seed_id"]),
        "positive": row["positive_id"] and passage(row["positive_id"]),
        "negative": row["negative_id"] and passage(row["negative_id"]),
        "candidates": sorted(candidates, key=lambda candidate: -candidate["fused"]),
    }
