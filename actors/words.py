"""Words, sentences and letters by Unicode's rules, for every place that counts or compares them.

Scripts that separate words by spaces alone take a fast path; the rest go through ICU, which has
dictionaries for those that write no spaces (Unicode Standard Annex 29). Every function takes any
string in time proportional to its length.
"""

import re
import unicodedata
from bisect import bisect_left
from functools import cache
from itertools import accumulate, pairwise

MAX_WORD_CHARACTERS = 50
"""An unbroken string (base64, a URL) counts as one word per this many characters."""

# Plain scripts: Latin, Greek, Cyrillic, Armenian and Georgian, punctuation, symbols and emoji.
_NOT_PLAIN = re.compile(
    "[^\u0000-\u058f\u10a0-\u10ff\u1c80-\u1cbf\u1d00-\u2d2f\u2de0-\u2e7f\ua640-\ua69f\ua700-\ua7ff"
    "\uab30-\uab6f\ufb00-\ufb17\ufe00-\ufe0f\ufe20-\ufe2f\ufff9-\uffff\U0001d400-\U0001d7ff"
    "\U0001f000-\U0001faff]"
)
_CHUNK = re.compile(r"[^\s\u200b]+")
_PLAIN_WORD = re.compile(r"[^\s\u200b]{1,50}")
_COMPARED = re.compile("[\\w\u0300-\u036f]+")
_ALPHANUMERIC = re.compile(r"[^\W_]")
_PERHAPS_MARKS = re.compile("[^\0-\u02ff]{31}")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")
_SURROGATE = re.compile("[\ud800-\udfff]")
_JOINERS = "\u200c\u200d"


def normalized(text: str) -> str:
    """Returns the text in NFC.

    After every 30th combining mark in a row a combining grapheme joiner is put, as in Unicode's
    Stream-Safe Text Format (Standard Annex 15), since a run of marks is sorted in quadratic time.
    """
    if _PERHAPS_MARKS.search(text):
        text = _mark_runs().sub("\\1\u034f", text)
    return unicodedata.normalize("NFC", text)


def word_spans(text: str) -> list[tuple[int, int]]:
    """Returns the start and end of each of the words by which a text is measured.

    They are what stands between spaces; where that is not wholly in a plain script, they are ICU's
    words in it. Punctuation belongs to the word before it.
    """
    if not _NOT_PLAIN.search(text):
        return [match.span() for match in _PLAIN_WORD.finditer(text)]
    segments = _segments(text)
    places = accumulate(map(len, segments), initial=0)
    starts = [
        start
        for start, segment in zip(places, segments, strict=False)
        if segment[0].isalnum() or _ALPHANUMERIC.search(segment)
    ]
    spans = []
    for match in _CHUNK.finditer(text):
        start, end = match.span()
        borders = [start, end]
        if _NOT_PLAIN.search(match[0]):
            # Punctuation before the first word belongs to it.
            borders[1:1] = starts[bisect_left(starts, start) : bisect_left(starts, end)][1:]
        for left, right in pairwise(borders):
            while right - left > MAX_WORD_CHARACTERS:
                spans.append((left, left + MAX_WORD_CHARACTERS))
                left += MAX_WORD_CHARACTERS
            spans.append((left, right))
    return spans


def num_words(text: str) -> int:
    """Counts the words by which a text is measured; counts of texts joined by spaces add up.

    >>> num_words("Well-known, isn't it?"), num_words("日本の朝市へ")
    (3, 4)
    """
    if not _NOT_PLAIN.search(text):
        return sum(1 for _ in _PLAIN_WORD.finditer(text))
    return len(word_spans(text))


def compared_words(text: str) -> list[str]:
    """Returns the words by which texts are compared: without case and punctuation, in order.

    >>> compared_words("Straße, well-known!")
    ['strasse', 'well', 'known']
    """
    text = normalized(text.casefold())
    if not _NOT_PLAIN.search(text):
        return _COMPARED.findall(text)
    words = []
    for segment in _segments(text):
        if not _NOT_PLAIN.search(segment):
            words += _COMPARED.findall(segment)
        elif _ALPHANUMERIC.search(segment):
            words.append(segment)
    return words


def sentence_starts(text: str) -> list[int]:
    """Returns where each sentence begins: 0, and after every sentence's end and its spaces."""
    if not _NOT_PLAIN.search(text):
        return [0, *(match.end() for match in _SENTENCE_END.finditer(text))]
    from icu4py.breakers import SentenceBreaker

    starts = [0]
    for sentence in SentenceBreaker(_SURROGATE.sub("\ufffd", text), "root"):
        starts.append(starts[-1] + len(sentence))
    return starts[:-1] or [0]


def letter_share(text: str) -> float:
    """Returns the share of letters, with their combining marks, in what is not space."""
    num_letters = num_all = 0
    of_letter = False
    for character in text:
        if character.isalpha():
            of_letter = True
        elif character.isspace() or character in _JOINERS:
            continue
        elif of_letter:
            of_letter = unicodedata.category(character).startswith("M")
        num_all += 1
        num_letters += of_letter
    return num_letters / num_all if num_all else 0.0


def _segments(text: str) -> list[str]:
    from icu4py.breakers import WordBreaker  # imported here, since plain texts do without it

    return list(WordBreaker(_SURROGATE.sub("\ufffd", text), "root"))


@cache
def _mark_runs() -> re.Pattern[str]:
    marks = "".join(chr(code) for code in range(0x300, 0x20000) if unicodedata.combining(chr(code)))
    return re.compile(f"([{marks}]{{30}})(?=[{marks}])")
