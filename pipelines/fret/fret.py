"""The step `fret`: scored candidates become training examples, and queries unfit for it are marked.

Every query keeps its row, with the rule that dropped it if one did: an LLM was paid for it, and
another threshold may want it.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

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
from pipelines.fret.corpus_queries import TASKS
from pipelines.fret.fusion import JUDGES, LLM_JUDGES, asks_cross_encoder, asks_llm, choose_labels
from pipelines.fret.judging import judging_of
from pipelines.fret.pairs import scored_candidates
from pipelines.fret.scored_queries import QueryScores, judged_first, with_scores
from pipelines.records import FRET, PASSAGE

if TYPE_CHECKING:
    from pipelines.recipe.recipe import Recipe

TITLE = "choose positives and hard negatives"
MAX_LISTED = 100
AUTO = "auto"
_SCORING = ("probe", "scores", "cross_scores")  # the steps that may have scored pairs


class FretConfig(Config):
    """How labels are chosen from the scored candidates. The defaults are Gecko's."""

    fusion: str = Field(
        default="ql+rc",
        description="judges, joined by +: ql, rc, and sim, the retriever's similarity; with"
        " cross_encoder also ce; with candidates.lexical also lex, BM25, and hybrid, the sum that"
        " ordered the candidates; without ql and rc no pair is scored by the LLM, and without ce"
        " too all candidates are judged; auto: what"
        " the step `probe` finds best, its scale too, and if that is the retriever alone, the seed"
        " is the positive and the retriever judges the others",
    )
    scale: Literal["ranks", "z-scores"] = Field(
        default="ranks",
        description="what of each judge is added up: 1 / rank, or its scores, standardised over a"
        " query's scored candidates (hybrid's are standardised over the corpus already)",
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
        if fusion != AUTO and (len(set(names)) < len(names) or not JUDGES.keys() >= set(names)):
            raise ValueError(
                f"accepted are {AUTO}, or {', '.join(JUDGES)}, each once, joined by + (ql+sim)"
            )
        return fusion

    @property
    def asks_llm(self) -> bool:
        """Whether a judge is the LLM, for which pairs are scored."""
        return asks_llm(self.fusion)

    @property
    def llm_judges(self) -> tuple[str, ...]:
        """The judges that are the LLM; with `auto` all that there are."""
        named = LLM_JUDGES if self.fusion == AUTO else self.fusion.split("+")
        return tuple(judge for judge in LLM_JUDGES if judge in named)

    @property
    def asks_cross_encoder(self) -> bool:
        """Whether a judge is the cross-encoder, for which pairs are scored too."""
        return asks_cross_encoder(self.fusion)

    @property
    def scores_pairs(self) -> bool:
        """Whether some candidates are scored for a judge, and those alone are labelled."""
        return self.asks_llm or self.asks_cross_encoder


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
        inputs=(
            "candidates",
            *(["probe"] if recipe.has_probe else []),
            *(["scores"] if recipe.fret.asks_llm else []),
            *(["cross_scores"] if recipe.fret.asks_cross_encoder else []),
            "passages",
        ),
        work=lambda context: make_fret(
            recipe.fret,
            decontamination,
            context,
            fixed=fixed,
            ordered_by=recipe.candidates.ordered_by,
        ),
    )


def make_fret(
    config: FretConfig,
    decontamination: Decontamination,
    context: StepContext,
    *,
    fixed: bool = False,
    ordered_by: str = "sim",
) -> dict[str, Json]:
    """Chooses each query's positive and hard negatives, and applies the filters.

    Where passages are `fixed`, all candidates are labelled, also those that were not scored, and
    the negatives' texts, which nobody reads, are left out. Where a probe found the teacher to be no
    better than the order of the candidates, nothing but its own queries was scored: then the first
    are labelled, as many as would have been scored. That order is by the judge `ordered_by`.
    """
    candidates, probe = context.input("candidates"), context.inputs.get("probe")
    scores = QueryScores(*(context.inputs[name] for name in _SCORING if name in context.inputs))
    dropped, metrics = _filter(config, decontamination, candidates, scores)
    judged = config.scores_pairs and not probe
    judging = judging_of(config.fusion, config.scale, ordered_by) if judged else None
    label_all = fixed or not config.scores_pairs
    num_unscored = 0 if config.scores_pairs else sys.maxsize
    if probe:
        config = as_chosen(config, probe)
        if probe.manifest.metrics["fusion"] is None:
            num_unscored = probe.manifest.metrics["num_scored"]
    if label_all or num_unscored:
        ids = _nearest(candidates, sys.maxsize if label_all else num_unscored)
    else:
        ids = scores.passage_ids
    texts = PassageTexts(context.input("passages"), ids)
    totals = Counter(_count([]))
    for shard in candidates.shards:
        rows = []
        for found in candidates.shard(shard).to_pylist():
            row = _NOT_LABELLED | found | {"dropped_by": dropped.get(found["id"])}
            if found["dropped_by"] is None:
                columns, num_judged = _judged(found, scores.of(row["id"]), num_unscored)
                row |= columns
                if label_all and num_judged:
                    num_judged = len(row["candidate_ids"])
                row |= _labels(row, num_judged, config, texts)
            if fixed:
                row |= {"negative_titles": [], "negatives": []}
            rows.append(row)
            if judging and row["task"] not in TASKS:
                judging.add_row(row)
        table = pa.Table.from_pylist(rows, schema=FRET)
        context.log.append([write_table(context.storage, shard.path, table)])
        totals.update(_count(rows))
        context.progress.update(totals["num_queries"], candidates.num_rows)
    return {**totals, **metrics, **(judging.metrics() if judging else {})}


def as_chosen(config: FretConfig, probe: Artifact) -> FretConfig:
    """Returns the configuration with what a probe chose: with SKIP the seed, and the retriever.

    The retriever is the first of the probe's rankings: the judge that ordered the candidates.
    """
    chosen = probe.manifest.metrics
    if chosen["fusion"] is None:
        retriever = chosen["judges"][0]["fusion"]
        update = {"fusion": retriever, "scale": "z-scores", "positive": "seed"}
    else:
        update = {"fusion": chosen["fusion"], "scale": chosen["scale"]}
    return config.model_copy(update=update)


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


_NOT_LABELLED: dict[str, Any] = dict.fromkeys(FRET.names) | {
    name: [] for name in FRET.names if pa.types.is_list(FRET.field(name).type)
}


def _nearest(candidates: Artifact, num: int) -> pa.ChunkedArray:
    """Returns the ids of the passages that are labelled where not all were scored by the LLM."""
    tables = candidates.tables(["id", "seed_id", "dropped_by", "candidate_ids"])
    rows = (row for table in tables for row in table.to_pylist() if row["dropped_by"] is None)
    ids = sorted({id_ for row in rows for id_ in scored_candidates(row, num)})
    return pa.chunked_array([pa.array(ids, pa.string())])


def _judged(
    row: dict[str, Any], scored: dict[str, dict[str, Any]], num_unscored: int
) -> tuple[dict[str, Any], int]:
    """Returns a query's candidates with their scores, and how many of the first are to be labelled.

    They are those that were scored or else, of a query that was not, the nearest `num_unscored`.
    """
    if any(score["error"] for score in scored.values()):
        return {}, 0
    if scored:
        return with_scores(row, scored), len(scored)
    nearest = set(scored_candidates(row, num_unscored))
    return judged_first(row, nearest), len(nearest)


def _labels(
    row: dict[str, Any], num_judged: int, config: FretConfig, texts: PassageTexts
) -> dict[str, Any]:
    """Returns the labels of a query by its first `num_judged` candidates; none if none was."""
    if num_judged == 0:
        return {}
    ids = row["candidate_ids"][:num_judged]
    unknown = [float("nan")] * num_judged
    labels = choose_labels(
        {judge: (row[column] + unknown)[:num_judged] for judge, column in JUDGES.items()},
        seed_place=ids.index(row["seed_id"]),
        config=config,
        query_id=row["id"],
    )
    positive_id = ids[labels.positive]
    negative_ids = [ids[place] for place in labels.negatives]
    return {
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
