"""Relevance judgements as BEIR and TREC write them: the one reader of them.

| form | columns |
|---|---|
| BEIR | query, passage, score |
| TREC | query, iteration (``0``, as a rule), passage, score |

Columns are apart by tabs, or by blanks where a line has no tab. What stands behind the score is
ignored. The first line is a header if its score is no number at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from cluster.errors import Reject
from cluster.json_lines import text_lines

# trec_eval keeps a counter for every score up to the highest, which for 2^31 takes 16 GB.
MAX_SCORE = 1_000_000
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_SCORE_NAMES = ("score", "rel", "relevance", "label", "judgement", "judgment")


class Judgement(NamedTuple):
    """How relevant a passage is to a query, and the line that says so."""

    score: int
    where: str


@dataclass(frozen=True, kw_only=True)
class Qrels:
    """The judgements of a file.

    Attributes:
        judgements: (query id, passage id) -> its judgement; below zero is 0.
        rejects: Lines that are none; of two that differ on one passage, both.
        num_below_zero: Judgements that were below zero.
        num_repeated: Lines that say what another one says.
    """

    judgements: dict[tuple[str, str], Judgement] = field(default_factory=dict)
    rejects: list[Reject] = field(default_factory=list)
    num_below_zero: int = 0
    num_repeated: int = 0


def number(text: str) -> float | None:
    """Returns a number as people write it, None for anything else: ``1,0``, ``nan``, ``1_0``."""
    text = text.strip()  # of more than `float` takes for blanks, such as \x1f
    return float(text) if _NUMBER.fullmatch(text) else None


def is_header(score: str) -> bool:
    """Says whether what stands in a first line's place of the score is no number at all."""
    word = score.strip().lower().lstrip("+-")
    return word not in ("", "nan", "inf", "infinity") and not any(map(str.isnumeric, word))


def read_qrels(lines: Iterable[bytes], place: str) -> Qrels:
    """Reads the judgements of a file's lines; `place` is its name."""
    rows, rejects = [], []
    for row in text_lines(lines, place):
        if len(row) == 3:
            rejects.append(row)
        else:
            rows.append((*row, _columns(row[1])))
    score_at = _score_column([columns for *_, columns in rows])
    judgements: dict[tuple[str, str], Judgement] = {}
    disputed: dict[tuple[str, str], None] = {}
    num_below_zero = num_repeated = 0
    for place_in_file, (where, line, columns) in enumerate(rows):
        if not place_in_file and len(columns) > score_at and is_header(columns[score_at]):
            continue
        query, passage, score = _judgement(columns, score_at)
        reason = _fault(query, passage, score)
        if reason or score is None:
            rejects.append((where, reason, line[:200]))
            continue
        pair = query, passage
        new = Judgement(max(0, int(max(score, -1))), where)
        known = judgements.get(pair)
        if known and known.score != new.score:
            scores = f"{query!r}, {passage!r}: {new.score} here, {known.score} in {known.where}"
            rejects.append((where, "judged twice with different scores", scores))
            disputed[pair] = None
        elif known:
            num_repeated += 1
        else:
            judgements[pair] = new
            num_below_zero += score < 0
    for pair in disputed:
        first = judgements.pop(pair)
        scores = f"{pair[0]!r}, {pair[1]!r}: {first.score} here, another score below"
        rejects.append((first.where, "judged twice with different scores", scores))
    return Qrels(
        judgements=judgements,
        rejects=rejects,
        num_below_zero=num_below_zero,
        num_repeated=num_repeated,
    )


def _columns(line: str) -> list[str]:
    columns = line.split("\t")
    return columns if len(columns) >= 3 else line.split()


def _score_column(rows: Sequence[Sequence[str]]) -> int:
    """Returns 3 for TREC's form, in which most lines of the file are then, and 2 for BEIR's."""
    if rows and len(rows[0]) > 2 and rows[0][2].strip().lower() in _SCORE_NAMES:
        return 2
    return 3 if sum(map(_is_trec, rows)) > len(rows) / 2 else 2


def _is_trec(columns: Sequence[str]) -> bool:
    if len(columns) < 4 or number(columns[3]) is None:
        return False
    return columns[1].strip().lower() in ("0", "q0") or number(columns[2]) is None


def _judgement(columns: Sequence[str], score_at: int) -> tuple[str, str, float | None]:
    if len(columns) <= score_at:
        return "", "", None
    return columns[0], columns[score_at - 1], number(columns[score_at])


def _fault(query: str, passage: str, score: float | None) -> str:
    if score is None or not query.strip() or not passage.strip():
        return "no query, passage and whole-number score"
    if score > MAX_SCORE:
        return f"score above {MAX_SCORE:,}"
    if score > 0 and not score.is_integer():
        return "score is not whole"
    return "an id holds the character NUL" if "\0" in query + passage else ""
