import base64
import io
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import StorageError
from cluster.parquet import open_parquet, parquet_batches, parquet_table

ROOT = Path(__file__).parents[3]


def written(table: pa.Table, **settings: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **settings)
    return sink.getvalue()


def rows(content: bytes, columns: list[str]) -> list[dict[str, Any]]:
    return [row for batch in parquet_batches(content, columns, "x") for row in batch.to_pylist()]


class Code:
    """Unpickling it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def code_in_a_file(tmp_path: Path) -> pa.ExtensionArray:
    """A column whose values make the folder `ran` when they become Python objects."""
    from ray.data._internal.object_extensions.arrow import ArrowPythonObjectType

    values = pa.array([pickle.dumps(Code(tmp_path / "ran"))], pa.large_binary())
    return pa.ExtensionArray.from_storage(ArrowPythonObjectType(), values)


def flat(values: pa.Array) -> pa.Array:
    return values


def listed(values: pa.Array) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), values)


def in_a_struct(values: pa.Array) -> pa.Array:
    return pa.StructArray.from_arrays([listed(values)], ["deep"])


@pytest.mark.parametrize("nested", [flat, listed, in_a_struct])
@pytest.mark.parametrize("name", ["x", "xy", "xyz", "x" * 50])
def test_file_whose_values_would_be_unpickled_is_refused(
    nested: Any, name: str, code_in_a_file: pa.ExtensionArray, tmp_path: Path
) -> None:
    content = written(pa.table({"text": ["harmless"], name: nested(code_in_a_file)}))
    # What a reader that knows nothing of this does with it:
    if nested is flat:
        pq.read_table(pa.BufferReader(content)).to_pylist()
        assert (tmp_path / "ran").is_dir()
        (tmp_path / "ran").rmdir()
    for read in (
        lambda: list(parquet_batches(content, ["text", name], "corpus/a.parquet")),
        lambda: list(parquet_batches(content, ["text"], "corpus/a.parquet")),
        lambda: parquet_table(content, None, "corpus/a.parquet"),
        lambda: open_parquet(content, "corpus/a.parquet"),
    ):
        with pytest.raises(StorageError, match=r"corpus/a\.parquet has a column of an Arrow exten"):
            read()
    assert not (tmp_path / "ran").exists()


def test_type_of_an_extension_is_refused_before_its_code_runs() -> None:
    made = []

    class Told(pa.ExtensionType):
        def __init__(self) -> None:
            super().__init__(pa.string(), "told")

        def __arrow_ext_serialize__(self) -> bytes:
            return b""

        @classmethod
        def __arrow_ext_deserialize__(cls, storage: pa.DataType, serialized: bytes) -> "Told":
            made.append(serialized)
            return cls()

    pa.register_extension_type(Told())
    try:
        content = written(pa.table({"x": pa.ExtensionArray.from_storage(Told(), pa.array(["a"]))}))
        made.clear()
        with pytest.raises(StorageError, match="extension type"):
            open_parquet(content, "x")
        assert not made
        pq.read_schema(pa.BufferReader(content))
        assert made  # the file does run it
    finally:
        pa.unregister_extension_type("told")


def test_extension_is_found_wherever_it_lies_in_the_schema() -> None:
    found = set()
    for num_columns in range(1, 7):
        column = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16], pa.binary(16)))
        content = written(pa.table({"id": column, **{"n" * n: [1] for n in range(1, num_columns)}}))
        schema = pq.ParquetFile(io.BytesIO(content)).metadata.metadata[b"ARROW:schema"]
        found.add(base64.b64decode(schema).index(b"ARROW:extension:name") % 3)
        with pytest.raises(StorageError, match="extension type"):
            open_parquet(content, "x")
    assert found == {0, 1, 2}


def test_parquets_own_json_is_text() -> None:
    content = written(
        pa.table({"j": pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}']))}),
        store_schema=False,
    )
    assert parquet_table(content, None, "x")["j"].type == pa.string()


def test_only_the_columns_that_are_asked_for_are_read() -> None:
    far = pa.array([253_402_300_800_000], pa.timestamp("ms"))  # the year 10000
    content = written(pa.table({"when": far, "text": ["a"], "n": [1]}))
    rows = [
        row for batch in parquet_batches(content, ["text", "no"], "x") for row in batch.to_pylist()
    ]
    assert rows == [{"text": "a"}]
    assert parquet_table(content, ["n", "text"], "x").to_pydict() == {"n": [1], "text": ["a"]}


def test_rows_are_counted_without_columns() -> None:
    table = pa.table({"text": ["a", "b"]}).replace_schema_metadata({"k": "v"})
    empty = parquet_table(written(table), [], "x")
    assert (empty.num_rows, empty.num_columns) == (2, 0)
    assert empty.schema.metadata == {b"k": b"v"}
    assert [batch.num_rows for batch in parquet_batches(written(table), [], "x")] == [2]


def test_missing_and_doubled_columns_are_named() -> None:
    content = written(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]))
    with pytest.raises(StorageError, match="no column id, only text, text"):
        parquet_table(content, ["id"], "x")
    for read in (
        lambda: parquet_table(content, None, "x"),
        lambda: rows(content, ["text"]),
    ):
        with pytest.raises(StorageError, match="2 columns 'text'"):
            read()


def test_text_that_is_not_utf8_comes_as_bytes() -> None:
    content = written(pa.table({"text": pa.array([b"a\xff", b"b"]), "n": [1, 2]}))
    broken = written(
        pa.table(
            {
                "text": pa.Array.from_buffers(pa.string(), 2, pa.array([b"a\xff", b"b"]).buffers()),
                "n": [1, 2],
            }
        )
    )
    assert pq.ParquetFile(io.BytesIO(broken)).schema_arrow.field("text").type == pa.string()
    expected = [{"text": b"a\xff", "n": 1}, {"text": b"b", "n": 2}]
    for each in (content, broken):
        assert rows(each, ["text", "n"]) == expected
    with pytest.raises(StorageError, match=r"not a readable Parquet file: .*UTF8"):
        parquet_table(broken, None, "x")


@pytest.mark.parametrize("where", ["footer", "anywhere", "cut"])
def test_broken_file_is_one_line(where: str) -> None:
    import random

    chance = random.Random(where)
    whole = written(pa.table({"text": ["a", "b"] * 20, "n": [[1], [2]] * 20}))
    outcomes = set()
    for _ in range(200):
        content = bytearray(whole)
        if where == "cut":
            del content[chance.randrange(len(content)) :]
        else:
            content[chance.randrange(-400 if where == "footer" else -len(content), 0)] ^= 0xFF
        try:
            for batch in parquet_batches(bytes(content), ["text", "n"], "a.parquet"):
                batch.to_pylist()
            outcomes.add("read")
        except StorageError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
            assert str(error).startswith("a.parquet ")
            outcomes.add("refused")
    assert "refused" in outcomes


def test_parquet_is_read_in_one_place_only() -> None:
    reads = re.compile(
        r"ParquetFile\(|ParquetDataset|\b(pq|parquet|pd|pandas|pl|polars)\.(read|scan)_"
    )
    found = {
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("cluster", "actors", "pipelines", "serving", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if reads.search(line) and path != ROOT / "cluster" / "parquet.py"
    }
    assert not found
