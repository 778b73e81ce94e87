import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import BertConfig, BertModel

from actors.encoder import Encoder
from actors.encoder_templates import PromptTemplates
from cluster.artifacts import Artifact, shard_path
from cluster.steps import StepContext
from cluster.storage import open_storage, write_table
from pipelines.records import EXAMPLE

BATCH_SIZE, NUM_BATCHES = 16, 12


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A two-layer BERT with random weights and MiniLM's tokenizer: a batch takes milliseconds."""
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    encoder = Encoder(
        BertModel(config),
        Encoder.load("embedded:all-MiniLM-L6-v2", device="cpu").tokenizer,
        pooling="mean",
        max_tokens=64,
        templates=PromptTemplates(),
    )
    folder = tmp_path_factory.mktemp("student")
    encoder.save(folder, model_card="")
    return str(folder)


@pytest.fixture(scope="session")
def examples(data_folder: Path, student: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Title -> text pairs of Cranfield, two epochs of 96; half with a negative that was scored.

    Sixteen more are held out.
    """
    folder = tmp_path_factory.mktemp("examples")
    lines = (data_folder / "retrieval/cranfield/corpus.jsonl").read_text().splitlines()
    documents = [row for row in map(json.loads, lines) if row["title"] and row["text"]][:120]
    encoder, rng = Encoder.load(student, device="cpu"), np.random.default_rng(0)
    queries = encoder.tokenize([document["title"] for document in documents], max_tokens=32)
    passages = encoder.tokenize([document["text"] for document in documents], max_tokens=32)

    def row(batch: int, number: int) -> dict[str, object]:
        return {
            "batch": batch,
            "dataset": "titles" if batch % 3 else "more-titles",
            "query_tokens": queries[number],
            "positive_tokens": passages[number],
            "negative_tokens": [passages[number + 8]] if number % 2 else [],
            "teacher_scores": [2.0, 0.4] if number % 2 else [],
            "query_id": f"q{number}",
            "positive_id": f"p{number}",
            "symmetric": False,
        }

    rows = [
        row(epoch * 6 + place // BATCH_SIZE, int(number))
        for epoch in range(2)
        for place, number in enumerate(rng.permutation(96))
    ]
    for shard in range(4):
        table = pa.Table.from_pylist(rows[shard * 48 : (shard + 1) * 48], schema=EXAMPLE)
        write_table(open_storage(folder), shard_path(shard), table)
    held_out = pa.Table.from_pylist([row(0, number) for number in range(96, 112)], schema=EXAMPLE)
    write_table(open_storage(folder / "validation"), shard_path(0), held_out)
    return str(folder)


class Quiet:
    """Progress that nobody sees."""

    def update(self, done: float, total: float | None = None, note: str = "") -> None: ...


@pytest.fixture(scope="session")
def context() -> Callable[..., StepContext]:
    """Makes the context of a step of a folder and its inputs by name."""

    def make(folder: Path, **inputs: Artifact) -> StepContext:
        storage = open_storage(folder)
        return StepContext(storage=storage, inputs=inputs, progress=Quiet())

    return make
