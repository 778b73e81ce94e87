import numpy as np
import pytest

from actors.passage_index import PassageIndex, merge_top_k


def unit(rng: np.random.Generator, rows: int, dimensions: int = 16) -> np.ndarray:
    vectors = rng.standard_normal((rows, dimensions)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def brute(queries: np.ndarray, passages: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    scores = (queries.astype(np.float64) @ passages.astype(np.float64).T).astype(np.float32)
    rows = np.stack([sorted(range(len(passages)), key=lambda r: (-s[r], r))[:k] for s in scores])
    return np.take_along_axis(scores, rows, axis=1), rows


def index_of(vectors: np.ndarray) -> PassageIndex:
    index = PassageIndex(vectors.shape[1])
    index.add(vectors)
    return index


def test_search_equals_brute_force():
    rng = np.random.default_rng(0)
    passages, queries = unit(rng, 500), unit(rng, 300)
    index = index_of(passages[:200])
    index.add(passages[200:])
    scores, rows = index.search(queries, 20)
    expected_scores, expected_rows = brute(queries, passages, 20)
    assert (scores.dtype, rows.dtype) == (np.float32, np.int64)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)


def test_search_orders_ties_by_row_across_the_border():
    rng = np.random.default_rng(1)
    one = unit(rng, 1)
    passages = np.concatenate([unit(rng, 30), np.repeat(one, 100, axis=0), unit(rng, 30)])
    scores, rows = index_of(passages).search(one, 7)
    assert rows[0].tolist() == list(range(30, 37))
    assert len(set(scores[0].tolist())) == 1


def test_search_does_not_depend_on_the_other_queries():
    rng = np.random.default_rng(2)
    index, queries = index_of(unit(rng, 400, 384)), unit(rng, 64, 384)
    together = index.search(queries, 10)
    alone = [index.search(query[None], 10) for query in queries]
    np.testing.assert_array_equal(together[0], np.concatenate([scores for scores, _ in alone]))
    np.testing.assert_array_equal(together[1], np.concatenate([rows for _, rows in alone]))


def test_search_of_a_small_index_returns_what_there_is():
    rng = np.random.default_rng(3)
    queries = unit(rng, 2)
    assert index_of(unit(rng, 3)).search(queries, 10)[1].shape == (2, 3)
    assert PassageIndex(16).search(queries, 10)[1].shape == (2, 0)
    assert index_of(unit(rng, 3)).search(queries[:0], 10)[1].shape == (0, 3)


def test_merged_shards_equal_one_index():
    rng = np.random.default_rng(4)
    passages, queries = unit(rng, 300), unit(rng, 20)
    passages[250:260] = passages[10:20]  # ties between shards
    results = []
    for start in (0, 100, 200):
        scores, rows = index_of(passages[start : start + 100]).search(queries, 15)
        results.append((scores, rows + start))
    scores, rows = merge_top_k(results[::-1], 15)
    expected_scores, expected_rows = index_of(passages).search(queries, 15)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(scores, expected_scores)


def test_wrong_arguments_are_refused():
    index = PassageIndex(16)
    with pytest.raises(ValueError, match=r"\[rows, 16\]"):
        index.add(np.zeros((2, 8), np.float32))
    with pytest.raises(ValueError, match="k 0"):
        index.search(np.zeros((1, 16), np.float32), 0)
    with pytest.raises(ValueError, match="no results"):
        merge_top_k([], 3)
