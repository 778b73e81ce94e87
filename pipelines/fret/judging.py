"""How well the teacher judges: how often each judge and each fusion ranks the seed first.

The seed is the passage that a query was written from, so it is known to answer it. Only queries
whose seed the retriever has among the candidates that are scored are counted: of the others the
retriever's order says nothing, since the seed was put into their lists. Every ranking is compared
with the order in which the candidates came, on the same queries: the retriever's similarity or,
with `candidates.lexical`, its sum with BM25. A teacher has to do better than that order, or it
teaches nothing that is not had without it.

The measure flatters the LLM: it wrote the query from that very passage. A teacher that does not
pass cannot be trusted; one that passes may still teach nothing new.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from cluster.artifacts import Json
from pipelines.fret.fusion import JUDGES, SCORED, asks_cross_encoder, asks_llm, fuse

SIGNIFICANT = 0.05
_NAMES = {"ql": "QL", "rc": "RC", "ce": "CE"}
_ORDERS = {"sim": "the retriever", "hybrid": "the retriever with BM25"}
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
        if self.fusion in _ORDERS:
            return _ORDERS[self.fusion]
        names = [_NAMES.get(judge, judge) for judge in self.fusion.split("+")]
        if len(names) == 1:
            return names[0]
        if self.scale == "ranks":
            return f"{' + '.join(names)} by ranks"
        # The hybrid score is standardised already; see `fuse`.
        return " + ".join(name if name == "hybrid" else f"z({name})" for name in names)

    def ordered_by(self, judge: str) -> Ranking:
        """Returns the same ranking where `judge` ordered the candidates in place of `sim`."""
        return replace(self, fusion=self.fusion.replace("sim", judge))


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
    """Counts, query by query, where each of the rankings puts the seed."""

    def __init__(
        self,
        ordered_by: str = "sim",
        rankings: Sequence[Ranking] | None = None,
        preference: Sequence[Ranking] | None = None,
    ) -> None:
        """Begins with no query.

        Args:
            ordered_by: The judge that ordered the candidates, `sim` or `hybrid`.
            rankings: What is counted, that order among it; `RANKINGS` with that order if None.
            preference: What of it may be chosen, the first of equals; `PREFERENCE` if None.
        """
        self.rankings = tuple(rankings or _ordered_by(ordered_by, RANKINGS))
        self.preference = tuple(preference or _ordered_by(ordered_by, PREFERENCE))
        self.retriever = RETRIEVER.ordered_by(ordered_by)
        self.num_queries = 0
        self._judges = set(JUDGES)
        self._firsts = np.zeros(len(self.rankings))
        self._better = np.zeros((len(self.rankings), len(self.rankings)), dtype=np.int64)

    def add(self, scores: Mapping[str, Sequence[float]], seed_place: int) -> None:
        """Counts a query.

        Args:
            scores: Of the judges that were asked, the same for each query, one a candidate, in
                their order.
            seed_place: Where the seed stands among the candidates.
        """
        firsts = np.zeros(len(self.rankings))
        self._judges = set(scores)
        for place, each in enumerate(self.rankings):
            if self._is_judged(each):
                firsts[place] = seed_first(fuse(scores, each.fusion, each.scale), seed_place)
        self.num_queries += 1
        self._firsts += firsts
        self._better += firsts[:, None] > firsts[None, :] + _EQUAL

    def add_all(self, other: Judging) -> None:
        """Adds the queries that another one with the same rankings has counted."""
        if other.num_queries:
            self.num_queries += other.num_queries
            self._judges = other._judges
            self._firsts += other._firsts
            self._better += other._better

    def add_row(self, row: Mapping[str, Any]) -> None:
        """Counts a row of FRet, if it was scored and the retriever has its seed among the scored.

        Its first candidates are those that were scored; see `records.FRET`.
        """
        num_scored = max(len(row.get(column) or []) for column in SCORED.values())
        if 0 < (row["seed_rank"] or 0) <= num_scored:
            scores = {
                judge: row[column][:num_scored]
                for judge, column in JUDGES.items()
                if row.get(column)
            }
            self.add(scores, row["candidate_ids"].index(row["seed_id"]))

    def share(self, ranking: Ranking) -> float:
        """Returns the share of the queries whose seed it ranks first; 0 without queries."""
        return float(self._firsts[self.rankings.index(ranking)] / max(1, self.num_queries))

    def p(self, ranking: Ranking, other: Ranking | None = None) -> float:
        """Returns the two-sided p of the exact sign test with another ranking, or the retriever."""
        return sign_test(*self._compared(ranking, other or self.retriever))

    def table(self) -> list[Row]:
        """Returns a row of each ranking whose judges were asked, the retriever's first."""
        rows = []
        for ranking in filter(self._is_judged, self.rankings):
            better, worse = self._compared(ranking, self.retriever)
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
        it at all, the first in `preference` is taken that is not significantly worse than the best.
        """
        retriever = self.share(self.retriever) + _EQUAL
        better = [each for each in self.preference if self.share(each) > retriever]
        fit = [each for each in better if self.p(each) < SIGNIFICANT] or better
        if not fit:
            return None
        best = max(fit, key=self.share)
        return next(each for each in fit if self.p(each, best) >= SIGNIFICANT)

    def verdict(self) -> Verdict:
        """Says whether the teacher is worth its labels, and why."""
        retriever, chosen = self._percent(self.retriever), self.choose()
        if self.num_queries == 0:
            reason = "SKIP: the retriever has no seed among its nearest candidates, so that there"
            return Verdict(
                verdict="SKIP", reason=f"{reason} is nothing to judge the teacher by", chosen=None
            )
        if chosen is None:
            judged = filter(self._is_judged, (*self.preference, *self.rankings[1:]))
            best = max(judged, key=lambda each: (each in self.preference, self.share(each)))
            return Verdict(
                verdict="SKIP",
                reason="SKIP: no fusion ranks the seed first more often than"
                f" {self.retriever.title}, which does for {retriever} of {self.num_queries:,}"
                f" queries; the best, {best.title}, does for {self._percent(best)}",
                chosen=None,
            )
        p, verdict, chance = self.p(chosen), "GO", ""
        if p >= SIGNIFICANT:
            verdict, chance = "MAYBE", ", which may be chance"
        return Verdict(
            verdict=verdict,
            reason=f"{verdict}: {chosen.title} ranks the seed first for {self._percent(chosen)} of"
            f" {self.num_queries:,} queries, {self.retriever.title} for {retriever}{chance}"
            f" ({_shown(p)})",
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
        left, right = self.rankings.index(ranking), self.rankings.index(other)
        return int(self._better[left, right]), int(self._better[right, left])

    def _percent(self, ranking: Ranking) -> str:
        return f"{self.share(ranking):.0%}".replace("%", " %")


def judging_of(fusion: str, scale: str, ordered_by: str = "sim") -> Judging:
    """Returns what counts for a fusion: with a cross-encoder in it, those of the LLM only if asked.

    `ordered_by` is the judge that ordered the candidates, `sim` or `hybrid`.

    A cross-encoder has written no query, so that the measure does not flatter it: it may be chosen
    alone.
    """
    if not asks_cross_encoder(fusion):
        return Judging(ordered_by)
    alone, llm = Ranking(fusion="ce"), asks_llm(fusion)
    own = Ranking(fusion=fusion, scale=scale) if fusion != alone.fusion else alone
    with_order = [Ranking(fusion="ce+sim", scale=each) for each in ("z-scores", "ranks")]
    rankings = _ordered_by(ordered_by, (*(RANKINGS if llm else (RETRIEVER,)), alone, *with_order))
    preference = _ordered_by(ordered_by, (*with_order, *(PREFERENCE if llm else ())))
    return Judging(
        ordered_by, tuple(dict.fromkeys((*rankings, own))), tuple(dict.fromkeys((own, *preference)))
    )


def _ordered_by(judge: str, rankings: Sequence[Ranking]) -> list[Ranking]:
    return [each.ordered_by(judge) for each in rankings]


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
