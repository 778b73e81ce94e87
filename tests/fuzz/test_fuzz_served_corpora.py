"""Whatever a corpus holds, `tokay serve` reads it, or says in one line why not."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import UserError
from serving.corpus import check_corpus

TEXTS = st.text(st.characters(), max_size=20)
NAMES = st.sampled_from(["_id", "id", "title", "text", "embedding", "other"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.dictionaries(NAMES, VALUES | TEXTS, max_size=4).map(json.dumps) | st.fixed_dictionaries(
    {"text": TEXTS}, optional={"_id": TEXTS | st.integers(), "title": TEXTS | st.none()}
).map(json.dumps)
LINES = ROWS.map(str.encode) | VALUES.map(json.dumps).map(str.encode) | st.binary(max_size=30)
UTF8 = st.text(st.characters(codec="utf-8"), max_size=10)
COLUMNS = st.sampled_from(
    [
        (pa.string(), UTF8),
        (pa.large_string(), UTF8),
        (pa.binary(), st.binary(max_size=5)),
        (pa.dictionary(pa.int8(), pa.string()), UTF8),
        (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
        (pa.float32(), st.floats(width=32)),
        (pa.timestamp("us"), st.integers(-(2**63), 2**63 - 1)),
        (pa.list_(pa.float32()), st.lists(st.floats(width=32), min_size=2, max_size=3)),
        (pa.list_(pa.float64(), 2), st.lists(st.floats(), min_size=2, max_size=2)),
        (pa.list_(pa.string()), st.lists(UTF8, max_size=2)),
        (pa.null(), st.none()),
        (pa.struct([("a", pa.int8())]), st.fixed_dictionaries({"a": st.integers(0, 9)})),
    ]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpora")


def check(path: Path) -> None:
    try:
        told = check_corpus(str(path))
    except UserError as error:
        told = str(error)
    if told is not None:
        assert "\n" not in told
        assert len(told) < 1200


@given(lines=st.lists(LINES, max_size=5))
def test_json_lines_of_any_kind_are_read_or_refused(folder: Path, lines: list[bytes]) -> None:
    path = folder / "c.jsonl"
    path.write_bytes(b"\n".join(lines))
    check(path)


@given(data=st.data())
def test_parquet_of_any_columns_is_read_or_refused(folder: Path, data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(0, 3))
    columns: dict[str, Any] = {}
    for name in data.draw(st.lists(NAMES, unique=True)):
        kind, values = data.draw(COLUMNS)
        drawn = data.draw(st.lists(values | st.none(), min_size=num_rows, max_size=num_rows))
        columns[name] = pa.array(drawn, kind)
    path = folder / "c.parquet"
    pq.write_table(pa.table(columns), path)
    check(path)


@given(
    content=st.binary(max_size=200), name=st.sampled_from(["b.jsonl", "b.jsonl.gz", "b.parquet"])
)
def test_file_of_any_bytes_is_read_or_refused(folder: Path, content: bytes, name: str) -> None:
    path = folder / name
    path.write_bytes(content)
    check(path)
