import numpy as np
import pytest

from actors.passage_index import (
    ApproximateIndex,
    PassageIndex,
    choose_kind,
    exact_top_k,
    merge_top_k,
)


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


def clustered(rng: np.random.Generator, rows: int) -> np.ndarray:
    centres = unit(rng, 20, 32)
    vectors = centres[rng.integers(0, 20, rows)] + 0.3 * unit(rng, rows, 32)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "recall", "accuracy"), [("ivf", 0.9, 2e-3), ("hnsw", 0.9, 2e-3), ("pq", 0.4, 0.2)]
)
def test_approximate_index_finds_most_and_keeps_the_vectors(kind, recall, accuracy):
    rng = np.random.default_rng(5)
    passages = clustered(rng, 4000)
    queries = passages[:200]
    index = ApproximateIndex(32, kind, len(passages))
    index.train(passages[: index.num_training_vectors])
    for start in range(0, len(passages), 1000):
        index.add(passages[start : start + 1000])
    assert len(index) == len(passages)
    scores, rows = index.search(queries, 10)
    exact_scores, exact = exact_top_k(queries, np.split(passages, 4), 10)
    found = np.mean([len(np.intersect1d(*pair)) / 10 for pair in zip(rows, exact, strict=True)])
    assert found > recall
    np.testing.assert_allclose(scores[:, 0], exact_scores[:, 0], atol=accuracy)
    np.testing.assert_allclose(
        index.vectors(np.array([7, 3999])), passages[[7, 3999]], atol=accuracy
    )


def test_exact_top_k_over_parts_equals_one_index():
    rng = np.random.default_rng(6)
    passages, queries = unit(rng, 300), unit(rng, 20)
    found = exact_top_k(queries, (passages[:100], passages[100:150], passages[150:]), 7)
    expected = index_of(passages).search(queries, 7)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "num_vectors", "expected"),
    [
        ("auto", 100_000, "flat"),
        ("auto", 100_001, "ivf"),
        ("auto", 30_000_000, "pq"),
        ("hnsw", 5, "hnsw"),
    ],
)
def test_kind_of_index_goes_by_size(kind, num_vectors, expected):
    assert choose_kind(kind, num_vectors) == expected


def test_unknown_kind_of_index_is_named():
    with pytest.raises(ValueError, match="'tree': accepted are ivf, hnsw, pq"):
        ApproximateIndex(16, "tree", 10)
