import asyncio
import threading

import numpy as np
import pyarrow as pa
import pytest

from actors.encoder import Encoder, Prepared
from cluster.stages import StageOutput, StageResources
from pipelines.encoders import EncoderConfig, load_encoder
from pipelines.mining.embeddings import EmbedPassages, column_vectors
from pipelines.records import PASSAGE

CONFIG = EncoderConfig(model="embedded:all-MiniLM-L6-v2", passage_template="{title}: {text}")


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
        assert output.rows["id"].to_pylist() == given["id"].to_pylist()
        np.testing.assert_array_equal(column_vectors(output.rows["embedding"]), vectors)
