"""Some FRet examples, with everything that their labels were chosen by."""

from collections.abc import Callable
from typing import Any
from zlib import crc32

from cluster.artifacts import Artifact, Json
from cluster.errors import excerpt
from pipelines.fret.fusion import ranks
from pipelines.report.labels import rank_correlation
from pipelines.report.run_folder import find_passages

NUM_OF_EACH_KIND = 3
CANDIDATE_CHARACTERS = 140


def _likelihood(row: dict[str, Any]) -> float:
    """Returns the QL of the best candidate, infinite where the LLM has not scored it."""
    best = int(ranks(row["fused"]).argmin())
    scores: list[float] = row["query_likelihoods"]
    return scores[best] if best < len(scores) else float("inf")


# How labelled queries may be sorted: the highest value comes first.
ORDERS: dict[str, Callable[[dict[str, Any]], float]] = {
    "shift": lambda row: row["candidate_ids"].index(row["positive_id"]),
    "doubt": lambda row: -rank_correlation(row["query_likelihoods"], row["relevances"]),
    "hardest": lambda row: -_likelihood(row),
    "stored": lambda row: 0,
}
# The kinds of kept queries that the report shows, the highest of each first.
KINDS: dict[str, Callable[[dict[str, Any]], float]] = {
    "Drawn at random": lambda row: crc32(row["id"].encode()),
    "The positive that the retriever ranked lowest": ORDERS["shift"],
    "QL and RC disagree most": ORDERS["doubt"],
    "The positive explains the query least": ORDERS["hardest"],
}
DROPPED = "Dropped, one for each reason"
_SCORES = ("query_likelihoods", "relevances")
_SHOWN = ("id", "task", "query", "dropped_by", "positive_is_seed", "seed_rank")  # as they stand


def choose_examples(fret: Artifact | None, passages: Artifact | None) -> list[dict[str, Json]]:
    """Returns some kept queries of each kind of `KINDS`, and one for each reason for dropping.

    Each is what `describe_examples` returns, with its `kind`; none appears twice.
    """
    best: dict[str, list[tuple[float, int, dict[str, Any]]]] = {kind: [] for kind in KINDS}
    dropped: dict[str, dict[str, Any]] = {}
    if fret is None:
        return []
    rows = (row for table in fret.tables() for row in table.to_pylist())
    for number, row in enumerate(rows):
        if row["dropped_by"] is not None:
            dropped.setdefault(row["dropped_by"], row)
            continue
        for kind, key in KINDS.items():
            entry = (key(row), -number, row)  # the first wins a tie
            best[kind] = sorted([*best[kind], entry], reverse=True)[:NUM_OF_EACH_KIND]
    chosen: dict[str, tuple[str, dict[str, Any]]] = {}
    for kind, entries in best.items():
        for _, _, row in entries:
            chosen.setdefault(row["id"], (kind, row))
    chosen |= {dropped[reason]["id"]: (DROPPED, dropped[reason]) for reason in sorted(dropped)}
    described = describe_examples([row for _, row in chosen.values()], fret, passages)
    kinds = [kind for kind, _ in chosen.values()]
    return [{"kind": kind} | row for kind, row in zip(kinds, described, strict=True)]


def describe_examples(
    rows: list[dict[str, Any]], fret: Artifact, passages: Artifact | None
) -> list[dict[str, Json]]:
    """Returns rows of the FRet artifact with their passages' texts and each candidate's ranks.

    Their `negatives` are None where lists are learnt from, of which no passage is a negative.
    """
    ids = {id_ for row in rows for id_ in (row["seed_id"], *row["candidate_ids"])}
    texts = find_passages(passages, ids)
    return [_example(row, texts, are_lists(fret)) for row in rows]


def are_lists(fret: Artifact) -> bool:
    """Says whether the step took every scored candidate into an example, as `negative: all`."""
    return fret.manifest.config.get("negative") == "all"


def _example(
    row: dict[str, Any], texts: dict[str, dict[str, str]], is_list: bool
) -> dict[str, Json]:
    def passage(id_: str) -> dict[str, str]:
        return texts.get(id_, {"id": id_, "title": "", "text": ""})

    roles = {
        "seed": [row["seed_id"]],
        "positive": [row["positive_id"]],
        "hard negative": [] if is_list else row["negative_ids"],
    }
    ids = row["candidate_ids"][: len(row["fused"])]
    unscored = [None] * len(ids)  # by the LLM, which has scored the first or none
    ql, rc = (row[name] + unscored for name in _SCORES)
    ql_ranks, rc_ranks = ([*map(int, ranks(row[name])), *unscored] for name in _SCORES)
    candidates = []
    for place, id_ in enumerate(ids):
        candidate = passage(id_)
        candidates.append(
            {
                "id": id_,
                "title": candidate["title"],
                "text": excerpt(candidate["text"], CANDIDATE_CHARACTERS),
                "roles": [role for role, holders in roles.items() if id_ in holders],
                "similarity": row["similarities"][place],
                "lexical": row["lexical"][place] if row.get("lexical") else None,
                "ql": ql[place],
                "ql_rank": ql_ranks[place],
                "rc": rc[place],
                "rc_rank": rc_ranks[place],
                "fused": row["fused"][place],
            }
        )
    return {
        **{key: row[key] for key in _SHOWN},
        "seed": passage(row["seed_id"]),
        "positive": row["positive_id"] and passage(row["positive_id"]),
        "negatives": None if is_list else [passage(id_) for id_ in row["negative_ids"]],
        "candidates": sorted(candidates, key=lambda row: -row["fused"]),
    }
