"""A corpus in units gives the rows of the whole, whatever their size."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import Reject
from cluster.storage import open_storage
from pipelines.corpus import units
from pipelines.corpus.units import Unit, divide, file_groups
from pipelines.datasets.corpus import Corpus, CorpusConfig
from pipelines.datasets.documents import Document

Found = Document | Reject


class Silent:
    def update(self, done: float, total: float | None = None, note: str = "") -> None: ...


def of_units(corpus: Corpus, folder: Path | str) -> tuple[list[Unit], list[Found]]:
    """Divides a corpus, and reads its units one by one."""
    found = divide(corpus, open_storage(folder), Silent())
    return found, [each for unit in found for each in corpus.some(unit.files, unit.span).read(1)]


def set_bytes(monkeypatch: pytest.MonkeyPatch, num: int) -> None:
    monkeypatch.setattr(units, "_FEWEST_BYTES", num)
    monkeypatch.setattr(units, "_MAX_UNITS", 1 << 60)


def line(number: int, **more: Any) -> bytes:
    return json.dumps({"text": f"text {number}", **more}).encode()


LINES = [
    line(1),
    b"",
    b"{broken",
    line(4) + b"\r",
    b"\r",
    b'{"text": "caf\xe9"}',
    b"[7]",
    line(8, _id="named"),
    b"\xef\xbb\xbf" + line(9),
    b"",
    b"",
    line(12),
]
ROWS = ["text,url", "1,a", "", "broken", "2,caf\udce9", "3,c\r", "4,\rd", "\ufeff5,e", ";,;"]


def content_of(name: str) -> bytes:
    if "jsonl" in name or name == "x.json":
        return b"\n".join(LINES)
    rows = "\n".join(ROWS).encode("utf-8", "surrogateescape")
    return rows.replace(b",", b"\t") if name.endswith("tsv") else rows


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv", "x.tsv"])
def test_rows_of_lines_are_the_same_whatever_the_span(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for end in (b"", b"\n", b"\r\n", b"\n\n"):
        content = content_of(name) + end
        (tmp_path / name).write_bytes(content)
        corpus = Corpus(CorpusConfig(path=str(tmp_path / name)))
        whole = list(corpus.documents())
        assert {"file:line", "reject"} == {
            "reject" if isinstance(each, tuple) else "file:line" for each in whole
        }
        for size in (1, 2, 3, 10, 30, len(content) - 1, len(content)):
            set_bytes(monkeypatch, size)
            found, rows = of_units(corpus, tmp_path / f"counts-{len(end)}-{end!r}-{size}")
            assert rows == whole
            assert (len(found) > 1) == (size < len(content))


@pytest.mark.parametrize("name", ["x.jsonl", "x.tsv", "x.csv"])
def test_line_that_is_longer_than_spans_is_one_reject(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = b"y" * (20 << 20)
    if name == "x.jsonl":
        parts = [line(1), b'{"text": "' + long + b'"}', line(3), b"{"] + [line(9)] * 5
    else:
        tab = b"\t" if name == "x.tsv" else b","
        parts = [b"id" + tab + b"text", b"a" + tab + long, b"b" + tab + b"x", b"c"]
    (tmp_path / name).write_bytes(b"\n".join(parts))
    corpus = Corpus(CorpusConfig(path=str(tmp_path / name)))
    whole = list(corpus.documents())
    assert [each[0] for each in whole if isinstance(each, tuple)] == [f"{name}:2", f"{name}:4"]
    for size in (3 << 20, 8 << 20, 20 << 20):
        set_bytes(monkeypatch, size)
        found, rows = of_units(corpus, tmp_path / f"counts-{size}")
        assert rows == whole
        assert len(found) == 2  # in the spans between, no line begins
        assert found[1].span is not None


def test_names_of_columns_may_stand_behind_what_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.tsv").write_bytes(b"\xff\n" * 20 + b"text\nx\n" + b"\xff\n" * 20 + b"y\n")
    corpus = Corpus(CorpusConfig(path=str(tmp_path)))
    whole = list(corpus.documents())
    assert [each.name for each in whole if isinstance(each, Document)] == ["x.tsv:22", "x.tsv:43"]
    for size in (5, 20, 60):
        set_bytes(monkeypatch, size)
        assert of_units(corpus, tmp_path / f"counts-{size}")[1] == whole


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", b'text,url\n1,a\n2,"a\nb"\n3,c\n'),
        ("x.csv", b'text,url\n"never closed,a\n' + b"2,b\n" * 9),
        ("x.csv", b'text,url\n1,a\n2,"a\r\n' + b"2,b\n" * 9),
        ("x.json", json.dumps([{"text": f"{n}"} for n in range(9)]).encode()),
        ("x.json", b'{\n"text": "a"}\n' * 9),
        ("x.txt", b"some text\n" * 9),
        ("x.jsonl.gz", gzip.compress(line(1) + b"\n" + line(2), mtime=0)),
        ("x.parquet", b"no Parquet file"),
    ],
)
def test_what_must_be_read_from_its_beginning_is_one_unit(
    name: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_bytes(content)
    corpus = Corpus(CorpusConfig(path=str(tmp_path / name)))
    whole = list(corpus.documents())
    set_bytes(monkeypatch, 5)
    found, rows = of_units(corpus, tmp_path / "counts")
    assert found == [Unit(files=[name])] and rows == whole


def write_parquet(path: Path, group_rows: int = 10) -> pa.Table:
    rows = [{"text": f"text {n} {'x' * 300}", "url": None, "big": f"{n}" * 3000} for n in range(95)]
    rows[7] = {"text": None, "url": None, "big": "7"}
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, path, row_group_size=group_rows, compression="none", use_dictionary=False)
    return table


def test_rows_of_parquet_are_the_same_whatever_the_span(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "x.parquet")
    corpus = Corpus(CorpusConfig(path=str(tmp_path / "x.parquet")))
    whole = list(corpus.documents())
    assert [each[0] for each in whole if isinstance(each, tuple)] == ["x.parquet:8"]
    assert whole[-1].name == "x.parquet:95"  # type: ignore[union-attr]
    (num_bytes,) = corpus.sizes()
    for size in (500, num_bytes // 10, num_bytes // 3, num_bytes):
        set_bytes(monkeypatch, size)
        found, rows = of_units(corpus, tmp_path / f"counts-{size}")
        assert rows == whole
        assert 3 <= len(found) <= 10 if size < num_bytes else len(found) == 1


def test_broken_row_group_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "x.parquet")
    group = pq.read_metadata(tmp_path / "x.parquet").row_group(3)
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    start = group.column(0).data_page_offset
    content[start : start + 30] = bytes(30)
    (tmp_path / "x.parquet").write_bytes(content)
    corpus = Corpus(CorpusConfig(path=str(tmp_path / "x.parquet")))
    whole = list(corpus.documents())
    where, reason, _ = whole[30]  # type: ignore[misc]
    assert where == "x.parquet:31" and reason.startswith("not a readable Parquet file")
    assert [each.name for each in whole[31:33]] == ["x.parquet:41", "x.parquet:42"]  # type: ignore[union-attr]
    for size in (500, 200_000):
        set_bytes(monkeypatch, size)
        assert of_units(corpus, tmp_path / f"counts-{size}")[1] == whole


def test_row_groups_in_no_order_are_all_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.datasets.sources import parquet
    from pipelines.datasets.sources.parquet_footer import ColumnChunk

    write_parquet(tmp_path / "x.parquet")
    places = parquet._places

    def odd(groups: list[list[ColumnChunk]], content: Any) -> list[int]:
        groups[4] = [ColumnChunk(path="text", unpacked_bytes=1, place=1 << 40)]
        return places(groups, content)

    corpus = Corpus(CorpusConfig(path=str(tmp_path / "x.parquet")))
    whole = list(corpus.documents())
    monkeypatch.setattr(parquet, "_places", odd)
    set_bytes(monkeypatch, 40_000)
    found, rows = of_units(corpus, tmp_path / "counts")
    assert rows == whole and len(found) == 4  # those behind the one that lies nowhere with it


def test_what_was_counted_is_not_counted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"\n".join([line(1)] * 100))
    corpus = Corpus(CorpusConfig(path=str(tmp_path / "x.jsonl")))
    set_bytes(monkeypatch, 50)
    found, _ = of_units(corpus, tmp_path / "counts")
    monkeypatch.setattr(Corpus, "count", None)
    assert divide(corpus, open_storage(tmp_path / "counts"), Silent()) == found


def test_small_files_are_grouped_and_large_ones_are_not() -> None:
    files = [f"{number:05}" for number in range(5000)]
    groups = file_groups(files, [100] * 5000)
    assert [file for group in groups for file in group] == files
    assert [len(group) for group in groups] == [1024] * 4 + [904]
    big = 1 << 34
    groups = file_groups(files[:6], [1 << 20, 1 << 20, big, 1 << 20, 7 << 20, 1 << 20])
    assert [len(group) for group in groups] == [2, 1, 2, 1]
    # Of petabytes each task gets more, so that there are no millions of tasks.
    assert 4096 <= len(file_groups(["a"] * 100_000, [1 << 30] * 100_000)) <= 8192
    assert file_groups([], []) == []
