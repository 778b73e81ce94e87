"""Which test sets a recipe or a command names, and reading them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.artifacts import Artifact
from pipelines.datasets.corpus import PYTHON_DOCUMENTATION
from pipelines.datasets.folders import TestData, read_folder
from pipelines.datasets.mteb_tasks import judged_texts, load_mteb_task
from pipelines.datasets.retrieval import RetrievalDataset, TitledText
from pipelines.names import SetName

MTEB = "mteb"


class TestSet(BaseModel):
    """A test set: a folder of one of several kinds, or an mteb task by name."""

    __test__ = False  # not pytest's
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: SetName
    path: str = Field(
        description="a folder or URI; 'python-documentation' (retrieval); mteb's name (mteb), whose"
        " data is fetched before a run begins: its texts are kept out of training"
    )
    kind: Literal["retrieval", "sts", "pairs", "classification", "clustering", "rerank", "mteb"] = (
        "retrieval"
    )
    split: str = "test"
    task: str | None = Field(default=None, description="default: Gecko's prompt for this set")
    dimensions: tuple[int, ...] = Field(
        default=(), description="also cut the vectors to these, and normalise them again"
    )


def load_test_set(test_set: TestSet, passages: Artifact | None = None) -> TestData | Any:
    """Reads a test set; that of the Python documentation is asked of the run's own passages.

    Returns:
        What :func:`pipelines.evaluation.evaluate.evaluate` takes; of an mteb task its data is
        fetched.

    Raises:
        UserError: It does not exist or is malformed.
    """
    if test_set.kind == MTEB:
        return load_mteb_task(test_set.path)
    if test_set.path == PYTHON_DOCUMENTATION:
        assert passages is not None
        return _python_questions(test_set, passages)
    return _read(test_set)


def _read(test_set: TestSet) -> TestData:
    return replace(read_folder(test_set.kind, test_set.path, test_set.split), name=test_set.name)


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
            id_: TitledText(title, text)
            for id_, (title, text) in zip(table["id"].to_pylist(), texts, strict=True)
        },
        queries={q.id: q.question for q in questions if q.id in qrels},
        qrels=qrels,
    )


def evaluation_queries(test_sets: tuple[TestSet, ...]) -> list[str]:
    """Returns every text that the run is judged by and must not be trained on.

    Queries, and the texts of the evaluated split of other kinds; of the Python documentation the
    questions of both splits. The data of mteb's own tasks is fetched for it before anything is run.

    Raises:
        UserError: A test set does not exist or is malformed, or mteb's data cannot be had.
    """
    texts: set[str] = set()
    for test_set in test_sets:
        if test_set.path == PYTHON_DOCUMENTATION:
            from pipelines.demo.questions import load_questions

            for split in ("dev", "test"):
                texts |= {question.question for question in load_questions(split)}
        elif test_set.kind == MTEB:
            texts |= set(judged_texts(load_mteb_task(test_set.path)))
        else:
            texts |= set(_read(test_set).judged_texts())
    return sorted(texts)
