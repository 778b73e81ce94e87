import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.artifacts import Artifact, FileEntry, Manifest, shard_path, write_shards
from cluster.steps import StepContext
from cluster.storage import open_storage, read_table
from pipelines.mixture.config import MixtureConfig
from pipelines.mixture.formats import Formatter
from pipelines.mixture.mixture import make_mixture
from pipelines.records import EXAMPLE, FRET


class Silent:
    def update(self, done: float, total: float | None = None, note: str = "") -> None: ...


def fret_row(number: int, **changes: Any) -> dict[str, Any]:
    row = dict.fromkeys(FRET.names) | {
        "id": f"q{number}",
        "task": "question answering",
        "query": f"question {number}",
        "candidate_ids": [f"p{number}", f"n{number}", f"m{number}", "unscored"],
        "fused": [1.5, 0.5, 0.75],
        "positive_id": f"p{number}",
        "positive_title": "",
        "positive": f"answer {number}",
        "negative_ids": [f"n{number}", f"m{number}"],
        "negative_titles": ["Title", ""],
        "negatives": [f"worst {number}", f"worse {number}"],
    }
    return row | changes


def artifact(folder: Path, table: pa.Table) -> Artifact:
    storage = open_storage(folder)
    write_shards(storage, table, 1 << 20)
    entry = FileEntry(path=shard_path(0), num_bytes=0, sha256="", num_rows=table.num_rows)
    manifest = Manifest(step=folder.name, fingerprint="", config={}, inputs={}, files=(entry,))
    return Artifact(storage, manifest)


def mixed(
    tmp_path: Path,
    formatter: Formatter,
    config: dict[str, Any],
    fret: list[dict[str, Any]],
    epochs: float = 1,
    batch_size: int = 4,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    context = StepContext(
        storage=open_storage(tmp_path / "mixture"),
        inputs={"fret": artifact(tmp_path / "fret", pa.Table.from_pylist(fret, schema=FRET))},
        run=open_storage(tmp_path),
        progress=Silent(),
    )
    metrics = make_mixture(
        MixtureConfig.model_validate(config),
        formatter=formatter,
        batch_size=batch_size,
        epochs=epochs,
        context=context,
    )
    tables = [read_table(context.storage, path) for path in context.storage.list("shards")]
    table = pa.concat_tables(tables)
    assert table.schema == EXAMPLE
    return metrics, table.to_pylist()


def test_fret_rows_carry_the_teachers_scores_of_positive_and_negatives(
    tmp_path: Path, formatter: Formatter
) -> None:
    fret = [fret_row(0), fret_row(1, dropped_by="repeats another query")]
    metrics, (row,) = mixed(tmp_path, formatter, {}, fret)
    assert metrics == {"num_batches": 1, "num_examples": 1, "sets": {"fret": 1}}
    assert row == {
        "batch": 0,
        "dataset": "fret",
        "query": "task: question answering | query: question 0",
        "positive": "title: none | text: answer 0",
        "negatives": ["title: Title | text: worst 0", "title: none | text: worse 0"],
        "query_tokens": [1, 5, 8, 9, 1, 6, 8, 1, 2],
        "positive_tokens": [1, 6, 4, 1, 5, 6, 1, 2],
        "negative_tokens": [[1, 6, 5, 1, 5, 5, 1, 2], [1, 6, 4, 1, 5, 5, 1, 2]],
        "teacher_scores": [1.5, 0.5, 0.75],
        "query_id": "q0",
        "positive_id": "p0",
        "symmetric": False,
    }


def test_batches_are_in_order_and_each_of_one_set(tmp_path: Path, formatter: Formatter) -> None:
    pairs = [{"query": f"ask {n}", "positive": f"reply {n}"} for n in range(10)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    config = {"labelled": [{"name": "human", "path": str(tmp_path / "pairs.jsonl")}]}
    fret = [fret_row(n) for n in range(14)]
    metrics, rows = mixed(tmp_path, formatter, config, fret, epochs=3)
    assert metrics["sets"] == {"fret": 14, "human": 10}
    assert metrics["num_batches"] == 18
    assert [row["batch"] for row in rows] == [n for n in range(18) for _ in range(4)]
    sets = [{row["dataset"] for row in rows[start : start + 4]} for start in range(0, 72, 4)]
    assert all(len(names) == 1 for names in sets) and len(set.union(*sets)) == 2


def test_rows_are_tokenised_once_for_all_epochs_and_only_if_drawn(
    tmp_path: Path, formatter: Formatter
) -> None:
    fret = [fret_row(n) for n in range(8)]
    mixed(tmp_path, formatter, {}, fret, epochs=5)
    assert len(formatter.encoder.texts) == 8 * 4
    formatter.encoder.texts.clear()
    mixed(tmp_path, formatter, {}, fret, epochs=0.5)
    assert len(formatter.encoder.texts) == 4 * 4
