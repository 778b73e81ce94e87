"""Files of HTML, each a page."""

from collections.abc import Iterator

from cluster.errors import Reject
from pipelines.datasets.documents import Page
from pipelines.datasets.sources.streams import MAX_ROW_BYTES, Source, too_long


def html_pages(source: Source) -> Iterator[Page | Reject]:
    """Yields the file's page."""
    with source.stream() as stream:
        content = stream.read(MAX_ROW_BYTES + 1)
    if len(content) > MAX_ROW_BYTES:
        yield source.name, too_long("a page"), ""
    else:
        yield Page(name=source.name, content=content)
