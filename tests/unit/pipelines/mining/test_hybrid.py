"""Similarity and BM25 in one sum: z-scores by hand, the union, ties, the seed."""

import asyncio
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from actors.index_actor import IndexActor
from actors.lexical_index import LexicalHits, LexicalIndexActor
from cluster.errors import UserError
from cluster.stages import StageResources
from pipelines.mining import candidates
from pipelines.mining.candidates import CandidatesConfig, CandidateSearch
from pipelines.mining.hybrid import LexicalConfig, best_places, hybrid_scores, standardised
from pipelines.recipe.read import load_recipe


class Remote:
    """Answers as the handle of a Ray actor would."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> "Method":
        return Method(getattr(self._actor, name))


class Method:
    def __init__(self, call: Any) -> None:
        self._call = call

    async def remote(self, *arguments: Any) -> Any:
        return self._call(*arguments)


class Passages:
    """Passages as `IndexActor` reads them, in two parts."""

    name = "passages"

    def __init__(self, ids: list[str], vectors: np.ndarray, texts: list[str]) -> None:
        self._ids, self._vectors, self._texts = ids, vectors, texts

    def __len__(self) -> int:
        return len(self._ids)

    def ids(self) -> np.ndarray:
        return np.array(self._ids, dtype=np.bytes_)

    def parts(self) -> Iterator[Any]:
        yield from np.array_split(self._vectors, 2)


class Texts(Passages):
    """As BM25's actor reads them."""

    def parts(self) -> Iterator[Any]:
        half = len(self) // 2
        for part in (slice(0, half), slice(half, None)):
            yield self.ids()[part], self._texts[part]


def search(
    config: CandidatesConfig,
    texts: list[str],
    vectors: np.ndarray,
    queries: list[tuple[str, str, np.ndarray]],
    num_actors: int = 1,
    places: Sequence[int] | None = None,
) -> list[dict[str, Any]]:
    """Returns rows of queries, each given by its seed's place, its text and its vector.

    The passages lie in the order of `places`, shared among `num_actors`.
    """
    ids = [f"{97 * row % 101:04x}" * 8 for row in range(len(texts))]
    parts = np.array_split(np.arange(len(ids)) if places is None else np.array(places), num_actors)
    indexes = [
        Remote(
            IndexActor(
                Passages([ids[row] for row in part], vectors[part], []),
                "flat",
                StageResources(),
                len(queries),
            )
        )
        for part in parts
    ]
    lexical = None
    if bm25 := config.lexical:
        of_all = Texts(ids, vectors, texts)
        lexical = Remote(
            LexicalIndexActor(of_all, "", None, k1=bm25.k1, b=bm25.b, stemmer=bm25.stemmer)
        )
    rows = [{"seed_id": ids[int(seed)], "query": query} for seed, query, _ in queries]
    asked = np.stack([vector for _, _, vector in queries]).astype(np.float32)
    found = CandidateSearch(config, len(ids), indexes, lexical)
    asyncio.run(found.find(rows, asked))
    for row in rows:
        row["rows"] = [ids.index(id_) for id_ in row["candidate_ids"]]
    return rows


def on_circle(*degrees: float) -> np.ndarray:
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


# The query points at 0 degrees: passages 0, 1, 2 ... are ever farther from it.
VECTORS = on_circle(0, 10, 20, 30, 40, 50, 60, 70, 80, 90)
TEXTS = ["a"] * 9 + ["rare"]
TOWARDS = on_circle(0)[0]


def test_scores_are_standardised_by_the_moments_of_the_corpus() -> None:
    z = standardised(np.array([[1.0, 5.0], [2.0, 2.0]]), np.array([3.0, 1.0]), np.array([2.0, 0]))
    assert z.tolist() == [[-1, 1], [0, 0]]
    # Similarities to the sample are 1, 0 and -1: a mean of 0, a deviation of sqrt(2 / 3).
    sample = on_circle(0, 90, 180)
    hits = LexicalHits(
        rows=np.array([[0, 1]]),
        scores=np.array([[4, 1]], np.float32),
        mean=np.array([1.0]),
        std=np.array([1.5]),
    )
    scores = hybrid_scores(np.array([[0.5, 1.0]]), on_circle(0), sample, hits, 0.25)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, [[0.5 * 1.5**0.5 + 0.25 * 2, 1.5**0.5]], rtol=1e-6)


def test_best_places_name_each_passage_once_and_ties_by_id() -> None:
    ids, scores = np.array([b"d", b"", b"c", b"d", b"a", b"b"]), np.array([1.0, 9, 2, 1, 1, 1])
    assert best_places(ids, scores, 9).tolist() == [2, 4, 5, 0]
    assert best_places(ids, scores, 2).tolist() == [2, 4]


def test_union_is_ordered_by_the_sum_and_bm25s_own_finds_have_their_similarity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(candidates, "DEPTH", 1)  # so that the retriever does not name the last
    config = CandidatesConfig(num_candidates=3, lexical=LexicalConfig(weight=1))
    (row,) = search(config, TEXTS, VECTORS, [("1", "rare word", TOWARDS)])
    similarities = VECTORS @ TOWARDS
    lexical = np.array([0] * 9 + [row["lexical"][row["rows"].index(9)]])
    assert lexical[9] > 0
    sums = (similarities - similarities.mean()) / similarities.std()
    sums = sums + (lexical - lexical.mean()) / lexical.std()
    order = np.argsort(-sums)
    assert order[:3].tolist() != np.argsort(-similarities)[:3].tolist()
    assert row["rows"] == order[:3].tolist()
    assert row["seed_rank"] == 1 + row["rows"].index(1)
    np.testing.assert_allclose(row["similarities"], similarities[order[:3]], atol=1e-6)
    np.testing.assert_allclose(row["lexical"], lexical[order[:3]])
    np.testing.assert_allclose(row["hybrid"], sums[order[:3]], rtol=1e-5)


def test_seed_that_neither_finds_takes_the_last_place_with_its_own_scores() -> None:
    config = CandidatesConfig(num_candidates=2, max_seed_rank=2, lexical=LexicalConfig(weight=0.1))
    texts = ["a seed"] * 3 + ["a"] * 40
    vectors = on_circle(*range(0, 86, 2))
    far, near = search(config, texts, vectors, [("42", "seed", TOWARDS), ("1", "seed", TOWARDS)])
    assert (far["rows"], far["seed_rank"]) == ([0, 42], 0)
    assert far["dropped_by"] == "round trip failed"
    assert far["lexical"][1] == 0 < far["lexical"][0]
    assert far["similarities"][1] == pytest.approx(np.cos(np.radians(84)), abs=1e-6)
    assert far["hybrid"][1] < far["hybrid"][0]
    assert (near["rows"], near["seed_rank"], near["dropped_by"]) == ([0, 1], 2, None)


def test_seed_is_ranked_only_among_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "DEPTH", 1)
    # The seed is third by either, and would be the first by the sum.
    texts = ["a", "a", "x x", "a", "a", "a", "a", "a", "x x x", "x x x"]
    config = CandidatesConfig(num_candidates=2, lexical=LexicalConfig(weight=1))
    (row,) = search(config, texts, VECTORS, [("2", "x", TOWARDS)])
    assert (row["rows"], row["seed_rank"]) == ([0, 2], 0)
    assert row["hybrid"][1] > row["hybrid"][0]


@pytest.mark.parametrize("query", ["", "unknown words"])
def test_query_without_a_known_word_gets_the_retrievers_candidates(query: str) -> None:
    config = CandidatesConfig(num_candidates=4)
    with_bm25 = CandidatesConfig(num_candidates=4, lexical=LexicalConfig())
    (plain,) = search(config, TEXTS, VECTORS, [("0", query, TOWARDS)])
    (row,) = search(with_bm25, TEXTS, VECTORS, [("0", query, TOWARDS)])
    assert row["rows"] == plain["rows"] == [0, 1, 2, 3]
    assert row["similarities"] == plain["similarities"]
    assert row["lexical"] == [0] * 4
    assert "lexical" not in plain and "hybrid" not in plain


def test_candidates_do_not_depend_on_the_number_of_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "NUM_SAMPLED", 20)
    rng = np.random.default_rng(0)
    words = [f"w{number}" for number in range(30)]
    texts = [" ".join(rng.choice(words, 5)) for _ in range(60)]
    # Integers of few values: sums are exact, and many of them are the same.
    vectors = rng.integers(-1, 2, (60, 4)).astype(np.float32)
    queries = [(str(n), " ".join(rng.choice(words, 3)), vectors[n]) for n in range(12)]
    for lexical in (None, LexicalConfig()):
        config = CandidatesConfig(num_candidates=5, lexical=lexical)
        one = search(config, texts, vectors, queries)
        assert one == search(config, texts, vectors, queries, num_actors=3)
        # Nor on which shard a passage lies in: equal ones are ordered by id.
        elsewhere = rng.permutation(len(texts))
        assert one == search(config, texts, vectors, queries, 3, elsewhere)
        assert any(row["seed_rank"] for row in one)


@pytest.mark.parametrize("lexical", [None, LexicalConfig()])
def test_candidates_of_three_actors_are_those_of_one_to_the_last_bit(
    data_folder: Path, lexical: LexicalConfig | None
) -> None:
    folder = data_folder / "retrieval" / "cranfield"
    texts, queries = (
        [json.loads(line)["text"] for line in (folder / name).read_text("utf-8").splitlines()[:99]]
        for name in ("corpus.jsonl", "queries.jsonl")
    )
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((len(texts) + len(queries), 384)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[10:40] = vectors[9]  # more of them than there are candidates
    asked = [
        (str(number), query, vectors[9] if number == 5 else vectors[len(texts) + number])
        for number, query in enumerate(queries)
    ]
    config = CandidatesConfig(num_candidates=8, lexical=lexical)
    one = search(config, texts, vectors[: len(texts)], asked)
    assert one == search(config, texts, vectors[: len(texts)], asked, num_actors=3)
    if lexical is None:
        same = sorted(f"{97 * row % 101:04x}" * 8 for row in range(9, 40))
        assert one[5]["candidate_ids"][:7] == same[:7]  # the last is the seed
        exact = vectors[: len(texts)].astype(np.float64) @ vectors[len(texts)].astype(np.float64)
        best = np.sort(exact.astype(np.float32))[::-1]
        assert one[0]["similarities"][:7] == best[:7].tolist()


def test_lexical_scores_are_off_and_judges_without_them_refused() -> None:
    laptop = ["corpus.path=nowhere"]
    assert load_recipe("laptop", laptop).candidates.lexical is None
    for fusion in ("lex", "ql+hybrid"):
        given = [*laptop, f"fret.fusion={fusion}"]
        with pytest.raises(
            UserError, match=rf"fret\.fusion: {re.escape(fusion)} given, and candidates\.lexical"
        ):
            load_recipe("laptop", given)
        recipe = load_recipe("laptop", [*given, "candidates.lexical.weight=0.25"])
        assert recipe.candidates.lexical == LexicalConfig()
    with pytest.raises(ValidationError, match="stemmer"):
        LexicalConfig(stemmer="klingon")
