"""The step `passages` by real Ray tasks: the rows of one process, whatever dies on the way."""

import json
import logging
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import icu4py
import pytest

from cluster.artifacts import Artifact
from cluster.errors import Reject, UserError
from cluster.steps import Run, Step
from pipelines.corpus import parts, passages, repeats, units
from pipelines.corpus.passages import cut_corpus, make_passages
from pipelines.datasets.corpus import Corpus, CorpusConfig
from pipelines.datasets.documents import Document
from pipelines.run.console import JsonLines

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]
TEXT = "The harbour office opens at seven in the morning and closes after the last ferry"


class Noted(Corpus):
    """Notes in a folder which files were read; the process that reads `dies_at` dies once."""

    notes: Path
    dies_at: str | None = None
    raises_at: str | None = None

    def read(self, num_cores: int | None = None) -> Iterator[Document | Reject]:
        for file in self.files:
            with (self.notes / file).open("a") as note:
                note.write("x")
        for number, document in enumerate(super().read(num_cores)):
            if number == 3 and self.dies_at in self.files and not (self.notes / "died").exists():
                (self.notes / "died").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if self.raises_at in self.files:
                raise ValueError("a fault of ours")
            yield document

    def noted(self) -> Counter[str]:
        sizes = {file.name: file.stat().st_size for file in self.notes.iterdir()}
        return Counter({name: size for name, size in sizes.items() if size})


def made(corpus: Corpus, target: Path | str, sample: int | None = None) -> Artifact:
    step = Step(
        name="passages",
        config={},
        inputs=(),
        work=lambda context: make_passages(corpus, context, sample),
        max_reject_share=0.5,
    )
    return Run(str(target), [step]).execute(JsonLines())["passages"]


def write_copies(folder: Path, num_files: int = 4) -> Path:
    """Writes files whose documents are often copies of others, some of them changed a little."""
    folder.mkdir()
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnop", k=7)) for _ in range(3000)]
    texts: list[list[str]] = []
    for number in range(num_files):
        lines = ["broken", json.dumps({"_id": f"short {number}", "text": "short"})]
        for row in range(40):
            if texts and draw.random() < 0.5:
                text = list(draw.choice(texts))
                for _ in range(draw.choice([0, 0, 1, 2, 5, 20])):
                    text[draw.randrange(len(text))] = draw.choice(words)
            else:
                text = draw.choices(words, k=60)
            texts.append(text)
            lines.append(json.dumps({"_id": f"{number}-{row}", "text": " ".join(text)}))
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
    return folder


def assert_same(artifact: Artifact, corpus: Corpus) -> None:
    expected, rejects, num_documents = cut_corpus(corpus)
    rows = artifact.read().to_pylist()
    assert [(row["id"], row["source"], row["text"]) for row in rows] == [
        (each.id, each.source, each.text) for each in expected
    ]
    assert Counter(tuple(row.values()) for row in artifact.rejects().to_pylist()) == Counter(
        rejects
    )
    assert artifact.manifest.metrics["num_documents"] == num_documents
    assert artifact.manifest.metrics["num_passages"] == len(expected)


def test_copies_are_counted_and_stop_nothing(tmp_path: Path) -> None:
    rows = [{"_id": "a", "text": f"{TEXT}."}] * 9  # one id and one text
    rows += [{"_id": "b", "text": f"{TEXT}!"}, {"_id": "c", "text": "too short"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = made(Corpus(CorpusConfig(path=str(tmp_path / "x.jsonl"))), tmp_path / "run")
    metrics = found.manifest.metrics
    assert (found.num_rows, found.num_rejects, found.num_duplicates) == (1, 1, 9)
    assert metrics["num_documents"] == 11
    assert metrics["icu_version"] == icu4py.icu_version
    assert metrics["minhash"]["scheme"] == "affine32"
    assert sorted(found.rejects()["reason"].to_pylist()) == [
        *["duplicate"] * 8,
        "near-duplicate",
        "too short",
    ]
    assert not (tmp_path / "run/passages/work").exists()


def test_files_that_are_not_read_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "x.jsonl").write_text(json.dumps({"text": f"{TEXT}."}))
    for name in ("1.pdf", "2.pdf", "README.md"):
        (folder / name).write_text("")
    with caplog.at_level(logging.WARNING):
        found = made(Corpus(CorpusConfig(path=str(folder))), tmp_path / "run")
    assert found.manifest.metrics["files_passed_over"] == {".pdf": 2, ".md": 1}
    assert "these files are not read: 2 .pdf, 1 .md" in caplog.text


def test_killed_task_runs_again_and_what_a_failed_run_did_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file a task, some passages a shard, several partitions of every exchange.
    monkeypatch.setattr(parts, "_SHARD_PASSAGES", 7)
    monkeypatch.setattr(repeats, "_MAX_KEYS", 1000)
    monkeypatch.setattr(repeats, "_MAX_PAIRS", 20)
    monkeypatch.setattr(passages, "_cpus_per_task", lambda _: 1)
    corpus = Noted(CorpusConfig(path=str(write_copies(tmp_path / "corpus"))))
    monkeypatch.setattr(units, "_FEWEST_BYTES", max(corpus.sizes()))
    corpus.notes = tmp_path / "notes"
    corpus.notes.mkdir()
    corpus.dies_at, corpus.raises_at = "1.jsonl", "3.jsonl"
    with pytest.raises(Exception, match="a fault of ours"):
        made(corpus, tmp_path / "run")
    first = corpus.noted()
    done = [
        file.name.partition("-")[0]
        for file in (tmp_path / "run/passages/work/parts/shards").iterdir()
        if file.suffix == ".parquet"
    ]
    corpus.raises_at = None
    found = made(corpus, tmp_path / "run")
    again = corpus.noted() - first
    assert {f"{int(task)}.jsonl" for task in done}.isdisjoint(again) and done
    assert corpus.noted()["1.jsonl"] >= 2 and (corpus.notes / "died").exists()
    assert found.num_duplicates > 20 and found.num_shards > 10
    assert max(shard.num_rows for shard in found.shards) <= 7
    assert_same(found, Corpus(corpus.config))


def test_driver_that_was_killed_goes_on_from_each_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = Noted(CorpusConfig(path=str(write_copies(tmp_path / "corpus"))))
    corpus.notes = tmp_path / "notes"
    corpus.notes.mkdir()
    stops = ("_Meetings", "_Firsts", "_Repeated")
    for stop in stops:
        with monkeypatch.context() as patch:
            patch.setattr(repeats, stop, _stop)
            with pytest.raises(KeyboardInterrupt):
                made(corpus, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(passages, "_write", _stop_task)
        with pytest.raises(Exception, match="stopped"):
            made(corpus, tmp_path / "run")
    assert_same(made(corpus, tmp_path / "run"), Corpus(corpus.config))
    assert set(corpus.noted().values()) == {1}


def _stop(**_: object) -> None:
    raise KeyboardInterrupt


def _stop_task(*_: object) -> None:
    raise ValueError("stopped")


def test_web_pages_are_read_in_tasks(tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    folder.mkdir()
    for name in ("one", "two"):
        body = "".join(f"<p>{TEXT} of {name} {n}.</p>" for n in range(4))
        page = f"<html><body><article><h1>{name}</h1>{body}</article></body></html>"
        (folder / f"{name}.html").write_text(page)
    (folder / "three.html").write_text("<html><body></body></html>")
    corpus = Corpus(CorpusConfig(path=str(folder), near_duplicate_threshold=None))
    found = made(corpus, tmp_path / "run")
    assert found.num_rows == 2
    assert_same(found, corpus)


def test_sample_is_that_of_one_process(tmp_path: Path) -> None:
    corpus = Corpus(CorpusConfig(path=str(write_copies(tmp_path / "corpus"))))
    found = made(corpus, tmp_path / "run", sample=30)
    expected, _, _ = cut_corpus(corpus, sample=30)
    assert found.read()["source"].to_pylist() == [each.source for each in expected]


def test_mistakes_are_told_when_all_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"body": TEXT}))
    with pytest.raises(UserError, match="no row has the field 'text', only body"):
        made(Corpus(CorpusConfig(path=str(tmp_path / "x.jsonl"))), tmp_path / "a")
    (tmp_path / "y.jsonl").write_text(json.dumps({"text": "short"}))
    with pytest.raises(UserError, match="gave no passage: 1 rejects, the first because 'too"):
        made(Corpus(CorpusConfig(path=str(tmp_path / "y.jsonl"))), tmp_path / "b")
    (tmp_path / "z.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no documents"):
        made(Corpus(CorpusConfig(path=str(tmp_path / "z.jsonl"))), tmp_path / "c")
