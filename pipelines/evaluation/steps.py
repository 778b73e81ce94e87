"""The step `evaluation`: the run's test sets, by the retriever and the student before and after."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from cluster.artifacts import Artifact, Json
from cluster.storage import open_storage
from pipelines.corpus.sources import PYTHON_DOCUMENTATION
from pipelines.evaluation.dataset import Passage, RetrievalDataset, read_beir

if TYPE_CHECKING:
    from actors.encoder import Encoder
    from cluster.steps import StepContext

RESULTS = "results.json"


class TestSet(BaseModel):
    """A retrieval test set: a BEIR folder, or the questions about the Python documentation."""

    __test__ = False  # not pytest's
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    path: str = Field(description="a BEIR folder or URI, or 'python-documentation'")
    split: str = "test"
    task: str | None = Field(default=None, description="default: Gecko's prompt for this set")


def load_test_set(test_set: TestSet, passages: Artifact | None = None) -> RetrievalDataset:
    """Reads a test set; that of the Python documentation is asked of the run's own passages."""
    if test_set.path == PYTHON_DOCUMENTATION:
        assert passages is not None
        return _python_questions(test_set, passages)
    storage = open_storage(test_set.path)
    folder = getattr(storage, "folder", None)
    with tempfile.TemporaryDirectory() as temporary:
        if folder is None:
            folder = Path(temporary)
            for file in storage.list():
                storage.download(file, folder / file)
        dataset = read_beir(folder, test_set.split)
    return RetrievalDataset(
        name=test_set.name,
        split=dataset.split,
        passages=dataset.passages,
        queries=dataset.queries,
        qrels=dataset.qrels,
    )


def _python_questions(test_set: TestSet, passages: Artifact) -> RetrievalDataset:
    from pipelines.demo.questions import load_questions

    table = passages.read()
    ids = dict(zip(table["source"].to_pylist(), table["id"].to_pylist(), strict=True))
    texts = zip(table["title"].to_pylist(), table["text"].to_pylist(), strict=True)
    qrels = {}
    questions = load_questions(test_set.split)
    for question in questions:
        # Another Python or package version may lack an entry; a question with none is left out.
        answers = {ids[source]: 1 for source in question.answers if source in ids}
        if answers:
            qrels[question.id] = answers
    return RetrievalDataset(
        name=test_set.name,
        split=test_set.split,
        passages={
            id_: Passage(title, text)
            for id_, (title, text) in zip(table["id"].to_pylist(), texts, strict=True)
        },
        queries={q.id: q.question for q in questions if q.id in qrels},
        qrels=qrels,
    )


def evaluation_queries(test_sets: tuple[TestSet, ...]) -> list[str]:
    """Returns every query that the run is judged by, of all splits it can find here."""
    queries: set[str] = set()
    for test_set in test_sets:
        if test_set.path == PYTHON_DOCUMENTATION:
            from pipelines.demo.questions import load_questions

            for split in ("dev", "test"):
                queries |= {question.question for question in load_questions(split)}
        else:
            queries |= set(load_test_set(test_set).queries.values())
    return sorted(queries)


def run_evaluation(
    test_sets: tuple[TestSet, ...], encoders: dict[str, Encoder], context: StepContext
) -> dict[str, Json]:
    """Evaluates every encoder on every test set; writes results.json with each query's results."""
    from pipelines.evaluation.evaluate import difference, evaluate

    results, differences = [], []
    done = 0
    datasets = [load_test_set(test_set, context.input("passages")) for test_set in test_sets]
    total = sum(len(d.passages) + len(d.qrels) for d in datasets) * len(encoders)
    for test_set, dataset in zip(test_sets, datasets, strict=True):
        by_model = {}
        for name, encoder in encoders.items():

            def progress(num_texts: int, name: str = name) -> None:
                nonlocal done
                done += num_texts
                context.progress.update(done, total, name)

            by_model[name] = evaluate(
                encoder, dataset, task=test_set.task, model=name, on_progress=progress
            )
        results += [result.to_json() for result in by_model.values()]
        gain = difference(by_model["student_before"], by_model["student_after"])
        differences.append(
            {
                "dataset": dataset.name,
                "split": dataset.split,
                "metric": "ndcg_at_10",
                "difference": gain.mean,
                "interval": [gain.low, gain.high],
            }
        )
    queries = {dataset.name: dict(dataset.queries) for dataset in datasets}
    qrels = {d.name: {query: dict(rated) for query, rated in d.qrels.items()} for d in datasets}
    document = {
        "results": results,
        "differences": differences,
        "queries": queries,
        "qrels": qrels,
        "num_parameters": {name: encoder.num_parameters for name, encoder in encoders.items()},
    }
    context.storage.write_bytes(RESULTS, json.dumps(document).encode())
    short = [{k: v for k, v in r.items() if k not in _LONG} for r in results]
    return {"results": short, "differences": differences}


_LONG = ("per_query", "top_results")
