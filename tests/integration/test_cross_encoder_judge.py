"""Pairs scored by a cross-encoder through real Ray Data, and gone on with after a stop."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from actors.cross_encoder import CrossEncoder
from actors.embedded import embedded_model
from cluster.artifacts import write_shards
from cluster.steps import Run, Step, StepContext
from cluster.storage import open_storage, read_table
from pipelines.fret.cross_scores import cross_score_pairs
from pipelines.recipe.read import load_recipe
from pipelines.records import PAIRS
from pipelines.run.console import JsonLines

pytestmark = pytest.mark.slow
ROWS = [
    {
        "passage_id": f"p{number}",
        "title": "",
        "text": "flow " * (number + 1),
        "query_ids": [f"q{number}", f"q{number + 1}"],
        "queries": [f"query {number}", f"query {number + 1}"],
    }
    for number in range(6)
]


class Silent:
    def update(self, done: float, total: float | None = None, note: str = "") -> None: ...


def model(folder: Path) -> str:
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model("embedded:all-MiniLM-L6-v2"))
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=len(tokenizer),
        intermediate_size=64,
        num_labels=1,
        max_position_embeddings=64,
        initializer_range=0.2,
        **sizes,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def test_pairs_keep_their_order_and_only_shards_that_are_missing_are_scored(
    ray_session: None, tmp_path: Path
) -> None:
    folder = model(tmp_path / "model")
    settings = [f"cross_encoder.model={folder}", "fret.fusion=ce", "corpus.path=none"]
    recipe = load_recipe("laptop", settings)

    def pairs(context: StepContext) -> dict[str, Any]:
        write_shards(context.storage, pa.Table.from_pylist(ROWS, schema=PAIRS), 2)
        return {"num_passages": len(ROWS), "num_pairs": 2 * len(ROWS)}

    steps = [Step(name="pairs", config={}, inputs=(), work=pairs)]
    inputs = Run(str(tmp_path / "run"), steps).execute(JsonLines())
    storage = open_storage(str(tmp_path / "scores"))
    context = StepContext(storage=storage, inputs=inputs, progress=Silent())
    assert cross_score_pairs(recipe, context) == {"num_pairs": 12}
    shards = sorted((tmp_path / "scores" / "shards").iterdir())
    assert len(shards) == 3
    rows = [
        row for shard in shards for row in read_table(storage, f"shards/{shard.name}").to_pylist()
    ]
    assert [row["passage_id"] for row in rows] == [row["passage_id"] for row in ROWS]
    given = [(query, row["text"]) for row in ROWS for query in row["queries"]]
    expected = CrossEncoder.load(folder).score(given)
    scores = [score for row in rows for score in row["cross_scores"]]
    assert scores == pytest.approx(expected.tolist(), abs=1e-5)
    # As a run that was stopped leaves it: one of the shards is not there yet.
    lost = shards.pop(1)
    content = read_table(storage, f"shards/{lost.name}")
    lost.unlink()
    before = [shard.stat().st_mtime_ns for shard in shards]
    assert cross_score_pairs(recipe, context) == {"num_pairs": 12}
    assert [shard.stat().st_mtime_ns for shard in shards] == before
    assert read_table(storage, f"shards/{lost.name}").equals(content)
