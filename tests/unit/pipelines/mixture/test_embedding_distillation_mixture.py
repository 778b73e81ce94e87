"""Which texts embedding distillation has, and whose vectors; stages run in this process."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from actors.encoder import Encoder
from cluster.artifacts import Artifact, Manifest, write_artifact, write_shards
from cluster.errors import UserError
from cluster.file_list import FileList
from cluster.shard_groups import shard_groups
from cluster.stages import Stage
from cluster.steps import StepContext
from cluster.storage import open_storage, read_table, write_table
from pipelines.corpus.held_out import HELD_OUT
from pipelines.datasets.decontamination import Decontamination
from pipelines.mining.embeddings import column_vectors, vector_column
from pipelines.mixture import embedding_distillation_mixture as mixture
from pipelines.mixture import stored_rows
from pipelines.mixture.passage_draw import Draw
from pipelines.recipe.read import load_recipe
from pipelines.records import EMBEDDING, PASSAGE, QUERY, TEXT

NUM_PASSAGES = 20
PASSAGES = pa.Table.from_pylist(
    [
        {"id": f"p{n}", "title": f"Title {n}", "text": f"passage {n} of many", "source": f"{n}#1"}
        for n in range(NUM_PASSAGES)
    ],
    schema=PASSAGE,
)
QUERIES = pa.Table.from_pylist(
    [
        dict.fromkeys(QUERY.names) | {"id": f"q{n}", "task": "search result"} | row
        for n, row in enumerate(
            [
                {"query": "what is a stone"},
                {"query": "passage", "dropped_by": "too short"},
                {"query": "what is a stone"},  # again
                {"query": "", "dropped_by": "nothing"},
                {"query": None, "dropped_by": "nothing"},
                {"query": "who judges the runs of others"},  # as a test set does
                {"query": "which query is held out", "dropped_by": HELD_OUT},
            ]
        )
    ],
    schema=QUERY,
)


class Silent:
    def update(self, done: float, total: float | None = None, note: str = "") -> None: ...


def run_here(stage: Stage, source: Artifact, context: StepContext) -> None:
    transform = stage.load()
    done = context.storage.list("shards")
    for entry in source.shards:
        if entry.path not in done:
            table = source.shard(entry, list(stage.columns))
            output: Any = asyncio.run(transform(table))  # type: ignore[arg-type]
            assert output.rows.num_rows == table.num_rows
            context.log.append([write_table(context.storage, entry.path, output.rows)])


def artifact(folder: Path, table: pa.Table | None, **metrics: Any) -> Artifact:
    storage = open_storage(folder)
    files = write_shards(storage, table, 8) if table is not None and table.num_rows else []
    manifest = Manifest(step=folder.name, fingerprint="", config={}, inputs={}, metrics=metrics)
    return write_artifact(storage, manifest, FileList.of(files))


Mix = Callable[..., tuple[dict[str, Any], pa.Table]]


@pytest.fixture
def mix(tmp_path: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> Mix:
    """Runs the step with a tiny retriever, which is the student too; settings as `--set` has."""
    monkeypatch.setattr(mixture, "run_stage", run_here)
    model = str(tiny_model("bert", tmp_path / "model"))
    encoder = Encoder.load(model, max_tokens=64, passage_template="{title} {text}", device="cpu")
    encoder.save(tmp_path / "student/model", model_card="")
    texts = encoder.format_passages(*(PASSAGES[name].to_pylist() for name in ("text", "title")))
    embedded = pa.table([PASSAGES["id"], vector_column(encoder.encode(texts))], schema=EMBEDDING)

    def run(*settings: str, dimensions: int = encoder.dimensions) -> Any:
        recipe = load_recipe(
            "laptop",
            [
                f"retriever.model={model}",
                "retriever.max_tokens=64",
                "retriever.dtype=float32",
                "student.max_tokens=64",
                "embedding_distillation.training={batch_size: 4, epochs: 1}",
                *settings,
            ],
        )
        judged_by = ["who judges the runs of others"]
        step = mixture.step(recipe, Decontamination(judged_by))
        inputs = {
            "student": artifact(tmp_path / "student", None, dimensions=dimensions),
            "passages": artifact(tmp_path / "passages", PASSAGES),
            "embeddings": artifact(tmp_path / "embeddings", embedded),
            "queries": artifact(tmp_path / "queries", QUERIES),
        }
        folder = tmp_path / "mixture"
        context = StepContext(
            storage=open_storage(folder),
            inputs={name: inputs[name] for name in step.inputs},
            progress=Silent(),
        )
        storage = context.storage
        storage.delete("")
        metrics = step.work(context)
        tables = [read_table(storage, path) for path in storage.list("shards")]
        return metrics, pa.concat_tables(tables)

    return run


def test_draw_is_exact_and_more_contain_the_fewer(tmp_path: Path) -> None:
    passages = artifact(tmp_path / "passages", PASSAGES)
    drawn = [set(np.flatnonzero(Draw.of(passages, n, 0).includes(PASSAGES["id"]))) for n in (3, 9)]
    assert [len(each) for each in drawn] == [3, 9]
    assert drawn[0] < drawn[1]
    other = Draw.of(passages, 9, 1).includes(PASSAGES["id"])
    assert set(np.flatnonzero(other)) != drawn[1]
    assert Draw.of(passages, 20, 0).includes(PASSAGES["id"]).all()
    assert Draw.of(passages, 99, 0).includes(PASSAGES["id"]).all()


def test_texts_are_all_passages_and_the_different_queries_with_the_retrievers_vectors(
    mix: Mix, tmp_path: Path
) -> None:
    metrics, rows = mix("embedding_distillation.training.epochs=10")
    assert rows.schema == TEXT
    assert metrics["sets"] == {"passages": 20, "queries": 2}
    assert (metrics["num_examples"], metrics["num_decontaminated"]) == (22, 1)
    assert metrics["num_batches"] == max(rows["batch"].to_pylist()) + 1 == 55
    encoder = Encoder.load(str(tmp_path / "student/model"), device="cpu")
    texts = rows["text"].to_pylist()
    assert {"Title 7 passage 7 of many", "passage"} <= {*texts}
    assert not {"", "who judges the runs of others"} & {*texts}
    # Whoever embeds what the student reads gets the vector that stands beside it.
    vectors = column_vectors(rows["embedding"])
    np.testing.assert_allclose(encoder.encode(texts), vectors, atol=1e-5)
    assert rows["tokens"].to_pylist() == encoder.tokenize(texts)
    for number in range(55):
        batch = rows.filter(pc.equal(rows["batch"], number))
        assert len(set(batch["dataset"].to_pylist())) == 1


def test_named_teacher_embeds_the_passages_that_are_drawn(
    mix: Mix, tmp_path: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = str(tiny_model("bert", tmp_path / "teacher", num_attention_heads=1))
    counted: list[int] = []
    encode = Encoder.encode_prepared

    def counting(encoder: Encoder, texts: Any, **options: Any) -> np.ndarray:
        counted.append(len(texts.order))
        return encode(encoder, texts, **options)

    monkeypatch.setattr(Encoder, "encode_prepared", counting)
    metrics, rows = mix(
        f"embedding_distillation.teacher={{model: {teacher}, passage_template: 'a {{text}}'}}",
        "embedding_distillation.mixture={max_passages: 5, queries: false}",
    )
    monkeypatch.undo()
    assert metrics["sets"] == {"passages": 5}
    assert sum(counted) == 5
    by_text = dict(zip(rows["text"].to_pylist(), column_vectors(rows["embedding"]), strict=True))
    encoder = Encoder.load(teacher, passage_template="a {text}", device="cpu")
    for text, vector in by_text.items():
        number = text.split()[1]
        own = encoder.encode_passages([f"passage {number} of many"], [f"Title {number}"])
        np.testing.assert_allclose(own[0], vector, atol=1e-5)


def test_texts_held_out_are_not_trained_on(mix: Mix, tmp_path: Path) -> None:
    metrics, rows = mix("embedding_distillation.mixture={validation_examples: 4, queries: false}")
    held_out = read_table(open_storage(tmp_path / "mixture"), "validation/shards/000000000.parquet")
    assert metrics["num_validation_examples"] == held_out.num_rows == 4
    assert metrics["num_examples"] == 16
    assert not {*rows["text"].to_pylist()} & {*held_out["text"].to_pylist()}


def test_rows_do_not_depend_on_the_tasks(mix: Mix, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["embedding_distillation.training.epochs=3"]
    whole = mix(*settings)
    monkeypatch.setattr(shard_groups, "__defaults__", (1,))
    monkeypatch.setattr(stored_rows, "_SOURCE_BYTES", 1)
    metrics, rows = mix(*settings)
    assert metrics == whole[0]
    assert rows.to_pylist() == whole[1].to_pylist()


@pytest.mark.parametrize("settings", [(), ("embedding_distillation.mixture.queries=false",)])
def test_teacher_of_other_dimensions_is_refused(mix: Mix, settings: tuple[str, ...]) -> None:
    with pytest.raises(UserError, match=r"have \d+ dimensions, and the student's 7: name an"):
        mix(*settings, dimensions=7)
