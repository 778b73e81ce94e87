"""How good and how fast an encoder is at retrieval, and whether one is better than another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipelines.evaluation.bootstrap import NUM_RESAMPLES, Estimate, bootstrap
from pipelines.evaluation.dataset import RetrievalDataset
from pipelines.evaluation.mteb_model import CHUNK_TEXTS, MtebEncoder, TextEncoder, quiet_mteb
from pipelines.evaluation.prompts import EvaluationPrompt, evaluation_prompt
from pipelines.evaluation.retrieval_task import make_retrieval_task

METRICS = ("ndcg_at_10", "recall_at_10", "mrr_at_10")
TOP_RESULTS = 10


class Hit(NamedTuple):
    """A passage that a query found, and their cosine."""

    passage: str
    score: float


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """One model on one test set.

    Attributes:
        model: Name of the model.
        dataset: Name of the test set.
        split: Name of the qrels.
        task: What ``{task}`` of the query template said.
        num_passages: Size of the corpus.
        num_queries: Queries with qrels.
        ndcg_at_10: Mean over queries, with its 95 % interval.
        recall_at_10: As ``ndcg_at_10``.
        mrr_at_10: As ``ndcg_at_10``.
        per_query: Metric -> query id -> score.
        top_results: Query id -> its best 10 passages, best first.
        texts_per_s: Passages encoded in a second, tokenisation included, search and loading not.
    """

    model: str
    dataset: str
    split: str
    task: str
    num_passages: int
    num_queries: int
    ndcg_at_10: Estimate
    recall_at_10: Estimate
    mrr_at_10: Estimate
    per_query: Mapping[str, Mapping[str, float]]
    top_results: Mapping[str, tuple[Hit, ...]]
    texts_per_s: float

    def to_json(self, *, per_query: bool = True) -> dict[str, Any]:
        """Returns plain lists, dicts and numbers; without the queries' own if not ``per_query``."""
        row: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("model", "dataset", "split", "task", "num_passages", "num_queries")
        }
        for metric in METRICS:
            mean, low, high = getattr(self, metric)
            row |= {metric: mean, f"{metric}_interval": [low, high]}
        row["texts_per_s"] = self.texts_per_s
        if per_query:
            row["per_query"] = {metric: dict(scores) for metric, scores in self.per_query.items()}
            row["top_results"] = {
                query: [list(hit) for hit in hits] for query, hits in self.top_results.items()
            }
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> RetrievalResult:
        """Reads what :meth:`to_json` wrote, the queries' own scores included."""
        fields = {name: value for name, value in row.items() if not name.endswith("_interval")}
        for metric in METRICS:
            fields[metric] = Estimate(row[metric], *row[f"{metric}_interval"])
        fields["top_results"] = {
            query: tuple(Hit(*hit) for hit in hits) for query, hits in row["top_results"].items()
        }
        return cls(**fields)


def evaluate(
    encoder: TextEncoder,
    dataset: RetrievalDataset,
    *,
    task: str | None = None,
    model: str = "model",
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    on_progress: Callable[[int], None] | None = None,
) -> RetrievalResult:
    """Measures an encoder on a test set with mteb's retrieval task.

    Args:
        encoder: The model.
        dataset: From :func:`pipelines.evaluation.dataset.read_beir`, or made in memory.
        task: For the query template; Gecko's for a test set of this name if None.
        model: Name of the model.
        num_resamples: Of the bootstrap over queries.
        seed: Of the bootstrap.
        on_progress: Called with the number of texts just encoded; ``len(dataset.qrels)`` queries
            and ``len(dataset.passages)`` passages in all.
    """
    prompt = evaluation_prompt("Retrieval", dataset.name)
    if task is not None:
        prompt = EvaluationPrompt(task=task, symmetric=False)
    with quiet_mteb():
        wrapped = MtebEncoder(encoder, name=model, prompt=prompt, on_progress=on_progress)
        mteb_task = make_retrieval_task(dataset)
        # What mteb.evaluate() calls, without its import of sentence-transformers (4 s).
        mteb_task.evaluate(
            wrapped,
            dataset.split,
            encode_kwargs={"batch_size": CHUNK_TEXTS, "show_progress_bar": False},
        )
    judged = mteb_task.judged
    queries = sorted(judged.scores)
    per_query = {
        metric: {query: float(judged.scores[query][spelled]) for query in queries}
        for metric, spelled in zip(METRICS, ("ndcg_cut_10", "recall_10", "mrr_10"), strict=True)
    }
    estimates = {
        metric: bootstrap(list(scores.values()), num_resamples=num_resamples, seed=seed)
        for metric, scores in per_query.items()
    }
    return RetrievalResult(
        model=model,
        dataset=dataset.name,
        split=dataset.split,
        task=prompt.task,
        num_passages=len(dataset.passages),
        num_queries=len(queries),
        ndcg_at_10=estimates["ndcg_at_10"],
        recall_at_10=estimates["recall_at_10"],
        mrr_at_10=estimates["mrr_at_10"],
        per_query=per_query,
        top_results={query: _best(judged.rankings[query]) for query in queries},
        texts_per_s=wrapped.num_passages / wrapped.passages_s,
    )


def difference(
    before: RetrievalResult,
    after: RetrievalResult,
    *,
    metric: str = "ndcg_at_10",
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Returns ``after - before`` with its paired bootstrap interval: both on the same draws.

    Raises:
        ValueError: The two were not measured on the same queries.
    """
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r}: accepted are {', '.join(METRICS)}")
    old, new = before.per_query[metric], after.per_query[metric]
    if (before.dataset, before.split) != (after.dataset, after.split) or old.keys() != new.keys():
        raise ValueError(
            f"{before.model!r} was measured on {before.dataset}/{before.split} "
            f"({len(old)} queries), {after.model!r} on {after.dataset}/{after.split} "
            f"({len(new)}): compare results on the same queries"
        )
    gains = [new[query] - old[query] for query in sorted(old)]
    return bootstrap(gains, num_resamples=num_resamples, seed=seed)


def _best(ranking: Mapping[str, float]) -> tuple[Hit, ...]:
    # Ties go to the larger id, as in pytrec_eval, so that the list is the one that was scored.
    hits = sorted(ranking.items(), key=lambda item: (item[1], item[0]), reverse=True)
    return tuple(Hit(passage, float(score)) for passage, score in hits[:TOP_RESULTS])
