"""Labelled sets as examples."""

import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from cluster.errors import UserError
from cluster.storage import open_storage
from pipelines.corpus.passages import passage_id
from pipelines.mixture.config import LabelledSet
from pipelines.mixture.formats import Example, Target


def read_labelled(labelled: LabelledSet) -> Iterator[Example]:
    """Yields the set's examples."""
    for where, row in _read_jsonl(labelled.path):
        if not isinstance(row, dict) or not all(isinstance(row.get(k), str) for k in _REQUIRED):
            raise UserError(
                f"labelled set {labelled.name}, {where}: give JSON objects with the strings query"
                " and positive, and maybe negative"
            )
        negative = row.get("negative")
        yield Example(
            task=labelled.task,
            query=row["query"],
            positive=Target(row["positive"]),
            negatives=(Target(negative),) if negative else (),
            query_id=passage_id("query", row["query"]),
            positive_id=passage_id("", row["positive"]),
        )


_REQUIRED = ("query", "positive")


def _read_jsonl(path: str) -> Iterator[tuple[str, Any]]:
    parent, _, name = path.rpartition("/")
    storage = open_storage(parent or ".")
    try:
        lines = storage.read_bytes(PurePosixPath(name).as_posix()).splitlines()
    except FileNotFoundError as error:
        raise UserError(f"labelled set {path} does not exist: correct labelled.path") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise UserError(f"labelled set {path}, line {number}: {error}") from error
