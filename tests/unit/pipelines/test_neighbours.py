"""The index actor over an artifact's shards, exact and not."""

import numpy as np
import pyarrow as pa
import pytest

from cluster.artifacts import MANIFEST, Artifact, Manifest, list_files, open_artifact, write_shards
from cluster.storage import open_storage
from pipelines.encoders import vector_column
from pipelines.fret.neighbours import IndexActor

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
    manifest = Manifest(
        step="embeddings", fingerprint="", config={}, inputs={}, files=list_files(storage)
    )
    storage.write_bytes(MANIFEST, manifest.to_json())
    return open_artifact(storage.uri)


@pytest.mark.parametrize(
    ("kind", "chosen", "num_audited"),
    [("auto", "flat", 0), ("ivf", "ivf", 64), ("hnsw", "hnsw", 64)],
)
def test_index_actor_finds_rows_of_the_whole_and_audits_itself(
    kind: str, chosen: str, num_audited: int, vectors: np.ndarray, embeddings: Artifact
) -> None:
    actor = IndexActor(embeddings, list(embeddings.shards), FIRST_ROW, kind, False)
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
    actor = IndexActor(embeddings, list(embeddings.shards[2:4]), 600, "auto", False)
    held, elsewhere = f"{700 * 7919 % NUM_ROWS:016x}", f"{5 * 7919 % NUM_ROWS:016x}"
    found = actor.vectors([elsewhere, held, "ffffffffffffffff", "0"])
    assert list(found) == [held]
    np.testing.assert_array_equal(found[held], vectors[700])
