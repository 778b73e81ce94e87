import bz2
import gzip
import io
from pathlib import Path

import pytest
from backports import zstd

from cluster.storage import open_storage
from pipelines.datasets.sources import streams
from pipelines.datasets.sources.streams import Source, Unreadable, bounded_lines

PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstd.compress}


def source(folder: Path, name: str, content: bytes) -> Source:
    (folder / name).write_bytes(content)
    return Source(storage=open_storage(folder), path=name)


@pytest.mark.parametrize("ending", PACK)
def test_packed_files_are_unpacked_member_after_member(tmp_path: Path, ending: str) -> None:
    packed = source(tmp_path, f"x{ending}", PACK[ending](b"one\n") + PACK[ending](b"two\n"))
    with packed.stream() as stream:
        assert list(bounded_lines(stream)) == [b"one\n", b"two\n"]
    with packed.local_file() as file:
        assert file.read_bytes() == b"one\ntwo\n"


@pytest.mark.parametrize("ending", PACK)
def test_truncated_file_gives_what_it_holds_and_then_says_so(tmp_path: Path, ending: str) -> None:
    content = b"".join(b"line %d\n" % number for number in range(1 << 17))
    packed = PACK[ending](content)
    lines = []
    with (
        pytest.raises(Unreadable, match="cannot be unpacked"),
        source(tmp_path, f"x{ending}", packed[:-9]).stream() as stream,
    ):
        for line in bounded_lines(stream):
            lines.append(line or b"")
    # Of bz2, whole blocks alone.
    assert ending == ".bz2" or len(b"".join(lines)) > len(content) - (1 << 18)


@pytest.mark.parametrize("ending", PACK)
def test_bomb_is_refused_before_it_has_unpacked(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "FREE_BYTES", 1 << 16)
    bomb = source(tmp_path, f"x{ending}", PACK[ending](b"\n" * (8 << 20)))
    size = 0
    refused = pytest.raises(Unreadable, match="unpacks to more than 200 times its size")
    with refused, bomb.stream() as stream:
        for line in bounded_lines(stream):
            size += len(line or b"")
    assert size <= max(1 << 16, 200 * (tmp_path / f"x{ending}").stat().st_size)
    with pytest.raises(Unreadable, match="unpacks to"), bomb.local_file():
        pass


def test_line_beyond_the_limit_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_ROW_BYTES", 4)
    content = b"abc\n" + b"x" * (3 << 20) + b"\nabcd\nabcde"
    assert list(bounded_lines(io.BytesIO(content))) == [b"abc\n", None, None, None]


def test_file_that_is_gone_or_locked_is_unreadable(tmp_path: Path) -> None:
    gone = source(tmp_path, "x.txt", b"")
    (tmp_path / "x.txt").unlink()
    with pytest.raises(Unreadable, match="cannot be read: No such file"), gone.stream():
        pass


def test_file_on_s3_is_read_like_one_on_a_disk(bucket: str) -> None:
    storage = open_storage(bucket)
    storage.write_bytes("a/x.gz", gzip.compress(b"one\n"))
    with Source(storage=storage, path="a/x.gz").stream() as stream:
        assert stream.read() == b"one\n"
