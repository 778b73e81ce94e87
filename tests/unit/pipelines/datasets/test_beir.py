"""Reading BEIR folders: what is in them, and what is said when something is wrong."""

import gzip
import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.errors import UserError
from cluster.storage import open_storage
from pipelines.datasets.beir import read_beir
from pipelines.datasets.qrels import read_qrels
from pipelines.datasets.retrieval import RetrievalDataset, TitledText


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
        "p1": TitledText("Sorting", "sorted() returns a new list."),
        "p2": TitledText("", "len() counts."),
        "3": TitledText("", "Ünïcode"),
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
        (
            "corpus.jsonl",
            '{"_id": "p1", "text": "a"}\n{"_id": "p2", ',
            "corpus.jsonl:2: malformed JSON",
        ),
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
        ("qrels/test.tsv", "h\th\th\nq1 p1\n", "test.tsv:2: no query, passage and whole-number"),
        ("qrels/test.tsv", "h\th\th\nq1\tp1\thigh\n", "test.tsv:2:"),
        ("qrels/test.tsv", "q1\tp1\t1,0\nq2\tp2\t1\n", "test.tsv:1: no query, passage and"),
        ("qrels/test.tsv", "q1\tp1\tnan\nq2\tp2\t1\n", "test.tsv:1: no query, passage and"),
        ("qrels/test.tsv", "q1\tp1\t1_0\n", "test.tsv:1: no query, passage and"),
        ("qrels/test.tsv", "q1\tp1\t0.5\n", "test.tsv:1: score is not whole: 'q1\\tp1\\t0.5'"),
        ("qrels/test.tsv", f"q1\tp1\t{10**20}\n", f"above 1,000,000: 'q1\\tp1\\t{10**20}'"),
        ("qrels/test.tsv", "q1\tp1\t2147483648\n", "test.tsv:1: score above 1,000,000"),
        ("qrels/test.tsv", "q1\tp1\t" + "9" * 9999, "test.tsv:1: score above 1,000,000"),
        ("qrels/test.tsv", "q1\tp1\0x\t1\n", "an id holds the character NUL"),
        (
            "qrels/test.tsv",
            "q1\tp1\t1\nq2\tp2\t1\nq1\tp1\t0\n",
            "test.tsv:3: judged twice with different scores: \"'q1', 'p1': 0 here, 1 in ",
        ),
        ("qrels/test.tsv", "q1\tp1\t0\nq2\tp2\t-1\n", "no passage is relevant"),
        ("corpus.jsonl", "[" * 99999, "corpus.jsonl:1: JSON nested too deep"),
        ("corpus.jsonl", '{"_id": ' + "9" * 5000 + "}", "corpus.jsonl:1: a whole number of"),
        ("corpus.jsonl", '{"_id": NaN, "text": "a"}', "corpus.jsonl:1: NaN is no number"),
        (
            "queries.jsonl",
            '{"_id": "q1", "text": "\\ud83d"}',
            "queries.jsonl:1: half of a surrogate pair",
        ),
    ],
)
def test_beir_folder_with_a_mistake_names_file_line_and_what_to_do(
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
    with pytest.raises(UserError, match=r"queries\.jsonl:1: not UTF-8"):
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


JUDGED = {"q1": {"p1": 2, "p2": 0}, "q2": {"p2": 1}}


@pytest.mark.parametrize(
    "qrels",
    [
        "q1\tp1\t2\nq1\tp2\t0\nq2\tp2\t1\n",
        "q1 p1 2\nq1 p2 0\nq2 p2 1\n",
        "q1\tp1\t2.0\nq1\tp2\t0.0\nq2\tp2\t1e0\n",
        "q1\tp1\t2 \nq1\tp2\t0\t\n\nq2\tp2\t1   ",
        "q1\tp1\t2\x1f\nq1\tp2\t0\x1c\nq2\tp2\t1\n",
        "q1\tp1\t2\tsure\nq1\tp2\t0\t7\nq2\tp2\t1\t\n",
        "q1 0 p1 2\nq1 0 p2 0\nq2 0 p2 1\n",
        "q1\t0\tp1\t2\nq1\t0\tp2\t0\nq2\t0\tp2\t1\n",
        "q1  Q0  p1  2\nq1  Q0  p2  -2\nq2  Q0  p2  1\n",
        "qid\titer\tdocid\trel\r\nq1\t0\tp1\t2\r\nq1\t0\tp2\t-1\r\nq2\t0\tp2\t1\r\n",
        "\ufeffq1\tp1\t2\nq1\tp2\t0\nq2\tp2\t1\n",
        "q1\tp1\t2\nq1\tp1\t2\nq1\tp2\t-1\nq1\tp2\t-2\nq2\tp2\t1\n",
    ],
)
def test_qrels_are_read_as_people_write_them(tmp_path: Path, qrels: str) -> None:
    folder = write_folder(tmp_path)
    (folder / "qrels" / "test.tsv").write_text(qrels, encoding="utf-8", newline="")
    assert read_beir(folder).qrels == JUDGED


def test_qrels_of_trecs_form_are_known_by_most_lines(tmp_path: Path) -> None:
    # A passage may be called 0, and a column behind the score may hold numbers.
    (tmp_path / "qrels.tsv").write_text("q1\t5\t1\t9\nq1\t0\t1\t9\nq2\t7\t1\t9\n")
    found = read_qrels((tmp_path / "qrels.tsv").open("rb"), "qrels.tsv")
    assert {pair: score for pair, (score, _) in found.judgements.items()} == {
        ("q1", "5"): 1,
        ("q1", "0"): 1,
        ("q2", "7"): 1,
    }


def test_qrels_with_blanks_in_ids_are_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "corpus.jsonl").write_text('{"_id": "p 1", "text": "a"}')
    (folder / "queries.jsonl").write_text('{"_id": "q 1", "text": "a"}')
    (folder / "qrels" / "test.tsv").write_text("q 1\tp 1\t1\n")
    assert read_beir(folder).qrels == {"q 1": {"p 1": 1}}


def test_beir_folder_tells_what_its_scores_do_not_count(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "qrels" / "test.tsv").write_text("q1\tp1\t1\nq1\tp1\t1\nq1\tp2\t-1\nq2\tp2\t-2\n")
    dataset = read_beir(folder)
    assert dataset.qrels == {"q1": {"p1": 1, "p2": 0}}
    assert dataset.notes == (
        "2 judgements below zero count as not relevant",
        "1 judgements are there more than once and count once",
        "1 of 2 queries have no relevant passage, such as 'q2', and are left out",
    )


def test_beir_folder_that_is_packed_is_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        plain = (folder / name).read_bytes()
        (folder / f"{name}.gz").write_bytes(gzip.compress(plain))
        (folder / name).unlink()
    assert read_beir(folder).qrels == JUDGED
    (folder / "corpus.jsonl").write_text('{"_id": "p1", "text": "plain"}')
    assert read_beir(folder).passages == {"p1": TitledText("", "plain")}
    (folder / "qrels" / "test.tsv.gz").write_bytes(b"q1\tp1\t1\n")
    with pytest.raises(UserError, match=r"test\.tsv\.gz cannot be unpacked"):
        read_beir(folder)


def test_query_that_is_its_own_passage_does_not_find_itself() -> None:
    passages = {name: TitledText("title", text) for name, text in (("a", "x y"), ("b", "z"))}
    arguana = RetrievalDataset(
        name="a", passages=passages, queries={"a": "x  y"}, qrels={"a": {"b": 1}}
    )
    assert arguana.leaves_out_own
    assert "own passage is left out" in arguana.notes[0]
    judged = replace(arguana, qrels={"a": {"a": 1, "b": 1}})
    another_text = replace(arguana, queries={"a": "who is x"})
    assert not judged.leaves_out_own
    assert not another_text.leaves_out_own
    assert len({each.revision() for each in (arguana, judged, another_text)}) == 3


def test_dataset_with_some_unknown_passages_keeps_them_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        dataset = RetrievalDataset(
            name="part",
            passages={"a": TitledText("", "x")},
            queries={"q": "x"},
            qrels={"q": {"a": 1, "gone": 1}},
        )
    assert dataset.qrels["q"] == {"a": 1, "gone": 1}
    assert "1 of 2 judged passages are not in the corpus" in caplog.text


def test_dataset_in_memory_with_unknown_queries_is_refused() -> None:
    with pytest.raises(UserError, match="1 queries of the qrels are not among the queries"):
        RetrievalDataset(
            name="d", passages={"a": TitledText("", "x")}, queries={"q": "x"}, qrels={"r": {"a": 1}}
        )


def test_beir_folder_is_read_from_s3(tmp_path: Path, bucket: str) -> None:
    write_folder(tmp_path / "docs")
    storage = open_storage(f"{bucket}/sets/docs")
    for file in (path for path in (tmp_path / "docs").rglob("*") if path.is_file()):
        storage.upload(file, file.relative_to(tmp_path / "docs").as_posix())
    assert read_beir(storage.uri).revision() == read_beir(tmp_path / "docs").revision()
    assert read_beir(storage.uri).name == "docs"
    with pytest.raises(UserError, match=r"docs has no split 'train': it has dev, test; name"):
        read_beir(storage.uri, "train")
    with pytest.raises(UserError, match="does not exist or is empty"):
        read_beir(f"{bucket}/sets/none")
