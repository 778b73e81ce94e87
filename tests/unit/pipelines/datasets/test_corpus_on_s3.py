"""A corpus on S3 is read by ranges of the versions that were listed, as one on a disk is read."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import StorageError
from cluster.s3_storage import S3Storage
from cluster.storage import open_storage
from pipelines.corpus import units
from pipelines.corpus.units import divide
from pipelines.datasets.corpus import Corpus, CorpusConfig
from pipelines.datasets.sources import streams

ROWS = [{"text": f"text {number} {'x' * 500}", "other": "y" * 500} for number in range(2000)]


class Silent:
    def update(self, done: float, total: float | None = None, note: str = "") -> None: ...


def record(kind: str, block: bytes) -> bytes:
    head = f"WARC/1.0\r\nWARC-Type: {kind}\r\nContent-Length: {len(block)}\r\n\r\n"
    return head.encode() + block + b"\r\n\r\n"


def write_corpus(folder: Path) -> dict[str, bytes]:
    """Writes a file of each way in which files are read; returns their contents."""
    folder.mkdir()
    lines = [json.dumps(row).encode() for row in ROWS]
    lines[100] = b"{broken"
    texts = [record("conversion", f"text {number}".encode()) for number in range(20)]
    texts[3] = texts[3].replace(b"WARC/1.0", b"WAXX/1.0")
    contents = {
        "a.jsonl": b"\n".join(lines),
        "b.jsonl.gz": gzip.compress(b"\n".join(lines[:50])),
        "c.json": json.dumps(ROWS[:50]).encode(),
        "d.csv": b"text,other\n" + b"\n".join(b"%d,x" % number for number in range(500)),
        "e.wet": b"".join(texts),
        "f.warc.gz": b"".join(map(gzip.compress, texts)),
        "g.txt": b"a text\n" * 50,
        "h.arc": b"no archive",
        "i.jsonl": b"",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(
        table, folder / "j.parquet", row_group_size=200, compression="none", use_dictionary=False
    )
    contents["j.parquet"] = (folder / "j.parquet").read_bytes()
    return contents


def no_copy(**_: object) -> None:
    raise AssertionError("a copy on this machine's disk")


@pytest.mark.parametrize("num_bytes", [8 << 20, 100_000])
def test_rows_on_s3_are_those_on_a_disk(
    num_bytes: int, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in write_corpus(tmp_path / "corpus").items():
        open_storage(bucket).write_bytes(f"corpus/{name}", content)
    monkeypatch.setattr(units, "_FEWEST_BYTES", num_bytes)
    monkeypatch.setattr(streams, "TemporaryDirectory", no_copy)
    monkeypatch.setattr(streams, "_RANGE_BYTES", 1 << 16)
    here, there = (
        Corpus(CorpusConfig(path=place)) for place in (str(tmp_path / "corpus"), f"{bucket}/corpus")
    )
    rows = list(here.documents())
    assert len(rows) > 4500 and sum(isinstance(row, tuple) for row in rows) == 4
    found = divide(there, open_storage(f"{bucket}/counts"), Silent())
    assert (len(found) > 20) == (num_bytes == 100_000)
    of_units = [row for unit in found for row in there.some(unit.files, unit.span).read(1)]
    assert not [pair for pair in zip(of_units, rows, strict=True) if pair[0] != pair[1]]
    assert not [pair for pair in zip(there.documents(), rows, strict=True) if pair[0] != pair[1]]
    assert there.version() == Corpus(there.config).version()


def test_span_asks_s3_for_little_more_than_it_holds(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = write_corpus(tmp_path / "corpus")
    monkeypatch.setattr(units, "_FEWEST_BYTES", 400_000)
    monkeypatch.setattr(streams, "_RANGE_BYTES", 1 << 16)
    for name in ("a.jsonl", "j.parquet"):
        open_storage(bucket).write_bytes(f"{name}/{name}", contents[name])
        corpus = Corpus(CorpusConfig(path=f"{bucket}/{name}/{name}"))
        found = divide(corpus, open_storage(tmp_path / name), Silent())
        asked: list[int] = []
        get = S3Storage._get

        def counted(*given: Any, get: Any = get, asked: list[int] = asked) -> Any:
            answer, content = get(*given)
            asked.append(len(content))
            return answer, content

        with monkeypatch.context() as patch:
            patch.setattr(S3Storage, "_get", counted)
            unit = found[len(found) // 2]
            assert list(corpus.some(unit.files, unit.span).read(1))
        # Of Parquet one column of two.
        assert 150_000 < sum(asked) < (800_000 if name == "a.jsonl" else 500_000)
        assert len(contents[name]) > 2_000_000 and len(found) > 5


@pytest.mark.slow
def test_answers_that_break_off_cost_no_row(
    faulty_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "_RANGE_BYTES", 1 << 18)
    for name, content in write_corpus(tmp_path / "corpus").items():
        open_storage(faulty_bucket).write_bytes(f"corpus/{name}", content)
    here, there = (
        list(Corpus(CorpusConfig(path=place)).documents())
        for place in (str(tmp_path / "corpus"), f"{faulty_bucket}/corpus")
    )
    assert not [pair for pair in zip(here, there, strict=True) if pair[0] != pair[1]]


@pytest.mark.parametrize("name", ["a.jsonl", "c.json", "d.csv", "e.wet", "f.warc.gz", "j.parquet"])
def test_s3_that_fails_is_told_and_not_taken_for_broken_data(
    name: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = write_corpus(tmp_path / "corpus")[name]
    noise = random.Random(1).randbytes(200_000)
    if name.endswith("gz"):  # each file is longer than its end, which is read first
        content += gzip.compress(record("conversion", noise))
    elif name != "j.parquet":
        content += b"\n" * 200_000
    open_storage(bucket).write_bytes(name, content)
    monkeypatch.setattr(streams, "_RANGE_BYTES", 1 << 16)
    corpus = Corpus(CorpusConfig(path=f"{bucket}/{name}"))
    assert list(corpus.documents())
    get, num_calls = S3Storage._get, 0

    def broken(self: S3Storage, path: str, part: str, version: str | None = None) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls > 2:
            raise StorageError("the network is gone")
        return get(self, path, part, version)

    monkeypatch.setattr(S3Storage, "_get", broken)
    with pytest.raises(StorageError, match="the network is gone"):
        list(corpus.documents())
    assert num_calls == 3


def test_file_that_was_replaced_since_it_was_listed_is_told(bucket: str) -> None:
    storage = open_storage(bucket)
    storage.write_bytes("c/x.jsonl", b'{"text": "one"}')
    for place in (f"{bucket}/c", f"{bucket}/c/x.jsonl"):
        corpus = Corpus(CorpusConfig(path=place))
        storage.write_bytes("c/x.jsonl", b'{"text": "two"}')
        with pytest.raises(StorageError, match="was written anew while it was read"):
            list(corpus.documents())
        assert len(list(Corpus(corpus.config).documents())) == 1
        storage.write_bytes("c/x.jsonl", b'{"text": "one"}')
