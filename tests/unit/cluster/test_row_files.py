"""Which files of a folder hold rows, and rows that the same file gives every reader."""

import gzip
from datetime import date
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pytest

from cluster.errors import UserError
from cluster.files import StoredFile
from cluster.row_files import (
    batch_rows,
    beir_corpora,
    file_format,
    file_lines,
    find_files,
    is_beir,
    jsonl_rows,
    without_copies,
)
from cluster.storage import open_storage


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("a.jsonl", "jsonl"),
        ("b/a.NDJSON", "jsonl"),
        ("a.JSONL.GZ", "jsonl"),
        ("a.Parquet", "parquet"),
        ("a.parquet.gz", None),
        ("a.tsv", None),
        ("a.gz", None),
        ("jsonl", None),
    ],
)
def test_format_follows_from_the_suffix_in_any_case(path: str, expected: str | None) -> None:
    assert file_format(path) == expected


def test_packed_copy_beside_its_file_is_left_out() -> None:
    paths = ["a.jsonl", "a.jsonl.gz", "a.jsonl.GZ", "b.jsonl.gz", "c/a.jsonl.gz"]
    assert without_copies(paths) == ["a.jsonl", "b.jsonl.gz", "c/a.jsonl.gz"]


def test_beir_folder_has_queries_beside_its_corpus() -> None:
    paths = ["x/corpus.jsonl.gz", "x/queries.jsonl", "x/more.jsonl"]
    assert is_beir(paths) and beir_corpora(paths) == ["x/corpus.jsonl.gz"]
    assert not is_beir(["corpus.jsonl", "more.jsonl"])


def test_hidden_files_are_passed_over_unless_named(tmp_path: Path) -> None:
    for name in (".a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"text": "x"}\n[1]')
    storage, files = find_files(str(tmp_path))
    assert files == [StoredFile(path="b.jsonl", num_bytes=17, version=None)]
    assert [file.path for file in find_files(str(tmp_path / ".a.jsonl"))[1]] == [".a.jsonl"]
    assert find_files(str(tmp_path / "none"))[1] == []
    good, bad = jsonl_rows(storage, "b.jsonl")
    assert good == ("b.jsonl:1", {"text": "x"}) and bad[:2] == ("b.jsonl:2", "not a JSON object")


def test_gzip_is_unpacked_by_the_name_of_the_file(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    packed = gzip.compress(b"one\n") + gzip.compress(b"two\n")
    for name in ("c.jsonl", "c.jsonl.GZ"):
        (tmp_path / name).write_bytes(packed)
    assert list(file_lines(storage, "c.jsonl.GZ")) == [b"one\n", b"two\n"]
    assert b"".join(file_lines(storage, "c.jsonl")) == packed
    for broken in (packed[:-5], b"none", packed[:12] + b"\xff" * 20):
        (tmp_path / "c.jsonl.gz").write_bytes(broken)
        with pytest.raises(UserError, match=rf"{tmp_path.name}/c\.jsonl\.gz cannot be unpacked"):
            list(file_lines(storage, "c.jsonl.gz"))


def test_rows_of_a_batch_hold_texts_numbers_and_lists() -> None:
    columns = {
        "bytes": pa.array([b"a", b"\xff"]),
        "list": pa.array([[b"b"], None]),
        "decimal": pa.array([Decimal("1.50"), None]),
        "day": pa.array([date(2020, 1, 2), None]),
        "struct": pa.array([{"a": 1}, None]),
    }
    good, bad = batch_rows(pa.RecordBatch.from_pydict(columns), "f", start=5)
    where, row = good[0], good[1]
    assert where == "f:5" and isinstance(row, dict)
    assert (row["bytes"], row["list"], row["decimal"]) == ("a", ["b"], "1.50")
    assert row["day"] == "2020-01-02" and row["struct"] == {"type": "struct<a: int64>"}
    assert bad[:2] == ("f:6", "not UTF-8")
