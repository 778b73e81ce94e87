"""The footer's numbers are Arrow's own, and a broken footer ends no process."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.datasets.sources.parquet_footer import read_footer

TABLE = pa.table(
    {
        "text": [f"a text of its own, {number}" for number in range(1000)],
        "same": ["one text"] * 1000,
        "a.b": [None, 0.5] * 500,
        "nested": [{"list": [{"x": number}], "truth": True} for number in range(1000)],
    }
)


def written(**options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(TABLE, sink, row_group_size=300, **options)
    return sink.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "none", "use_dictionary": False, "write_statistics": False},
        {"write_page_index": True, "store_schema": False, "version": "1.0"},
        {"sorting_columns": [pq.SortingColumn(0)], "write_page_checksum": True},
        {"use_dictionary": ["same"], "bloom_filter_options": {"same": {"ndv": 10, "fpp": 0.1}}},
    ],
)
def test_numbers_are_those_of_arrow(options: dict[str, object]) -> None:
    content = written(**options)
    metadata = pq.ParquetFile(io.BytesIO(content)).metadata
    groups = read_footer(io.BytesIO(content))
    assert len(groups) == metadata.num_row_groups == 4
    for number, chunks in enumerate(groups):
        group = metadata.row_group(number)
        assert len(chunks) == group.num_columns == 5
        for place, chunk in enumerate(chunks):
            told = group.column(place)
            assert chunk.path == told.path_in_schema
            assert chunk.unpacked_bytes == told.total_uncompressed_size
            begins = told.dictionary_page_offset if told.has_dictionary_page else None
            assert chunk.place == (begins or told.data_page_offset)


def test_broken_footer_is_an_error_and_nothing_else() -> None:
    content = written()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    random, broken = np.random.default_rng(0), 0
    for _ in range(1500):
        changed = bytearray(content)
        for place in random.integers(start, len(content) - 8, random.integers(1, 4)):
            changed[place] = random.integers(256)
        try:
            read_footer(io.BytesIO(changed))
        except ValueError:
            broken += 1
    assert broken > 100


@pytest.mark.parametrize(
    "footer", [b"", b"PAR1", b"\xff" * 100, b"\x1c" * 5000, b"\x49\xfc\x7f", b"\x49\x1c\x00"]
)
def test_no_footer_at_all(footer: bytes) -> None:
    size = len(footer).to_bytes(4, "little")
    try:
        assert not any(read_footer(io.BytesIO(footer + size + b"PAR1")))
    except ValueError as error:
        assert "footer" in str(error)
