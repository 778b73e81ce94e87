"""The whole loop through every real engine, killed and finished as a job of a cluster."""

import contextlib
import inspect
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from cluster import jobs
from cluster.artifacts import Artifact, open_artifact

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
NUM_SEEDS = 12


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BEIR folder from the standard library's docstrings, with lines that are no documents."""
    folder = tmp_path_factory.mktemp("beir")
    functions = [
        value
        for module in (statistics, os.path, json, subprocess, inspect)
        for _, value in sorted(vars(module).items())
        if inspect.isfunction(value) and inspect.getdoc(value)
    ]
    rows = {f.__qualname__: str(inspect.getdoc(f)) for f in functions}
    lines = [json.dumps({"_id": k, "title": k, "text": v}) for k, v in rows.items()]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    lines += ["{not json", json.dumps({"_id": "empty", "text": ""}), json.dumps({"_id": "none"})]
    (folder / "documents.jsonl").write_text("\n".join(lines))
    (folder / "queries.jsonl").write_text(
        json.dumps({"_id": "q1", "text": "what is the middle value of some numbers"})
        + "\n"
        + json.dumps({"_id": "q2", "text": "does a file exist"})
    )
    (folder / "qrels").mkdir()
    (folder / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\nq1\tmedian\t1\nq2\texists\t1\n"
    )
    return folder


def command(verb: str, corpus: Path, run: Path) -> list[str]:
    settings = [
        f"corpus.path={corpus}/documents.jsonl",
        f"seeds.num_seeds={NUM_SEEDS}",
        "seeds.rows_per_shard=2",
        "scores.num_scored=3",
        "queries.max_passage_tokens=64",
        "scores.max_passage_tokens=48",
        "training.batch_size=4",
        "training.epochs=4",
        "training.checkpoint_every_batches=2",
        "candidates.max_seed_rank=20",
        "resources.llm.shards_in_flight=2",  # when the first shard is there, others are to come
        f"evaluation=[{{name: tiny, path: {corpus}, task: search result}}]",
    ]
    sets = [word for setting in settings for word in ("--set", setting)]
    return [sys.executable, "-m", "pipelines.cli", verb, "laptop", "--storage", str(run), *sets]


def kill_when(folder: Path, pattern: str, arguments: list[str], limit_s: float = 600) -> None:
    """Starts the command and kills its whole process tree once a file of the pattern is there."""
    process = subprocess.Popen(arguments, start_new_session=True)
    limit = time.monotonic() + limit_s
    while not list(folder.glob(pattern)):
        assert process.poll() is None, f"ended with {process.returncode} before {pattern}"
        assert time.monotonic() < limit, f"no {pattern} within {limit_s} s"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def kill_engine_when(folder: Path, pattern: str) -> threading.Thread:
    """Kills the vLLM engine, and nothing else, once a file of the pattern is there."""

    def work() -> None:
        limit = time.monotonic() + 600
        while not list(folder.glob(pattern)) and time.monotonic() < limit:
            time.sleep(0.02)
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "EngineCore" in "".join([process.name(), *process.cmdline()]):
                    process.kill()
                    (folder / "engine-killed").touch()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def run_as_job(submit: list[str], job_server: str) -> str:
    """Submits the run through the job server, waits for it, and returns what it printed."""
    answer = subprocess.run(
        [*submit, "--address", job_server, "--json"], check=True, capture_output=True, text=True
    )
    job = json.loads(answer.stdout)["id"]
    follow = [sys.executable, "-m", "pipelines.cli", "logs", job, "--follow"]
    logs = subprocess.run(
        [*follow, "--address", job_server], check=True, capture_output=True, text=True, timeout=600
    )
    (state,) = jobs.status(job_server, job)
    assert (state.status, state.exit_code) == ("SUCCEEDED", 0), logs.stdout
    return logs.stdout


def check_labels(run: Path) -> None:
    """Every seed has one row, in its order, and every scored query its labels."""
    seeds = artifact(run, "seeds").read()["id"].to_pylist()
    fret = artifact(run, "fret").read()
    assert len(seeds) == NUM_SEEDS
    assert artifact(run, "queries").read()["seed_id"].to_pylist() == seeds
    assert fret["seed_id"].to_pylist() == seeds
    assert len(set(fret["id"].to_pylist())) == fret.num_rows
    scored = [row for row in fret.to_pylist() if row["query_likelihoods"]]
    assert scored and all(row["dropped_by"] for row in fret.to_pylist() if row not in scored)
    for row in scored:
        assert row["seed_id"] in row["candidate_ids"][: len(row["query_likelihoods"])]
        assert not {row["positive_id"], row["seed_id"]} & set(row["negative_ids"])


def artifact(run: Path, name: str) -> Artifact:
    found = open_artifact(str(run / name))
    found.verify()
    return found


@pytest.mark.chaos
def test_run_killed_in_a_step_and_an_engine_that_dies_give_every_row_once(
    corpus: Path, tmp_path: Path
) -> None:
    run, arguments = tmp_path / "run", command("run", corpus, tmp_path / "run")
    kill_when(run, "queries/shards/*.parquet", arguments)
    assert not (run / "queries" / "manifest.json").exists()
    written = {f: f.stat().st_mtime_ns for f in run.glob("queries/shards/*.parquet")}
    engine = kill_engine_when(run, "scores/shards/*.parquet")
    subprocess.run([*arguments, "--until", "fret"], check=True, timeout=900)
    engine.join()
    assert (run / "engine-killed").exists()
    assert {f: f.stat().st_mtime_ns for f in written} == written
    check_labels(run)


def test_run_killed_in_training_is_finished_as_a_job_and_not_run_again(
    corpus: Path, job_server: str, tmp_path: Path
) -> None:
    run, arguments = tmp_path / "run", command("run", corpus, tmp_path / "run")
    kill_when(run, "training/metrics.jsonl", arguments)
    finished = {f: f.stat().st_mtime_ns for f in run.glob("*/manifest.json")}
    assert (run / "fret" / "manifest.json") in finished
    assert (run / "training" / "manifest.json") not in finished

    printed = run_as_job(command("submit", corpus, run), job_server)
    assert "done before" in printed and "report:" in printed
    assert {f: f.stat().st_mtime_ns for f in finished} == finished  # no finished step is repeated

    check_labels(run)
    reasons = artifact(run, "passages").rejects()["reason"].to_pylist()
    assert {"malformed JSON", "empty"} <= set(reasons)
    mixture = artifact(run, "mixture").manifest.metrics
    assert artifact(run, "training").manifest.metrics["num_batches"] == mixture["num_batches"]
    assert artifact(run, "export").manifest.metrics["parity_cosine"] > 0.9999
    report = json.loads((run / "report.json").read_text())
    for model in ("retriever", "student_before", "student_after"):
        assert 0 <= report[model]["ndcg_at_10"] <= 1
    before, after = (
        {file.path: file.sha256 for file in artifact(run, step).files}["model/model.safetensors"]
        for step in ("student", "export")
    )
    assert before != after  # twelve seeds promise no more

    again = time.monotonic()
    subprocess.run(arguments, check=True, capture_output=True, timeout=300)
    assert time.monotonic() - again < 60  # everything is found

    changed = subprocess.run(
        [*arguments, "--set", "queries.temperature=0.9"], capture_output=True, text=True
    )
    assert changed.returncode == 2
    assert "queries.temperature: 0.5 -> 0.9" in changed.stderr and "--rebuild" in changed.stderr
