import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import BertConfig, BertModel

from actors.encoder import Encoder
from actors.encoder_templates import PromptTemplates
from cluster.artifacts import Artifact
from cluster.file_list import shard_path
from cluster.steps import StepContext
from cluster.storage import open_storage, write_table
from pipelines.records import EXAMPLE
from pipelines.training.examples import count_batches
from pipelines.training.metrics import read_metrics
from pipelines.training.place import Place
from pipelines.training.trainer import Job
from pipelines.training.worker import run_training

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


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def run(student: str, request: pytest.FixtureRequest) -> Callable[..., list[dict[str, Any]]]:
    """Trains the student in this process by the module's CONFIG, maybe broken off at a checkpoint.

    Returns the rows of its metrics.
    """

    def train(
        examples: str, output: Path, *, kill_after: int | None = None, **settings: Any
    ) -> list[dict[str, Any]]:
        job = Job(
            config=request.module.CONFIG.model_copy(update=settings),
            examples=examples,
            student=student,
            output=str(output),
            num_batches=count_batches(examples),
        )

        def report(row: dict[str, Any]) -> None:
            if kill_after is not None and row["batch"] + 1 >= kill_after:
                raise Killed

        if kill_after is None:
            run_training(job, Place(device="cpu"), report=report)
        else:
            with pytest.raises(Killed):
                run_training(job, Place(device="cpu"), report=report)
        return read_metrics(open_storage(output))

    return train


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
