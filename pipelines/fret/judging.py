"""How well the teacher judges: how often each judge and each fusion ranks the seed first.

The seed is the passage that a query was written from, so it is known to answer it. Only queries
whose seed the retriever has among the candidates that are scored are counted: of the others the
retriever's order says nothing, since the seed was put into their lists. Every ranking is compared
with the retriever's own order on the same queries.

The measure flatters the LLM: it wrote the query from that very passage. A teacher that does not
pass cannot be trusted; one that passes may still teach nothing new.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cluster.artifacts import Json
from pipelines.fret.fusion import JUDGES, fuse

SIGNIFICANT = 0.05
_NAMES = {"ql": "QL", "rc": "RC"}
_EQUAL = 1e-9  # sums of the same parts in another order differ by rounding


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """An order of the candidates: who judges, and what of each judge is added up.

    Of one judge alone both scales give the same order; `z-scores` keeps its ties.
    """

    fusion: str
    scale: str = "z-scores"

    @property
    def title(self) -> str:
        """How it is called in a table and a sentence."""
        judges = self.fusion.split("+")
        if judges == ["sim"]:
            return "the retriever"
        names = [_NAMES.get(judge, judge) for judge in judges]
        if len(names) == 1:
            return names[0]
        if self.scale == "ranks":
            return f"{' + '.join(names)} by ranks"
        return " + ".join(f"z({name})" for name in names)


RETRIEVER = Ranking(fusion="sim")
GECKO = Ranking(fusion="ql+rc", scale="ranks")
RANKINGS = (
    RETRIEVER,
    Ranking(fusion="ql"),
    Ranking(fusion="rc"),
    *(
        Ranking(fusion=fusion, scale=scale)
        for fusion in ("ql+rc", "ql+sim", "ql+rc+sim")
        for scale in ("ranks", "z-scores")
    ),
)
PREFERENCE = (
    Ranking(fusion="ql+sim", scale="z-scores"),
    Ranking(fusion="ql+sim", scale="ranks"),
    GECKO,
    Ranking(fusion="ql+rc", scale="z-scores"),
    Ranking(fusion="ql+rc+sim", scale="z-scores"),
    Ranking(fusion="ql+rc+sim", scale="ranks"),
)
"""What `choose` may choose, the first of equals.

Two judges come before three. QL with the retriever comes first: the two read differently, so that
they seldom err together, and every LLM that was measured is sound in QL, while RC needs some half a
billion parameters. Scores come before ranks, since they also say by how much; the paper's fusion is
by ranks. One judge alone is in the table and never chosen. The measure flatters QL most: SmolLM2's
can rank the seed first far more often than any fusion does, and on people's queries it was no
better than its fusion with the retriever.
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One ranking in the table.

    Attributes:
        ranking: Its title.
        fusion: Its judges, joined by +.
        scale: What of each is added up.
        seed_first: Share of the queries whose seed it ranks first.
        better: Queries of which it ranks the seed first rather than the retriever does.
        worse: The other way round.
        p: Of the two-sided exact sign test of those two, which is McNemar's where there are no
            ties; 1 for the retriever itself.
    """

    ranking: str
    fusion: str
    scale: str
    seed_first: float
    better: int
    worse: int
    p: float


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the teacher is worth its labels.

    Attributes:
        verdict: GO, MAYBE or SKIP.
        reason: A sentence with its figures, which begins with the verdict.
        chosen: The ranking that labels should come from; None: no one, with SKIP.
    """

    verdict: str
    reason: str
    chosen: Ranking | None


class Judging:
    """Counts, query by query, where each of `RANKINGS` puts the seed."""

    def __init__(self) -> None:
        self.num_queries = 0
        self._judges = set(JUDGES)
        self._firsts = np.zeros(len(RANKINGS))
        self._better = np.zeros((len(RANKINGS), len(RANKINGS)), dtype=np.int64)

    def add(self, scores: Mapping[str, Sequence[float]], seed_place: int) -> None:
        """Counts a query.

        Args:
            scores: Of the judges that were asked, the same for each query, one a candidate, in the
                retriever's order.
            seed_place: Where the seed stands among the candidates.
        """
        firsts = np.zeros(len(RANKINGS))
        self._judges = set(scores)
        for place, each in enumerate(RANKINGS):
            if self._is_judged(each):
                firsts[place] = seed_first(fuse(scores, each.fusion, each.scale), seed_place)
        self.num_queries += 1
        self._firsts += firsts
        self._better += firsts[:, None] > firsts[None, :] + _EQUAL

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Counts a row of FRet, if it was scored and the retriever has its seed among the scored.

        Its first candidates are those that were scored; see `records.FRET`.
        """
        num_scored = len(row["query_likelihoods"] or row["relevances"])
        if 0 < (row["seed_rank"] or 0) <= num_scored:
            scores = {
                judge: row[column][:num_scored]
                for judge, column in JUDGES.items()
                if row.get(column)
            }
            self.add(scores, row["candidate_ids"].index(row["seed_id"]))

    def share(self, ranking: Ranking) -> float:
        """Returns the share of the queries whose seed it ranks first; 0 without queries."""
        return float(self._firsts[RANKINGS.index(ranking)] / max(1, self.num_queries))

    def p(self, ranking: Ranking, other: Ranking = RETRIEVER) -> float:
        """Returns the two-sided p of the exact sign test between two rankings."""
        return sign_test(*self._compared(ranking, other))

    def table(self) -> list[Row]:
        """Returns a row of each ranking whose judges were asked, the retriever's first."""
        rows = []
        for ranking in filter(self._is_judged, RANKINGS):
            better, worse = self._compared(ranking, RETRIEVER)
            rows.append(
                Row(
                    ranking=ranking.title,
                    fusion=ranking.fusion,
                    scale=ranking.scale,
                    seed_first=round(self.share(ranking), 4),
                    better=better,
                    worse=worse,
                    p=float(f"{sign_test(better, worse):.3g}"),
                )
            )
        return rows

    def choose(self) -> Ranking | None:
        """Returns the ranking that labels should come from; None if no one beats the retriever.

        A few hundred queries cannot tell near equals apart, and the best of several looks better
        than it is. So of those that beat the retriever significantly, or else of those that beat
        it at all, the first in `PREFERENCE` is taken that is not significantly worse than the best.
        """
        retriever = self.share(RETRIEVER) + _EQUAL
        better = [each for each in PREFERENCE if self.share(each) > retriever]
        fit = [each for each in better if self.p(each) < SIGNIFICANT] or better
        if not fit:
            return None
        best = max(fit, key=self.share)
        return next(each for each in fit if self.p(each, best) >= SIGNIFICANT)

    def verdict(self) -> Verdict:
        """Says whether the teacher is worth its labels, and why."""
        retriever, chosen = f"{self.share(RETRIEVER):.0%}".replace("%", " %"), self.choose()
        if self.num_queries == 0:
            reason = "SKIP: the retriever has no seed among its nearest candidates, so that there"
            return Verdict(
                verdict="SKIP", reason=f"{reason} is nothing to judge the teacher by", chosen=None
            )
        if chosen is None:
            judged = filter(self._is_judged, (*PREFERENCE, *RANKINGS[1:]))
            best = max(judged, key=lambda each: (each in PREFERENCE, self.share(each)))
            return Verdict(
                verdict="SKIP",
                reason="SKIP: no fusion ranks the seed first more often than the retriever, which"
                f" does for {retriever} of {self.num_queries:,} queries; the best, {best.title},"
                f" does for {self._percent(best)}",
                chosen=None,
            )
        p, verdict, chance = self.p(chosen), "GO", ""
        if p >= SIGNIFICANT:
            verdict, chance = "MAYBE", ", which may be chance"
        return Verdict(
            verdict=verdict,
            reason=f"{verdict}: {chosen.title} ranks the seed first for {self._percent(chosen)} of"
            f" {self.num_queries:,} queries, the retriever for {retriever}{chance} ({_shown(p)})",
            chosen=chosen,
        )

    def metrics(self) -> dict[str, Json]:
        """Returns the table and the verdict for a manifest; `fusion` is None with SKIP."""
        verdict = self.verdict()
        chosen = verdict.chosen
        return {
            "num_judged": self.num_queries,
            "judges": [asdict(row) for row in self.table()],
            "verdict": verdict.verdict,
            "reason": verdict.reason,
            "fusion": chosen.fusion if chosen else None,
            "scale": chosen.scale if chosen else None,
        }

    def _is_judged(self, ranking: Ranking) -> bool:
        return self._judges.issuperset(ranking.fusion.split("+"))

    def _compared(self, ranking: Ranking, other: Ranking) -> tuple[int, int]:
        left, right = RANKINGS.index(ranking), RANKINGS.index(other)
        return int(self._better[left, right]), int(self._better[right, left])

    def _percent(self, ranking: Ranking) -> str:
        return f"{self.share(ranking):.0%}".replace("%", " %")


def seed_first(fused: np.ndarray, seed_place: int) -> float:
    """Returns the chance that the seed comes first where equals are drawn.

    >>> seed_first(np.array([1.5, 1.5, 0.7]), 1), seed_first(np.array([1.5, 1.5, 0.7]), 2)
    (0.5, 0.0)
    """
    first = fused >= fused.max() - _EQUAL
    return 1 / int(first.sum()) if first[seed_place] else 0.0


def sign_test(better: int, worse: int) -> float:
    """Returns the two-sided p of so many wins and losses, were both equally likely.

    >>> sign_test(5, 0), sign_test(0, 0)
    (0.0625, 1.0)
    """
    from scipy.stats import binomtest  # type: ignore[import-untyped]

    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def _shown(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"
