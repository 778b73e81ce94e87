import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cluster.artifacts import Artifact, Manifest, write_artifact, write_shards
from cluster.errors import TooManyRejects, UserError
from cluster.file_list import FileList
from cluster.shard_groups import shard_groups
from cluster.steps import StepContext
from cluster.storage import open_storage, read_table
from pipelines.datasets.decontamination import Decontamination
from pipelines.encoders import EncoderConfig
from pipelines.mixture import formats, mixture, stored_rows
from pipelines.mixture.config import MixtureConfig, PrefinetuningMixtureConfig, SetsConfig
from pipelines.mixture.formats import Format, Formatter
from pipelines.mixture.mixture import WriteExamples, make_mixture
from pipelines.records import EXAMPLE, FRET, PASSAGE, SEED


class Silent:
    def update(self, done: float, total: float | None = None, note: str = "") -> None: ...


@dataclass(frozen=True, kw_only=True)
class Given(Format):
    """Has its formatter, and loads none."""

    formatter: Formatter

    def load(self) -> Formatter:
        return self.formatter


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
    manifest = Manifest(step=folder.name, fingerprint="", config={}, inputs={})
    return write_artifact(storage, manifest, FileList.of(write_shards(storage, table, 1 << 20)))


def mixed(
    tmp_path: Path,
    formatter: Formatter,
    config: SetsConfig,
    *,
    judged_by: Sequence[str] = (),
    epochs: float = 1,
    batch_size: int = 4,
    resumed: bool = False,
    **inputs: pa.Table,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns the manifest's metrics and the rows in the order of training."""
    context = StepContext(
        storage=open_storage(tmp_path / "mixture"),
        inputs={name: artifact(tmp_path / name, table) for name, table in inputs.items()},
        progress=Silent(),
    )
    if not resumed:
        context.storage.delete("")
    metrics = make_mixture(
        config,
        format_=Given(
            student=EncoderConfig(model="words"),
            max_query_tokens=0,
            max_passage_tokens=0,
            formatter=formatter,
        ),
        decontamination=Decontamination(judged_by),
        batch_size=batch_size,
        epochs=epochs,
        context=context,
    )
    return metrics, shards(tmp_path / "mixture")


def shards(folder: Path) -> list[dict[str, Any]]:
    storage = open_storage(folder)
    table = pa.concat_tables([read_table(storage, path) for path in storage.list("shards")])
    assert table.schema == EXAMPLE
    return table.to_pylist()


def fret(*rows: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=FRET)


def pairs(tmp_path: Path, name: str, num_rows: int, **keys: Any) -> dict[str, Any]:
    rows = [{"query": f"{name} asks {n}", "positive": f"{name} says {n}"} for n in range(num_rows)]
    (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"name": name, "path": str(tmp_path / f"{name}.jsonl"), **keys}


def test_fret_rows_carry_the_teachers_scores_of_positive_and_negatives(
    tmp_path: Path, formatter: Formatter
) -> None:
    rows = fret(fret_row(0), fret_row(1, dropped_by="repeats another query"))
    metrics, (row,) = mixed(tmp_path, formatter, MixtureConfig(), fret=rows)
    assert (metrics["num_batches"], metrics["num_examples"], metrics["sets"]) == (1, 1, {"fret": 1})
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


def test_list_of_twenty_keeps_its_scores_in_every_epoch(
    tmp_path: Path, formatter: Formatter
) -> None:
    others = range(19, 0, -1)  # the worst first

    def listed(number: int) -> dict[str, Any]:
        return fret_row(
            number,
            candidate_ids=[f"p{number}", *(f"{number}/{place}" for place in range(1, 20))],
            fused=[1.5 - place / 8 for place in range(20)],
            negative_ids=[f"{number}/{place}" for place in others],
            negative_titles=[""] * 19,
            negatives=[f"text {place}" for place in others],
        )

    alone = fret_row(2, candidate_ids=["p2"], fused=[0.5]) | {
        name: [] for name in ("negative_ids", "negative_titles", "negatives")
    }
    rows = fret(listed(0), listed(1), listed(1), alone)  # one query comes twice
    metrics, rows = mixed(tmp_path, formatter, MixtureConfig(), fret=rows, epochs=4, batch_size=2)
    assert metrics["num_batches"] == 8
    batches: dict[int, list[str]] = {}
    for row in rows:
        batches.setdefault(row["batch"], []).append(row["query_id"])
        if row["query_id"] == "q2":
            assert (row["negatives"], row["teacher_scores"]) == ([], [0.5])
            continue
        assert row["teacher_scores"] == [1.5, *(1.5 - place / 8 for place in others)]
        assert [int(text.split()[-1]) for text in row["negatives"]] == list(others)
        tokens = [[1, 6, 4, 1, 5, 4, len(str(place)), 2] for place in others]
        assert row["negative_tokens"] == tokens
    assert all(len(set(ids)) == len(ids) == 2 for ids in batches.values())


def test_batches_are_in_order_and_each_of_one_set(tmp_path: Path, formatter: Formatter) -> None:
    config = MixtureConfig.model_validate({"labelled": [pairs(tmp_path, "human", 10)]})
    rows = fret(*[fret_row(n) for n in range(14)])
    metrics, mixture = mixed(tmp_path, formatter, config, fret=rows, epochs=3)
    assert metrics["sets"] == {"fret": 14, "human": 10}
    assert metrics["num_batches"] == 18 == sum(metrics["batches"].values())
    assert [row["batch"] for row in mixture] == [n for n in range(18) for _ in range(4)]
    sets = [{row["dataset"] for row in mixture[start : start + 4]} for start in range(0, 72, 4)]
    assert all(len(names) == 1 for names in sets) and len(set.union(*sets)) == 2


def test_rows_are_tokenised_once_for_all_epochs_and_only_if_drawn(
    tmp_path: Path, formatter: Formatter
) -> None:
    rows, texts = fret(*[fret_row(n) for n in range(8)]), formatter.encoder.texts
    mixed(tmp_path, formatter, MixtureConfig(), fret=rows, epochs=5)
    assert len(texts) == 8 * 4
    texts.clear()
    mixed(tmp_path, formatter, MixtureConfig(), fret=rows, epochs=0.5)
    assert len(texts) == 4 * 4


def test_rows_do_not_depend_on_the_tasks(
    tmp_path: Path, formatter: Formatter, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = fret(*[fret_row(n) for n in range(17)])
    labelled = [pairs(tmp_path, "a", 11), pairs(tmp_path, "b", 40, max_rows=9)]
    config = MixtureConfig.model_validate({"labelled": labelled, "validation_examples": 4})
    made = [mixed(tmp_path / "whole", formatter, config, epochs=2.5, fret=rows)]
    monkeypatch.setattr(shard_groups, "__defaults__", (1,))
    monkeypatch.setattr(stored_rows, "_SOURCE_BYTES", 1)
    monkeypatch.setattr(formats, "_ROWS_AT_ONCE", 4)
    monkeypatch.setattr(mixture, "EXAMPLES_PER_SHARD", 12)
    made.append(mixed(tmp_path / "parts", formatter, config, epochs=2.5, fret=rows))
    assert made[0] == made[1]
    held_out = [shards(tmp_path / name / "mixture/validation") for name in ("whole", "parts")]
    assert held_out[0] == held_out[1] and len(held_out[0]) == 4
    assert {row["dataset"] for row in made[0][1]} == {"fret", "a", "b"}
    files = open_storage(tmp_path / "parts/mixture").list("shards")
    assert len(files) == -(-made[0][0]["num_batches"] // 3)
    # What a killed run has written is not written anew.
    taken = WriteExamples.merge
    merged = list[int]()

    def counted(self: WriteExamples, some: pa.Table) -> tuple[pa.Table, dict[str, int]]:
        merged.append(some.num_rows)
        return taken(self, some)

    monkeypatch.setattr(WriteExamples, "merge", counted)
    formatter.encoder.texts.clear()
    open_storage(tmp_path / "parts/mixture").delete(files[1])
    again = mixed(tmp_path / "parts", formatter, config, epochs=2.5, resumed=True, fret=rows)
    assert again == made[0]
    assert len(merged) == 1
    assert not formatter.encoder.texts  # nor is any text tokenised again


def test_temperature_evens_out_sets_that_have_no_weight_of_their_own(
    tmp_path: Path, formatter: Formatter
) -> None:
    sets = [pairs(tmp_path, "large", 400), pairs(tmp_path, "small", 25)]
    sets.append(pairs(tmp_path, "weighed", 10, weight=5))
    config = PrefinetuningMixtureConfig.model_validate({"labelled": sets, "temperature": 2})
    metrics, _ = mixed(tmp_path, formatter, config, epochs=20, batch_size=4)
    expected = {"large": 20, "small": 5, "weighed": 5}  # the square roots of the rows
    num_batches = metrics["num_batches"]
    assert num_batches == 20 * 435 // 4
    chi_square = 0.0
    for name, weight in expected.items():
        mean = num_batches * weight / 30
        chi_square += (metrics["batches"][name] - mean) ** 2 / mean
    assert chi_square < 13.8  # p = 0.001


def test_rows_beyond_the_most_are_not_drawn(tmp_path: Path, formatter: Formatter) -> None:
    config = MixtureConfig.model_validate(
        {"labelled": [pairs(tmp_path, "human", 50, max_rows=6)], "fret_max_rows": 3}
    )
    rows = fret(*[fret_row(n) for n in range(9)])
    metrics, mixture = mixed(tmp_path, formatter, config, fret=rows, epochs=9, batch_size=3)
    assert metrics["sets"] == {"fret": 3, "human": 6}
    assert len({row["query"] for row in mixture}) == 9


def test_fret_tasks_may_be_drawn_equally_often(tmp_path: Path, formatter: Formatter) -> None:
    rows = fret(*[fret_row(n, task="rare" if n % 20 == 0 else "common") for n in range(200)])

    def share_of_rare(tasks: str) -> float:
        config = MixtureConfig.model_validate({"fret_tasks": tasks})
        _, mixture = mixed(tmp_path, formatter, config, fret=rows, epochs=10, batch_size=8)
        return sum("task: rare" in row["query"] for row in mixture) / len(mixture)

    assert share_of_rare("rows") == pytest.approx(0.05, abs=0.005)
    assert share_of_rare("uniform") == pytest.approx(0.5, abs=0.03)


def test_fret_may_be_cut_to_some_tasks(tmp_path: Path, formatter: Formatter) -> None:
    rows = fret(*[fret_row(n, task=f"task {n % 3}") for n in range(30)])
    config = MixtureConfig.model_validate({"fret_only_tasks": ["task 0", "task 2"]})
    metrics, mixture = mixed(tmp_path, formatter, config, fret=rows)
    assert metrics["sets"] == {"fret": 20}
    assert not any("task 1" in row["query"] for row in mixture)


def test_fret_of_no_weight_is_not_read(tmp_path: Path, formatter: Formatter) -> None:
    config = MixtureConfig.model_validate(
        {"fret_weight": 0, "labelled": [pairs(tmp_path, "human", 4)]}
    )
    metrics, _ = mixed(tmp_path, formatter, config)
    assert metrics["sets"] == {"human": 4}


def test_labelled_texts_that_repeat_an_evaluation_query_are_taken_out_and_counted(
    tmp_path: Path, formatter: Formatter
) -> None:
    asymmetric = pairs(tmp_path, "human", 6)
    symmetric = pairs(tmp_path, "twin", 6, symmetric=True)
    config = PrefinetuningMixtureConfig.model_validate({"labelled": [asymmetric, symmetric]})
    judged_by = ["Human asks 3?", "human says 4", "twin asks 1", "twin says 5"]
    metrics, mixture = mixed(tmp_path, formatter, config, judged_by=judged_by, epochs=5)
    # What an asymmetric set answers with is no query.
    assert metrics["sets"] == {"human": 5, "twin": 4}
    reasons = [metrics["labelled"][name]["decontaminated"] for name in ("human", "twin")]
    assert reasons == [{"repeats an evaluation query": 1}, {"repeats an evaluation query": 2}]
    assert metrics["num_evaluation_queries"] == 4
    assert metrics["contaminated"][0] == {
        "set": "human",
        "text": "human asks 3",
        "evaluation_query": "Human asks 3?",
    }
    queries = {row["query"].rpartition("query: ")[2] for row in mixture}
    assert not {"human asks 3", "twin asks 1", "twin asks 5"} & queries


def test_rows_that_cannot_be_read_are_written_down(tmp_path: Path, formatter: Formatter) -> None:
    human = pairs(tmp_path, "human", 19)
    with Path(human["path"]).open("a") as file:
        file.write('\n{"query": "and the answer?"}')
    config = MixtureConfig.model_validate({"fret_weight": 0, "labelled": [human]})
    metrics, _ = mixed(tmp_path, formatter, config)
    assert metrics["labelled"]["human"]["rejected"] == {"no text in field 'positive'": 1}
    (reject,) = read_table(
        open_storage(tmp_path / "mixture"), "rejects/000000000.parquet"
    ).to_pylist()
    assert reject["id"] == "human: human.jsonl:20" and "and the answer?" in reject["text"]
    with pytest.raises(TooManyRejects, match=r"share of 0\.04 of 20"):
        mixed(tmp_path, formatter, config.model_copy(update={"max_reject_share": 0.04}))


def test_held_out_examples_lie_apart_and_share_no_query_with_training(
    tmp_path: Path, formatter: Formatter
) -> None:
    human = pairs(tmp_path, "human", 60)
    with Path(human["path"]).open("a") as file:  # every query has a second positive
        rows = [{"query": f"human asks {n}", "positive": f"or {n}"} for n in range(60)]
        file.write("\n" + "\n".join(map(json.dumps, rows)))
    config = PrefinetuningMixtureConfig.model_validate(
        {"labelled": [human, pairs(tmp_path, "other", 60)], "validation_examples": 18}
    )
    metrics, mixture = mixed(tmp_path, formatter, config, epochs=4, batch_size=5)
    held_out = shards(tmp_path / "mixture" / "validation")
    assert metrics["num_validation_examples"] == len(held_out) == 18
    assert [sum(row["dataset"] == name for row in held_out) for name in ("human", "other")] == [
        12,
        6,
    ]
    assert [row["batch"] for row in held_out] == [*[0] * 5, *[1] * 5, *[2] * 2, *[3] * 5, 4]
    assert not {row["query"] for row in held_out} & {row["query"] for row in mixture}
    assert metrics["num_examples"] == len({row["positive"] for row in mixture})


def test_titles_and_bodies_may_come_from_the_runs_own_passages(
    tmp_path: Path, formatter: Formatter
) -> None:
    passages = [{"id": "1", "title": "Bees", "text": "They dance.", "source": "a#1"}]
    config = PrefinetuningMixtureConfig.model_validate(
        {"labelled": [{"name": "titles", "kind": "title-body", "path": "run:passages"}]}
    )
    table = pa.Table.from_pylist(passages, schema=PASSAGE)
    _, (row,) = mixed(tmp_path, formatter, config, passages=table)
    assert row["query"] == "task: search result | query: Bees"
    assert row["positive"] == "title: none | text: They dance."


def test_passages_of_held_out_documents_are_not_trained_on(
    tmp_path: Path, formatter: Formatter
) -> None:
    passages = [
        {"id": id_, "title": title, "text": "They dance.", "source": f"{id_}#1"}
        for id_, title in (("a", "Bees"), ("b", "Wasps"))
    ]
    config = PrefinetuningMixtureConfig.model_validate(
        {"labelled": [{"name": "titles", "kind": "title-body", "path": "run:passages"}]}
    )
    open_storage(tmp_path / "seeds").write_bytes("held_out.json", b'["b"]')
    tables = {"passages": pa.Table.from_pylist(passages, PASSAGE), "seeds": SEED.empty_table()}
    _, (row,) = mixed(tmp_path, formatter, config, **tables)
    assert row["query"] == "task: search result | query: Bees"


def test_classification_triple_carries_its_id_at_the_end_of_every_text(
    tmp_path: Path, formatter: Formatter
) -> None:
    rows = [
        {"text": f"{label}{n} " + "long " * 30, "label": label} for label in "ab" for n in (1, 2)
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = PrefinetuningMixtureConfig.model_validate(
        {"labelled": [{"name": "c", "kind": "classification", "path": str(tmp_path / "c.jsonl")}]}
    )
    _, mixture = mixed(tmp_path, formatter, config)
    ids = set()
    for row in mixture:
        texts = [row["query"], row["positive"], *row["negatives"]]
        (unique,) = {text.split()[-1] for text in texts}
        ids.add(unique)
        assert row["symmetric"] and len(texts) == 3
        for text in texts:
            assert text.startswith(
                ("task: classification | query: a", "task: classification | query: b")
            )
        for tokens in (row["query_tokens"], row["positive_tokens"], *row["negative_tokens"]):
            # The long text was cut, and the id is still what the model reads last.
            assert tokens[-2:] == [len(unique), 2] and len(tokens) < formatter.max_query_tokens
            assert 4 in tokens[5:]
    assert len(ids) == 4


def test_no_example_at_all_is_a_mistake_that_says_what_to_do(
    tmp_path: Path, formatter: Formatter
) -> None:
    with pytest.raises(UserError, match="no training example is left"):
        mixed(tmp_path, formatter, MixtureConfig(), fret=fret(fret_row(0, dropped_by="too short")))
