"""mteb's own tasks: over test sets that are already here, and by name from the hub.

mteb's classes do the search, the ranking, the classifiers, the clusters and every metric.
"""

from __future__ import annotations

import copy
import difflib
import logging
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partialmethod
from types import ModuleType
from typing import Any

import numpy as np

from cluster.errors import UserError
from pipelines.datasets.folders import LabelledDataset, TestData
from pipelines.datasets.retrieval import RetrievalDataset

# Kind of test set -> mteb's type of task, the main score that its tasks of that type have, and
# their class.
_TYPES = {
    "retrieval": ("Retrieval", "ndcg_at_10", "AbsTaskRetrieval"),
    "rerank": ("Reranking", "map_at_1000", "AbsTaskRetrieval"),
    "sts": ("STS", "cosine_spearman", "AbsTaskSTS"),
    "pairs": ("PairClassification", "max_ap", "AbsTaskPairClassification"),
    "classification": ("Classification", "accuracy", "AbsTaskClassification"),
    "clustering": ("Clustering", "v_measure", "AbsTaskClustering"),
}


@contextmanager
def quiet_mteb() -> Iterator[ModuleType]:
    """Imports mteb and keeps it from everything but evaluating.

    mteb talks through logging, warnings and progress bars, makes ``~/.cache/mteb`` when imported
    and seeds the global random generators whenever it makes a task. Inside this block the console
    stays silent, no folder is made, and the generators are put back at the end, so that an
    evaluation in the middle of training does not change the training.

    Yields:
        The mteb module (its import takes about 4 s, hence not at the top of a file).
    """
    import torch
    from tqdm.std import tqdm  # type: ignore[import-untyped]

    own_cache = "mteb" not in sys.modules and "MTEB_CACHE" not in os.environ
    if own_cache:
        os.environ["MTEB_CACHE"] = tempfile.gettempdir()
    try:
        import datasets
        import mteb
    finally:
        if own_cache:
            del os.environ["MTEB_CACHE"]
    loggers = [
        logging.getLogger(name)
        for name in ("mteb", "datasets", "huggingface_hub", "sentence_transformers")
    ]
    levels = [each.level for each in loggers]
    bars_were_off = datasets.are_progress_bars_disabled()
    # mteb seeds NumPy's old global generator, which therefore is the one to put back.
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    for each in loggers:
        each.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    # Several of mteb's tasks show bars whatever is set.
    tqdm_init = tqdm.__init__
    tqdm.__init__ = partialmethod(tqdm_init, disable=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield mteb
    finally:
        tqdm.__init__ = tqdm_init
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
        if not bars_were_off:
            datasets.enable_progress_bars()
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def make_task(data: TestData) -> Any:
    """Returns an mteb task over ``data``, with its data loaded.

    Its name is the test set's with the kind behind it, such as ``cranfield-retrieval``, and the
    split where that is not ``test``; its revision is a hash of the data. Call inside
    ``quiet_mteb``.
    """
    from mteb import abstasks
    from mteb.abstasks.task_metadata import TaskMetadata

    mteb_type, main_score, base = _TYPES[data.kind]
    split = "" if data.split == "test" else f"-{data.split}"
    # It names a file of the results.
    name = f"{data.name}-{data.kind}{split}".replace("/", "-").replace("\0", "-")
    metadata = TaskMetadata(
        name=name,
        description=f"A {data.kind} test set from a local folder.",
        type=mteb_type,
        category="t2c" if data.kind in ("classification", "clustering") else "t2t",
        dataset={"path": f"local/{data.name}", "revision": data.revision()},
        eval_splits=[data.split],
        eval_langs=["und-Zyyy"],
        main_score=main_score,
    )
    task = type("LocalTask", (getattr(abstasks, base),), {"metadata": metadata})()
    if isinstance(data, RetrievalDataset):
        task.dataset = {"default": {data.split: _retrieval_split(data)}}
        task.ignore_identical_ids = data.leaves_out_own
    else:
        _load_labelled(task, data)
    task.data_loaded = True
    return task


def _retrieval_split(data: RetrievalDataset) -> dict[str, Any]:
    from datasets import Dataset

    passages = list(data.passages.values())
    judged = list(data.qrels)
    titles, texts = [each.title for each in passages], [each.text for each in passages]
    queries = [data.queries[query] for query in judged]
    return {
        "corpus": Dataset.from_dict({"id": list(data.passages), "title": titles, "text": texts}),
        "queries": Dataset.from_dict({"id": judged, "text": queries}),
        "relevant_docs": {query: dict(data.qrels[query]) for query in judged},
        "top_ranked": data.candidates and {query: list(data.candidates[query]) for query in judged},
    }


def _load_labelled(task: Any, data: LabelledDataset) -> None:
    from datasets import Dataset, DatasetDict

    splits = {split: dict(columns) for split, columns in data.columns.items()}
    if data.kind in ("classification", "clustering"):
        labels = sorted({label for columns in splits.values() for label in columns["label"]})
        number = {label: place for place, label in enumerate(labels)}
        for columns in splits.values():
            columns["label"] = [number[label] for label in columns["label"]]
    if data.kind == "clustering":
        task.input_column_name, task.label_column_name = "text", "label"
        # mteb's 4 % are for test sets of 100 thousand texts.
        task.max_fraction_of_documents_to_embed = None
    if data.kind == "pairs":
        task.label_column_name = "score"
        for columns in splits.values():
            columns["score"] = [int(score) for score in columns["score"]]
    if data.kind == "sts":
        scores = splits[data.split]["score"]
        task.min_score, task.max_score = min(scores), max(scores)
    task.dataset = DatasetDict(
        {split: Dataset.from_dict(columns) for split, columns in splits.items()}
    )


def fresh(task: Any) -> Any:
    """Returns a task over the same data whose random draws begin anew.

    mteb's tasks keep their generator's state, so that the second model measured with one would be
    given other samples than the first.
    """
    from mteb._set_seed import _set_seed

    again = copy.copy(task)
    again.rng_state, again.np_rng = _set_seed(task.seed)
    return again


def find_mteb_task(name: str) -> Any:
    """Returns mteb's task of this name; call inside ``quiet_mteb``.

    Raises:
        UserError: The name is unknown, with the names like it, or the task is not about text.
    """
    import mteb
    from mteb.get_tasks import _TASKS_REGISTRY

    if name not in _TASKS_REGISTRY:
        by_lower = {known.lower(): known for known in _TASKS_REGISTRY}
        close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
        meant = " or ".join(by_lower[match] for match in close)
        raise UserError(
            f"mteb {mteb.__version__} has no task {name!r}"
            + (f"; did you mean {meant}?" if meant else "; see mteb's list of tasks")
        )
    return _of_texts(mteb.get_task(name))


def _of_texts(task: Any) -> Any:
    if set(task.metadata.modalities) != {"text"}:
        raise UserError(
            f"mteb task {task.metadata.name!r} is about {', '.join(task.metadata.modalities)}; "
            "an encoder of texts can be measured on text tasks only"
        )
    return task


def find_mteb_tasks(name: str) -> list[Any]:
    """Returns the tasks of mteb's benchmark of this name, or the one task.

    A benchmark's tasks have its own splits and languages. Call inside ``quiet_mteb``.

    Raises:
        UserError: As `find_mteb_task`.
    """
    import mteb

    try:
        tasks = mteb.get_benchmark(name).tasks
    except KeyError:
        return [find_mteb_task(name)]
    # mteb keeps its benchmarks, which would keep all data that is loaded.
    return [_of_texts(copy.deepcopy(task)) for task in tasks]


def judged_texts(task: Any) -> Iterator[str]:
    """Yields the texts of an mteb task, whose data is loaded, that training must not have seen.

    A retrieval's or reranking's queries, and every text of the evaluated splits of other types.
    """
    from mteb.abstasks import AbsTaskRetrieval

    for part in getattr(task, "tasks", [task]):
        searched = isinstance(part, AbsTaskRetrieval)
        if searched:
            part.convert_v1_dataset_format_to_v2(num_proc=None)
        names = ["text"] if searched else list(part._get_content_columns())
        for subset in part.hf_subsets:
            splits = part.dataset.get(subset, part.dataset)
            for split in part.eval_splits:
                data = splits[split]["queries"] if searched else splits[split]
                for name in names:
                    if name in data.column_names:
                        yield from _strings(data[name])


def _strings(value: Any) -> Iterator[str]:
    """Yields what is said in a column: texts, lists of texts, conversations."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(value["content"])
    else:
        for each in value or ():
            yield from _strings(each)


def load_mteb_tasks(name: str) -> Iterator[Any]:
    """Yields the tasks of a name, each with its data fetched from the hub or its local cache.

    Raises:
        UserError: As `find_mteb_tasks`, or its data cannot be had.
    """
    with quiet_mteb():
        tasks = find_mteb_tasks(name)
    while tasks:
        task = tasks.pop(0)
        with quiet_mteb():
            for part in getattr(task, "tasks", [task]):  # several where mteb aggregates
                _load(part)
        yield task


def _load(task: Any) -> None:
    try:
        task.load_data()
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"data of mteb task {task.metadata.name!r} cannot be fetched ({reason}): check"
            " the network and HF_ENDPOINT, or measure on a local folder with --beir"
        ) from error
