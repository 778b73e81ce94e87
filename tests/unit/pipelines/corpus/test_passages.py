import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cluster.exchange
from cluster.artifacts import Artifact
from cluster.steps import Run, Step
from pipelines.corpus import parts, passages, repeats, units
from pipelines.corpus.parts import passages_per_shard
from pipelines.corpus.passages import cut_corpus, make_passages
from pipelines.datasets.corpus import Corpus, CorpusConfig
from pipelines.run.console import JsonLines


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks run in this process, the last one first; tests/integration has Ray's."""

    def run_tasks(
        work: Callable[..., Any], arguments: Iterator[tuple[Any, ...]], num_cpus: float = 1.0
    ) -> Iterator[Any]:
        for given in reversed(list(arguments)):
            yield work(*given)

    monkeypatch.setattr(cluster.exchange, "run_tasks", run_tasks)
    monkeypatch.setattr(passages, "_cpus_per_task", lambda _: 1)


def words(draw: random.Random, num: int) -> list[str]:
    return ["".join(draw.choices("abcdefghijklmnop", k=6)) for _ in range(num)]


def write_copies(folder: Path) -> Corpus:
    """Writes files whose documents are often copies of others, some of them changed a little."""
    draw = random.Random(1)
    texts: list[list[str]] = []
    for number in range(4):
        lines = ["broken", json.dumps({"_id": f"short {number}", "text": "short"})]
        for row in range(50):
            text = list(draw.choice(texts)) if texts and draw.random() < 0.5 else words(draw, 60)
            if len(texts) % 3 == 0:
                for place in draw.sample(range(60), draw.choice([1, 1, 2, 20])):
                    text[place : place + 1] = words(draw, 1)
            texts.append(text)
            lines.append(json.dumps({"_id": f"{number}-{row}", "text": " ".join(text)}))
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    (folder / "4.jsonl").write_text("")
    return Corpus(CorpusConfig(path=str(folder), max_reject_share=1))


def made(corpus: Corpus, target: Path, sample: int | None = None) -> Artifact:
    step = Step(
        name="passages",
        config={},
        inputs=(),
        work=lambda context: make_passages(corpus, context, sample),
    )
    return Run(str(target), [step]).execute(JsonLines())["passages"]


@pytest.mark.usefixtures("backwards")
@pytest.mark.parametrize("threshold", [0.8, None])
def test_rows_are_the_same_whatever_the_tasks_parts_and_partitions(
    threshold: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus").mkdir()
    corpus = write_copies(tmp_path / "corpus")
    config = corpus.config.model_copy(update={"near_duplicate_threshold": threshold})
    corpus = Corpus(config)
    expected, rejects, num_documents = cut_corpus(corpus)
    reasons = Counter(reason for _, reason, _ in rejects)
    assert reasons["duplicate"] > 20 and (reasons["near-duplicate"] > 5) == bool(threshold)
    for number, (group_bytes, part_rows, shard_passages, keys, pairs) in enumerate(
        [(1 << 20, 1 << 17, 1024, 10**6, 10**6), (1, 20, 3, 300, 5), (20_000, 50, 10, 100, 1)]
    ):
        monkeypatch.setattr(units, "_FEWEST_BYTES", group_bytes)
        monkeypatch.setattr(parts, "_MAX_PART_ROWS", part_rows)
        monkeypatch.setattr(parts, "_SHARD_PASSAGES", shard_passages)
        monkeypatch.setattr(repeats, "_MAX_KEYS", keys)
        monkeypatch.setattr(repeats, "_MAX_PAIRS", pairs)
        found = made(corpus, tmp_path / f"run-{number}")
        assert [(row["id"], row["source"], row["text"]) for row in found.read().to_pylist()] == [
            (each.id, each.source, each.text) for each in expected
        ]
        told = [tuple(row.values()) for row in found.rejects().to_pylist()]
        assert sorted(told) == sorted(rejects)
        assert found.num_duplicates == reasons["duplicate"] + reasons["near-duplicate"]
        assert found.manifest.metrics["num_documents"] == num_documents
        assert max(shard.num_rows or 0 for shard in found.shards) <= shard_passages


@pytest.mark.usefixtures("backwards")
def test_part_is_written_a_group_of_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "corpus").mkdir()
    corpus = write_copies(tmp_path / "corpus")
    monkeypatch.setattr(parts, "_SHARD_PASSAGES", 5)
    held, read, written = [0], [0], [0]
    rows, groups = parts._rows, parts._row_groups

    def rows_counted(*given: Any) -> Iterator[dict[str, Any]]:
        for row in rows(*given):
            read[0] += 1
            held[0] = max(held[0], read[0] - written[0])
            yield row

    def groups_counted(*given: Any) -> Iterator[Any]:
        for group in groups(*given):
            yield group
            written[0] += group.num_rows

    monkeypatch.setattr(parts, "_rows", rows_counted)
    monkeypatch.setattr(parts, "_row_groups", groups_counted)
    found = made(corpus, tmp_path / "run")
    assert read[0] == written[0] == found.num_rows + found.num_rejects + found.num_duplicates
    assert held[0] <= 2 * 10


def test_shards_of_large_corpora_hold_more_passages() -> None:
    sizes = [0, 1 << 30, 100 << 30, 1 << 50]
    assert [passages_per_shard(size) for size in sizes] == [1024, 2048, 1 << 16, 1 << 16]


def test_sample_is_of_whole_documents_and_a_larger_one_contains_it(tmp_path: Path) -> None:
    rows = []
    for number in range(60):
        text = " ".join(words(random.Random(number), 60))
        rows.append({"_id": f"d{number:02}", "text": text})
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = CorpusConfig(path=str(tmp_path / "x.jsonl"), max_words=20, min_words=10)
    corpus = Corpus(config)

    def sources(sample: int | None) -> list[str]:
        return [passage.source for passage in cut_corpus(corpus, sample=sample)[0]]

    assert len(sources(None)) == len(sources(1000)) == 180  # three of each document
    some, more = sources(30), sources(31)
    assert len(some) == 30 and more[:30] == some and len(more) == 31
    documents = {source.partition("#")[0] for source in some}
    assert len(documents) == 10
    assert documents != {f"d{number:02}" for number in range(10)}
