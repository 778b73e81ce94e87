import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.encoder import Encoder
from cluster.artifacts import Manifest, list_files, write_shards
from cluster.errors import UserError
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
    manifest = Manifest(
        step="index", fingerprint="f", config={}, inputs={}, files=list_files(storage)
    )
    storage.write_bytes("manifest.json", manifest.to_json())
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
        (b"{not json", "line 2"),
        (b'{"_id": "b"}', "line 2"),
        (b'{"_id": "b", "text": 7}', "line 2"),
        (b'{"_id": "b", "text": "\xff"}', "line 2"),
        (b"[1]", "line 2"),
    ],
)
def test_malformed_line_is_named(encoder: Encoder, tmp_path: Path, line: bytes, says: str) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(json.dumps(ROWS[0]).encode() + b"\n" + line)
    for refuse in (
        lambda: check_corpus(str(tmp_path)),
        lambda: load_corpus(str(tmp_path), encoder),
    ):
        with pytest.raises(UserError, match=says):
            refuse()


def test_nothing_to_serve_is_refused(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no passages")
    for uri in (tmp_path, tmp_path / "missing", tmp_path / "missing.jsonl"):
        with pytest.raises(UserError, match="accepted are"):
            check_corpus(str(uri))
    (tmp_path / "corpus.jsonl").write_text("")
    with pytest.raises(UserError, match="empty"):
        load_corpus(str(tmp_path), encoder)
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "bad.parquet")
    with pytest.raises(UserError, match="column text"):
        load_corpus(str(tmp_path / "bad.parquet"), encoder)
