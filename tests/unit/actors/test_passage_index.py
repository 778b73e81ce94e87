import subprocess
import sys

import faiss
import numpy as np
import pytest

from actors.passage_index import (
    ApproximateIndex,
    PassageIndex,
    choose_kind,
    exact_top_k,
    fits_gpu,
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
    np.testing.assert_array_equal(scores, expected_scores)  # float64 products, rounded
    np.testing.assert_array_equal(index.vectors(np.array([499, 3])), passages[[499, 3]])
    other = index_of(np.asfortranarray(passages, dtype=np.float64))
    again = other.search(np.asfortranarray(queries, dtype=np.float64), 20)
    np.testing.assert_array_equal(again[0], scores)
    np.testing.assert_array_equal(again[1], rows)


def test_few_queries_are_multiplied_and_not_scanned_for_on_few_threads():
    script = """
import faiss
from actors.passage_index import PassageIndex

faiss.omp_set_num_threads(3)
assert faiss.cvar.distance_compute_blas_threshold == 128_000, "FAISS has another rule now"
PassageIndex(4)
print(faiss.cvar.distance_compute_blas_threshold)
"""
    command = [sys.executable, "-c", script]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(printed) == 6_000


class LastOfTies:
    """An index of FAISS that gives of equal scores the last rows first, as it may; notes widths."""

    def __init__(self, index):
        self.index, self.asked = index, []

    def __getattr__(self, name):
        return getattr(self.index, name)

    def search(self, queries, k):
        self.asked.append((len(queries), k))
        vectors = self.index.reconstruct_n(0, self.index.ntotal)
        scores = queries @ vectors.T
        rows = np.stack([np.lexsort((-np.arange(len(each)), -each))[:k] for each in scores])
        return np.take_along_axis(scores, rows, axis=1), rows


NEAR, FAR = 0.9e-5, 1.1e-5  # of a score up to 1; of a higher one, in proportion


@pytest.mark.parametrize(
    ("values", "widths"),
    [
        ([1000, *[1.0] * 8, 1 - FAR], [10]),
        ([1000, *[1.0] * 8, 1 - NEAR], [10, 40]),
        ([1000, *[100.0] * 8, 100 - 100 * FAR], [10]),
        ([1000, *[100.0] * 8, 100 - 100 * NEAR], [10, 40]),
        ([1000, *[1.0] * 38, 1 - FAR], [10, 40]),
        ([1000, *[1.0] * 38, 1 - NEAR], [10, 40, 120]),
        ([1000, *[100.0] * 38, 100 - 100 * FAR], [10, 40]),
        ([1000, *[100.0] * 38, 100 - 100 * NEAR], [10, 40, 120]),
        ([1000, *[1.0] * 60], [10, 40, 120]),
        ([1000, *[1.0] * 119], [10, 40, 120]),
        ([1000, 1.0, 1 - NEAR, 0.5], [10]),
    ],
)
def test_search_looks_beyond_a_tie_at_the_border(values, widths):
    rest = np.linspace(0.4, 0.1, 120 - len(values))
    index = index_of(np.array([*values, *rest], np.float32)[:, None])
    index._host = stub = LastOfTies(index._host)
    scores, rows = index.search(np.ones((1, 1), np.float32), 2)
    assert rows.tolist() == [[0, 1]]
    assert scores.tolist() == [[1000, np.float32(values[1])]]
    assert stub.asked == [(1, width) for width in widths]


def test_each_query_with_a_tie_looks_wider_alone():
    values = np.array([[1, 0], [0.9, 0], [0, 1], *[[0, 0.5]] * 12, *[[0.1, 0.1]] * 9], np.float32)
    index = index_of(values)
    index._host = stub = LastOfTies(index._host)
    queries = np.array([[1, 0], [0, 1], [1, 0.1], [0, 1]], np.float32)
    rows = index.search(queries, 2)[1]
    assert rows.tolist() == [[0, 1], [2, 3], [0, 1], [2, 3]]
    assert stub.asked == [(4, 10), (1, 24), (1, 24)]


def test_search_orders_ties_by_row_across_the_border():
    rng = np.random.default_rng(1)
    one = unit(rng, 1)
    passages = np.concatenate([unit(rng, 30), np.repeat(one, 100, axis=0), unit(rng, 30)])
    scores, rows = index_of(passages).search(one, 7)
    assert rows[0].tolist() == list(range(30, 37))
    assert len(set(scores[0].tolist())) == 1


def test_equal_scores_come_in_the_order_that_is_given():
    rng = np.random.default_rng(9)
    passages, queries = unit(rng, 200), unit(rng, 3)
    passages[40:140] = queries[0]
    places = rng.permutation(200)
    index = PassageIndex(16, order=places)
    index.add(passages)
    scores, rows = index.search(queries, 7)
    same = np.arange(40, 140)
    assert rows[0].tolist() == same[np.argsort(places[same])][:7].tolist()
    np.testing.assert_array_equal(scores, index_of(passages).search(queries, 7)[0])


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


@pytest.mark.parametrize(("kind", "recall", "accuracy"), [("ivf", 0.9, 2e-3), ("pq", 0.4, 0.2)])
def test_approximate_index_finds_most_keeps_the_vectors_and_can_be_saved(
    kind, recall, accuracy, tmp_path
):
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
    with (tmp_path / "index").open("wb") as file:
        index.write(file)
    with (tmp_path / "index").open("rb") as file:
        again = ApproximateIndex.read(file, kind)
    assert (again.kind, len(again), again.dimensions) == (kind, 4000, 32)
    np.testing.assert_array_equal(again.search(queries, 10)[1], rows)
    held = index.vectors(np.array([7, 3999]))
    np.testing.assert_array_equal(again.vectors(np.array([7, 3999])), held)


@pytest.mark.parametrize("kind", ["ivf", "pq"])
@pytest.mark.parametrize("num_vectors", [1, 2, 3, 4, 255, 256])
def test_approximate_index_of_few_vectors_finds_them(kind, num_vectors):
    passages = unit(np.random.default_rng(7), num_vectors)
    chosen = choose_kind(kind, num_vectors, passages.shape[1], 1)
    index = ApproximateIndex(passages.shape[1], chosen, num_vectors)
    index.train(passages)
    index.add(passages)
    scores, rows = index.search(passages, 5)
    assert scores.shape == rows.shape == (num_vectors, min(5, num_vectors))
    # Most of the lists are searched, and all of so few.
    found = (rows == np.arange(num_vectors)[:, None]).any(axis=1)
    assert found.all() if num_vectors < 5 else found.mean() > 0.9


def test_exact_top_k_over_parts_equals_one_index():
    rng = np.random.default_rng(6)
    passages, queries = unit(rng, 300), unit(rng, 20)
    found = exact_top_k(queries, (passages[:100], passages[100:150], passages[150:]), 7)
    expected = index_of(passages).search(queries, 7)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "num_vectors", "dimensions", "num_queries", "expected"),
    [
        ("auto", 2**18, 256, 10**9, "flat"),
        ("auto", 2**18, 257, 10**9, "ivf"),
        # 1,024 lists: 1.2 * 1024 * (180 * 1024 + 2**18) = 548.6 M for the lists, and 14,080 * 4
        # products for each query in place of 262,144: equal at 2,665.4 queries.
        ("auto", 2**18, 257, 2665, "flat"),
        ("auto", 2**18, 257, 2666, "ivf"),
        ("auto", 2**22, 1024, 1, "flat"),
        ("auto", 2**22, 1025, 1, "ivf"),  # exact vectors would take more than 16 GiB
        ("auto", 2**23, 1024, 1, "ivf"),
        ("auto", 2**23, 1025, 1, "pq"),
        ("pq", 255, 16, 1, "ivf"),
        ("pq", 256, 16, 1, "pq"),
        ("ivf", 1, 16, 1, "ivf"),
    ],
)
def test_kind_of_index_goes_by_bytes_and_by_what_it_costs(
    kind, num_vectors, dimensions, num_queries, expected
):
    assert choose_kind(kind, num_vectors, dimensions, num_queries) == expected


def test_unknown_kind_of_index_is_named():
    with pytest.raises(ValueError, match="'tree': accepted are ivf, pq"):
        ApproximateIndex(16, "tree", 10)


class OtherOrder:
    """Stands in for a GPU: the same rows, the scores added up otherwise, the width noted."""

    def __init__(self, index):
        self.index, self.widths = faiss.clone_index(index), []

    def search(self, queries, k):
        self.widths.append(k)
        scores, rows = self.index.search(queries, k)
        return scores[:, ::-1] + np.float32(1e-6), rows[:, ::-1]


@pytest.fixture
def copies(monkeypatch):
    """FAISS for GPUs, as far as it is asked; the GPU has 3 GiB free."""
    copies = []

    def copy(_resources, device, index):
        assert device == 0
        copies.append(OtherOrder(index))
        return copies[-1]

    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_gpu", copy, raising=False)
    monkeypatch.setattr("actors.passage_index._free_gpu_bytes", lambda: 3 * 2**30)
    return copies


def test_gpu_gets_the_vectors_once_and_gives_the_same_as_the_cpu(copies):
    rng = np.random.default_rng(7)
    passages, queries = unit(rng, 3000), unit(rng, 300)
    passages[500:600] = queries[0]
    index = PassageIndex(16, gpu=True)
    for part in np.split(passages, 3):
        index.add(part)
    assert not copies
    for k in (10, 2048 - 8, 2048):
        found, expected = index.search(queries, k), index_of(passages).search(queries, k)
        np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_array_equal(found[0], expected[0])
    assert index.on_gpu
    assert len(copies) == 1
    assert set(copies[0].widths) == {18, 2048}  # a wider search is the CPU's
    index.add(passages[:5])
    assert not index.on_gpu
    assert len(index.search(queries, 1)[1]) == 300
    assert len(copies) == 2


def test_vectors_that_do_not_fit_the_gpu_are_searched_on_the_cpu(copies, monkeypatch):
    rng = np.random.default_rng(8)
    index = PassageIndex(16, gpu=True)
    index.add(unit(rng, 100))
    monkeypatch.setattr("actors.passage_index._free_gpu_bytes", lambda: 2 * 2**30)
    assert index.search(unit(rng, 2), 3)[1].shape == (2, 3)
    assert not index.on_gpu
    assert not copies


def test_fit_goes_by_bytes_share_and_workspace(copies, monkeypatch):
    gib = 2**30 // (4 * 1024)  # vectors of 1,023 dimensions, with their norms
    assert fits_gpu(gib, 1023)
    assert not fits_gpu(gib + 1, 1023)
    monkeypatch.setattr("actors.passage_index._free_gpu_bytes", lambda: 6 * 2**30)
    assert fits_gpu(gib, 1023, share=0.5)
    assert not fits_gpu(gib, 1023, share=0.49)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    assert not fits_gpu(1, 16)
