"""What single queries, pairs and texts scored, which mteb averages away.

Intervals and comparisons need them: two models a point apart on 200 queries are often the same
model. mteb hands them to methods of its tasks on the way to the mean; those calls are recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

TOP_RESULTS = 10
# mteb's names of a query's metrics that pytrec_eval spells otherwise.
_SPELLED = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "precision": "P"}
# What else a retrieval table shows.
_ALSO = ("ndcg_at_10", "recall_at_10", "mrr_at_10")


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """The items of one test set (or of one language of it) and the statistic that scores them.

    Attributes:
        statistic: ``mean``, ``spearman`` or ``max_ap``.
        rows: float64 ``[k, items]``: scores for ``mean``; gold and predicted scores for
            ``spearman``; labels (0 or 1) and one row for each kind of similarity for ``max_ap``.
        ids: The items' names, where they have some.
    """

    statistic: str
    rows: np.ndarray
    ids: tuple[str, ...] = ()

    def score(self, drawn: np.ndarray | slice = slice(None)) -> float:
        """Returns the statistic of the items drawn."""
        return _STATISTICS[self.statistic](self.rows[:, drawn])

    def to_json(self) -> dict[str, Any]:
        """Returns plain lists, strings and numbers."""
        return {"statistic": self.statistic, "rows": self.rows.tolist(), "ids": list(self.ids)}

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Sample:
        """Reads what :meth:`to_json` wrote."""
        rows = np.asarray(row["rows"], dtype=np.float64)
        return cls(statistic=row["statistic"], rows=rows, ids=tuple(row["ids"]))


def _mean(rows: np.ndarray) -> float:
    return float(rows[0].mean())


def _spearman(rows: np.ndarray) -> float:
    from scipy.stats import rankdata  # type: ignore[import-untyped]

    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(rankdata(rows[0]), rankdata(rows[1]))[0, 1])


def _max_ap(rows: np.ndarray) -> float:
    return max(average_precision(rows[0], scores) for scores in rows[1:])


_STATISTICS: dict[str, Callable[[np.ndarray], float]] = {
    "mean": _mean,
    "spearman": _spearman,
    "max_ap": _max_ap,
}


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Returns scikit-learn's average precision, ties as one threshold; nan without a positive.

    Args:
        labels: 0 or 1, ``[items]``.
        scores: Larger for what is more alike, ``[items]``.
    """
    order = np.argsort(-scores)
    hits = np.cumsum(labels[order])
    if not hits[-1]:
        return float("nan")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
    steps = np.diff(hits[last] / hits[-1], prepend=0.0)
    return float((steps * hits[last] / (last + 1)).sum())


@dataclass(kw_only=True)
class Items:
    """What was recorded: see :func:`record_items`.

    Attributes:
        metric: The task's main score.
        samples: Metric -> one sample for each split and language.
        top_results: Query -> its best passages, ``(id, cosine)``, best first.
    """

    metric: str
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    top_results: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    _experiments: list[np.ndarray] = field(default_factory=list)

    def _add(self, metric: str, statistic: str, rows: Any, ids: Sequence[str] = ()) -> None:
        sample = Sample(
            statistic=statistic, rows=np.asarray(rows, dtype=np.float64), ids=tuple(ids)
        )
        self.samples.setdefault(metric, []).append(sample)

    def _queries(
        self,
        scores: Mapping[str, Mapping[str, float]],
        qrels: Mapping[str, Mapping[str, int]],
        results: Mapping[str, Mapping[str, float]],
        **_: str,
    ) -> None:
        from mteb._evaluators.retrieval_metrics import mrr

        queries = sorted(scores)
        for metric in dict.fromkeys((self.metric, *_ALSO)):
            name, _at, cut = metric.partition("_at_")
            if name == "mrr" and cut:
                values = dict(
                    zip(results, mrr(qrels, results, [int(cut)])[f"MRR@{cut}"], strict=True)
                )
            elif name in _SPELLED:
                values = {query: each[f"{_SPELLED[name]}_{cut}"] for query, each in scores.items()}
            else:
                continue
            self._add(metric, "mean", [[values[query] for query in queries]], queries)
        for query in queries:
            # Ties go to the larger id, as in pytrec_eval: the list is the one that was scored.
            hits = sorted(results[query].items(), key=lambda hit: (hit[1], hit[0]), reverse=True)
            self.top_results[query] = [(id_, float(score)) for id_, score in hits[:TOP_RESULTS]]

    def _pairs(self, scores: Mapping[str, Any], gold: Sequence[float]) -> None:
        key = {"cosine_spearman": "cosine_scores", "spearman": "similarity_scores"}.get(self.metric)
        if key:
            self._add(self.metric, "spearman", [gold, scores[key]])

    def _labelled_pairs(self, scores: Mapping[str, Any], labels: Sequence[int]) -> None:
        rows = [scores["cosine_scores"], -np.asarray(scores["manhattan_distances"])]
        # Of unit vectors: the dot product and the Euclidean distance rank as the cosine does.
        kept = {"max_ap": rows, "cosine_ap": rows[:1], "similarity_ap": rows[:1]}.get(self.metric)
        if kept:
            self._add(self.metric, "max_ap", [labels, *kept])

    def _experiment(self, gold: Any, predicted: Any) -> None:
        self._experiments.append(np.asarray(gold) == np.asarray(predicted))

    def _experiments_done(self, scores: Any) -> None:
        done, self._experiments = self._experiments, []
        same = {right.shape for right in done}
        # Folds of a cross-validation are of other texts each, and several labels no accuracy.
        if self.metric == "accuracy" and len(same) == 1 and len(same.pop()) == 1:
            self._add("accuracy", "mean", [np.mean(done, axis=0)])

    def _clusters(self, scores: dict[str, Any]) -> None:
        measures = scores.get("v_measures", ())
        if self.metric == "v_measure" and measures:
            levels = measures.values() if isinstance(measures, dict) else [measures]
            self._add("v_measure", "mean", [[one for level in levels for one in level]])


def record_items(task: Any) -> Items:
    """Returns a record that fills while mteb evaluates ``task``.

    Clustering's items are its experiments, each of as many texts drawn; there is none for tasks
    whose score is not a statistic of single items.
    """
    from mteb import abstasks

    items = Items(metric=task.metadata.main_score)
    for kind, method, record in (
        (abstasks.AbsTaskRetrieval, "task_specific_scores", items._queries),
        (abstasks.AbsTaskSTS, "_calculate_scores", items._pairs),
        (abstasks.AbsTaskPairClassification, "_compute_metrics", items._labelled_pairs),
        (abstasks.AbsTaskClassification, "_calculate_scores", items._experiment),
        (abstasks.AbsTaskClassification, "_calculate_avg_scores", items._experiments_done),
        (abstasks.AbsTask, "_add_main_score", items._clusters),
    ):
        if isinstance(task, kind):
            setattr(task, method, _recorded(getattr(task, method), record))
    return items


def _recorded(method: Callable[..., Any], record: Callable[..., None]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        record(*args, **kwargs)
        return method(*args, **kwargs)

    return call
