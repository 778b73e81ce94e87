import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.encoder import Encoder
from cluster.artifacts import Manifest, list_files, write_artifact, write_shards
from cluster.errors import TokayError, UserError
from cluster.file_list import FileList
from cluster.files import FileEntry
from cluster.storage import open_storage
from serving.corpus import check_corpus, load_corpus

ROWS = [
    {"_id": "a", "title": "Geckos", "text": "They climb glass."},
    {"_id": "b", "title": "", "text": "Ray runs actors."},
]


def passages(vectors: np.ndarray) -> pa.Table:
    columns = {
        "id": ["x", "y"],
        "title": ["one", None],
        "text": ["first", "second"],
        "source": ["s#1", "s#2"],
        "embedding": pa.array(list(vectors), pa.list_(pa.float32())),
    }
    return pa.table(columns)


def test_jsonl_is_embedded_with_its_titles(encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n\n".join(map(json.dumps, ROWS)))
    expected = encoder.encode(["Geckos They climb glass.", "Ray runs actors."])
    for uri in (tmp_path, path):
        check_corpus(str(uri))
        corpus = load_corpus(str(uri), encoder)
        assert len(corpus) == 2
        (passage, score), (_, other) = corpus.search(expected[0], 5)
        assert (passage.id, passage.title, passage.text) == ("a", "Geckos", "They climb glass.")
        assert score == pytest.approx(1, abs=1e-5)
        assert other == pytest.approx(float(expected[0] @ expected[1]), abs=1e-5)


def test_titles_go_where_the_template_has_a_place(prompted: Encoder, tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    expected = prompted.encode(["title: none | text: Ray runs actors."])
    (passage, score), _ = load_corpus(str(tmp_path), prompted).search(expected[0], 2)
    assert passage.id == "b"
    assert score == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("kind", ["list", "fixed"])
def test_vectors_of_parquet_are_used_as_they_are(
    encoder: Encoder, tmp_path: Path, kind: str
) -> None:
    vectors = np.eye(2, 384, dtype=np.float32)
    table = passages(vectors)
    if kind == "fixed":
        column = table.column("embedding").cast(pa.list_(pa.float32(), 384))
        table = table.set_column(table.schema.get_field_index("embedding"), "embedding", column)
    pq.write_table(table, tmp_path / "part.parquet")
    (passage, score), (_, zero) = load_corpus(str(tmp_path), encoder).search(vectors[1], 2)
    assert (passage.id, passage.title, score, zero) == ("y", "", 1, 0)


def test_index_of_a_run_is_served_with_its_vectors(encoder: Encoder, tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "index")
    write_shards(storage, passages(np.eye(2, 384, dtype=np.float32)), rows_per_shard=1)
    with pytest.raises(UserError, match="384"):
        load_corpus(storage.uri, encoder_of_another_size(encoder))
    manifest = Manifest(step="index", fingerprint="f", config={}, inputs={})
    write_artifact(storage, manifest, list_files(storage))
    check_corpus(storage.uri)
    corpus = load_corpus(storage.uri, encoder)
    assert [hit[0].id for hit in corpus.search(np.eye(384, dtype=np.float32)[0], 1)] == ["x"]


def encoder_of_another_size(encoder: Encoder) -> Encoder:
    class Narrow(Encoder):
        dimensions = 128  # type: ignore[assignment]

    return Narrow(
        encoder.model,
        encoder.tokenizer,
        pooling="mean",
        max_tokens=16,
        templates=encoder.templates,
    )


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{not json", "malformed JSON"),
        (b'{"_id": "b"}', "no text in field"),
        (b'{"_id": "b", "text": 7}', "no text in field"),
        (b'{"_id": "b", "text": " ", "title": null}', "blank"),
        (b'{"_id": "b", "text": "\xff"}', "not UTF-8"),
        (b'{"_id": "b", "text": "\\ud83d"}', "half of a surrogate pair"),
        (b'{"_id": "b", "text": "a", "text": "b"}', "the key 'text' twice"),
        (b"[1]", "not a JSON object"),
        (b"[" * 900 + b"]" * 900, "not a JSON object"),
        (b"[" * 200_000, "nested too deeply"),
    ],
)
def test_line_that_is_no_passage_is_left_out_and_counted(
    encoder: Encoder, tmp_path: Path, line: bytes, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "corpus.jsonl"
    good = json.dumps(ROWS[0]).encode()
    path.write_bytes(good + b"\n" + line + b"\n" + json.dumps(ROWS[1]).encode())
    told = check_corpus(str(tmp_path))
    assert told is not None
    assert told.startswith(f"1 of 3 rows of corpus '{tmp_path}' are no passages, such as ")
    assert says in told
    assert len(told) < 700
    corpus = load_corpus(str(tmp_path), encoder)
    assert corpus.passages["id"].to_pylist() == ["a", "b"]
    assert told in caplog.messages
    # Two of three are too many.
    path.write_bytes(good + b"\n" + line + b"\n" + line)
    for refuse in (lambda: check_corpus(str(path)), lambda: load_corpus(str(path), encoder)):
        with pytest.raises(UserError, match="2 of 3 rows") as refusal:
            refuse()
        assert says in str(refusal.value)


@pytest.mark.parametrize(
    "name", ["corpus.jsonl", "c.NDJSON", "c.jsonl.gz", "corpus.jsonl.gz", "part.parquet"]
)
def test_rows_are_named_as_tokay_run_names_them(
    encoder: Encoder, tmp_path: Path, name: str
) -> None:
    rows = [
        {"_id": "under", "id": "plain", "text": "one\x85two\u2028three"},
        {"_id": None, "id": "plain", "title": None, "text": "second"},
        {"_id": None, "id": None, "title": "third", "text": ""},
    ]
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist([{"title": "", **row} for row in rows]), path)
    else:
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
        path.write_bytes(gzip.compress(lines) if name.endswith(".gz") else lines)
        if name.startswith("corpus"):
            (tmp_path / "queries.jsonl").write_text("{}")
    for uri in (tmp_path, path):
        assert check_corpus(str(uri)) is None
        assert load_corpus(str(uri), encoder).passages.to_pylist() == [
            {"id": "under", "title": "", "text": "one\x85two\u2028three"},
            {"id": "plain", "title": "", "text": "second"},
            {"id": f"{name}:3", "title": "third", "text": ""},
        ]


def test_parquet_of_any_kind_of_text_is_read(encoder: Encoder, tmp_path: Path) -> None:
    columns = {
        "_id": pa.array([7, 8, 9]),
        "title": pa.array(["one", "two", "one"]).dictionary_encode(),
        "text": pa.array([b"first", "zw\u00f6lf".encode(), b"\xff"], pa.binary()),
        # Columns that nobody asks for are not decoded: no year 300000 in Python's dates.
        "when": pa.array([2**62] * 3, pa.timestamp("us")),
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    told = check_corpus(str(tmp_path))
    assert told is not None
    assert "1 of 3 rows" in told
    assert "x.parquet:3 (not UTF-8" in told
    assert load_corpus(str(tmp_path), encoder).passages.to_pylist() == [
        {"id": "7", "title": "one", "text": "first"},
        {"id": "8", "title": "two", "text": "zwölf"},
    ]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"id": ["a"]}, "no column text, only id"),
        ({"text": [1]}, "a column text of int64"),
        ({"text": ["a"], "_id": [[1]]}, "a column _id of list"),
        ({"text": ["a"], "embedding": ["b"]}, "a column embedding of string"),
        ({"text": ["a"], "embedding": [[1]]}, "a column embedding of list<.*int64>"),
        ({"text": ["a", "b"], "id": ["x", "y"], "embedding": [[1.0, 0], [1.0]]}, "of y"),
        ({"text": ["a", "b"], "id": ["x", "y"], "embedding": [[1.0, 0], None]}, "of y"),
        ({"text": ["a"], "id": ["x"], "embedding": [[1.0, None]]}, "no numbers .of x"),
        ({"text": ["a"], "id": ["x"], "embedding": [[1.0, float("nan")]]}, "no numbers .of x"),
        ({"text": ["a"], "id": ["x"], "embedding": [[1e300, 0]]}, "no numbers .of x"),
        ({"text": ["a"], "id": ["x"], "embedding": [[0.0, 0]]}, "zeros .* .of x"),
    ],
)
def test_parquet_that_holds_no_passages_is_refused_before_the_start(
    tmp_path: Path, columns: dict[str, Any], says: str
) -> None:
    pq.write_table(pa.table(columns), tmp_path / "bad.parquet")
    with pytest.raises(UserError, match=says):
        check_corpus(str(tmp_path))


def test_vectors_are_brought_to_unit_length_beside_their_rows(
    encoder: Encoder, tmp_path: Path
) -> None:
    vectors = 3 * np.eye(3, 384, dtype=np.float64)
    columns = {"id": ["x", "y", "z"], "text": ["first", None, "third"], "embedding": list(vectors)}
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    assert "1 of 3 rows" in (check_corpus(str(tmp_path)) or "")
    corpus = load_corpus(str(tmp_path), encoder)
    ((passage, score),) = corpus.search(vectors[2].astype(np.float32) / 3, 1)
    assert (passage.id, score) == ("z", pytest.approx(1))


def test_hidden_and_broken_files_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "corpus.ndjson").write_text(json.dumps(ROWS[0]))
    (tmp_path / "._corpus.ndjson").write_bytes(b"\0\5\26\7")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.parquet").write_bytes(b"PAR1")
    assert check_corpus(str(tmp_path)) is None
    (tmp_path / "corpus.ndjson.gz").write_bytes(gzip.compress(b"{}"))  # a copy, not read
    assert check_corpus(str(tmp_path)) is None
    (tmp_path / "y.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"y\.parquet is not a readable Parquet file"):
        check_corpus(str(tmp_path))


def test_folder_that_is_called_like_a_file_is_read(encoder: Encoder, tmp_path: Path) -> None:
    folder = tmp_path / "table.parquet"  # as Spark writes tables
    folder.mkdir()
    pq.write_table(pa.table({"text": ["first"]}), folder / "part-0.parquet")
    assert check_corpus(str(folder)) is None
    assert len(load_corpus(str(folder), encoder)) == 1


def test_index_without_all_its_rows_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "index")
    write_shards(storage, passages(np.eye(2, 384, dtype=np.float32)), rows_per_shard=1)
    manifest = Manifest(step="index", fingerprint="f", config={}, inputs={})
    write_artifact(storage, manifest, list_files(storage))
    first = storage.read_bytes("shards/000000000.parquet")
    pq.write_table(
        pq.read_table(pa.BufferReader(first)).slice(0, 0),
        tmp_path / "index/shards/000000001.parquet",
    )
    with pytest.raises(UserError, match="has 1 rows and its manifest says 2"):
        load_corpus(storage.uri, encoder)
    storage.delete("shards/000000001.parquet")
    with pytest.raises(UserError, match=r"000000001\.parquet is missing"):
        load_corpus(storage.uri, encoder)


def test_nothing_to_serve_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no passages")
    for uri in (tmp_path, tmp_path / "missing", tmp_path / "missing.jsonl"):
        with pytest.raises(UserError, match="accepted are"):
            check_corpus(str(uri))
    (tmp_path / "corpus.jsonl").write_text("")
    for check in (check_corpus, lambda uri: load_corpus(uri, encoder)):
        with pytest.raises(UserError, match="empty"):
            check(str(tmp_path))


@pytest.mark.parametrize("path", ["../../private.parquet", "shards/../../../private.parquet"])
def test_shards_outside_of_their_folder_are_not_read(path: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["secret"]}), tmp_path / "private.parquet")
    entry = FileEntry(path=path, num_bytes=1, sha256="0" * 64, num_rows=1)
    manifest = Manifest(step="index", fingerprint="f", config={}, inputs={})
    write_artifact(open_storage(tmp_path / "run/index"), manifest, FileList.of([entry]))
    with pytest.raises(TokayError, match=r"files\.parquet is not what this version"):
        check_corpus(str(tmp_path / "run/index"))


def test_queries_of_a_beir_folder_are_not_served(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for name in ("corpus", "queries"):
        (tmp_path / "set" / f"{name}.jsonl").write_text(json.dumps({"_id": name, "text": name}))
    assert load_corpus(str(tmp_path), encoder).passages["id"].to_pylist() == ["corpus"]
    # Without queries it is one file of rows like others.
    (tmp_path / "set" / "queries.jsonl").rename(tmp_path / "set" / "more.jsonl")
    assert load_corpus(str(tmp_path), encoder).passages["id"].to_pylist() == ["corpus", "queries"]
