"""Whatever lies in a corpus, reading it raises nothing but the user's mistakes."""

import gzip
import io
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from cluster.artifacts import REJECT_SCHEMA
from cluster.errors import UserError
from pipelines.corpus.cutting import passages_of, reject_reason
from pipelines.datasets.corpus import Corpus, CorpusConfig
from pipelines.datasets.documents import Document

FIELDS = ("_id", "id", "title", "text")


def read(content: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(content)
        try:
            found = list(Corpus(CorpusConfig(path=folder)).documents())
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 1500
            return
    rejects = [row for row in found if isinstance(row, tuple)]
    columns = [list(column) for column in zip(*rejects, strict=True)] or [[], [], []]
    pa.table(columns, schema=REJECT_SCHEMA)
    for document in found:
        if isinstance(document, Document):
            document.name.encode()
            for passage in passages_of(document, max_words=16, min_words=8):
                passage.text.encode()
                reject_reason(passage.text)


names = st.one_of(st.sampled_from(FIELDS), st.text(max_size=3))
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(), max_size=40)
)
values = st.recursive(
    scalars,
    lambda some: st.one_of(st.lists(some, max_size=3), st.dictionaries(names, some, max_size=4)),
    max_leaves=8,
)
rows = st.one_of(values, st.dictionaries(names, values, max_size=5))


@given(st.binary(max_size=200), st.sampled_from(["x.jsonl", "x.txt", "x.parquet", "x.jsonl.gz"]))
def test_any_bytes_are_read_or_refused(content: bytes, name: str) -> None:
    read(content, name)


@given(st.lists(rows, max_size=5), st.booleans(), st.binary(max_size=3), st.integers(0, 300))
def test_any_json_is_read_or_refused(
    lines: list[object], packed: bool, noise: bytes, place: int
) -> None:
    content = "\n".join(map(json.dumps, lines)).encode()
    content = content[:place] + noise + content[place:]
    read(gzip.compress(content) if packed else content, "x.jsonl.gz" if packed else "x.jsonl")


kinds = st.recursive(
    st.sampled_from(
        [
            *(pa.string(), pa.large_string(), pa.binary(), pa.string_view(), pa.binary(3)),
            *(pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.bool_(), pa.null()),
            *(pa.date32(), pa.date64(), pa.timestamp("us"), pa.timestamp("ns", "UTC")),
            *(pa.time64("ns"), pa.duration("s"), pa.decimal128(20, 3)),
            pa.dictionary(pa.int16(), pa.string()),
        ]
    ),
    lambda some: st.one_of(
        some.map(pa.list_), some.map(lambda kind: pa.struct([("text", kind), ("b", pa.int8())]))
    ),
    max_leaves=3,
)


def column(kind: pa.DataType, content: bytes, num_rows: int) -> pa.Array:
    """A column of any type: values that are cast from numbers, bytes or nothing."""
    numbers = [int.from_bytes(content[at : at + 4], "little") for at in range(num_rows)]
    for given_values in (numbers, [content[at:] for at in range(num_rows)]):
        try:
            return pa.array(given_values).cast(kind, safe=False)
        except (pa.ArrowException, OverflowError):
            continue  # this type is not made so
    return pa.nulls(num_rows, kind)


@given(
    st.dictionaries(names, kinds, max_size=4),
    st.binary(min_size=4, max_size=30),
    st.integers(0, 4),
    st.one_of(st.none(), st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=2))),
)
def test_any_parquet_is_read_or_refused(
    schema: dict[str, pa.DataType],
    content: bytes,
    num_rows: int,
    noise: tuple[int, bytes] | None,
) -> None:
    columns = {name: column(kind, content, num_rows) for name, kind in schema.items()}
    columns = {name: made for name, made in columns.items() if name.isprintable()}
    sink = io.BytesIO()
    try:
        pq.write_table(pa.table(columns), sink)
    except pa.ArrowException:
        return  # Parquet has no such type
    written = sink.getvalue()
    if noise is not None:
        place, changed = noise
        written = written[:place] + changed + written[place + len(changed) :]
    read(written, "x.parquet")


def test_any_byte_of_a_parquet_footer_may_be_wrong() -> None:
    """Arrow ends the process where it is asked for a column chunk that does not fit the schema."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"text": ["what a text says", "b"], "n": [1, 2]}), sink)
    written = sink.getvalue()
    start = len(written) - 8 - int.from_bytes(written[-8:-4], "little")
    for place in range(start, len(written) - 8):
        for other in (1, 2, 37):
            changed = bytes([written[place] ^ other])
            read(written[:place] + changed + written[place + 1 :], "x.parquet")
