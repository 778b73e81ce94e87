"""Training beside sentence-transformers' trainer: same model, pairs, batches, loss and precision.

    python benchmarks/train.py PAIRS [--pairs 1024] [--batch 64] [--repeats 3] [--layers 0 2 5]

PAIRS is a JSONL file of `query` and `positive`. Both train one epoch over the same batches in the
same order, in-batch negatives only and without dropout, so that both minimise the same function:
`MultipleNegativesRankingLoss` in `MatryoshkaLoss` at two sizes, and then, with batches of
--cached-batch, `CachedMultipleNegativesRankingLoss`. The rival's mini-batch in the cached loss is
the faster of 16 and 32. Both are timed from a model's folder and a list of pairs to the folder of
the trained model, without imports. Each repeat is a process of its own, whose peak memory
counts. Prints one JSON line.
"""

import argparse
import itertools
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from cluster.plain_json import dump_json

MODEL = "embedded:all-MiniLM-L6-v2"
DIMENSIONS = (384, 128)
TEMPERATURE = 0.05
LEARNING_RATE = 5e-5
MAX_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class Task:
    """What both are given."""

    folder: Path
    pairs: list[dict[str, str]]
    batch_size: int
    mini_batch: int | None  # of the cached loss; None: the plain one
    bfloat16: bool


def tokay(connection: Connection, task: Task) -> None:
    """Tokenises, writes the examples, and trains in this process."""
    import pyarrow as pa
    from transformers import AutoModel, AutoTokenizer  # noqa: F401  imported lazily, untimed

    from actors.encoder import Encoder
    from cluster.file_list import shard_path
    from cluster.storage import open_storage, write_table
    from pipelines.records import EXAMPLE
    from pipelines.training.config import LossConfig, TrainingConfig
    from pipelines.training.metrics import read_metrics
    from pipelines.training.place import Place
    from pipelines.training.trainer import Job
    from pipelines.training.worker import run_training

    config = TrainingConfig(
        epochs=1,
        batch_size=task.batch_size,
        loss=LossConfig(
            temperature=TEMPERATURE,
            same_tower_negatives="none",
            matryoshka_dimensions=DIMENSIONS[1:],
        ),
        learning_rate=LEARNING_RATE,
        warmup_ratio=0,
        max_query_tokens=MAX_TOKENS,
        max_passage_tokens=MAX_TOKENS,
        dropout=False,
        precision="bfloat16" if task.bfloat16 else "float32",
        gradient_cache_tokens=2048 if task.mini_batch else None,
        checkpoint_every_batches=10**9,
        tracking=(),
    )
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        encoder = Encoder.load(str(task.folder), max_tokens=MAX_TOKENS, device="cpu")
        tokens = [
            encoder.tokenize([pair[name] for pair in task.pairs]) for name in ("query", "positive")
        ]
        rows = [
            {
                "batch": number // task.batch_size,
                "dataset": "pairs",
                "query_tokens": query,
                "positive_tokens": positive,
                "negative_tokens": [],
                "teacher_scores": [],
                "query_id": "",
                "positive_id": "",
                "symmetric": False,
            }
            for number, (query, positive) in enumerate(zip(*tokens, strict=True))
        ]
        del encoder
        write_table(open_storage(folder), shard_path(0), pa.Table.from_pylist(rows, schema=EXAMPLE))
        job = Job(
            config=config,
            examples=folder,
            student=str(task.folder),
            output=str(Path(folder) / "output"),
            num_batches=rows[-1]["batch"] + 1,
        )
        run_training(job, Place(device="cpu"))
        seconds = time.perf_counter() - begin
        losses = [row["loss"] for row in read_metrics(open_storage(job.output))]
    connection.send((seconds, _peak_bytes(), losses))


def sentence_transformers(connection: Connection, task: Task) -> None:
    """Trains with `SentenceTransformerTrainer`."""
    import torch
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
        losses,
    )
    from torch.utils.data import BatchSampler, SequentialSampler

    begin = time.perf_counter()
    model = SentenceTransformer(str(task.folder), device="cpu")
    model.max_seq_length = MAX_TOKENS
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    # Newer attention takes its dropout from the configuration.
    for layer in model[0].auto_model.encoder.layer:
        layer.attention.self.dropout_prob = 0.0
    settings = {"scale": 1 / TEMPERATURE}
    inner: Any
    if task.mini_batch:
        inner = losses.CachedMultipleNegativesRankingLoss(
            model, mini_batch_size=task.mini_batch, **settings
        )
    else:
        inner = losses.MultipleNegativesRankingLoss(model, **settings)
    seen: list[float] = []

    class Recorded(losses.MatryoshkaLoss):  # type: ignore[misc]
        def forward(self, features: Any, labels: Any) -> Any:
            loss = super().forward(features, labels)
            seen.append(float(loss.detach()) / len(DIMENSIONS))
            return loss

    with tempfile.TemporaryDirectory() as folder:
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                output_dir=folder,
                num_train_epochs=1,
                per_device_train_batch_size=task.batch_size,
                learning_rate=LEARNING_RATE,
                weight_decay=0.01,
                warmup_steps=0,
                optim="adamw_torch_fused",
                bf16=task.bfloat16,
                use_cpu=True,
                save_strategy="no",
                logging_strategy="no",
                report_to="none",
                disable_tqdm=True,
                batch_sampler=lambda dataset, batch_size, drop_last, **_: BatchSampler(
                    SequentialSampler(dataset), batch_size, drop_last
                ),
            ),
            train_dataset=Dataset.from_dict(
                {
                    "anchor": [pair["query"] for pair in task.pairs],
                    "positive": [pair["positive"] for pair in task.pairs],
                }
            ),
            loss=Recorded(model, inner, matryoshka_dims=list(DIMENSIONS)),
        )
        trainer.train()
        model.save(str(Path(folder) / "trained"))
        seconds = time.perf_counter() - begin
    connection.send((seconds, _peak_bytes(), seen))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(worker: Any, task: Task) -> tuple[float, int, list[float]]:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe(duplex=False)
    process = spawn.Process(target=worker, args=(theirs, task))
    process.start()
    theirs.close()
    result = ours.recv()
    process.join()
    return result


def quarters(losses: list[float]) -> list[float]:
    """Returns the mean of each quarter, or each loss where there are fewer than four."""
    parts = np.array_split(losses, min(4, len(losses)))
    return [round(float(np.mean(part)), 3) for part in parts]


def compare(task: Task, repeats: int) -> dict[str, Any]:
    """Runs both in turns and returns pairs/s, memory and how far apart the loss curves are."""
    workers = (tokay, sentence_transformers)
    results: dict[str, list[tuple[float, int, list[float]]]] = {w.__name__: [] for w in workers}
    for _, worker in itertools.product(range(repeats), workers):
        results[worker.__name__].append(measure(worker, task))
    report: dict[str, Any] = {"batch": task.batch_size}
    for name, rows in results.items():
        report[name] = {
            "pairs_per_s": [round(len(task.pairs) / row[0], 1) for row in rows],
            "peak_mib": round(statistics.median(row[1] for row in rows) / 2**20),
            "losses": quarters(rows[0][2]),
        }
    ours, theirs = ([row[0] for row in rows] for rows in results.values())
    curves = [np.array(rows[0][2]) for rows in results.values()]
    report["ratio"] = round(statistics.median(theirs) / statistics.median(ours), 2)
    report["largest_loss_difference"] = round(float(np.abs(curves[0] - curves[1]).max()), 4)
    return report


def main() -> None:
    """Measures the plain and the cached batch."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs_file", type=Path)
    parser.add_argument("--pairs", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--cached-batch", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 5])
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16")
    arguments = parser.parse_args()
    from actors.encoder import Encoder
    from pipelines.training.layers import cut_layers

    lines = arguments.pairs_file.read_text(encoding="utf-8").splitlines()[: arguments.pairs]
    pairs = [json.loads(line) for line in lines]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "student"
        encoder = Encoder.load(MODEL, max_tokens=MAX_TOKENS, device="cpu")
        cut_layers(encoder, arguments.layers).save(folder, model_card="")

        def task(batch: int, mini_batch: int | None) -> Task:
            return Task(
                folder=folder,
                pairs=pairs,
                batch_size=batch,
                mini_batch=mini_batch,
                bfloat16=arguments.precision == "bfloat16",
            )

        plain = compare(task(arguments.batch, None), arguments.repeats)
        tried = {
            size: measure(sentence_transformers, task(arguments.cached_batch, size))[0]
            for size in (16, 32)
        }
        mini_batch = min(tried, key=lambda size: tried[size])
        cached = compare(task(arguments.cached_batch, mini_batch), arguments.repeats)
    print(
        dump_json(
            {
                "benchmark": "train",
                "pairs": len(pairs),
                "layers": arguments.layers,
                "precision": arguments.precision,
                "plain": plain,
                "cached": cached | {"rival_mini_batch": mini_batch},
            }
        )
    )


if __name__ == "__main__":
    main()
