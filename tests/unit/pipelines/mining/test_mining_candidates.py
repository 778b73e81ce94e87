"""The index actor over an artifact's shards, exact and not."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest

from actors.index_actor import IndexActor, read_saved_indexes
from actors.passage_index import ApproximateIndex, IndexKind
from cluster.artifacts import (
    Artifact,
    Manifest,
    list_files,
    open_artifact,
    write_artifact,
    write_shards,
)
from cluster.errors import UserError
from cluster.file_list import FileList
from cluster.files import FileEntry
from cluster.stages import StageResources
from cluster.storage import open_storage
from pipelines.mining.candidates import CandidatesConfig, EmbeddingShards, _note_saved, check_index
from pipelines.mining.embeddings import vector_column
from pipelines.recipe.read import load_recipe

NUM_ROWS = 2000
MANY = 10**9  # queries


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((50, 32))
    rows = centres[rng.integers(0, 50, NUM_ROWS)] + 0.5 * rng.standard_normal((NUM_ROWS, 32))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def embeddings(vectors: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    storage = open_storage(tmp_path_factory.mktemp("embeddings"))
    ids = [id_of(row).decode() for row in range(NUM_ROWS)]
    write_shards(storage, pa.table({"id": ids, "embedding": vector_column(vectors)}), 300)
    manifest = Manifest(step="embeddings", fingerprint="", config={}, inputs={})
    write_artifact(storage, manifest, list_files(storage))
    return open_artifact(storage.uri)


def id_of(row: int) -> bytes:
    return b"%016x" % (row * 7919 % NUM_ROWS)


def shards_of(embeddings: Artifact, start: int = 0, end: int | None = None) -> EmbeddingShards:
    return EmbeddingShards(embeddings=embeddings, shards=embeddings.shards[start:end])


@pytest.mark.parametrize(
    ("kind", "chosen", "num_audited"),
    [("auto", "flat", 0), ("ivf", "ivf", 64)],
)
def test_index_actor_finds_ids_and_audits_itself(
    kind: str, chosen: str, num_audited: int, vectors: np.ndarray, embeddings: Artifact
) -> None:
    actor = IndexActor(shards_of(embeddings), kind, StageResources(), MANY)
    for start in (0, 500):
        similarities, ids = actor.search(vectors[start : start + 40], 5)
        assert ids[:, 0].tolist() == [id_of(row) for row in range(start, start + 40)]
        np.testing.assert_allclose(similarities[:, 0], 1, atol=2e-3)
    audit = actor.audit()
    assert (audit["kind"], audit["num_audited"]) == (chosen, num_audited)
    assert 0.9 < audit["recall"] <= 1
    assert audit["peak_bytes"] > 10_000_000


def test_index_actor_returns_the_vectors_that_it_holds(
    vectors: np.ndarray, embeddings: Artifact
) -> None:
    actor = IndexActor(shards_of(embeddings, 2, 4), "auto", StageResources(), MANY)
    places, found = actor.vectors(np.array([id_of(5), id_of(700), b"f" * 16, b"0", b""]))
    assert places.tolist() == [1]
    np.testing.assert_array_equal(found, vectors[[700]])
    ids = np.array([[id_of(5), id_of(700)], [id_of(899), b""]])
    similarities = actor.similarities(vectors[[700, 3]], ids)
    assert similarities.dtype == np.float32
    exact = vectors[899].astype(np.float64) @ vectors[3].astype(np.float64)
    np.testing.assert_allclose(similarities, [[0, 1], [exact, 0]], atol=1e-6)
    first = sorted(id_of(row) for row in range(600, 1200))[:3]
    assert actor.first_ids(3).tolist() == first
    assert len(actor.first_ids(1000)) == 600


@pytest.mark.parametrize(("num_cpus", "expected"), [(0.0, None), (1.0, None), (3.0, 3)])
def test_index_actor_takes_its_cpus_or_all_cores(
    num_cpus: float, expected: int | None, embeddings: Artifact
) -> None:
    faiss.omp_set_num_threads(1)  # as Ray leaves it, with one CPU or less
    try:
        IndexActor(shards_of(embeddings), "auto", StageResources(num_cpus=num_cpus), MANY)
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
    assert IndexActor(shards, "auto", resources, MANY).kind == "ivf"
    assert IndexActor(shards, "auto", resources, MANY).kind == "flat"
    assert asked == [(NUM_ROWS, 32, 0.6)] * 2
    assert IndexActor(shards, "auto", StageResources(), 1).kind == "flat"  # it costs less
    assert len(asked) == 2


class Builds:
    """Counts the indexes that are built."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, build = 0, IndexActor.build
        monkeypatch.setattr("actors.index_actor.actor_begins", lambda *_: None)

        def counting(actor: IndexActor) -> ApproximateIndex:
            self.count += 1
            return build(actor)

        monkeypatch.setattr(IndexActor, "build", counting)


@pytest.mark.parametrize("place", ["tmp_path", "bucket"])
def test_index_is_built_once_and_loaded_from_then_on(
    place: str,
    vectors: np.ndarray,
    embeddings: Artifact,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    builds, step = Builds(monkeypatch), open_storage(f"{request.getfixturevalue(place)}/step")

    def start(*part: int, kind: IndexKind = "ivf") -> IndexActor:
        shards = shards_of(embeddings, *part)
        return IndexActor(shards, kind, StageResources(), MANY, step)

    first = start()
    saved = first.saved()
    assert saved is not None and step.size(saved.path) == saved.num_bytes
    assert start().saved() == saved and builds.count == 2  # as long as it is in no list
    _note_saved(step, saved)
    again = start()
    assert (builds.count, again.saved()) == (2, saved)
    for ours, theirs in zip(
        first.search(vectors[:30], 5), again.search(vectors[:30], 5), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert again.audit()["recall"] > 0.9
    for part in ((0, 3), (3, 7)):
        other = start(*part).saved()
        assert other is not None and other.path != saved.path
        _note_saved(step, other)
    assert (builds.count, len(read_saved_indexes(step))) == (4, 3)
    start(3, 7)
    assert builds.count == 4
    assert start(kind="flat").saved() is None


@pytest.mark.parametrize("harm", ["changed", "cut off", "missing", "listed otherwise"])
def test_saved_index_that_is_not_the_one_of_the_list_is_not_read(
    harm: str, embeddings: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds, step = Builds(monkeypatch), open_storage(tmp_path)

    def start() -> FileEntry:
        actor = IndexActor(shards_of(embeddings), "ivf", StageResources(), MANY, step)
        saved = actor.saved()
        assert saved is not None
        return saved

    saved = start()
    _note_saved(step, saved)
    content = step.read_bytes(saved.path)
    if harm == "changed":
        step.write_bytes(saved.path, content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "cut off":
        step.write_bytes(saved.path, content[:-1])
    elif harm == "missing":
        step.delete(saved.path)
    else:
        _note_saved(step, replace(saved, sha256="0" * 64))

    def read(*_: object) -> None:
        raise AssertionError("FAISS was given the file")

    monkeypatch.setattr(faiss, "read_index", read)
    assert start() == saved  # the same vectors give the same file
    assert builds.count == 2


def test_part_that_an_actor_gets_travels_without_the_others(embeddings: Artifact) -> None:
    own = FileList.of(embeddings.shards[2:4])
    part = EmbeddingShards(embeddings=embeddings, shards=own)
    assert (part.name, len(part)) == ("000000002-000000003", 600)
    again = pickle.loads(pickle.dumps(part))
    assert again.ids().tolist() == [id_of(row) for row in range(600, 1200)]


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
