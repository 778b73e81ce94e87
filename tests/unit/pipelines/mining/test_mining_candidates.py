"""The index actor over an artifact's shards, exact and not."""

import os

import faiss
import numpy as np
import pyarrow as pa
import pytest

from actors.index_actor import IndexActor
from cluster.artifacts import (
    Artifact,
    Manifest,
    list_files,
    open_artifact,
    write_artifact,
    write_shards,
)
from cluster.errors import UserError
from cluster.stages import StageResources
from cluster.storage import open_storage
from pipelines.mining.candidates import CandidatesConfig, EmbeddingShards, check_index
from pipelines.mining.embeddings import vector_column
from pipelines.recipe.read import load_recipe

NUM_ROWS, FIRST_ROW = 2000, 100


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((50, 32))
    rows = centres[rng.integers(0, 50, NUM_ROWS)] + 0.5 * rng.standard_normal((NUM_ROWS, 32))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def embeddings(vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    storage = open_storage(tmp_path_factory.mktemp("embeddings"))
    ids = [f"{row * 7919 % NUM_ROWS:016x}" for row in range(NUM_ROWS)]
    write_shards(storage, pa.table({"id": ids, "embedding": vector_column(vectors)}), 300)
    manifest = Manifest(step="embeddings", fingerprint="", config={}, inputs={})
    write_artifact(storage, manifest, list_files(storage))
    return open_artifact(storage.uri)


def shards_of(embeddings: Artifact, start: int = 0, end: int | None = None) -> EmbeddingShards:
    return EmbeddingShards(embeddings=embeddings, shards=embeddings.shards[start:end])


@pytest.mark.parametrize(
    ("kind", "chosen", "num_audited"),
    [("auto", "flat", 0), ("ivf", "ivf", 64)],
)
def test_index_actor_finds_rows_of_the_whole_and_audits_itself(
    kind: str, chosen: str, num_audited: int, vectors: np.ndarray, embeddings: Artifact
) -> None:
    actor = IndexActor(shards_of(embeddings), FIRST_ROW, kind, StageResources())
    for start in (0, 500):
        similarities, rows = actor.search(vectors[start : start + 40], 5)
        assert rows[:, 0].tolist() == list(range(FIRST_ROW + start, FIRST_ROW + start + 40))
        np.testing.assert_allclose(similarities[:, 0], 1, atol=2e-3)
    audit = actor.audit()
    assert (audit["kind"], audit["num_audited"]) == (chosen, num_audited)
    assert 0.9 < audit["recall"] <= 1
    assert audit["peak_bytes"] > 10_000_000


def test_index_actor_returns_the_vectors_that_it_holds(
    vectors: np.ndarray, embeddings: Artifact
) -> None:
    actor = IndexActor(shards_of(embeddings, 2, 4), 600, "auto", StageResources())
    held, elsewhere = f"{700 * 7919 % NUM_ROWS:016x}", f"{5 * 7919 % NUM_ROWS:016x}"
    found = actor.vectors([elsewhere, held, "ffffffffffffffff", "0"])
    assert list(found) == [held]
    np.testing.assert_array_equal(found[held], vectors[700])


@pytest.mark.parametrize(("num_cpus", "expected"), [(0.0, None), (1.0, None), (3.0, 3)])
def test_index_actor_takes_its_cpus_or_all_cores(
    num_cpus: float, expected: int | None, embeddings: Artifact
) -> None:
    faiss.omp_set_num_threads(1)  # as Ray leaves it, with one CPU or less
    try:
        IndexActor(shards_of(embeddings), 0, "auto", StageResources(num_cpus=num_cpus))
        assert faiss.omp_get_max_threads() == (expected or len(os.sched_getaffinity(0)))
    finally:
        faiss.omp_set_num_threads(len(os.sched_getaffinity(0)))


def test_index_actor_with_a_gpu_goes_by_what_fits_its_share(
    embeddings: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fits(num_vectors: int, dimensions: int, share: float) -> bool:
        asked.append((num_vectors, dimensions, share))
        return len(asked) > 1

    monkeypatch.setattr("actors.index_actor.fits_gpu", fits)
    monkeypatch.setattr("actors.passage_index._MAX_FLAT_BYTES", 1000)
    resources = StageResources(num_gpus=0.6)
    shards = shards_of(embeddings)
    assert IndexActor(shards, 0, "auto", resources).kind == "ivf"
    assert IndexActor(shards, 0, "auto", resources).kind == "flat"
    assert asked == [(NUM_ROWS, 32, 0.6)] * 2
    IndexActor(shards, 0, "auto", StageResources())
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("index", "resources", "told"),
    [
        ("ivf", {"num_gpus": 1}, "on a GPU accepted are auto and flat: set num_gpus to 0"),
        ("pq", {"num_gpus": 0.6, "num_actors": 2}, "candidates.index: 'pq'"),
        ("auto", {"num_gpus": 0.5, "num_actors": 2}, "0.5 for each of 2 actors"),
    ],
)
def test_index_that_its_gpus_cannot_hold_is_refused(
    index: str, resources: dict[str, float], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        check_index(CandidatesConfig(index=index), StageResources(**resources))


@pytest.mark.parametrize(
    ("index", "resources"),
    [
        ("ivf", {"num_actors": 4}),
        ("auto", {"num_gpus": 0.6, "num_actors": 4}),
        ("flat", {"num_gpus": 0.1}),
    ],
)
def test_index_that_fits_its_gpus_is_accepted(index: str, resources: dict[str, float]) -> None:
    check_index(CandidatesConfig(index=index), StageResources(**resources))


def test_recipe_of_an_index_that_its_gpus_cannot_hold_is_refused() -> None:
    settings = ["candidates.index=ivf", "resources.index.num_gpus=1", "corpus.path=nowhere"]
    with pytest.raises(UserError, match=r"candidates\.index: 'ivf' with .* set num_gpus to 0"):
        load_recipe("gpu", settings)
