import json
import logging
import random
from pathlib import Path

import icu4py
import pytest

from cluster.artifacts import Artifact
from cluster.steps import Run, Step
from pipelines.corpus.passages import cut_corpus, make_passages
from pipelines.datasets.corpus import Corpus, CorpusConfig


class Listener:
    def step_found(self, step: Step, artifact: Artifact) -> None: ...

    def step_begins(self, step: Step, resumed: bool) -> "Listener":
        return self

    def step_done(self, step: Step, artifact: Artifact) -> None: ...

    def update(self, done: float, total: float | None = None, note: str = "") -> None: ...


def made(folder: Path, target: Path) -> Artifact:
    corpus = Corpus(CorpusConfig(path=str(folder)))
    step = Step(
        name="passages",
        config={},
        inputs=(),
        work=lambda context: make_passages(corpus, context),
        max_reject_share=0.5,
    )
    return Run(str(target), [step]).execute(Listener())["passages"]


def test_copies_are_counted_and_stop_nothing(tmp_path: Path) -> None:
    text = "The harbour office opens at seven in the morning and closes after the last ferry"
    rows = [{"_id": "a", "text": f"{text}."}] * 9  # one id and one text
    rows += [{"_id": "b", "text": f"{text}!"}, {"_id": "c", "text": "too short"}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    passages = made(tmp_path / "x.jsonl", tmp_path / "run")
    metrics = passages.manifest.metrics
    assert (passages.num_rows, passages.num_rejects, passages.num_duplicates) == (1, 1, 9)
    assert metrics["num_documents"] == 11
    assert metrics["icu_version"] == icu4py.icu_version
    assert sorted(passages.rejects()["reason"].to_pylist()) == [
        *["duplicate"] * 8,
        "near-duplicate",
        "too short",
    ]


def test_files_that_are_not_read_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    text = "The harbour office opens at seven in the morning and closes after the last ferry."
    (folder / "x.jsonl").write_text(json.dumps({"text": text}))
    for name in ("1.pdf", "2.pdf", "README.md"):
        (folder / name).write_text("")
    with caplog.at_level(logging.WARNING):
        passages = made(folder, tmp_path / "run")
    assert passages.manifest.metrics["files_passed_over"] == {".pdf": 2, ".md": 1}
    assert "these files are not read: 2 .pdf, 1 .md" in caplog.text


def test_sample_is_of_whole_documents_and_a_larger_one_contains_it(tmp_path: Path) -> None:
    rows = []
    for number in range(60):
        draw = random.Random(number)
        words = ["".join(draw.choices("abcdefghijklmnop", k=6)) for _ in range(60)]
        rows.append({"_id": f"d{number:02}", "text": " ".join(words)})
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
