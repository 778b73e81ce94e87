"""Documents become passages here: cleaned, cut and named.

Every corpus, whatever it was read from, passes through these functions, so that a passage has the
same text and the same id on every machine and in every run. All of them are pure.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

from actors.words import normalized, num_words, sentence_starts, word_spans
from cluster.errors import Reject
from pipelines.corpus.filters import FILTERS
from pipelines.ids import passage_id

if TYPE_CHECKING:
    from pipelines.datasets.documents import Document

T = TypeVar("T")

SHOWN = 200  # characters of what was refused

# Controls, invisible format characters but the joiners (which carry meaning in several scripts),
# halves of surrogate pairs, private use and what is no character.
_UNWRITTEN = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200e\u200f\u202a-\u202e\u2060-\u206f\ud800-\uf8ff"
    "\ufdd0-\ufdef\ufeff\ufff9-\ufffb\ufffe\uffff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e00ff\U000f0000-\U0010ffff]"
)


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A part of a document; `source` is `<document name>#<part>`, parts counted from 1.

    `headings` are the one it stands under and those within it.
    """

    id: str
    title: str
    text: str
    source: str
    url: str | None = None
    date: str | None = None
    language: str | None = None
    headings: tuple[str, ...] = ()

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Passage:
        """Returns the passage of a row of `pipelines.records.PASSAGE`."""
        return cls(**row | {"headings": tuple(row["headings"] or ())})


def clean(text: str) -> str:
    r"""Returns `text` as paragraphs of one line each, separated by blank lines.

    Normalises to NFC, takes out control and invisible characters, and joins the lines of a
    paragraph. Whatever Unicode calls a space or a line's end parts words, and so does the
    zero-width space.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\u2029", "\n\n")
    text = _UNWRITTEN.sub("", text.replace("\u200b", " "))
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", normalized(text)))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def cut(text: str, *, max_words: int = 160, min_words: int = 20) -> list[str]:
    """Cuts cleaned text into pieces of at most `max_words` words.

    Cuts at paragraph borders; inside an over-long paragraph at sentence borders; inside an
    over-long sentence at words, where spaces are if it has some. A last piece below `min_words`
    takes paragraphs from the piece before it where that leaves both of a fair size.

    Args:
        text: Output of `clean`: paragraphs separated by blank lines.
        max_words: Upper limit of a piece, in the words of `num_words`.
        min_words: Size below which a last piece is evened out.

    Returns:
        Pieces in the text's order, paragraphs separated by a line break; `[]` for empty text.

    Raises:
        ValueError: When not `0 < 2 * min_words <= max_words`.

    >>> cut("One two three. Four five. Six seven eight.", max_words=5, min_words=1)
    ['One two three. Four five.', 'Six seven eight.']
    """
    if not 0 < 2 * min_words <= max_words:
        raise ValueError(
            f"min_words={min_words}, max_words={max_words}: give a min_words of at least 1 and at "
            "most half of max_words"
        )
    units: list[tuple[str, int]] = []
    for paragraph in text.split("\n\n"):
        words = word_spans(paragraph)
        if len(words) > max_words:
            units += _parts(paragraph, words, max_words)
        elif words:
            units.append((paragraph, len(words)))
    groups = _pack(units, max_words)
    if len(groups) > 1:
        _even_out(groups[-2], groups[-1], min_words)
    return ["\n".join(group) for group in groups]


def passages_of(document: Document, *, max_words: int = 160, min_words: int = 20) -> list[Passage]:
    """Cleans and cuts a document. Unfit passages are included: see `reject_reason`."""
    title = " ".join(clean(document.title).split())
    known = {" ".join(clean(heading).split()) for heading in document.headings}
    pieces = cut(clean(document.text), max_words=max_words, min_words=min_words)
    passages = []
    above: tuple[str, ...] = ()
    for part, text in enumerate(pieces, start=1):
        lines = text.split("\n")
        within = tuple(line for line in lines if line in known)
        headings = within if lines[0] in known else above + within
        above = headings[-1:]
        passages.append(
            Passage(
                id=passage_id(title, text),
                title=title,
                text=text,
                source=f"{document.name}#{part}",
                url=document.url,
                date=document.date,
                language=document.language,
                headings=headings,
            )
        )
    return passages


def fit_passages(
    document: Document, *, max_words: int = 160, min_words: int = 20
) -> Iterator[Passage | Reject]:
    """Cleans and cuts a document; yields its passages, and what is unfit as a reject."""
    passages = passages_of(document, max_words=max_words, min_words=min_words)
    if not passages:
        yield document.name, "empty", document.text[:SHOWN]
    for passage in passages:
        reason = reject_reason(passage.text)
        yield passage if reason is None else (passage.source, reason, passage.text[:SHOWN])


def reject_reason(text: str) -> str | None:
    """Says why a text is unfit to be a passage, or None when it is fit: the first filter's word."""
    return next((reason for filter_ in FILTERS if (reason := filter_(text))), None)


def _parts(
    paragraph: str, words: list[tuple[int, int]], max_words: int
) -> Iterator[tuple[str, int]]:
    """Yields the pieces of an over-long paragraph, cut at sentences and, if need be, at words.

    Each comes with the number of its words.
    """
    starts = [start for start, _ in words]
    borders = sorted({bisect_left(starts, start) for start in sentence_starts(paragraph)} | {0})
    sizes = [
        (piece, piece[1] - piece[0])
        for first, end in pairwise([*borders, len(words)])
        for piece in _slices(paragraph, starts, first, end, max_words)
    ]
    for group in _pack(sizes, max_words):
        yield from _within(paragraph, words[group[0][0] : group[-1][1]], max_words)


def _slices(
    paragraph: str, starts: list[int], first: int, end: int, max_words: int
) -> Iterator[tuple[int, int]]:
    """Yields the first word, and the one behind the last, of each slice of a sentence."""
    while end - first > max_words:
        cut = first + max_words
        spaced = (
            n for n in range(cut, cut - max_words // 2, -1) if paragraph[starts[n] - 1] == " "
        )
        cut = next(spaced, cut)
        yield first, cut
        first = cut
    if first < end:
        yield first, end


def _within(
    paragraph: str, words: list[tuple[int, int]], max_words: int
) -> Iterator[tuple[str, int]]:
    """Yields the words' text; in halves where ICU finds more of them than in the whole text."""
    text = paragraph[words[0][0] : words[-1][1]]
    size = num_words(text)
    if size <= max_words or len(words) == 1:
        yield text, size
    else:
        yield from _within(paragraph, words[: len(words) // 2], max_words)
        yield from _within(paragraph, words[len(words) // 2 :], max_words)


def _pack(units: Iterable[tuple[T, int]], max_words: int) -> list[list[T]]:
    """Fills groups of at most `max_words` words with the units in their order."""
    groups: list[list[T]] = []
    room = 0
    for unit, size in units:
        if size > room or not groups:
            groups.append([])
            room = max_words
        groups[-1].append(unit)
        room -= size
    return groups


def _even_out(previous: list[str], last: list[str], min_words: int) -> None:
    while num_words(" ".join(last)) < min_words and len(previous) > 1:
        if num_words(" ".join(previous[:-1])) < min_words:
            return
        last.insert(0, previous.pop())
