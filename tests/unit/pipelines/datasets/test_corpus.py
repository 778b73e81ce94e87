import gzip
import json
import os
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from cluster.errors import UserError
from cluster.storage import open_storage
from pipelines.datasets.corpus import Corpus, CorpusConfig
from pipelines.datasets.documents import Document


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
        ("odd", {"format": "parquet"}, r"has no file of parquet, only 1 \.zip"),
        ("cols", {}, "no column 'text', only body"),
    ],
)
def test_unusable_corpus_is_one_line(
    tmp_path: Path, path: str, config: dict[str, object], message: str
) -> None:
    for name in ("odd", "cols"):
        (tmp_path / name).mkdir()
    (tmp_path / "odd" / "x.zip").write_bytes(b"")
    pq.write_table(pa.table({"body": ["t"]}), tmp_path / "cols" / "x.parquet")
    with pytest.raises(UserError, match=message):
        documents(tmp_path / path, **config)


def test_folder_of_several_formats_is_read_whole_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"_id": "j", "text": "one"}\n')
    pq.write_table(pa.table({"id": ["p"], "text": ["two"]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("three")
    (tmp_path / "d.NDJSON.gz").write_bytes(gzip.compress(b'{"_id": "z", "text": "four"}'))
    (tmp_path / "README.md").write_text("What these files are")
    (tmp_path / "table.xlsx").write_bytes(b"id,text")
    corpus = Corpus(CorpusConfig(path=str(tmp_path)))
    assert [document.name for document in corpus.documents()] == ["j", "p", "c.txt", "z"]  # type: ignore[union-attr]
    assert corpus.passed_over == {".md": 1, ".xlsx": 1}
    assert [d.name for d in documents(tmp_path, format="text")] == ["README.md", "c.txt"]  # type: ignore[union-attr]
    assert [d.name for d in documents(tmp_path, format="jsonl")] == ["j", "z"]  # type: ignore[union-attr]


def test_readme_is_not_taken_for_the_data_beside_it(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("What these files are")
    assert [d.name for d in documents(tmp_path)] == ["README.md"]  # type: ignore[union-attr]
    for number in range(2):
        (tmp_path / f"{number}.xlsx").write_text("id,text")
    with pytest.raises(UserError, match=r"holds 2 \.xlsx, which are not read, beside README\.md"):
        documents(tmp_path)
    (tmp_path / "one.txt").write_text("a text")
    with pytest.raises(UserError, match=r"holds 2 \.xlsx, which are not read"):
        documents(tmp_path)
    assert len(documents(tmp_path, format="text")) == 2


def test_files_that_a_system_put_there_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    for name in ("._a.jsonl", ".DS_Store", ".git/x.txt", "__MACOSX/a.jsonl"):
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "a.jsonl").write_text('{"_id": "a", "text": "x"}')
    assert documents(tmp_path) == [Document(name="a", title="", text="x")]


def test_compressed_files_are_read_instead_of_plain_ones_and_not_beside_them(
    tmp_path: Path,
) -> None:
    line = b'{"_id": "a", "text": "x"}\n'
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(line))
    (tmp_path / "queries.jsonl.gz").write_bytes(gzip.compress(b'{"_id": "q", "text": "no"}'))
    assert documents(tmp_path) == [Document(name="a", title="", text="x")]
    (tmp_path / "corpus.jsonl").write_bytes(line)
    assert documents(tmp_path) == [Document(name="a", title="", text="x")]
    (tmp_path / "note.txt.gz").write_bytes(gzip.compress(b"plain"))
    note = Document(name="note.txt.gz", title="note", text="plain")
    assert documents(tmp_path / "note.txt.gz") == [note]
    (tmp_path / "corpus.jsonl").unlink()
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(line)[:-9])
    (cut_short,) = documents(tmp_path)
    assert cut_short[:2] == (  # type: ignore[index]
        "corpus.jsonl.gz",
        "cannot be unpacked: Truncated compressed stream",
    )


@pytest.mark.parametrize(
    ("option", "name"), [("id_field", "doc_id"), ("title_field", "headlin"), ("text_field", "body")]
)
def test_field_that_no_row_has_is_named_and_one_that_some_have_is_fine(
    tmp_path: Path, option: str, name: str
) -> None:
    rows = [{"docid": "a", "headline": "H", "text": "x"}, {"docid": "b", "text": "y"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = f"no row has the field '{name}', only docid, headline, text: correct corpus.{option}"
    with pytest.raises(UserError, match=found):
        documents(tmp_path, **{option: name})
    fine = documents(tmp_path, id_field="docid", title_field="headline")
    assert fine == [
        Document(name="a", title="H", text="x"),
        Document(name="b", title="", text="y"),
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=f"'{name}'"):
        documents(tmp_path / "x.parquet", **{option: name})


@pytest.mark.parametrize(
    "line",
    [
        b'{"_id": "a", "text": "\\ud83d"}',
        b'{"_id": "a", "title": "\\ud83d", "text": "x"}',
        b'{"_id": "\\ud83d", "text": "x"}',
        b'{"text": "x", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"text": "x", "n": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"text": "x", "n": ' + b"9" * 5000 + b"}",
        b'{"text": "x", "n": NaN}',
        b'{"text": "x", "text": "y"}',
        b'{"_id": ["a"], "text": "x"}',
        b'{"_id": {"$oid": "a"}, "text": "x"}',
        b'{"text": 7, "n": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"text": ["x"]}',
        b"7",
        b"[" * 900 + b"]" * 900,
    ],
)
def test_line_that_is_no_document_is_a_reject_and_ends_nothing(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(
        line + b'\n{"_id": "b", "text": "x\xe2\x80\xa8y\xc2\x85z"}\n'
    )
    first, second = documents(tmp_path / "x.jsonl")
    assert second == Document(name="b", title="", text="x\u2028y\x85z")
    if isinstance(first, tuple):
        json.dumps(first, ensure_ascii=False).encode()
        assert first[0].startswith("x.jsonl:1") and len(first[1]) < 200 and len(first[2]) <= 200
    else:
        assert b"[" * 900 in line and first.text == "x"  # not too deep


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())),
        *(pa.binary(), pa.large_binary(), pa.binary_view()),
    ],
)
def test_parquet_columns_of_any_kind_of_text_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array(["caf\u00e9", None, "b"])
    if pa.types.is_dictionary(kind):
        column = values.dictionary_encode()
    else:
        column = pa.array([v and v.encode() for v in values.to_pylist()], pa.binary()).cast(kind)
    dates = pa.array([10**8] * 3, pa.date32())  # beyond the year 9999
    table = pa.table({"id": dates, "text": column, "title": column, "other": dates})
    pq.write_table(table, tmp_path / "x.parquet")
    first, second, third = documents(tmp_path, id_field="text")
    assert first == Document(name="caf\u00e9", title="caf\u00e9", text="caf\u00e9")
    assert second[:2] == ("x.parquet:2", "no text in field 'text'")  # type: ignore[index]
    assert third == Document(name="b", title="b", text="b")
    assert all(d.name if isinstance(d, Document) else d[0] for d in documents(tmp_path))  # by dates


def test_parquet_row_that_is_not_utf8_is_a_reject(tmp_path: Path) -> None:
    column = pa.array([b"caf\xe9", b"b"])
    for number, kind in enumerate((pa.binary(), pa.string())):
        text = column if kind == pa.binary() else column.view(pa.string())
        pq.write_table(pa.table({"text": text}), tmp_path / f"{number}.parquet")
        bad, good = documents(tmp_path / f"{number}.parquet")
        assert bad[:2] == (f"{number}.parquet:1", "not UTF-8")  # type: ignore[index]
        assert isinstance(good, Document) and good.text == "b"


def test_parquet_ids_are_texts_numbers_or_dates(tmp_path: Path) -> None:
    ids = {"int": [7], "float": [1.5], "date": [date(2020, 1, 2)], "list": [[1]]}
    for name, values in ids.items():
        pq.write_table(pa.table({"id": values, "text": ["x"]}), tmp_path / f"{name}.parquet")
    names = [d.name if isinstance(d, Document) else d[1] for d in documents(tmp_path)]
    assert names == ["2020-01-02", "1.5", "7", "its id is neither a text nor a number"]


def test_file_names_that_are_not_utf8_are_written_as_they_can_be(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    for name in (b"caf\xe9.txt", b"caf\xe9.jsonl"):
        with open(os.path.join(folder, name), "wb") as file:  # noqa: PTH118, PTH123
            file.write(b'{"text": "x"}')
    names = [document.name for document in documents(tmp_path)]  # type: ignore[union-attr]
    assert names == ["caf\\udce9.jsonl:1", "caf\\udce9.txt"]


def test_empty_files_are_no_documents_or_empty_ones(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b"")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "c.parquet")
    assert documents(tmp_path) == [Document(name="b.txt", title="b", text="")]


def test_min_words_above_half_of_max_words_is_refused_when_the_recipe_is_read() -> None:
    with pytest.raises(ValidationError, match="min_words: 100 given, and max_words is 160"):
        CorpusConfig(path="x", min_words=100)
    CorpusConfig(path="x", min_words=80)
