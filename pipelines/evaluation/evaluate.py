"""How good an encoder is on a test set, and whether one is better than another.

Every test set, ours or mteb's, goes the same way: an mteb task, mteb's evaluation, its result and
the scores of single items.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from actors.text_encoder import CHUNK_TEXTS, TextEncoder
from cluster.plain_json import dump_json
from pipelines.datasets.folders import LabelledDataset, TestData
from pipelines.datasets.mteb_tasks import fresh, make_task, quiet_mteb
from pipelines.datasets.retrieval import RetrievalDataset
from pipelines.evaluation.bootstrap import Estimate, bootstrap
from pipelines.evaluation.items import Sample, record_items
from pipelines.evaluation.mteb_model import (
    ModelIdentity,
    MtebEncoder,
    TextVectors,
    check_dimensions,
)
from pipelines.evaluation.prompts import EvaluationPrompt, evaluation_prompt

# Folder of single items beside mteb's own results.
ITEMS = "tokay"
# mteb rounds retrieval scores to five places.
_ROUNDED = 1e-4


@dataclass(frozen=True, kw_only=True)
class Result:
    """One model at one number of dimensions on one test set.

    Attributes:
        model: Name of the model.
        dataset: Name of the test set, or mteb's of its task.
        task_type: mteb's type of the task, such as ``STS``.
        split: Of the test set.
        task: What ``{task}`` of the query template said.
        dimensions: Of the vectors.
        metric: The task's main score, such as ``ndcg_at_10``.
        mteb_score: mteb's main score: the mean over splits and languages; nan where there is none.
        counts: Size of the test set: ``num_queries``, ``num_passages``, ``num_pairs``,
            ``num_texts``.
        texts_per_s: Distinct texts encoded in a second, tokenisation included, search and loading
            not; 0 where the vectors were there already.
        samples: Metric -> what single items scored, for each split and language. Retrieval has
            ``recall_at_10`` and ``mrr_at_10`` beside the main score; a task whose score is not a
            statistic of single items has none.
        top_results: Query -> its best 10 passages, ``(id, cosine)``, best first.
        seen: The model was trained on a set of this name.
    """

    model: str
    dataset: str
    task_type: str
    split: str
    task: str
    dimensions: int
    metric: str
    mteb_score: float
    counts: Mapping[str, int]
    texts_per_s: float
    samples: Mapping[str, Sequence[Sample]] = field(compare=False)
    top_results: Mapping[str, Sequence[tuple[str, float]]] = field(compare=False)
    seen: bool = False

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """Metric -> score with its 95 % interval, the main score first."""
        estimates = {metric: bootstrap(samples) for metric, samples in self.samples.items()}
        without = Estimate(self.mteb_score, math.nan, math.nan)
        return {self.metric: estimates.pop(self.metric, without), **estimates}

    @property
    def score(self) -> Estimate:
        """The main score; its interval is nan where there are no single items."""
        return self.estimates[self.metric]

    @property
    def reason(self) -> str | None:
        """Why there is no score; None where there is one."""
        if math.isfinite(self.mteb_score):
            return None
        for sample in self.samples.get(self.metric, ()):
            if sample.statistic == "spearman" and np.ptp(sample.rows[1]) == 0:
                return "the model finds all pairs equally alike, which has no correlation"
        return "mteb gives no number"

    @property
    def per_query(self) -> dict[str, dict[str, float]]:
        """Metric -> query -> score, for retrieval in one language."""
        return {
            metric: dict(zip(samples[0].ids, samples[0].rows[0].tolist(), strict=True))
            for metric, samples in self.samples.items()
            if len(samples) == 1 and samples[0].ids
        }

    def to_json(self, *, items: bool = True) -> dict[str, Any]:
        """Returns plain lists, dicts and numbers; without those of single items if not ``items``.

        Each metric stands under its own name, with ``METRIC_interval`` beside it. A score that is
        none is None, and ``reason`` says why.
        """
        names = ("model", "dataset", "task_type", "split", "task", "dimensions", "metric")
        row: dict[str, Any] = {name: getattr(self, name) for name in names}
        row |= {"score": known(self.score.mean), "mteb_score": known(self.mteb_score)}
        row |= {"reason": self.reason, **self.counts}
        for metric, score in self.estimates.items():
            row |= {metric: known(score.mean), f"{metric}_interval": score.interval}
        row |= {"texts_per_s": self.texts_per_s, "seen": self.seen}
        if items:
            row["counts"], row["per_query"] = dict(self.counts), self.per_query
            row["samples"] = {
                metric: [sample.to_json() for sample in samples]
                for metric, samples in self.samples.items()
                if metric not in row["per_query"]
            }
            row["top_results"] = {query: list(hits) for query, hits in self.top_results.items()}
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Result:
        """Reads what :meth:`to_json` wrote, that of single items included."""
        samples = {
            metric: [Sample(statistic="mean", rows=np.array([[*items.values()]]), ids=tuple(items))]
            for metric, items in row["per_query"].items()
        } | {
            metric: [Sample.from_json(each) for each in samples]
            for metric, samples in row["samples"].items()
        }
        hits = {query: [(i, s) for i, s in each] for query, each in row["top_results"].items()}
        plain = {name: row[name] for name in cls.__dataclass_fields__ if name in row}
        plain["mteb_score"] = math.nan if row["mteb_score"] is None else row["mteb_score"]
        return cls(**(plain | {"samples": samples, "top_results": hits}))


def known(score: float) -> float | None:
    """Returns a score as JSON has it: None where it is no number."""
    return score if math.isfinite(score) else None


def evaluate(
    encoder: TextEncoder,
    data: TestData | Any,
    *,
    model: ModelIdentity | str = "model",
    task: str | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Result:
    """Measures an encoder's full vectors; see :func:`evaluate_at`."""
    (result,) = evaluate_at(encoder, data, model=model, task=task, on_progress=on_progress)
    return result


def evaluate_at(
    encoder: TextEncoder,
    data: TestData | Any,
    *,
    dimensions: Sequence[int | None] = (None,),
    model: ModelIdentity | str = "model",
    task: str | None = None,
    results: Path | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Result]:
    """Measures an encoder on a test set with mteb.

    Args:
        encoder: The model.
        data: A test set, or an mteb task with its data loaded.
        dimensions: Cut the vectors to each of these, and make them of unit length again; None is
            all of them. Texts are encoded once for all.
        model: Its name, or what is known of it.
        task: For the query template; Gecko's for a test set of this type and name if None.
        results: A folder in the layout of mteb's ``ResultCache``. What stands there of the same
            model content, data and mteb is not measured again.
        on_progress: Called with the number of texts just encoded.

    Returns:
        One result for each number of dimensions, without repetition.

    Raises:
        UserError: The model has fewer dimensions, or its vectors are no numbers.
    """
    identity = ModelIdentity(name=model) if isinstance(model, str) else model
    with quiet_mteb():
        if isinstance(data, RetrievalDataset | LabelledDataset):
            mteb_task, name, counts = make_task(data), data.name, data.counts
        else:
            mteb_task, name, counts = data, data.metadata.name, {}
        metadata = mteb_task.metadata
        prompt = evaluation_prompt(metadata.type, name)
        if task is not None:
            prompt = EvaluationPrompt(task=task, symmetric=prompt.symmetric)
        full = encoder.dimensions
        for size in dimensions:
            check_dimensions(size, full)
        sizes = dict.fromkeys(None if size == full else size for size in dimensions)
        vectors = TextVectors(encoder, keep=len(sizes) > 1, on_progress=on_progress)
        measured = []
        for size in sizes:
            experiment = {"embed_dim": size, "task": task}
            wrapped = MtebEncoder(
                vectors,
                model=identity,
                prompt=prompt if task else None,
                dimensions=size,
                experiment={key: value for key, value in experiment.items() if value},
            )
            stored = _Stored(results, wrapped, mteb_task) if results else None
            result = stored.read() if stored and identity.revision else None
            if result is None:
                result = _measure(wrapped, vectors, fresh(mteb_task), stored)
            measured.append(
                replace(
                    result,
                    model=identity.name,
                    dataset=name,
                    task=prompt.task,
                    counts=counts,
                    seen=name in identity.training_sets,
                )
            )
    return measured


def difference(before: Result, after: Result, *, metric: str | None = None) -> Estimate:
    """Returns ``after - before`` with its paired bootstrap interval: both on the same draws.

    The two are of one test set; `metric` is the main score if None.

    Raises:
        ValueError: The two were not measured on the same items.
    """
    chosen = metric or after.metric
    if chosen not in after.estimates:
        raise ValueError(f"metric {chosen!r}: accepted are {', '.join(after.estimates)}")
    old, new = (result.samples.get(chosen, ()) for result in (before, after))
    same = [[(one.ids, one.rows.shape) for one in samples] for samples in (old, new)]
    other_items = bool(old and new) and same[0] != same[1]
    if (before.dataset, before.split) != (after.dataset, after.split) or other_items:
        raise ValueError(
            f"{before.model!r} was measured on {before.dataset}/{before.split}, {after.model!r} on "
            f"{after.dataset}/{after.split}, or on other items: compare results on the same ones"
        )
    if not (old and new):  # mteb's score is no mean over items, of one of them at least
        return Estimate(after.mteb_score - before.mteb_score, math.nan, math.nan)
    return bootstrap(new, before=old)


def _measure(
    encoder: MtebEncoder, vectors: TextVectors, mteb_task: Any, stored: _Stored | None
) -> Result:
    import mteb

    items = record_items(mteb_task)
    if stored:
        stored.drop()
    outcome = mteb.evaluate(
        encoder,
        mteb_task,
        cache=stored.cache if stored else None,
        overwrite_strategy="always",
        co2_tracker=False,
        encode_kwargs={"batch_size": CHUNK_TEXTS, "show_progress_bar": False},
        show_progress_bar=False,
    ).task_results[0]
    score = float(outcome.get_score())
    main = items.samples.get(items.metric)
    # No interval is given around anything but mteb's own score.
    if main and abs(np.mean([sample.score() for sample in main]) - score) > _ROUNDED:
        del items.samples[items.metric]
    result = Result(
        model="",
        dataset="",
        task_type=mteb_task.metadata.type,
        split="+".join(mteb_task.eval_splits),
        task="",
        dimensions=encoder.dimensions,
        metric=items.metric,
        mteb_score=score,
        counts={},
        texts_per_s=vectors.num_texts / vectors.seconds_s if vectors.num_texts else 0.0,
        samples=items.samples,
        top_results=items.top_results,
    )
    if stored:
        stored.write(result)
    return result


class _Stored:
    """Where a result of mteb's and its single items stand in a folder of results.

    mteb's own files are as its `ResultCache` writes them; the items stand in a folder `ITEMS`
    beside them, where mteb does not look.

    Attributes:
        cache: mteb's.
    """

    def __init__(self, folder: Path, encoder: MtebEncoder, mteb_task: Any) -> None:
        import mteb

        self.cache = mteb.ResultCache(folder)
        name, splits = mteb_task.metadata.name, mteb_task.eval_splits
        path = self.cache.get_task_result_path(name, encoder.mteb_model_meta)
        self._items = path.parent / ITEMS / f"{name}.json"
        try:
            there = self.cache.load_task_result(name, encoder.mteb_model_meta)
        except ValueError:  # half a file, of somebody who was killed
            there = None
        # mteb itself does not see that data has changed.
        self._fresh = (
            there is not None
            and set(splits) <= set(there.scores)
            and there.dataset_revision == mteb_task.metadata.revision
            and there.mteb_version == mteb.__version__
        )

    def read(self) -> Result | None:
        """Returns the result if it is of the same model, data and mteb."""
        if not (self._fresh and self._items.is_file()):
            return None
        try:
            return Result.from_json(json.loads(self._items.read_bytes()))
        except ValueError:  # as above
            return None

    def drop(self) -> None:
        """Takes the items away, lest they be taken for those of a new result of mteb's."""
        self._items.unlink(missing_ok=True)

    def write(self, result: Result) -> None:
        """Keeps a result for the next run."""
        self._items.parent.mkdir(parents=True, exist_ok=True)
        begun = self._items.with_suffix(".part")
        begun.write_text(dump_json(result.to_json()), encoding="utf-8")
        begun.replace(self._items)
