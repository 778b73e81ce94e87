import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import UserError
from cluster.storage import open_storage
from pipelines.corpus.passages import Document
from pipelines.corpus.sources import Corpus, CorpusConfig


def documents(path: object, **config: object) -> list[Document | tuple[str, str, str]]:
    return list(Corpus(CorpusConfig(path=str(path), **config)).documents())  # type: ignore[arg-type]


def test_jsonl_gives_documents_and_a_reject_for_each_bad_line(tmp_path: Path) -> None:
    lines = [
        json.dumps({"_id": "a", "title": "A", "text": "first"}).encode(),
        b"{not json",
        b'{"_id": "b", "text": "caf\xe9"}',
        json.dumps({"_id": "c", "body": "no text"}).encode(),
        b"[1, 2]",
        b"",
        json.dumps({"id": 7, "text": "last"}).encode(),
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    found = documents(tmp_path / "x.jsonl")
    assert [d for d in found if isinstance(d, Document)] == [
        Document(name="a", title="A", text="first"),
        Document(name="7", title="", text="last"),
    ]
    assert [(d[0], d[1]) for d in found if isinstance(d, tuple)] == [
        ("x.jsonl:2", "malformed JSON"),
        ("x.jsonl:3", "not UTF-8"),
        ("c", "no text in field 'text'"),
        ("x.jsonl:5", "not a JSON object"),
    ]


def test_parquet_text_and_beir_are_recognised(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table({"id": ["1"], "text": ["t"]}), tmp_path / "p" / "a.parquet")
    assert documents(tmp_path / "p") == [Document(name="1", title="", text="t")]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "note.txt").write_text("plain")
    assert documents(tmp_path / "t") == [Document(name="note.txt", title="note", text="plain")]
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "corpus.jsonl").write_text('{"_id": "d", "text": "x"}')
    (tmp_path / "b" / "queries.jsonl").write_text('{"_id": "q", "text": "not a passage"}')
    assert documents(tmp_path / "b") == [Document(name="d", title="", text="x")]


def test_include_chooses_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "corpus.jsonl").write_text(json.dumps({"_id": name, "text": "x"}))
        (tmp_path / name / "queries.jsonl").write_text("")
    found = documents(tmp_path, include=("a/*", "*c/*"))
    assert [d.name for d in found if isinstance(d, Document)] == ["a", "c"]
    with pytest.raises(UserError, match="has 6 files and none like d/"):
        documents(tmp_path, include=("d/*",))


def test_corpus_is_read_from_s3(bucket: str) -> None:
    open_storage(bucket).write_bytes("c/x.jsonl", b'{"id": "1", "text": "far away"}')
    assert documents(f"{bucket}/c") == [Document(name="1", title="", text="far away")]
    assert documents(f"{bucket}/c/x.jsonl") == [Document(name="1", title="", text="far away")]


def test_version_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(text)
    a, b, c = (Corpus(CorpusConfig(path=str(tmp_path / name))).version() for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("path", "config", "message"),
    [
        ("nothing", {}, "does not exist or is empty"),
        ("odd", {}, "no file that looks like a corpus"),
        ("odd", {"format": "parquet"}, r"holds no parquet file \(\.parquet\)"),
        ("bad", {}, "is not Parquet"),
        ("cols", {}, "no column 'text', only body"),
    ],
)
def test_unusable_corpus_is_one_line(
    tmp_path: Path, path: str, config: dict[str, object], message: str
) -> None:
    for name in ("odd", "bad", "cols"):
        (tmp_path / name).mkdir()
    (tmp_path / "odd" / "x.zip").write_bytes(b"")
    (tmp_path / "bad" / "x.parquet").write_bytes(b"PAR0")
    pq.write_table(pa.table({"body": ["t"]}), tmp_path / "cols" / "x.parquet")
    with pytest.raises(UserError, match=message):
        documents(tmp_path / path, **config)
