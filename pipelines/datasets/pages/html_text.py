"""From what a web server sent to HTML as text: its codings undone, its encoding found."""

from __future__ import annotations

import codecs
import io
import re
import zlib

from pipelines.datasets.sources.streams import (
    MAX_ROW_BYTES,
    Unreadable,
    read_bounded,
    too_long,
)

_META = re.compile(rb"""<(?:meta|\?xml)[^>]*?(?:charset|encoding)\s*=\s*["']?\s*([\w.:-]+)""", re.I)
_META_BYTES = 4096  # where browsers look for it, and some more
_BOMS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_GUESS_BYTES = 1 << 16  # of a page whose encoding nobody says
_MAX_WRONG = 0.001  # of a page's characters may be broken where it names its encoding


def decoded(content: bytes, codings: tuple[str, ...]) -> bytes:
    """Undoes a page's codings (`gzip`, `deflate`, `br`, `zstd`, `chunked`), the last one first.

    What does not look as its coding says is taken as it is: crawlers undo codings, and keep the
    headers. What ends early is as much as there is.

    Raises:
        Unreadable: It is more than MAX_ROW_BYTES, or in a coding that is not known.
    """
    for coding in reversed(codings):
        content = _undo(content, coding)
        if len(content) > MAX_ROW_BYTES:
            raise Unreadable(too_long("a page"))
    return content


def html_text(content: bytes, charset: str | None) -> str:
    """Returns HTML as text, in the encoding that it or its server names, or that fits.

    In this order: a byte order mark, the server's header, a meta tag, strict UTF-8, and what
    charset-normalizer finds likely. Latin-1 is tried behind UTF-8 only: servers name it by
    default, and a text in it is hardly ever UTF-8 by chance.

    Raises:
        Unreadable: Nothing fits.
    """
    from charset_normalizer import from_bytes

    for bom, name in _BOMS.items():
        if content.startswith(bom):
            return content[len(bom) :].decode(name, "replace")
    meta = _META.search(content, 0, _META_BYTES)
    named = [charset or "", meta[1].decode("ascii", "replace") if meta else ""]
    encodings = [codec for each in named if (codec := _codec(each))]
    for codec in sorted([*encodings, "utf-8"], key=lambda each: each == "cp1252"):
        try:
            return content.decode(codec)
        except UnicodeDecodeError:
            continue
    for codec in encodings:
        text = content.decode(codec, "replace")
        if text.count("\ufffd") <= _MAX_WRONG * len(text):
            return text
    guess = from_bytes(content[:_GUESS_BYTES]).best()
    if guess is None:
        raise Unreadable("its encoding is not known")
    return content.decode(guess.encoding, "replace")


def _codec(name: str) -> str | None:
    """Returns the codec of Python that browsers mean by a name, or None."""
    from resiliparse.parse.encoding import map_encoding_to_html5

    mapped = map_encoding_to_html5(name.strip(), fallback_utf8=False)
    if mapped is None:
        return None
    try:
        return codecs.lookup(mapped).name
    except LookupError:
        return None


def _undo(content: bytes, coding: str) -> bytes:
    from fastwarc.stream_io import BrotliReader, ZstdReader

    if coding == "chunked":
        return _dechunked(content)
    if coding in ("gzip", "x-gzip") and content.startswith(b"\x1f\x8b"):
        return _inflated(content, zlib.MAX_WBITS | 16)
    if coding == "deflate":
        return _inflated(content, zlib.MAX_WBITS) or _inflated(content, -zlib.MAX_WBITS) or content
    if coding == "zstd" and content.startswith(b"\x28\xb5\x2f\xfd"):
        return read_bounded(ZstdReader(io.BytesIO(content)))
    if coding == "br":
        return read_bounded(BrotliReader(io.BytesIO(content))) or content
    if coding in ("gzip", "x-gzip", "zstd", "identity", "utf-8", "none", "binary", "8bit", "7bit"):
        return content  # what crawlers undid, and what servers write that name no coding
    raise Unreadable(f"the coding {coding[:40]!r}, which is not known")


def _inflated(content: bytes, bits: int) -> bytes:
    try:
        return zlib.decompressobj(bits).decompress(content, MAX_ROW_BYTES + 1)
    except zlib.error:
        return b""


def _dechunked(content: bytes) -> bytes:
    """Joins the chunks of HTTP/1.1; of a broken one on, and of none, the bytes as they are."""
    joined, at = bytearray(), 0
    while True:
        end = content.find(b"\n", at, at + 1024)
        size = content[at:end].partition(b";")[0].strip()
        if end < 0 or not re.fullmatch(rb"[0-9A-Fa-f]{1,8}", size):
            return bytes(joined) + content[at:]
        if not (length := int(size, 16)):
            return bytes(joined)
        joined += content[end + 1 : end + 1 + length]
        at = end + 1 + length
        at += 2 if content.startswith(b"\r\n", at) else content.startswith(b"\n", at)
