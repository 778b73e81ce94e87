"""Test sets other than retrieval, in folders of plain files, one file for each split.

| kind | file | holds |
|---|---|---|
| ``sts`` | ``SPLIT.tsv`` | score, sentence1, sentence2 |
| ``pairs`` | ``SPLIT.tsv`` | the same, the score being 1 (same meaning) or 0 |
| ``classification`` | ``SPLIT.jsonl``, ``train.jsonl`` | text, label |
| ``clustering`` | ``SPLIT.jsonl`` | text, label |
| ``rerank`` | ``SPLIT.jsonl`` | query, positive [...], negative [...] |

Each file may be packed, such as ``test.jsonl.gz``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from cluster.errors import UserError
from cluster.row_files import find_file
from cluster.storage import Storage, open_storage
from pipelines.datasets.beir import read_beir, read_lines, read_objects, split_names
from pipelines.datasets.qrels import is_header, number
from pipelines.datasets.retrieval import RetrievalDataset, TitledText, content_hash

TRAIN = "train"
Columns = Mapping[str, list[Any]]


@dataclass(frozen=True, kw_only=True)
class LabelledDataset:
    """Texts with labels, or pairs of texts with scores.

    Attributes:
        name: Shown in tables.
        kind: ``sts``, ``pairs``, ``classification`` or ``clustering``.
        split: The one that is evaluated.
        columns: Split -> column -> values; ``text`` and ``label``, or ``sentence1``, ``sentence2``
            and ``score``. Classification has ``train`` too.
    """

    name: str
    kind: str
    split: str = "test"
    columns: Mapping[str, Columns]
    notes: ClassVar[tuple[str, ...]] = ()  # what whoever reads its scores has to know

    @property
    def counts(self) -> dict[str, int]:
        """What a table says of its size."""
        what = "num_pairs" if self.kind in ("sts", "pairs") else "num_texts"
        return {what: len(next(iter(self.columns[self.split].values())))}

    @property
    def num_texts(self) -> int:
        """Texts that a model has to encode; for classification not all of ``train`` is drawn."""
        return len(self.judged_texts())

    def judged_texts(self) -> list[str]:
        """Returns the texts of the evaluated split, which training must not have seen."""
        columns = self.columns[self.split]
        return [
            text for name in ("text", "sentence1", "sentence2") for text in columns.get(name, ())
        ]

    def revision(self) -> str:
        """Returns a hash of the content."""
        return content_hash([self.columns])


Folder = str | Path
TestData = RetrievalDataset | LabelledDataset


def read_folder(kind: str, folder: Folder, split: str = "test") -> TestData:
    """Reads a test set of one of :data:`KINDS`.

    Raises:
        UserError: The kind is unknown, or a file is missing or malformed; the message names the
            file, the line and what to do.
    """
    if kind not in KINDS:
        raise UserError(f"kind {kind!r} of a test set: accepted are {', '.join(KINDS)}")
    if kind != "retrieval" and not any(open_storage(folder).entries()):
        raise UserError(
            f"{kind} folder {folder} does not exist or is empty; give one with {split}.* in it"
        )
    return KINDS[kind](folder, split)


def _read_pairs(kind: str, folder: Folder, split: str) -> LabelledDataset:
    columns: dict[str, list[Any]] = {"score": [], "sentence1": [], "sentence2": []}
    for place, (at, line) in enumerate(read_lines(*_split_file(folder, split, "tsv"))):
        fields = line.split("\t")
        score = number(fields[0])
        if len(fields) == 3 and score is None and not place and is_header(fields[0]):
            continue
        if len(fields) != 3 or score is None or not math.isfinite(score):
            raise UserError(
                f"{at}: {line.strip()[:80]!r} is not score, sentence1 and sentence2 with tabs "
                "between; correct the line"
            )
        if kind == "pairs" and score not in (0, 1):
            raise UserError(f"{at}: score {fields[0]}: a pair's is 0 or 1; or measure it as sts")
        for column, value in zip(columns.values(), (score, *fields[1:]), strict=True):
            column.append(value)
    return _labelled(kind, folder, split, {split: columns})


def _read_labels(kind: str, folder: Folder, split: str) -> LabelledDataset:
    splits = (TRAIN, split) if kind == "classification" else (split,)
    files = {name: _split_file(folder, name, "jsonl") for name in splits}
    columns = {name: _texts_and_labels(*file) for name, file in files.items()}
    return _labelled(kind, folder, split, columns)


def _texts_and_labels(storage: Storage, path: str) -> Columns:
    columns: dict[str, list[Any]] = {"text": [], "label": []}
    for at, row in read_objects(storage, path):
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("text"), str)
            or not isinstance(row.get("label"), str | int)
        ):
            raise UserError(f'{at}: write {{"text": "...", "label": "..."}}')
        columns["text"].append(row["text"])
        columns["label"].append(str(row["label"]))
    return columns


def _labelled(
    kind: str, folder: Folder, split: str, columns: Mapping[str, Columns]
) -> LabelledDataset:
    for name, values in columns.items():
        if not next(iter(values.values())):
            raise UserError(f"{folder}: split {name!r} is empty; give at least one line")
        what = "score" if "score" in values else "label"
        # A classifier's test texts may be of one label.
        if len(set(values[what])) == 1 and (kind != "classification" or name == TRAIN):
            missing = 0 if values[what][0] else 1
            wanted = f"one pair of score {missing}" if kind == "pairs" else "two"
            raise UserError(
                f"{folder}: split {name!r} has one {what} alone; give at least {wanted}"
            )
    if kind == "classification":
        known = set(columns[TRAIN]["label"])
        for label in columns[split]["label"]:
            if label not in known:
                raise UserError(
                    f"{folder}: label {label!r} of split {split!r} is not in split {TRAIN!r}; add "
                    "texts of it there, or take it out here"
                )
    if kind == "clustering" and max(Counter(columns[split]["label"]).values()) == 1:
        raise UserError(
            f"{folder}: each text of split {split!r} has a label of its own; give at least one "
            "label two texts"
        )
    return LabelledDataset(
        name=Path(folder).resolve().name, kind=kind, split=split, columns=columns
    )


def _read_rerank(folder: Folder, split: str) -> RetrievalDataset:
    passages: dict[str, TitledText] = {}
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    num_left_out = 0
    for place, (at, row) in enumerate(read_objects(*_split_file(folder, split, "jsonl"))):
        fields = row if isinstance(row, dict) else {}
        judged = {"positive": fields.get("positive"), "negative": fields.get("negative")}
        if not isinstance(fields.get("query"), str) or not all(
            isinstance(texts, list) and all(isinstance(text, str) for text in texts)
            for texts in judged.values()
        ):
            raise UserError(f'{at}: write {{"query": "...", "positive": [...], "negative": [...]}}')
        if not judged["positive"] or not judged["negative"]:
            num_left_out += 1  # as mteb does: any order of such candidates is as good
            continue
        query = f"{split}_query{place}"
        queries[query] = fields["query"]
        qrels[query] = {}
        # mteb's ids: positives come first where cosines are equal.
        for what, relevance in (("positive", 1), ("negative", 0)):
            for rank, text in enumerate(fields[what]):
                id_ = f"{'a' * relevance}{what}_{query}_{rank:05}"
                passages[id_] = TitledText("", text)
                qrels[query][id_] = relevance
    return RetrievalDataset(
        name=Path(folder).resolve().name,
        split=split,
        passages=passages,
        queries=queries,
        qrels=qrels,
        candidates={query: list(judged) for query, judged in qrels.items()},
        remarks=(f"{num_left_out} queries without a positive or a negative are left out",)
        if num_left_out
        else (),
    )


def _split_file(folder: Folder, split: str, ending: str) -> tuple[Storage, str]:
    storage, path = open_storage(folder), f"{split}.{ending}"
    if find_file(storage, path) is None:
        splits = split_names(storage, "", f".{ending}")
        raise UserError(
            f"{folder} has no {path}"
            + (f": it has the splits {', '.join(splits)}" if splits else "; add it")
        )
    return storage, path


KINDS: dict[str, Callable[[Folder, str], TestData]] = {
    "retrieval": read_beir,
    "sts": partial(_read_pairs, "sts"),
    "pairs": partial(_read_pairs, "pairs"),
    "classification": partial(_read_labels, "classification"),
    "clustering": partial(_read_labels, "clustering"),
    "rerank": _read_rerank,
}
