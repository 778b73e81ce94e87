"""Which test sets a recipe or a command names, and reading them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from cluster.artifacts import Json
from cluster.config import Config
from cluster.storage import file_versions, open_storage
from pipelines.datasets.folders import TestData, read_folder
from pipelines.datasets.mteb_tasks import judged_texts, load_mteb_tasks
from pipelines.fingerprints import NotFingerprinted, fingerprinted
from pipelines.names import SetName

MTEB = "mteb"


class TestSet(Config):
    """A test set: a folder of one of several kinds, or an mteb task by name."""

    __test__ = False  # not pytest's

    name: SetName
    path: Annotated[str, NotFingerprinted] = Field(
        description="a folder or URI; mteb's name of a task, or of a benchmark and all its tasks"
        " (mteb), whose data is fetched before a run begins: its texts are kept out of training"
    )
    kind: Literal["retrieval", "sts", "pairs", "classification", "clustering", "rerank", "mteb"] = (
        "retrieval"
    )
    split: str = "test"
    task: str | None = Field(default=None, description="default: Gecko's prompt for this set")
    dimensions: tuple[int, ...] = Field(
        default=(), description="also cut the vectors to these, and normalise them again"
    )


def load_test_sets(test_sets: Iterable[TestSet]) -> Iterator[tuple[TestSet, TestData | Any]]:
    """Yields each test set's data, or each of its mteb tasks, with the data fetched.

    They are what :func:`pipelines.evaluation.evaluate.evaluate` takes.

    Raises:
        UserError: One does not exist or is malformed.
    """
    for test_set in test_sets:
        if test_set.kind == MTEB:
            yield from ((test_set, task) for task in load_mteb_tasks(test_set.path))
        else:
            yield test_set, load_folder(test_set)


def load_folder(test_set: TestSet) -> TestData:
    """Reads a test set that is a folder.

    Raises:
        UserError: It does not exist or is malformed.
    """
    return replace(read_folder(test_set.kind, test_set.path, test_set.split), name=test_set.name)


def evaluation_queries(test_sets: tuple[TestSet, ...]) -> list[str]:
    """Returns every text that the run is judged by and must not be trained on.

    Queries, and the texts of the evaluated split of other kinds. The data of mteb's own tasks is
    fetched for it before anything is run.

    Raises:
        UserError: A test set does not exist or is malformed, or mteb's data cannot be had.
    """
    texts: set[str] = set()
    for test_set, data in load_test_sets(test_sets):
        texts.update(judged_texts(data) if test_set.kind == MTEB else data.judged_texts())
    return sorted(texts)


def test_set_fingerprint(test_set: TestSet) -> dict[str, Json]:
    """Returns what the results depend on: a folder's files and not where it is."""
    row = fingerprinted(test_set)
    if test_set.kind == MTEB:
        row["path"] = test_set.path
    else:
        storage = open_storage(test_set.path)
        row["files"] = [list(each) for each in file_versions(storage, storage.list())]
    return row
