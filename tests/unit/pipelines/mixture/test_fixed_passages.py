"""The mixture of lists that hold stored vectors, and of the passages beside them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from actors.encoder import Encoder
from cluster import key_filter
from cluster.artifacts import Artifact, Manifest, write_artifact, write_shards
from cluster.errors import ArtifactError, UserError
from cluster.file_list import FileList
from cluster.shard_groups import shard_groups
from cluster.steps import StepContext
from cluster.storage import open_storage, read_table
from pipelines.datasets.decontamination import Decontamination
from pipelines.mining.embeddings import vector_column
from pipelines.mixture import fixed_lists, mixture, stored_rows
from pipelines.recipe.read import load_recipe
from pipelines.records import EMBEDDED_PASSAGE, EMBEDDING, FIXED_EXAMPLE, FRET, PASSAGE

NUM_PASSAGES, NUM_QUERIES, DIMENSIONS = 20, 12, 32
LONG = " ".join(["word"] * 60)
RECIPE = [
    "mixture.fixed_passages={anchor_share: 0.5}",
    "fret={negative: all, fusion: sim}",
    "training={batch_size: 4, epochs: 2, max_query_tokens: 8, max_passage_tokens: 8}",
    "training.loss={contrastive_weight: 0, distillation_weight: 1}",
    "student={layers: null, max_tokens: 48}",
]


class Silent:
    def update(self, done: float, total: float | None = None, note: str = "") -> None: ...


def artifact(folder: Path, table: pa.Table | None, **metrics: Any) -> Artifact:
    storage = open_storage(folder)
    files = write_shards(storage, table, 8) if table is not None and table.num_rows else []
    manifest = Manifest(step=folder.name, fingerprint="", config={}, inputs={}, metrics=metrics)
    return write_artifact(storage, manifest, FileList.of(files))


def passages(dimensions: int = DIMENSIONS) -> pa.Table:
    draw = np.random.default_rng(0)
    vectors = draw.normal(size=(NUM_PASSAGES, dimensions)).astype(np.float32)
    rows = [
        {"id": f"p{n}", "title": f"title {n}", "text": f"text {n} {LONG}", "source": f"d{n}#1"}
        for n in range(NUM_PASSAGES)
    ]
    table = pa.Table.from_pylist(rows, schema=pa.schema(list(EMBEDDED_PASSAGE)[:-1]))
    return table.append_column("embedding", vector_column(vectors)).cast(EMBEDDED_PASSAGE)


def fret() -> pa.Table:
    draw, rows = np.random.default_rng(1), []
    for number in range(NUM_QUERIES):
        size = 2 + number % 5
        ids = [f"p{n}" for n in draw.permutation(NUM_PASSAGES)[:size]]
        rows.append(
            dict.fromkeys(FRET.names)
            | {
                "id": f"q{number}",
                "task": "search",
                "query": f"question {number}",
                "dropped_by": "too short" if number == 11 else None,
                "candidate_ids": ids,
                "fused": draw.normal(size=size),
                "positive_id": ids[1],
                "negative_ids": [ids[0], *ids[2:]],
            }
        )
    return pa.Table.from_pylist(rows, schema=FRET)


Mix = Callable[..., tuple[dict[str, Any], pa.Table]]


@pytest.fixture
def mix(tmp_path: Path, tiny_model: Any) -> Mix:
    """Runs the step with a tiny retriever, which is the student too; settings as `--set` has."""
    model = str(tiny_model("bert", tmp_path / "model"))
    encoder = Encoder.load(model, max_tokens=48, passage_template="{title} {text}", device="cpu")
    assert encoder.dimensions == DIMENSIONS
    encoder.save(tmp_path / "student/model", model_card="")

    def run(*settings: str, dimensions: int = DIMENSIONS) -> tuple[dict[str, Any], pa.Table]:
        own = [f"retriever={{model: {model}, max_tokens: 32}}", f"student.model={model}"]
        step = mixture.step(load_recipe("laptop", [*RECIPE, *own, *settings]), Decontamination([]))
        assert set(step.inputs) == {"student", "fret", "embeddings", "passages"}
        embedded = passages(dimensions)
        inputs = {
            "student": artifact(tmp_path / "student", None, dimensions=DIMENSIONS),
            "fret": artifact(tmp_path / "fret", fret()),
            "embeddings": artifact(tmp_path / "embeddings", embedded.select(EMBEDDING.names)),
            "passages": artifact(tmp_path / "passages", embedded.select(PASSAGE.names)),
        }
        storage = open_storage(tmp_path / "mixture")
        storage.delete("")
        metrics = step.work(StepContext(storage=storage, inputs=inputs, progress=Silent()))
        tables = [read_table(storage, path) for path in storage.list("shards")]
        return metrics, pa.concat_tables(tables)

    return run


def test_query_brings_the_vectors_of_its_list_in_the_order_of_its_scores(
    mix: Mix, tmp_path: Path
) -> None:
    metrics, table = mix()
    assert table.schema == FIXED_EXAMPLE
    assert (metrics["num_examples"], metrics["sets"]) == (11, {"fret": 11})
    assert metrics["num_batches"] == 6 == max(table["batch"].to_pylist()) + 1  # 2 x 11 / 4
    encoder = Encoder.load(str(tmp_path / "student/model"), device="cpu")
    stored = {row["id"]: np.array(row["embedding"], np.float32) for row in passages().to_pylist()}
    by_id = {row["id"]: row for row in fret().to_pylist()}
    queries = [row for row in table.to_pylist() if row["query_id"]]
    assert len(queries) == 24 and len({row["query_id"] for row in queries}) == 11
    for row in queries:
        source = by_id[row["query_id"]]
        assert source["dropped_by"] is None and row["dataset"] == "fret"
        ids = [source["positive_id"], *source["negative_ids"]]
        fused = dict(zip(source["candidate_ids"], source["fused"], strict=True))
        assert row["teacher_scores"] == pytest.approx([fused[id_] for id_ in ids])
        vectors = np.frombuffer(row["vectors"], np.float16).reshape(len(ids), DIMENSIONS)
        np.testing.assert_allclose(vectors, [stored[id_] for id_ in ids], rtol=1e-3)
        (tokens,) = encoder.tokenize([source["query"]], max_tokens=8)
        assert row["tokens"] == tokens


def test_passages_stand_beside_the_queries_of_each_batch_and_are_read_in_full(
    mix: Mix, tmp_path: Path
) -> None:
    metrics, table = mix("training.epochs=4")
    encoder = Encoder.load(str(tmp_path / "student/model"), device="cpu")
    stored = {
        f"{row['title']} {row['text']}": np.array(row["embedding"], np.float16)
        for row in passages().to_pylist()
    }
    seen = []
    for number in range(11):
        batch = table.filter(pc.equal(table["batch"], number)).to_pylist()
        assert [row["dataset"] for row in batch] == ["fret"] * 4 + ["passages"] * 2
        for row in batch[4:]:
            seen.append(row["text"])
            assert row["query_id"] is None and row["teacher_scores"] == []
            assert row["vectors"] == stored[row["text"]].tobytes()
            # All that the retriever has read, which is less than the student could.
            (tokens,) = encoder.tokenize([row["text"]], max_tokens=32)
            assert row["tokens"] == tokens and len(tokens) == 32
    assert len(set(seen[:20])) == 20  # all once before any comes again
    assert metrics["num_anchored"] == 20
    few, table = mix("mixture.fixed_passages.max_passages=3")
    assert few["num_anchored"] == 3
    none, table = mix("mixture.fixed_passages.anchor_share=0")
    assert none["num_anchored"] == 0 and set(table["dataset"].to_pylist()) == {"fret"}


def test_lists_held_out_lie_apart_without_passages(mix: Mix, tmp_path: Path) -> None:
    metrics, table = mix("mixture.validation_examples=2")
    held_out = read_table(open_storage(tmp_path / "mixture"), "validation/shards/000000000.parquet")
    assert metrics["num_validation_examples"] == held_out.num_rows == 2
    assert held_out.schema == FIXED_EXAMPLE and None not in held_out["query_id"].to_pylist()
    assert not {*table["query_id"].to_pylist()} & {*held_out["query_id"].to_pylist()}


def test_rows_do_not_depend_on_the_tasks(
    mix: Mix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("mixture.validation_examples=2", "training.epochs=3")

    def files() -> list[tuple[str, list[dict[str, Any]]]]:
        storage = open_storage(tmp_path / "mixture")
        paths = [*storage.list("shards"), *storage.list("validation")]
        return [(path, read_table(storage, path).to_pylist()) for path in paths]

    whole = mix(*settings)[0], files()
    monkeypatch.setattr(shard_groups, "__defaults__", (1,))
    monkeypatch.setattr(stored_rows, "_SOURCE_BYTES", 1)
    monkeypatch.setattr(fixed_lists, "_VECTORS_PER_SHARD", 5)
    assert (mix(*settings)[0], files()) == whole
    monkeypatch.setattr(key_filter, "_FEWEST_BITS", 3)  # with 8 bits, all vectors travel
    monkeypatch.setattr(key_filter, "_MOST_BITS", 3)
    assert (mix(*settings)[0], files()) == whole


def test_passage_without_a_vector_is_an_error(mix: Mix, monkeypatch: pytest.MonkeyPatch) -> None:
    lists_of = fixed_lists.lists_of

    def with_another(*given: Any) -> pa.Table:
        rows = lists_of(*given).to_pylist()
        rows[0]["ids"][-1] = "nowhere"
        return pa.Table.from_pylist(rows, schema=fixed_lists._LIST)

    monkeypatch.setattr(fixed_lists, "lists_of", with_another)
    with pytest.raises(ArtifactError, match="passage nowhere of the lists is not among"):
        mix()


def test_student_of_other_dimensions_is_refused(mix: Mix) -> None:
    with pytest.raises(UserError, match="vectors have 16 dimensions and the student's 32"):
        mix(dimensions=16)


def test_no_list_at_all_is_a_mistake_that_says_what_to_do(mix: Mix) -> None:
    with pytest.raises(UserError, match="no training example is left"):
        mix("mixture.fret_only_tasks=[none]")
