"""Reading BEIR folders: what is in them, and what is said when something is wrong."""

import json
import logging
from pathlib import Path

import pytest

from cluster.errors import UserError
from pipelines.evaluation.dataset import Passage, RetrievalDataset, read_beir


def write_folder(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "qrels").mkdir(exist_ok=True)
    passages = [
        {"_id": "p1", "title": "Sorting", "text": "sorted() returns a new list."},
        {"_id": "p2", "text": "len() counts."},
        {"_id": 3, "title": None, "text": "Ünïcode"},
    ]
    queries = [{"_id": "q1", "text": "order a list"}, {"_id": "q2", "text": "how many"}]
    for name, rows in (("corpus", passages), ("queries", queries)):
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        (folder / f"{name}.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq1\tp1\t2\nq1\tp2\t0\nq2\tp2\t1\n", encoding="utf-8"
    )
    (folder / "qrels" / "dev.tsv").write_bytes(b"query-id\tcorpus-id\tscore\r\nq2\tp2\t1\r\n")
    return folder


def test_beir_folder_is_read(tmp_path: Path) -> None:
    dataset = read_beir(write_folder(tmp_path / "docs"))
    assert dataset.name == "docs"
    assert dataset.passages == {
        "p1": Passage("Sorting", "sorted() returns a new list."),
        "p2": Passage("", "len() counts."),
        "3": Passage("", "Ünïcode"),
    }
    assert dataset.queries == {"q1": "order a list", "q2": "how many"}
    assert dataset.qrels == {"q1": {"p1": 2, "p2": 0}, "q2": {"p2": 1}}


def test_beir_folder_other_split_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    assert read_beir(write_folder(tmp_path), "dev").qrels == {"q2": {"p2": 1}}


def test_beir_folder_without_header_keeps_its_first_judgement(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "qrels" / "test.tsv").write_text("q1\tp1\t1\n")
    assert read_beir(folder).qrels == {"q1": {"p1": 1}}


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("corpus.jsonl", '{"_id": "p1", "text": "a"}\n{"_id": "p2", ', "corpus.jsonl:2: not JSON"),
        ("corpus.jsonl", '["p1", "a"]', 'corpus.jsonl:1: no "_id"'),
        ("corpus.jsonl", '{"_id": "p1"}', 'corpus.jsonl:1: "text" is NoneType'),
        ("corpus.jsonl", '{"_id": "p1", "text": "a", "title": 7}', '"title" is int'),
        (
            "corpus.jsonl",
            '{"_id": "p1", "text": "a"}\n{"_id": "p1", "text": "b"}',
            "corpus.jsonl:2: passage 'p1' is there twice",
        ),
        ("corpus.jsonl", "", "has no passages"),
        ("corpus.jsonl", '{"_id": "other", "text": "a"}', "use the same ids"),
        ("queries.jsonl", '{"text": "a"}', 'queries.jsonl:1: no "_id"'),
        (
            "queries.jsonl",
            '{"_id": "q1", "text": "a"}\n\n{"_id": "q1", "text": "b"}',
            "queries.jsonl:3: query 'q1' is there twice",
        ),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "has no qrels"),
        ("qrels/test.tsv", "h\th\th\nq9\tp1\t1\n", "test.tsv:2: query 'q9' is not in queries"),
        ("qrels/test.tsv", "h\th\th\nq1 p1 1\n", "test.tsv:2: 'q1 p1 1' is not query-id"),
        ("qrels/test.tsv", "h\th\th\nq1\tp1\thigh\n", "test.tsv:2:"),
        ("qrels/test.tsv", "q1\t0\tp1\t1\n", "test.tsv:1:"),
    ],
)
def test_beir_folder_with_a_mistake_names_file_line_and_mend(
    tmp_path: Path, file: str, content: str, expected: str
) -> None:
    folder = write_folder(tmp_path)
    (folder / file).write_text(content)
    with pytest.raises(UserError) as caught:
        read_beir(folder)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_beir_folder_in_another_encoding_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "queries.jsonl").write_bytes('{"_id": "q1", "text": "über"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"queries\.jsonl is not UTF-8"):
        read_beir(folder)


@pytest.mark.parametrize("file", ["corpus.jsonl", "queries.jsonl"])
def test_beir_folder_without_a_file_names_it(tmp_path: Path, file: str) -> None:
    folder = write_folder(tmp_path)
    (folder / file).unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        read_beir(folder)


def test_beir_folder_of_other_splits_lists_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no split 'train': it has dev, test"):
        read_beir(write_folder(tmp_path), "train")


def test_beir_folder_without_qrels_says_what_to_add(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").touch()
    with pytest.raises(UserError, match=r"add qrels/test\.tsv"):
        read_beir(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        read_beir(tmp_path / "nowhere")


def test_dataset_with_some_unknown_passages_keeps_them_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        dataset = RetrievalDataset(
            name="part",
            passages={"a": Passage("", "x")},
            queries={"q": "x"},
            qrels={"q": {"a": 1, "gone": 1}},
        )
    assert dataset.qrels["q"] == {"a": 1, "gone": 1}
    assert "1 of 2 judged passages are not in the corpus" in caplog.text


def test_dataset_in_memory_with_unknown_queries_is_refused() -> None:
    with pytest.raises(UserError, match="1 queries of the qrels are not among the queries"):
        RetrievalDataset(
            name="d", passages={"a": Passage("", "x")}, queries={"q": "x"}, qrels={"r": {"a": 1}}
        )
