"""What the benchmark of the data plane makes up: passages, queries, vectors; and how it counts."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest

from benchmarks.scale import (
    Measured,
    Meter,
    corpus_folder,
    count_requests,
    draw_passages,
    pss,
    read_sentences,
    workers,
    write_corpus,
)
from benchmarks.stand_ins import (
    NUM_SCORED,
    QUERY_WORDS,
    DrawnCandidates,
    SeededEncoder,
    SeededQueries,
    SeededScores,
    WithSeededEncoder,
    seeded,
    write_query,
)
from cluster.artifacts import unfinished_artifact, write_shards
from cluster.file_list import FileList
from cluster.stages import Stage, StageResources
from cluster.steps import Step
from cluster.storage import LocalStorage
from pipelines.encoders import EncoderConfig
from pipelines.mining import embeddings
from pipelines.mining.embeddings import EmbedPassages, column_vectors
from pipelines.records import CANDIDATES, PAIRS, PASSAGE, SCORES

SENTENCES = [f"Sentence number {n} says that {n * n} is its square, as it is." for n in range(400)]


def passages(num: int, name: object = 0) -> list[dict[str, Any]]:
    drawn = draw_passages(SENTENCES, name, num)
    return [{"id": f"{n:016x}", **document} for n, document in enumerate(drawn)]


def outcome(stage: Stage, rows: pa.Table) -> pa.Table:
    output = asyncio.run(stage.load()(rows))  # type: ignore[arg-type]
    return output.rows


def test_sentences_are_fit_and_each_is_there_once(tmp_path: Path):
    good = "This sentence has more than eight words and ends here."
    texts = [f"{good} Too short. {good}", f"{good} x = {{a[0]: (b) for c in d}} # {{}} [] () == ;"]
    (tmp_path / "retrieval" / "set").mkdir(parents=True)
    file = tmp_path / "retrieval" / "set" / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert read_sentences(tmp_path) == [good]


def test_passages_differ_and_are_the_same_each_time():
    first, other = passages(300), passages(300, name=1)
    assert first == passages(300)
    assert len({row["text"] for row in first + other}) == 600
    assert all(80 <= len(row["text"].split()) < 160 for row in first)
    assert len({row["_id"] for row in first + other}) == 600


def test_a_corpus_has_files_of_so_many_passages_and_keeps_those_that_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("benchmarks.scale.PASSAGES_PER_FILE", 10)
    folder = corpus_folder(tmp_path, 25)
    write_corpus(folder, SENTENCES, 25)
    files = sorted(folder.iterdir())
    assert [len(file.read_text().splitlines()) for file in files] == [10, 10, 5]
    written = files[1].read_text()
    files[0].write_text("kept\n")
    files[1].unlink()
    write_corpus(folder, SENTENCES, 25)
    assert files[0].read_text() == "kept\n"
    assert files[1].read_text() == written


def test_a_query_is_made_of_its_passage_and_lies_nearest_to_it():
    rows, encoder = passages(200), SeededEncoder()
    queries = [write_query(row["title"], row["text"]) for row in rows]
    for row, query in zip(rows, queries, strict=True):
        assert set(query.split()[:QUERY_WORDS]) <= set(row["text"].split())
    texts = encoder.format_passages([r["text"] for r in rows], [r["title"] for r in rows])
    vectors, asked = encoder.encode_prepared(encoder.prepare(texts)), encoder.encode(queries)
    assert vectors.dtype == asked.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm([*vectors, *asked], axis=1), 1, rtol=1e-5)
    similarities = asked @ vectors.T
    assert (similarities.argmax(1) == np.arange(200)).all()
    assert 0.8 < np.diag(similarities).min() < np.diag(similarities).max() < 0.99


def test_the_products_own_stage_works_with_the_seeded_encoder(monkeypatch: pytest.MonkeyPatch):
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(embeddings, "load_encoder", load)
    rows = passages(5)
    inner = EmbedPassages(encoder=EncoderConfig(model="none"), resources=StageResources())
    stage = WithSeededEncoder(stage=inner, columns=inner.columns, resources=inner.resources)
    found = outcome(stage, pa.Table.from_pylist(rows, schema=PASSAGE))
    texts = SeededEncoder().format_passages([r["text"] for r in rows], [r["title"] for r in rows])
    expected = SeededEncoder().encode(texts)
    np.testing.assert_array_equal(column_vectors(found["embedding"]), expected)


def test_queries_and_scores_are_whole_rows_and_the_same_each_time():
    resources, rows = StageResources(), passages(4)
    queries = outcome(SeededQueries(resources=resources), pa.Table.from_pylist(rows))
    assert queries["seed_id"].to_pylist() == [row["id"] for row in rows]
    assert queries["dropped_by"].null_count == 4
    pairs = pa.Table.from_pylist(
        [{"passage_id": "00ff00ff00ff00ff", "query_ids": ["a", "b", "c"]}], schema=PAIRS
    )
    stage = SeededScores(resources=resources)
    scores = outcome(stage, pairs)
    assert scores.schema == SCORES
    assert len(set(scores["query_likelihoods"].to_pylist()[0])) == 3
    assert scores.equals(outcome(stage, pairs))


def test_drawn_candidates_are_passages_with_the_seed_among_them(tmp_path: Path):
    storage, rows = LocalStorage(tmp_path), passages(100)
    files = write_shards(storage, pa.Table.from_pylist(rows, schema=PASSAGE), 30)
    artifact = unfinished_artifact(storage, FileList.of(files))
    queries = outcome(SeededQueries(resources=StageResources()), pa.Table.from_pylist(rows[:10]))
    stage = DrawnCandidates(passages=artifact, resources=StageResources())
    found = outcome(stage, queries)
    assert found.schema == CANDIDATES
    assert found.equals(outcome(stage, queries))
    for row in found.to_pylist():
        assert row["candidate_ids"][0] == row["seed_id"]
        assert len(set(row["candidate_ids"])) == len(row["similarities"]) == NUM_SCORED
        assert set(row["candidate_ids"]) <= {row["id"] for row in rows}
        assert row["similarities"] == sorted(row["similarities"], reverse=True)


def test_a_step_without_a_model_stays_and_another_says_what_it_is():
    step = Step(name="seeds", config={"a": 1}, inputs=(), work=lambda context: {})
    assert seeded(step) is step
    found = seeded(replace(step, name="queries"))
    assert found.config == {"a": 1, "benchmark": "seeded"}


def test_requests_are_counted_by_method_with_listings_apart():
    log = f"""
127.0.0.1 - - [26/Nov/2026 23:00:00] "PUT /bucket/run/seeds/shards/0 HTTP/1.1" 200 -
127.0.0.1 - - [26/Nov/2026 23:00:00] "GET /bucket?list-type=2&prefix=run HTTP/1.1" 200 -
127.0.0.1 - - [26/Nov/2026 23:00:01] "GET /bucket/run/x HTTP/1.1" 206 -
127.0.0.1 - - [26/Nov/2026 23:00:01] "POST /bucket/run/x?uploads HTTP/1.1" 200 -
127.0.0.1 - - [26/Nov/2026 23:00:01] "{chr(27)}[33mGET /bucket/run/y HTTP/1.1{chr(27)}[0m" 404 -
"""
    assert count_requests(log) == {"PUT": 1, "LIST": 1, "GET": 2, "POST": 1}


def test_memory_of_a_process_is_seen():
    holding = "held = b'x' * 2**26; print(flush=True); input()"
    command = [sys.executable, "-c", holding]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        process.stdout.readline()
        found = pss(process.pid)
        process.communicate(b"\n")
    assert 2**26 < found < 2 * 2**26


def test_the_highest_memory_is_kept(monkeypatch: pytest.MonkeyPatch):
    sizes = itertools.chain([3, 9, 4], itertools.repeat(5))
    looked = threading.Event()

    def next_size(pid: int) -> int:
        size = next(sizes)
        if size == 5:
            looked.set()
        return size

    monkeypatch.setattr("benchmarks.scale.pss", next_size)
    monkeypatch.setattr("benchmarks.scale.workers", list)
    meter = Meter()
    meter.start()
    assert looked.wait(60)
    meter.end()
    assert meter.driver == 9


def test_a_worker_has_the_processes_that_it_has_started():
    before = workers()
    pages = "exec -a ray::read_files bash -c 'exec -a pages sleep 60 & echo $!; wait'"
    others = ["exec -a ray::LogAgent sleep 60", "exec sleep 60"]
    with contextlib.ExitStack() as stack:
        started = []
        for command in (pages, *others):
            process = subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)
            stack.callback(process.kill)
            started.append(process)
        child = int(started[0].stdout.readline())
        stack.callback(os.kill, child, signal.SIGKILL)
        while psutil.Process(child).cmdline()[:1] != ["pages"]:
            time.sleep(0.01)
        assert [found for found in workers() if found not in before] == [[started[0].pid, child]]


def test_a_line_has_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = tmp_path / "requests.log"
    log.write_text('"GET /before HTTP/1.1"\n')
    storage = LocalStorage(tmp_path / "step")
    storage.write_bytes("shards/0", b"12345")
    storage.write_bytes("work/exchange/0", b"123")
    meter = Meter()
    measured = Measured(meter, 2 * 2**20, log, passages=7)
    measured.begin(step="pairs")
    meter.driver, meter.worker = 5 * 2**20, 2**20
    with log.open("a") as file:
        file.write('"PUT /x HTTP/1.1"\n')
    measured.note_files(storage)
    measured.end(9, num_pairs=3)
    line = json.loads(capsys.readouterr().out)
    seconds = line.pop("seconds"), line.pop("rows_per_s")
    assert min(seconds) >= 0
    assert line == {
        "passages": 7,
        "step": "pairs",
        "num_rows": 9,
        "driver_mib": 5,
        "driver_over_imports_mib": 3,
        "largest_worker_mib": 1,
        "files": 1,
        "bytes": 5,
        "work_files": 1,
        "work_bytes": 3,
        "num_pairs": 3,
        "requests": {"PUT": 1},
    }
