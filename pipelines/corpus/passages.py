"""Documents become passages here: cleaned, cut, named and compared.

Every corpus, whatever it was read from, passes through these functions, so that a passage has the
same text and the same id on every machine and in every run. All of them are pure.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

MIN_WORDS = 8
"""A passage of fewer words says too little to write a question about."""

# A character of a script that is written without spaces counts as a word; an unbroken string
# (base64, a URL) counts as one word for every 50 characters.
_UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\s{_UNSPACED}]{{1,50}}")
_SENTENCE_BORDER = re.compile(r"(?<=[.!?])[\"')\]]*\s+|(?<=[。！？])")
_DOCTEST = re.compile(r"^[ \t]*>>>.*(?:\n[ \t]*\S.*)*", re.MULTILINE)
_RULE = re.compile(r"^[ \t]*([=\-*~^#_+])\1{2,}[ \t]*$", re.MULTILINE)
_ROLE = re.compile(r":[a-z][a-z:+.-]*:`~?([^`<]+?)(?:\s*<[^`>]*>)?`")
_LITERAL = re.compile(r"(?<![`\w])(`{1,2})([^`\n]+)\1_{0,2}(?![`\w])")
_CITATION = re.compile(r"[ \t]*\[(?:\d+|#\w*|\*)\]_(?!\w)")
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,2})(\w[^*\n]{0,60}?)\1(?![\w*])")
_JOINERS = "\u200c\u200d"  # format characters that carry meaning in several scripts
_CODE_SYMBOLS = frozenset("{}[]()<>=|\\/$#@;`~^&+")


@dataclass(frozen=True, kw_only=True)
class Document:
    """A source text: `name` is its locator in the corpus, unique and stable."""

    name: str
    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Passage:
    """A part of a document; `source` is `<document name>#<part>`, parts counted from 1."""

    id: str
    title: str
    text: str
    source: str


def clean(text: str) -> str:
    r"""Return `text` as paragraphs of one line each, separated by blank lines.

    Normalises to NFC, takes out control and invisible characters, doctest sessions, heading rules
    and reST mark-up around words, and joins the lines of a paragraph.
    """
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    text = "".join(
        character
        for character in text
        if character in "\n\t"
        or character in _JOINERS
        or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Cn")
    )
    text = _RULE.sub("", _DOCTEST.sub("", text))
    text = _EMPHASIS.sub(r"\2", _LITERAL.sub(r"\2", _ROLE.sub(r"\1", text)))
    text = _CITATION.sub("", text)
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", text))
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph)


def num_words(text: str) -> int:
    """Count words; a character of an unspaced script (Chinese, Japanese) is a word."""
    return sum(1 for _ in _WORD.finditer(text))


def cut(text: str, *, max_words: int = 160, min_words: int = 20) -> list[str]:
    """Cut cleaned text into pieces of at most `max_words` words.

    Cuts at paragraph borders; inside an over-long paragraph at sentence borders; inside an
    over-long sentence at words. A last piece below `min_words` takes paragraphs from the piece
    before it where that leaves both of a fair size.

    Args:
        text: Output of `clean`: paragraphs separated by blank lines.
        max_words: Upper limit of a piece, in the words of `num_words`.
        min_words: Size below which a last piece is evened out.

    Returns:
        Pieces in the text's order, paragraphs separated by a line break; `[]` for empty text.

    Raises:
        ValueError: When not `0 < 2 * min_words <= max_words`.
    """
    if not 0 < 2 * min_words <= max_words:
        raise ValueError(
            f"min_words={min_words}, max_words={max_words}: give a min_words of at least 1 and at "
            "most half of max_words"
        )
    units: list[str] = []
    for paragraph in text.split("\n\n"):
        if num_words(paragraph) <= max_words:
            units.append(paragraph)
            continue
        sentences = [
            part
            for sentence in _SENTENCE_BORDER.split(paragraph)
            for part in _word_slices(sentence, max_words)
        ]
        units.extend(" ".join(group) for group in _pack(sentences, max_words))
    groups = _pack([unit for unit in units if unit.strip()], max_words)
    if len(groups) > 1:
        _even_out(groups[-2], groups[-1], max_words, min_words)
    return ["\n".join(group) for group in groups]


def passage_id(title: str, text: str) -> str:
    """Return 16 hexadecimal characters that depend on nothing but title and text."""
    content = unicodedata.normalize("NFC", f"{title}\x1f{text}")
    return blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def passages_of(document: Document, *, max_words: int = 160, min_words: int = 20) -> list[Passage]:
    """Clean and cut a document. Unfit passages are included: see `reject_reason`."""
    title = " ".join(clean(document.title).split())
    return [
        Passage(
            id=passage_id(title, text), title=title, text=text, source=f"{document.name}#{part}"
        )
        for part, text in enumerate(
            cut(clean(document.text), max_words=max_words, min_words=min_words), start=1
        )
    ]


def reject_reason(text: str) -> str | None:
    """Say why a text is unfit to be a passage, or None when it is fit."""
    characters = [character for character in text if not character.isspace()]
    if not characters:
        return "empty"
    if num_words(text) < MIN_WORDS:
        return "too short"
    if sum(character.isalpha() for character in characters) < 0.6 * len(characters):
        return "too few letters"
    if sum(character in _CODE_SYMBOLS for character in characters) > 0.12 * len(characters):
        return "mostly code"
    return None


def near_duplicates(texts: Sequence[str], threshold: float = 0.8) -> set[int]:
    """Find the rows that repeat an earlier, kept row.

    Candidates come from MinHash-LSH over word trigrams and are confirmed by the exact Jaccard
    similarity, so nothing below the threshold is dropped.

    Args:
        texts: Passage texts; the first of a group of duplicates is the one kept.
        threshold: Jaccard similarity of the trigram sets from which two texts are duplicates.

    Returns:
        Numbers of the rows to drop.

    Raises:
        ValueError: When `threshold` is not above 0 and at most 1.
    """
    from datasketch import MinHash, MinHashLSH

    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: give a number above 0 and at most 1")
    # The index is asked for a little less than the threshold, because it errs to both sides.
    index = MinHashLSH(threshold=0.9 * threshold, num_perm=128)
    sketches = MinHash.generator(
        (
            [trigram.encode("utf-8", "surrogatepass") for trigram in _trigrams(text)]
            for text in texts
        ),
        num_perm=128,
        seed=1,
        scheme="affine32",
    )
    drop: set[int] = set()
    for row, sketch in enumerate(sketches):
        trigrams = _trigrams(texts[row])
        if any(
            _jaccard(trigrams, _trigrams(texts[kept])) >= threshold for kept in index.query(sketch)
        ):
            drop.add(row)
        else:
            index.insert(row, sketch)
    return drop


def _word_slices(sentence: str, max_words: int) -> Iterator[str]:
    starts = [match.start() for match in _WORD.finditer(sentence)][::max_words]
    for start, end in zip(starts, [*starts[1:], len(sentence)], strict=True):
        yield sentence[start:end].strip()


def _pack(units: Iterable[str], max_words: int) -> list[list[str]]:
    groups: list[list[str]] = []
    room = 0
    for unit in units:
        size = num_words(unit)
        if size > room or not groups:
            groups.append([])
            room = max_words
        groups[-1].append(unit)
        room -= size
    return groups


def _even_out(previous: list[str], last: list[str], max_words: int, min_words: int) -> None:
    while num_words(" ".join(last)) < min_words and len(previous) > 1:
        rest, moved = previous[:-1], previous[-1]
        if num_words(" ".join(rest)) < min_words or num_words(" ".join([moved, *last])) > max_words:
            return
        last.insert(0, previous.pop())


def _trigrams(text: str) -> set[str]:
    words = _WORD.findall(text.casefold())
    return {" ".join(words[start : start + 3]) for start in range(max(1, len(words) - 2))}


def _jaccard(left: set[str], right: set[str]) -> float:
    return len(left & right) / len(left | right)
