"""The step `fret`: scored candidates become training examples, and queries unfit for it are marked.

Every query keeps its row, with the rule that dropped it if one did: an LLM was paid for it, and
another threshold may want it.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from cluster.artifacts import Artifact, Json
from cluster.config import Config
from cluster.steps import Step, StepContext
from cluster.storage import write_table
from pipelines.corpus.near_duplicates import near_duplicates
from pipelines.datasets.decontamination import Decontamination
from pipelines.fingerprints import fingerprinted
from pipelines.fret.fusion import JUDGES, asks_llm, choose_labels
from pipelines.records import CANDIDATES, FRET, PASSAGE

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe

TITLE = "choose positives and hard negatives"
MAX_LISTED = 100


class FretConfig(Config):
    """How labels are chosen from the scored candidates. The defaults are Gecko's."""

    fusion: str = Field(
        default="ql+rc",
        description="judges, joined by +: ql, rc, and sim, the retriever's similarity; without ql"
        " and rc no pair is scored by the LLM, and all candidates are judged",
    )
    scale: Literal["ranks", "z-scores"] = Field(
        default="ranks",
        description="what of each judge is added up: 1 / rank, or its scores, standardised over a"
        " query's scored candidates",
    )
    positive: Literal["fused", "seed"] = Field(
        default="fused", description="the candidate that ranks highest, or the seed passage"
    )
    negative: Literal["lowest", "random", "none", "all"] = Field(
        default="lowest",
        description="which of the other candidates; all: every one that was scored, whatever the"
        " two rules below say, as a list for training.loss.distillation_weight",
    )
    num_negatives: int = Field(
        default=1, ge=1, description="hard negatives an example, as many as are fit; Gecko has one"
    )
    max_negative_similarity: float | None = Field(
        default=None,
        gt=0,
        description="negatives must be less similar to the query than this share of the"
        " positive's similarity (NV-Retriever's 0.95); Gecko has no such rule",
    )
    max_query_similarity: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="drop queries whose word trigrams repeat an earlier query's to this share"
        " (Jaccard)",
    )
    seed: int = 0

    @field_validator("fusion")
    @classmethod
    def _of_judges(cls, fusion: str) -> str:
        names = fusion.split("+")
        if len(set(names)) < len(names) or not JUDGES.keys() >= set(names):
            raise ValueError(f"accepted are {', '.join(JUDGES)}, each once, joined by + (ql+sim)")
        return fusion

    @property
    def asks_llm(self) -> bool:
        """Whether a judge is the LLM, for which pairs are scored."""
        return asks_llm(self.fusion)


def step(recipe: Recipe, decontamination: Decontamination) -> Step:
    """Returns the step; `decontamination` knows the texts of the run's own test sets."""
    fixed = recipe.mixture.fixed_passages is not None
    return Step(
        name="fret",
        config={
            **fingerprinted(recipe.fret),
            **({"fixed_passages": True} if fixed else {}),
            "decontamination": decontamination.fingerprint(),
        },
        inputs=("candidates", *(["scores"] if recipe.fret.asks_llm else []), "passages"),
        work=lambda context: make_fret(recipe.fret, decontamination, context, fixed=fixed),
    )


def make_fret(
    config: FretConfig,
    decontamination: Decontamination,
    context: StepContext,
    *,
    fixed: bool = False,
) -> dict[str, Json]:
    """Chooses each query's positive and hard negatives, and applies the filters.

    Where passages are `fixed`, all candidates are labelled, also those that the LLM has not scored,
    and the negatives' texts, which nobody reads, are left out.
    """
    candidates = context.input("candidates")
    scores = QueryScores(*(context.inputs[name] for name in ("scores",) if name in context.inputs))
    dropped, metrics = _filter(config, decontamination, candidates, scores)
    label_all = fixed or not config.asks_llm
    ids = _candidate_ids(candidates) if label_all else scores.passage_ids
    texts = PassageTexts(context.input("passages"), ids)
    totals = Counter(_count([]))
    for shard in candidates.shards:
        rows = []
        for found in candidates.shard(shard).to_pylist():
            row = _NOT_SCORED | found | {"dropped_by": dropped.get(found["id"])}
            scored = scores.of(row["id"])
            if scored or (found["dropped_by"] is None and not config.asks_llm):
                row |= _labels(row, scored, config, texts, label_all=label_all)
            if fixed:
                row |= {"negative_titles": [], "negatives": []}
            rows.append(row)
        write_table(context.storage, shard.path, pa.Table.from_pylist(rows, schema=FRET))
        totals.update(_count(rows))
        context.progress.update(totals["num_queries"], candidates.num_rows)
    return {**totals, **metrics}


class QueryScores:
    """The pairs' scores, by query: 100 bytes a pair in memory."""

    def __init__(self, *artifacts: Artifact) -> None:
        """Reads the artifacts' shards, which are sorted by passage; a query is in one artifact."""
        tables = [_one_row_a_pair(table) for artifact in artifacts for table in artifact.tables()]
        self._pairs = pa.concat_tables([_PAIR.empty_table(), *tables]).sort_by("query_id")
        self._query_ids = np.array(self._pairs["query_id"].to_pylist(), dtype=np.bytes_)

    @property
    def passage_ids(self) -> pa.ChunkedArray:
        """The passages that were scored."""
        return pc.unique(self._pairs["passage_id"])

    def of(self, query_id: str) -> dict[str, dict[str, Any]]:
        """Returns ql, rc and error by passage id; nothing for a query that was not scored."""
        key = query_id.encode()
        start = int(np.searchsorted(self._query_ids, key))
        end = int(np.searchsorted(self._query_ids, key, side="right"))
        return {row["passage_id"]: row for row in self._pairs.slice(start, end - start).to_pylist()}


class PassageTexts:
    """Titles and texts by passage id, held as Arrow columns."""

    def __init__(self, passages: Artifact, ids: pa.ChunkedArray) -> None:
        """Reads those of the artifact's passages that have these ids."""
        columns = ["id", "title", "text"]
        read = passages.tables(columns)
        tables = [table.filter(pc.is_in(table["id"], value_set=ids)) for table in read]
        self._table = pa.concat_tables([PASSAGE.empty_table().select(columns), *tables])
        self._rows = {id_: row for row, id_ in enumerate(self._table["id"].to_pylist())}

    def __getitem__(self, passage_id: str) -> tuple[str, str]:
        """Returns (title, text); raises KeyError for an id that is not in the corpus."""
        row = self._rows[passage_id]
        return self._table["title"][row].as_py(), self._table["text"][row].as_py()


_PAIR = pa.schema(
    [
        ("query_id", pa.string()),
        ("passage_id", pa.string()),
        ("ql", pa.float32()),
        ("rc", pa.float32()),
        ("error", pa.string()),
    ]
)


def _one_row_a_pair(scores: pa.Table) -> pa.Table:
    """Turns lists of a passage's queries into rows."""
    parents = pc.list_parent_indices(scores["query_ids"])
    lists = [
        pc.list_flatten(scores[name])
        for name in ("query_ids", "query_likelihoods", "relevances", "errors")
    ]
    passages = scores["passage_id"].take(parents)
    return pa.table([lists[0], passages, *lists[1:]], schema=_PAIR)


def _candidate_ids(candidates: Artifact) -> pa.ChunkedArray:
    parts = [pc.unique(pc.list_flatten(each["candidate_ids"])) for each in candidates.tables()]
    return pc.unique(pa.chunked_array([pa.array([], pa.string()), *parts]))


def _filter(
    config: FretConfig,
    decontamination: Decontamination,
    candidates: Artifact,
    scores: QueryScores,
) -> tuple[dict[str, str], dict[str, Json]]:
    """Returns why each dropped query is dropped, by its id, and figures of decontamination."""
    dropped: dict[str, str] = {}
    kept: dict[str, str] = {}  # ids by query
    contaminated: list[dict[str, str]] = []
    for table in candidates.tables(["id", "query", "dropped_by"]):
        for row in table.to_pylist():
            id_, query, error = row["id"], row["query"], row["dropped_by"]
            if error is None:
                error = next((s["error"] for s in scores.of(id_).values() if s["error"]), None)
            if error is not None:
                dropped[id_] = error
            elif repeated := decontamination.repeated(query):
                dropped[id_], evaluation_query = repeated
                contaminated.append({"query": query, "evaluation_query": evaluation_query})
            elif query.casefold() in kept:
                dropped[id_] = "repeats another query"
            else:
                kept[query.casefold()] = id_
    ids = list(kept.values())
    near = near_duplicates(list(kept), config.max_query_similarity)
    dropped |= {ids[place]: "nearly repeats another query" for place in near}
    highest = decontamination.highest_overlap(query for query in kept if kept[query] not in dropped)
    return dropped, {
        "dropped_by": dict(Counter(dropped.values())),
        "num_evaluation_queries": len(decontamination),
        "highest_overlap_kept": round(highest, 4),
        "num_contaminated": len(contaminated),
        "contaminated": contaminated[:MAX_LISTED],
    }


_NOT_SCORED: dict[str, Any] = dict.fromkeys(FRET.names) | {
    name: [] for name in FRET.names if pa.types.is_list(FRET.field(name).type)
}

_OF_CANDIDATES = [field.name for field in CANDIDATES if pa.types.is_list(field.type)]


def _labels(
    row: dict[str, Any],
    scored: dict[str, dict[str, Any]],
    config: FretConfig,
    texts: PassageTexts,
    *,
    label_all: bool,
) -> dict[str, Any]:
    """Returns the columns that a query gains; none of one with a pair that could not be scored.

    With `label_all` they are of all candidates, else of those that the LLM has scored.
    """
    if any(score["error"] for score in scored.values()):
        return {}
    candidates = row["candidate_ids"]
    places = {id_: place for place, id_ in enumerate(candidates)}.values()  # of each id one
    order = sorted(places, key=lambda place: candidates[place] not in scored)
    columns = {name: [row[name][place] for place in order] for name in _OF_CANDIDATES}
    ids = [id_ for id_ in columns["candidate_ids"] if id_ in scored]
    columns["query_likelihoods"] = [scored[id_]["ql"] for id_ in ids]
    columns["relevances"] = [scored[id_]["rc"] for id_ in ids]
    ids = columns["candidate_ids"] if label_all else ids
    unknown = [float("nan")] * len(ids)
    labels = choose_labels(
        {judge: (columns[column] + unknown)[: len(ids)] for judge, column in JUDGES.items()},
        seed_place=ids.index(row["seed_id"]),
        config=config,
        query_id=row["id"],
    )
    positive_id = ids[labels.positive]
    negative_ids = [ids[place] for place in labels.negatives]
    return {
        **columns,
        "fused": labels.fused,
        "positive_id": positive_id,
        "positive_title": texts[positive_id][0],
        "positive": texts[positive_id][1],
        "positive_is_seed": positive_id == row["seed_id"],
        "negative_ids": negative_ids,
        "negative_titles": [texts[id_][0] for id_ in negative_ids],
        "negatives": [texts[id_][1] for id_ in negative_ids],
    }


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
