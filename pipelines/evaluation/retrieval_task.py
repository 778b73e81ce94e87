"""mteb's own retrieval task over data that is already here.

mteb's class does the search, the ranking and the metrics. What is added is where the data comes
from, and that the scores of single queries are kept, which mteb averages away and which intervals
and comparisons need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.evaluation.dataset import RetrievalDataset


@dataclass(frozen=True, kw_only=True)
class JudgedQueries:
    """What mteb found for each query, before it takes means.

    Attributes:
        scores: Query id -> metric as pytrec_eval spells it (``ndcg_cut_10``, ``recall_10``) or
            ``mrr_10`` -> value.
        rankings: Query id -> passage id -> cosine, of the best 1000.
    """

    scores: Mapping[str, Mapping[str, float]]
    rankings: Mapping[str, Mapping[str, float]]


def make_retrieval_task(dataset: RetrievalDataset) -> Any:
    """Returns an mteb ``AbsTaskRetrieval`` over ``dataset``, with its data loaded.

    After an evaluation its attribute ``judged`` holds the :class:`JudgedQueries`. Call inside
    :func:`pipelines.evaluation.mteb_model.quiet_mteb`.
    """
    from datasets import Dataset
    from mteb._evaluators.retrieval_metrics import mrr
    from mteb.abstasks.retrieval import AbsTaskRetrieval
    from mteb.abstasks.task_metadata import TaskMetadata

    class LocalRetrieval(AbsTaskRetrieval):  # type: ignore[misc]
        judged: JudgedQueries | None = None
        metadata = TaskMetadata(
            name=dataset.name,
            description="A retrieval test set from a local folder.",
            type="Retrieval",
            category="t2t",
            dataset={"path": "local", "revision": "local"},
            eval_splits=[dataset.split],
            eval_langs=["und-Zyyy"],
            main_score="ndcg_at_10",
        )

        def task_specific_scores(
            self,
            scores: dict[str, dict[str, float]],
            qrels: dict[str, dict[str, int]],
            results: dict[str, dict[str, float]],
            hf_split: str,
            hf_subset: str,
        ) -> dict[str, float]:
            """Keeps the scores of the single queries; mteb calls it when it has them."""
            reciprocal_ranks = dict(zip(results, mrr(qrels, results, [10])["MRR@10"], strict=True))
            self.judged = JudgedQueries(
                scores={
                    query: {**metrics, "mrr_10": reciprocal_ranks[query]}
                    for query, metrics in scores.items()
                },
                rankings=results,
            )
            return {}

    task = LocalRetrieval()
    ids, passages = list(dataset.passages), list(dataset.passages.values())
    judged = list(dataset.qrels)
    task.dataset = {
        "default": {
            dataset.split: {
                "corpus": Dataset.from_dict(
                    {
                        "id": ids,
                        "title": [passage.title for passage in passages],
                        "text": [passage.text for passage in passages],
                    }
                ),
                "queries": Dataset.from_dict(
                    {"id": judged, "text": [dataset.queries[query] for query in judged]}
                ),
                "relevant_docs": {query: dict(dataset.qrels[query]) for query in judged},
                "top_ranked": None,
            }
        }
    }
    task.data_loaded = True
    return task
