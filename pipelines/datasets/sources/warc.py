"""WARC and WET: the pages and the texts of a web archive, by fastwarc."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO

from cluster.errors import Reject, excerpt
from pipelines.datasets.documents import Document, Page
from pipelines.datasets.sources.http_pages import HTML, http_page
from pipelines.datasets.sources.streams import MAX_ROW_BYTES, Source, read_bounded, too_long

if TYPE_CHECKING:
    from fastwarc import WarcRecord

# What a record, or the packed member that holds it, begins with.
_STARTS = {"gzip": b"\x1f\x8b\x08", "zstd": b"\x28\xb5\x2f\xfd", None: b"WARC/1."}
_WINDOW = 1 << 20


def warc_pages(source: Source) -> Iterator[Page | Document | Reject]:
    """Yields pages, and the texts of WET; each is named by its record's place in the file.

    A record that cannot be read costs itself alone, if it was packed by itself: reading goes on
    where the next one starts.
    """
    packing = None if source.packing == "bz2" else source.packing
    with source.file(unpack=source.packing == "bz2") as stream:
        at: int | None = 0
        while at is not None:
            records, behind, num_records = _records(stream, at), at + 1, 0
            failure = "no record of an archive"
            while True:
                try:
                    record = next(records)
                except StopIteration:
                    break
                except (OSError, ValueError) as error:
                    failure = f"broken record of an archive: {excerpt(error)}"
                    break
                place, block, failure = int(record.stream_pos), read_bounded(record.reader), ""
                num_records += 1
                yield from _found(source, f"{source.name}:{place}", record, block)
                # Within a plain file's record there may be something like the start of another.
                behind = place + 1 if packing else place + len(block) + 1
            following = _find(stream, _STARTS[packing], behind)
            # A packed member that could not be read behind others is met again, as the first one.
            if failure and not (packing and num_records and following is not None):
                yield f"{source.name}:{behind if num_records else at}", failure, ""
            at = following


def _records(stream: BinaryIO, at: int) -> Iterator[WarcRecord]:
    """Returns the records from a place on; the iterator raises OSError at one that is broken."""
    from fastwarc import ArchiveIterator

    stream.seek(at)
    return iter(ArchiveIterator(stream, parse_http=False, auto_decode="none"))


def _found(
    source: Source, name: str, record: WarcRecord, block: bytes
) -> Iterator[Page | Document | Reject]:
    kind, headers = str(record.record_type), record.headers
    is_long = len(block) > MAX_ROW_BYTES
    if headers.get("Content-Length") is None or (
        not is_long and len(block) != record.content_length
    ):
        reason = f"a record that ends early ({kind})"
        yield name, reason, excerpt(f"{len(block)} of {record.content_length} bytes")
        return
    url = (headers.get("WARC-Target-URI") or "").strip("<>") or None
    date = (headers.get("WARC-Date") or "")[:10] or None
    media = (headers.get("Content-Type") or "").partition(";")[0].strip().lower()
    found: Page | Document | Reject | str = kind
    if kind == "response":
        is_http = media == "application/http"
        found = http_page(name, block, url, date) if is_http else media or kind
    elif kind == "resource":
        found = Page(name=name, content=block, url=url, crawl_date=date) if media in HTML else media
    elif kind == "conversion":
        found = _text(name, block, url, headers.get("WARC-Identified-Content-Language"))
    if isinstance(found, str):
        source.passed_over[found] += 1
    elif is_long:
        yield name, too_long("a page"), ""
    else:
        yield found


def _text(name: str, block: bytes, url: str | None, languages: str | None) -> Document | Reject:
    """Returns the text of WET, whose languages Common Crawl names by ISO 639-3, the first most."""
    import pycountry

    try:
        text = block.decode()
    except UnicodeDecodeError as error:
        return name, "not UTF-8", f"byte {error.start}"
    code = (languages or "").partition(",")[0] or None
    known = code and pycountry.languages.get(alpha_3=code)
    language = getattr(known, "alpha_2", code)  # as BCP 47 has it: the shortest code there is
    text = text.replace("\n", "\n\n")  # each line is a paragraph of the page, or a part of its menu
    return Document(name=name, title="", text=text, url=url, language=language)


def _find(stream: BinaryIO, start: bytes, at: int) -> int | None:
    """Returns where `start` stands at or behind a place, or None."""
    stream.seek(at)
    window = b""
    while part := stream.read(_WINDOW):
        window += part
        found = window.find(start)
        if found >= 0:
            return at + found
        at += max(0, len(window) - len(start))
        window = window[-len(start) :]
    return None
