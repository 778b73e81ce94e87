import gzip
import os
from pathlib import Path

import pytest

from cluster.errors import Reject
from cluster.storage import open_storage
from pipelines.datasets.documents import Document, Page
from pipelines.datasets.sources import streams, warc
from pipelines.datasets.sources.arc import arc_pages
from pipelines.datasets.sources.http_pages import http_page
from pipelines.datasets.sources.streams import Source
from pipelines.datasets.sources.warc import warc_pages

WARCS = Path(os.environ.get("TOKAY_DATA", "nowhere"), "web", "warc")
needs_warcs = pytest.mark.skipif(not WARCS.is_dir(), reason="TOKAY_DATA names no public data")

PAGE = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=latin1\r\n\r\n<p>caf\xe9"


def record(
    url: str, block: bytes, kind: str = "response", media: str = "application/http"
) -> bytes:
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\nContent-Type: {media}\r\n"
        "WARC-Date: 2024-05-06T07:08:09Z\r\nWARC-Identified-Content-Language: deu,eng\r\n"
        f"Content-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def read(folder: Path, name: str, content: bytes) -> tuple[list[Page | Document | Reject], Source]:
    (folder / name).write_bytes(content)
    source = Source(storage=open_storage(folder), path=name)
    return list(warc_pages(source)), source


def test_pages_and_texts_are_told_from_what_else_an_archive_holds(tmp_path: Path) -> None:
    image = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n..."
    gone = b"HTTP/1.1 404 Not Found\r\nContent-Type: text/html\r\n\r\n<p>"
    content = b"".join(
        [
            record("http://a", b"about", "warcinfo", "application/warc-fields"),
            record("<http://b>", PAGE),
            record("http://c", image),
            record("http://d", gone),
            record("http://e", b"<p>x", "resource", "text/html"),
            record("http://f", b"x", "resource", "text/css"),
            record("http://g", "Grüße\naus".encode(), "conversion", "text/plain"),
            record("http://h", b"gr\xfc", "conversion", "text/plain"),
            record("http://i", b"nothing", "response"),
            record("dns:x.org", b"x.org. 1 IN A 1.2.3.4", "response", "text/dns"),
        ]
    )
    starts = [place for place in range(len(content)) if content.startswith(b"WARC/", place)]
    found, source = read(tmp_path, "x.warc", content)
    page = Page(
        name=f"x.warc:{starts[1]}",
        content=b"<p>caf\xe9",
        url="http://b",
        crawl_date="2024-05-06",
        charset="latin1",
    )
    assert found[0] == page
    assert found[1] == Page(
        name=f"x.warc:{starts[4]}", content=b"<p>x", url="http://e", crawl_date="2024-05-06"
    )
    text = Document(
        name=f"x.warc:{starts[6]}", title="", text="Grüße\n\naus", url="http://g", language="de"
    )
    assert found[2] == text
    assert [each[:2] for each in found[3:]] == [  # type: ignore[index]
        (f"x.warc:{starts[7]}", "not UTF-8"),
        (f"x.warc:{starts[8]}", "no status line in an answer of a web server"),
    ]
    not_pages = ("warcinfo", "image/png", "HTTP status 404", "text/css", "text/dns")
    assert source.passed_over == dict.fromkeys(not_pages, 1)


@pytest.mark.parametrize("packed", [True, False])
def test_broken_record_costs_itself_alone(tmp_path: Path, packed: bool) -> None:
    records = [record(f"http://{number}", PAGE + bytes(range(256))) for number in range(4)]
    if packed:
        records = [gzip.compress(each) for each in records]
        spoiled = records[1][:60] + bytes(20) + records[1][80:]
    else:
        spoiled = records[1].replace(b"WARC/1.0", b"WAXX/1.0", 1)
    name = "x.warc.gz" if packed else "x.warc"
    found, _ = read(tmp_path, name, records[0] + spoiled + b"".join(records[2:]))
    pages = [each.url for each in found if isinstance(each, Page)]
    assert pages == ["http://0", "http://2", "http://3"]
    where, reason, _ = found[1]  # type: ignore[misc]
    assert reason.startswith("broken record of an archive")
    # Of a plain record's start nothing is left.
    assert not packed or where == f"{name}:{len(records[0])}"
    assert len(found) == 4


@pytest.mark.parametrize("packed", [True, False])
def test_truncated_record_is_a_reject(tmp_path: Path, packed: bool) -> None:
    pack = gzip.compress if packed else bytes
    whole, cut_short = pack(record("http://a", PAGE)), pack(record("http://b", os.urandom(9000)))
    name = "x.warc.gz" if packed else "x.warc"
    first, second = read(tmp_path, name, whole + cut_short[:5000])[0]
    assert isinstance(first, Page)
    assert second[:2] == (f"{name}:{len(whole)}", "a record that ends early (response)")  # type: ignore[index]
    (nothing,) = read(tmp_path, name, pack(b"no archive"))[0]
    assert nothing[0] == f"{name}:0" and "record of an archive" in nothing[1]  # type: ignore[index]


def test_archive_within_a_page_is_no_record_of_its_own(tmp_path: Path) -> None:
    page = PAGE + b"\r\n\r\n" + record("http://within", PAGE)
    found, _ = read(tmp_path, "x.warc", record("http://a", page))
    assert [each.url for each in found] == ["http://a"]  # type: ignore[union-attr]


def test_page_beyond_the_limit_is_a_reject_and_a_film_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.datasets.sources import http_pages

    for module in (streams, warc, http_pages):
        monkeypatch.setattr(module, "MAX_ROW_BYTES", 1 << 20)
    film = b"HTTP/1.1 200 OK\r\nContent-Type: video/mp4\r\n\r\n" + bytes(3 << 20)
    long = record("http://a", PAGE + b" " * (3 << 20))
    content = long + record("http://b", film) + record("http://c", PAGE)
    found, source = read(tmp_path, "x.warc", content)
    assert found[0] == ("x.warc:0", "a page of more than 1 MiB", "")
    assert [each.url for each in found[1:]] == ["http://c"]  # type: ignore[union-attr]
    assert source.passed_over == {"video/mp4": 1}


def test_headers_beyond_reason_are_a_reject() -> None:
    block = PAGE.replace(b"\r\n\r\n", b"\r\n" + b"X: y\r\n" * 200 + b"\r\n")
    found = http_page("n", block, None, None)
    assert found[1].startswith("malformed HTTP headers")  # type: ignore[index]


@needs_warcs
@pytest.mark.parametrize("packing", ["", ".gz", ".bz2"])
def test_arc_is_read(tmp_path: Path, packing: str) -> None:
    import bz2

    plain = (WARCS / "warcio__example.arc").read_bytes()
    name = f"x.arc{packing}"
    packed = {"": plain, ".gz": (WARCS / "warcio__example.arc.gz").read_bytes()}
    (tmp_path / name).write_bytes(packed.get(packing) or bz2.compress(plain))
    source = Source(storage=open_storage(tmp_path), path=name)
    (page,) = arc_pages(source)
    assert isinstance(page, Page) and b"Example Domain" in page.content
    assert (page.url, page.crawl_date) == ("http://example.com/", "2014-02-16")
    assert source.passed_over == {"arc_header": 1}
