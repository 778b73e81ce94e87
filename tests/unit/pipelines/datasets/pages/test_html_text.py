import gzip
import zlib

import pytest
from backports import zstd

from pipelines.datasets.pages import html_text as module
from pipelines.datasets.pages.html_text import decoded, html_text
from pipelines.datasets.sources.streams import Unreadable

HTML = b"<p>" + bytes(range(32, 127)) * 20


def deflated(content: bytes, bits: int) -> bytes:
    packing = zlib.compressobj(wbits=bits)
    return packing.compress(content) + packing.flush()


@pytest.mark.parametrize(
    ("content", "codings"),
    [
        (HTML, ()),
        (gzip.compress(HTML), ("gzip",)),
        (deflated(HTML, 15), ("deflate",)),
        (deflated(HTML, -15), ("deflate",)),
        (zstd.compress(HTML), ("zstd",)),
        (
            b"5;x=y\r\n" + HTML[:5] + b"\r\n%x\r\n" % len(HTML[5:]) + HTML[5:] + b"\r\n0\r\n\r\n",
            ("chunked",),
        ),
        # What crawlers have undone already, and a server that is mistaken.
        (HTML, ("gzip", "chunked")),
        (HTML, ("br",)),
        (HTML, ("zstd",)),
        (HTML, ("deflate",)),
    ],
)
def test_codings_are_undone_where_there_are_some(content: bytes, codings: tuple[str, ...]) -> None:
    assert decoded(content, codings) == HTML


def test_last_coding_is_undone_first_and_an_early_end_is_one() -> None:
    packed = gzip.compress(HTML)
    chunked = b"%x\r\n" % len(packed) + packed + b"\r\n0\r\n\r\n"
    assert decoded(chunked, ("gzip", "chunked")) == HTML
    assert HTML.startswith(decoded(packed[:-30], ("gzip",))) and decoded(packed[:-30], ("gzip",))
    assert decoded(b"3\r\nabc\r\nzz\r\ndef", ("chunked",)) == b"abczz\r\ndef"
    with pytest.raises(Unreadable, match="the coding 'rot13'"):
        decoded(HTML, ("rot13",))


@pytest.mark.parametrize(
    ("packed", "coding"),
    [
        (gzip.compress(bytes(1 << 20)), "gzip"),
        (deflated(bytes(1 << 20), 15), "deflate"),
        (zstd.compress(bytes(1 << 20)), "zstd"),
    ],
)
def test_page_that_unpacks_beyond_the_limit_is_refused(
    packed: bytes, coding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ROW_BYTES", 1 << 16)
    with pytest.raises(Unreadable, match="a page of more than"):
        decoded(packed, (coding,))


TEXT = "<p>Größe, naïve cafés"


@pytest.mark.parametrize(
    ("content", "charset"),
    [
        (TEXT.encode("utf-8-sig"), "latin1"),  # the mark rules
        (b"\xff\xfe" + TEXT.encode("utf-16-le"), None),
        (TEXT.encode("cp1252"), "ISO-8859-1"),
        (TEXT.encode("latin2", "replace").replace(b"?", b"i"), "iso-8859-2"),
        (TEXT.encode(), "ISO-8859-1"),  # what many servers say of UTF-8
        (TEXT.encode(), "no-such-charset"),
        (b'<meta charset="windows-1252">' + TEXT.encode("cp1252"), None),
        (b"<meta http-equiv=x content='text/html; charset=cp1252'>" + TEXT.encode("cp1252"), None),
    ],
)
def test_encoding_is_that_of_mark_server_or_page(content: bytes, charset: str | None) -> None:
    text = html_text(content, charset).rpartition(">")[0]
    assert html_text(content, charset).endswith(
        TEXT.replace("ï", "i") if charset == "iso-8859-2" else TEXT
    )
    assert "\ufeff" not in text


def test_one_broken_character_does_not_change_the_encoding() -> None:
    text = "Größe " * 1000
    found = html_text(text.encode() + b"\xff", "utf-8")
    assert found == text + "\ufffd"


def test_encoding_that_nobody_names_is_guessed() -> None:
    russian = "Широкая электрификация южных губерний даст мощный толчок подъёму хозяйства. " * 5
    assert html_text(russian.encode("cp1251"), None) == russian
