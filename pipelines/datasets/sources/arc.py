"""ARC, the format before WARC, by warcio: fastwarc does not read it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from cluster.errors import Reject, excerpt
from pipelines.datasets.documents import Page
from pipelines.datasets.sources.http_pages import http_page
from pipelines.datasets.sources.streams import MAX_ROW_BYTES, Source, Unreadable, read_bounded

_DAY = re.compile(r"(\d{4})(\d\d)(\d\d)")


def arc_pages(source: Source) -> Iterator[Page | Reject]:
    """Yields the pages, each named by its record's place in the file, packed or not."""
    from warcio.archiveiterator import ArchiveIterator
    from warcio.exceptions import ArchiveLoadFailed

    unpack = source.packing in ("bz2", "zstd")
    with source.file(unpack=unpack) as stream:
        records = ArchiveIterator(stream, no_record_parse=True)
        while True:
            try:
                record = next(records)
                block = read_bounded(record.raw_stream)
                name = f"{source.name}:{records.get_record_offset()}"  # reads the record to its end
            except StopIteration:
                return
            except (ArchiveLoadFailed, OSError, ValueError, EOFError) as error:
                raise Unreadable(f"broken record of an archive: {excerpt(error)}") from error
            if record.rec_type != "response":
                source.passed_over[record.rec_type] += 1
                continue
            headers = record.rec_headers
            length = headers.get_header("length") or ""
            if not length.isdigit() or len(block) < min(int(length), MAX_ROW_BYTES + 1):
                yield name, "a record that ends early (response)", excerpt(headers.headers)
                continue
            day = _DAY.match(headers.get_header("archive-date") or "")
            date = "-".join(day.groups()) if day else None
            found = http_page(name, block, headers.get_header("uri"), date)
            if isinstance(found, str):
                source.passed_over[found] += 1
            else:
                yield found
