"""What the readers of sources give: documents, and web pages whose main text is yet to be found."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Document:
    """A source text: `name` is its locator in the corpus, unique and stable.

    Of a web page come its address, the day it was published (YYYY-MM-DD), its language (the first
    part of a BCP 47 tag) and the headings that stand in its text, each a paragraph of it.
    """

    name: str
    title: str
    text: str
    url: str | None = None
    date: str | None = None
    language: str | None = None
    headings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Page:
    """A web page as it was sent: HTML in the codings that its server named, one behind another.

    `charset` and `language` are the server's words for it, `crawl_date` the day it was fetched.
    """

    name: str
    content: bytes
    title: str = ""
    url: str | None = None
    crawl_date: str | None = None
    charset: str | None = None
    language: str | None = None
    codings: tuple[str, ...] = ()
