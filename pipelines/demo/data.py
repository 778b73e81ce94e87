"""The demo's data in the formats in which users bring theirs: JSON lines and a BEIR folder."""

import json
from collections.abc import Iterable

from cluster.storage import Storage, join
from pipelines.corpus.passages import cut_corpus
from pipelines.datasets.corpus import Corpus, CorpusConfig
from pipelines.demo.python_documentation import python_documentation
from pipelines.demo.questions import load_questions

DOCUMENTS = "documents.jsonl"
TEST_SET = "test_set"


def write_documents(storage: Storage) -> str:
    """Writes the Python documentation as `documents.jsonl`; returns how much of what is where."""
    documents = python_documentation()
    rows = ({"_id": each.name, "title": each.title, "text": each.text} for each in documents)
    _write(storage, DOCUMENTS, map(_json, rows))
    return f"{len(documents):,} documents in {join(storage.uri, DOCUMENTS)}"


def write_test_set(storage: Storage, corpus: CorpusConfig) -> str:
    """Writes the questions as the BEIR folder `test_set`; returns how much of what is where.

    It is searched in the passages that the run makes of `corpus`, because an answer is one of
    them. Another version of Python or of a package may lack an answer; a question that has none
    is not judged, but kept out of training like the others.
    """
    passages, _, _ = cut_corpus(Corpus(corpus))
    ids = {passage.source: passage.id for passage in passages}
    questions = load_questions()
    rows = ({"_id": each.id, "title": each.title, "text": each.text} for each in passages)
    _write(storage, f"{TEST_SET}/corpus.jsonl", map(_json, rows))
    rows = ({"_id": each.id, "text": each.question} for each in questions)
    _write(storage, f"{TEST_SET}/queries.jsonl", map(_json, rows))
    for split in ("dev", "test"):
        judgements = [
            f"{question.id}\t{ids[answer]}\t1"
            for question in questions
            for answer in question.answers
            if question.split == split and answer in ids
        ]
        lines = ["query-id\tcorpus-id\tscore", *judgements]
        _write(storage, f"{TEST_SET}/qrels/{split}.tsv", lines)
    return f"{len(questions)} questions in {join(storage.uri, TEST_SET)}, a BEIR folder"


def _json(row: dict[str, str]) -> str:
    return json.dumps(row, ensure_ascii=False)


def _write(storage: Storage, path: str, lines: Iterable[str]) -> None:
    """Writes a file that is missing or differs: S3 may give equal content another version."""
    content = "".join(f"{line}\n" for line in lines).encode()
    if not storage.exists(path) or storage.read_bytes(path) != content:
        storage.write_bytes(path, content)
