"""BM25 against plain NumPy; words, stems, ties and queries of which no word is known."""

from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest

from actors.lexical_index import LexicalIndex, StemmedLanguage

TEXTS = [
    "The bees dance, and the bee that dances longest has flown farthest.",
    "Bees!",
    "",
    "Dancing in Zürich: a dance a day",
    "no word of it",
]


def bm25(texts: Sequence[Sequence[str]], query: Sequence[str], k1: float, b: float) -> np.ndarray:
    lengths = np.array([len(text) for text in texts])
    scores = np.zeros(len(texts))
    for word in query:
        f = np.array([list(text).count(word) for text in texts])
        n = np.count_nonzero(f)
        idf = np.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
        scores += idf * f / (f + k1 * (1 - b + b * lengths / lengths.mean()))
    return scores


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.75), (1.2, 0.0)])
def test_scores_are_those_of_a_plain_bm25(k1: float, b: float) -> None:
    words = [chr(97 + number) for number in range(20)]
    rng = np.random.default_rng(0)
    texts = [list(rng.choice(words, size=rng.integers(0, 30))) for _ in range(50)]
    index = LexicalIndex([" ".join(text) for text in texts], k1=k1, b=b)
    for query in (["a"], ["b", "c", "z", "b"], words):
        expected = bm25(texts, [word for word in query if word != "z"], k1, b)
        scores = index.scores(" ".join(query))
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_words_are_without_case_and_punctuation_and_stemmed_if_asked() -> None:
    plain, stemmed = LexicalIndex(TEXTS), LexicalIndex(TEXTS, stemmer="english")
    assert np.flatnonzero(plain.scores("BEES?")).tolist() == [0, 1]
    assert np.flatnonzero(plain.scores("dancing")).tolist() == [3]
    assert np.flatnonzero(stemmed.scores("dancing")).tolist() == [0, 3]
    assert np.flatnonzero(plain.scores("zu\u0308rich")).tolist() == [3]


def test_words_of_scripts_without_spaces_are_found() -> None:
    index = LexicalIndex(["朝市では魚がよく売れる。", "雨が降る。", "ไปตลาด"])
    assert np.flatnonzero(index.scores("魚")).tolist() == [0]
    assert np.flatnonzero(index.scores("ตลาด")).tolist() == [2]


def test_best_come_first_ties_by_row_and_never_one_without_a_word_of_the_query() -> None:
    index = LexicalIndex(["b", "a c", "a", "c a", "a", "a"])
    hits = index.search(["a", "b x"], 3, np.array([[4, -1], [5, 0]]))
    # The texts of one word score the same, and higher than those of two.
    assert hits.rows.tolist() == [[4, -1, 2, 4, 5], [5, 0, 0, -1, -1]]
    of_all = [index.scores("a"), index.scores("b x")]
    assert hits.scores.dtype == np.float32
    assert hits.scores[0].tolist() == [of_all[0][4], 0, *of_all[0][[2, 4, 5]]]
    assert hits.scores[1].tolist() == [0, of_all[1][0], of_all[1][0], 0, 0]
    np.testing.assert_allclose(hits.mean, [each.mean() for each in of_all], rtol=1e-6)
    np.testing.assert_allclose(hits.std, [each.std() for each in of_all], rtol=1e-6)
    wide = index.search(["a"], 6, np.empty((1, 0), np.int64))
    assert wide.rows.tolist() == [[2, 4, 5, 1, 3, -1]]


@pytest.mark.parametrize("query", ["", " ?! ", "unknown words"])
@pytest.mark.parametrize("texts", [TEXTS, ["", "..."]])
def test_query_of_no_known_word_finds_nothing(query: str, texts: list[str]) -> None:
    index = LexicalIndex(texts)
    hits = index.search([query], 2, np.array([[0]]))
    assert not index.scores(query).any()
    assert hits.rows.tolist() == [[0, -1, -1]]
    assert (hits.scores.any(), hits.mean[0], hits.std[0]) == (False, 0, 0)


def test_languages_are_those_of_the_stemmer() -> None:
    import Stemmer

    assert {*get_args(StemmedLanguage)} == {*Stemmer.algorithms()} - {"porter", "dutch_porter"}
