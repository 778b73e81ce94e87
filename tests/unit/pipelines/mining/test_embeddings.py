import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from actors.encoder import Encoder, Prepared
from cluster.artifacts import Artifact, Manifest, write_artifact, write_shards
from cluster.file_list import FileList
from cluster.stages import StageOutput, StageResources
from cluster.steps import StepContext
from cluster.storage import open_storage
from pipelines.encoders import EncoderConfig, load_encoder
from pipelines.mining import embeddings
from pipelines.mining.embeddings import (
    EmbedPassages,
    column_vectors,
    embed_passages,
    embedded_passages,
    vector_column,
)
from pipelines.records import EMBEDDED_PASSAGE, EMBEDDING, PASSAGE

CONFIG = EncoderConfig(model="embedded:all-MiniLM-L6-v2", passage_template="{title}: {text}")


class Silent:
    def update(self, done: float, total: float | None = None, note: str = "") -> None: ...


def shard(number: int) -> pa.Table:
    rows = [
        dict.fromkeys(PASSAGE.names)
        | {"id": f"{number}-{n}", "title": f"Title {n % 3}", "text": f"shard {number} " * (n + 1)}
        for n in range(6)
    ]
    rows[5] = rows[4] | {"id": f"{number}-5"}  # a text twice
    return pa.Table.from_pylist(rows, schema=PASSAGE)


def test_shards_are_tokenised_while_others_are_embedded_and_their_vectors_stay(
    monkeypatch: pytest.MonkeyPatch,
):
    shards = [shard(number) for number in range(3)]
    expected = [
        load_encoder(CONFIG, device="cpu").encode_passages(
            each["text"].to_pylist(), each["title"].to_pylist()
        )
        for each in shards
    ]
    embed = EmbedPassages(encoder=CONFIG, resources=StageResources()).load()
    prepare, encode = Encoder.prepare, Encoder.encode_prepared
    tokenised = [threading.Event() for _ in shards]
    overlapping: list[bool] = []

    def noted(encoder: Encoder, texts: list[str]) -> Prepared:
        found = prepare(encoder, texts)
        tokenised[[event.is_set() for event in tokenised].index(False)].set()
        return found

    def waiting(encoder: Encoder, texts: Prepared) -> np.ndarray:
        following = min(len(overlapping) + 1, len(shards) - 1)
        overlapping.append(tokenised[following].wait(timeout=30))
        return encode(encoder, texts)

    monkeypatch.setattr(Encoder, "prepare", noted)
    monkeypatch.setattr(Encoder, "encode_prepared", waiting)

    async def all_at_once() -> list[StageOutput]:
        return await asyncio.gather(*(embed(each) for each in shards))

    found = asyncio.run(all_at_once())
    assert overlapping == [True] * len(shards)
    for output, given, vectors in zip(found, shards, expected, strict=True):
        assert output.rows.schema == EMBEDDING
        assert output.rows["id"].to_pylist() == given["id"].to_pylist()
        np.testing.assert_array_equal(column_vectors(output.rows["embedding"]), vectors)


def artifact(folder: Path, tables: Sequence[pa.Table], rows_per_shard: int = 6) -> Artifact:
    storage = open_storage(folder)
    files = write_shards(storage, pa.concat_tables(tables), rows_per_shard)
    manifest = Manifest(step=folder.name, fingerprint="", config={}, inputs={})
    return write_artifact(storage, manifest, FileList.of(files))


def test_what_is_served_has_the_passages_columns_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[EmbedPassages] = []
    monkeypatch.setattr(embeddings, "run_stage", lambda stage, *_: ran.append(stage) or {})
    passages = artifact(tmp_path / "passages", [shard(0)])
    context = StepContext(
        storage=open_storage(tmp_path), inputs={"passages": passages}, progress=Silent()
    )
    embed_passages(CONFIG, StageResources(), context, EMBEDDED_PASSAGE)
    embed_passages(CONFIG, StageResources(), context)
    vectors = np.ones((6, 3), np.float32)
    outputs = [stage.output(shard(0).select(stage.columns), vectors) for stage in ran]
    assert [output.schema for output in outputs] == [EMBEDDED_PASSAGE, EMBEDDING]
    assert outputs[0].select(PASSAGE.names) == shard(0)


def test_passages_have_their_vectors_where_their_texts_are_wanted(tmp_path: Path) -> None:
    shards = [shard(0), shard(1)]
    ids = pa.concat_tables(shards)["id"]
    vectors = np.arange(24, dtype=np.float32).reshape(12, 2)
    embedded = pa.table([ids, vector_column(vectors)], schema=EMBEDDING)

    def context(rows_per_shard: int) -> StepContext:
        inputs = {
            "passages": artifact(tmp_path / "passages", shards),
            "embeddings": artifact(tmp_path / "embeddings", [embedded], rows_per_shard),
        }
        return StepContext(storage=open_storage(tmp_path), inputs=inputs, progress=Silent())

    found = list(embedded_passages(context(6)))
    assert [table.num_rows for table in found] == [6, 6]
    for table, passages in zip(found, shards, strict=True):
        for name in ("id", "title", "text"):
            assert table[name].to_pylist() == passages[name].to_pylist()
    both = np.concatenate([column_vectors(table["embedding"]) for table in found])
    np.testing.assert_array_equal(both, vectors)
    with pytest.raises(ValueError):
        list(embedded_passages(context(4)))
