"""Flat search on a GPU: the rows, scores and order of the CPU's. Needs NumPy and ``faiss-gpu``."""

import numpy as np
import pytest

from actors.passage_index import PassageIndex, choose_kind, fits_gpu

faiss = pytest.importorskip("faiss")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not hasattr(faiss, "StandardGpuResources") or faiss.get_num_gpus() == 0,
        reason="FAISS finds no GPU: it needs faiss-gpu and one",
    ),
]


def unit(rng: np.random.Generator, rows: int, dimensions: int) -> np.ndarray:
    vectors = rng.standard_normal((rows, dimensions), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def both(dimensions: int, parts: list[np.ndarray]) -> tuple[PassageIndex, PassageIndex]:
    indexes = PassageIndex(dimensions, gpu=True), PassageIndex(dimensions)
    for part in parts:
        for index in indexes:
            index.add(part)
    return indexes


def assert_same(on_gpu: PassageIndex, on_cpu: PassageIndex, queries: np.ndarray, k: int) -> None:
    found, expected = on_gpu.search(queries, k), on_cpu.search(queries, k)
    assert on_gpu.on_gpu
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


@pytest.mark.parametrize("dimensions", [32, 384, 1024])
@pytest.mark.parametrize("k", [1, 20, 100])
def test_gpu_search_equals_the_cpus(dimensions: int, k: int) -> None:
    rng = np.random.default_rng(dimensions)
    indexes = both(dimensions, [unit(rng, 20_000, dimensions)])
    assert_same(*indexes, unit(rng, 600, dimensions), k)


def test_ties_come_in_the_order_of_rows() -> None:
    rng = np.random.default_rng(1)
    one = unit(rng, 1, 384)
    passages = np.concatenate(
        [unit(rng, 5000, 384), np.repeat(one, 3000, axis=0), unit(rng, 50, 384)]
    )
    indexes = both(384, [passages])
    assert_same(*indexes, one, 20)
    assert indexes[0].search(one, 20)[1][0].tolist() == list(range(5000, 5020))


@pytest.mark.parametrize("k", [2040, 2041, 2048, 3000])
def test_more_neighbours_than_a_gpu_selects_come_too(k: int) -> None:
    rng = np.random.default_rng(2)
    assert_same(*both(64, [unit(rng, 10_000, 64)]), unit(rng, 40, 64), k)


def test_vectors_added_in_parts_and_after_a_search_are_found() -> None:
    rng = np.random.default_rng(3)
    parts, queries = [unit(rng, rows, 128) for rows in (1, 4000, 3, 9000)], unit(rng, 50, 128)
    indexes = both(128, parts[:2])
    assert_same(*indexes, queries, 10)
    for part in parts[2:]:
        for index in indexes:
            index.add(part)
    assert_same(*indexes, queries, 10)


def test_vectors_that_do_not_fit_are_searched_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fits_gpu(1000, 1024)
    assert not fits_gpu(10**9, 1024)  # 4 TB
    assert not fits_gpu(1000, 1024, share=0.001)
    assert choose_kind("auto", 10**9, 1024, 1000) == "pq"
    rng = np.random.default_rng(4)
    on_gpu, on_cpu = both(64, [unit(rng, 1000, 64)])
    monkeypatch.setattr("actors.passage_index._GPU_WORKSPACE_BYTES", 2**50)
    queries = unit(rng, 5, 64)
    np.testing.assert_array_equal(on_gpu.search(queries, 5)[1], on_cpu.search(queries, 5)[1])
    assert not on_gpu.on_gpu


def test_vectors_and_searches_take_no_more_than_was_reckoned() -> None:
    from actors.passage_index import _GPU_WORKSPACE_BYTES, _free_gpu_bytes

    rng = np.random.default_rng(5)
    part = unit(rng, 20_000, 1024)
    index = PassageIndex(1024, gpu=True)
    for _ in range(13):
        index.add(part)
    num_bytes = 4 * len(index) * 1025
    before = _free_gpu_bytes()
    index.search(part[:256], 1000)
    assert index.on_gpu
    assert num_bytes < before - _free_gpu_bytes() < num_bytes + _GPU_WORKSPACE_BYTES
