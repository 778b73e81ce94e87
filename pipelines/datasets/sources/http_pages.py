"""The answers of web servers that archives keep: which of them are pages, and what they say."""

from __future__ import annotations

import io
import re
from http.client import HTTPException, HTTPMessage, parse_headers

from cluster.errors import Reject
from pipelines.datasets.documents import Page
from pipelines.datasets.sources.streams import MAX_ROW_BYTES, too_long

HTML = ("text/html", "application/xhtml+xml")
_STATUS = re.compile(rb"HTTP/[\d.]+ +(\d{3})[^\n]*\n")


def http_page(
    name: str, block: bytes, url: str | None, crawl_date: str | None
) -> Page | Reject | str:
    """Reads an answer of a web server, its status line first.

    Args:
        name: Of the page.
        block: The answer; with more than MAX_ROW_BYTES it is one that was cut there.
        url: What was asked for.
        crawl_date: When, as YYYY-MM-DD.

    Returns:
        The page, or why it could not be read, or what it is instead, in a word or two.
    """
    status = _STATUS.match(block)
    if not status:
        return name, "no status line in an answer of a web server", _shown(block)
    if status[1] != b"200":
        return f"HTTP status {status[1].decode()}"
    stream = io.BytesIO(block)
    stream.seek(status.end())
    try:
        headers = parse_headers(stream)
    except HTTPException as error:
        return name, f"malformed HTTP headers ({error})", _shown(block)
    kind = headers.get_content_type() if headers.get("Content-Type") else "no content type"
    if kind not in HTML:
        return kind
    if len(block) > MAX_ROW_BYTES:
        return name, too_long("a page"), ""
    return Page(
        name=name,
        content=stream.read(),
        url=url,
        crawl_date=crawl_date,
        charset=_charset(headers),
        language=headers.get("Content-Language"),
        codings=(*_list(headers, "Content-Encoding"), *_list(headers, "Transfer-Encoding")),
    )


def _charset(headers: HTTPMessage) -> str | None:
    charset = headers.get_param("charset")
    return charset.strip("\"' ") if isinstance(charset, str) else None


def _list(headers: HTTPMessage, name: str) -> list[str]:
    """Returns the codings in the order in which they were applied."""
    return [part.strip().lower() for part in headers.get(name, "").split(",") if part.strip()]


def _shown(block: bytes) -> str:
    return block[:200].decode("utf-8", "replace")
