import json
import logging
from pathlib import Path

import icu4py
import pytest

from cluster.artifacts import Artifact
from cluster.steps import Run, Step
from pipelines.corpus.cutting import make_passages
from pipelines.corpus.sources import Corpus, CorpusConfig


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
    for name in ("1.csv", "2.csv", "README.md"):
        (folder / name).write_text("")
    with caplog.at_level(logging.WARNING):
        passages = made(folder, tmp_path / "run")
    assert passages.manifest.metrics["files_passed_over"] == {".csv": 2, ".md": 1}
    assert "these files are not read: 2 .csv, 1 .md" in caplog.text
